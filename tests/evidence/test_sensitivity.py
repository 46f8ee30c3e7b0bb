from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flap_export.allocation.ladders import ffn_steps
from flap_export.calibration.statistics import CUT_SPACES
from flap_export.errors import InputError
from flap_export.evidence.sensitivity import ModuleSensitivity, Sensitivity, interpolated_losses
from flap_export.shapes import DecoderShape, LayerShape

LAYER = LayerShape(query_heads=4, kv_heads=2, ffn_channels=5)
SHAPE = DecoderShape(
    hidden_size=4, head_dim=3, vocabulary_size=11, ffn_matrices=3, tied_embeddings=False, layers=(LAYER, LAYER)
)


def sensitivity() -> Sensitivity:
    modules = {}
    for layer in range(2):
        losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
        modules[layer, CUT_SPACES[0]] = ModuleSensitivity(torch.tensor([2, 3, 0, 1]), torch.tensor([2, 4]), losses)
        losses = torch.tensor([0.1, 0.1, 0.4, 1.0, 3.0], dtype=torch.float64)
        modules[layer, CUT_SPACES[1]] = ModuleSensitivity(torch.tensor([4, 0, 3, 1, 2]), torch.arange(1, 6), losses)
    return Sensitivity("m", "text.txt", 3, 7, 5, "groups", modules, {"weights": "w", "calibration": "c"})


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    saved = sensitivity()
    saved.save(tmp_path / "s.safetensors")
    loaded = Sensitivity.load(tmp_path / "s.safetensors")
    for name in ("model", "source", "sequences", "sequence_length", "seed", "head_units", "digests"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert set(loaded.modules) == set(saved.modules)
    for key, module in saved.modules.items():
        for name in ("order", "gone", "losses"):
            torch.testing.assert_close(getattr(loaded.modules[key], name), getattr(module, name), rtol=0, atol=0)


@pytest.mark.parametrize("lacking", ["seed", "layers.1.ffn.losses"])
def test_an_incomplete_file_is_refused(lacking: str, tmp_path: Path) -> None:
    path, saved = tmp_path / "s.safetensors", sensitivity()
    header = {"schema_version": 1, "layers": 2, "model": "m", "source": "t", "sequences": 3, "sequence_length": 7}
    header |= {"seed": 5, "head_units": "groups", "digests": {}}
    tensors = {
        f"layers.{layer}.{space}.{name}": getattr(module, name).clone()
        for (layer, space), module in saved.modules.items()
        for name in ("order", "gone", "losses")
    }
    for kept in (header, tensors):
        kept.pop(lacking, None)  # type: ignore[attr-defined]
    save_file(tensors, path, metadata={"sensitivity": json.dumps(header)})
    with pytest.raises(InputError, match=rf"lacks '{lacking}'; measure again"):
        Sensitivity.load(path)


def test_ladders_hold_what_every_step_adds() -> None:
    ladders = sensitivity().ladders(SHAPE)
    assert len(ladders) == 2
    attention, ffn = ladders[1].attention, ladders[1].ffn
    np.testing.assert_allclose(attention.scores, [0.5, 1.5])
    assert attention.costs.tolist() == [72, 72]
    assert [attention.kept(steps) for steps in range(3)] == [(0, 1, 2, 3), (0, 1), ()]
    np.testing.assert_allclose(ffn.scores, [0.1, 0, 0.3, 0.6, 2], atol=1e-15)
    assert ffn.costs.tolist() == [12] * 5
    assert ffn.kept(2) == (1, 2, 3)


@pytest.mark.parametrize(("align", "added", "costs"), [(2, [0.1, 0.3, 2.6], [12, 24, 24]), (5, [3], [60])])
def test_aligned_ladders_skip_steps(align: int, added: list[float], costs: list[int]) -> None:
    ffn = sensitivity().ladders(SHAPE, align)[0].ffn
    assert ffn.gone.tolist() == ffn_steps(5, align).tolist()
    np.testing.assert_allclose(ffn.scores, added)
    assert ffn.costs.tolist() == costs


@st.composite
def curves(draw: st.DrawFn) -> tuple[np.ndarray, dict[int, float]]:
    """Rising errors, zeros among them, and losses at a few steps, noise among them."""
    added = st.floats(0, 10, allow_subnormal=False) | st.just(0.0) | st.floats(0, 1e-12, allow_subnormal=False)
    errors = np.cumsum(draw(st.lists(added, min_size=1, max_size=30)))
    known = draw(st.sets(st.integers(1, len(errors)), max_size=5)) | {len(errors)}
    losses = st.floats(0, 20, allow_subnormal=False) | st.just(0.0) | st.floats(0, 1e-9, allow_subnormal=False)
    return errors, {steps: draw(losses) for steps in known}


@given(curves())
def test_losses_never_fall_and_keep_between_the_measured_ones(curve: tuple[np.ndarray, dict[int, float]]) -> None:
    errors, measured = curve
    found = interpolated_losses(errors, measured)
    assert found.shape == errors.shape
    assert bool(np.isfinite(found).all())
    assert bool((np.diff(found) >= 0).all())
    highest = 0.0
    for steps in sorted(measured):
        # A measured loss below an earlier one is noise.
        highest = max(highest, measured[steps])
        assert found[steps - 1] == pytest.approx(highest, rel=1e-9, abs=1e-300)


def test_between_measured_losses_the_error_tells() -> None:
    errors = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
    np.testing.assert_allclose(interpolated_losses(errors, {5: 4.0}), errors / 2)
    # A loss of twice the error in the middle, half of it at the end, geometrically between.
    np.testing.assert_allclose(
        interpolated_losses(errors, {3: 6.0, 5: 16.0}), [2, 4, 6, 10, 16], err_msg="the ratio is the same everywhere"
    )
    np.testing.assert_allclose(interpolated_losses(errors, {3: 3.0, 5: 16.0})[3], 5 * 2**0.5)


def test_noise_where_nothing_is_lost_does_not_spread() -> None:
    """Two channels of no weight lose nothing, but are measured at rounding's 1e-9: the ratio there says nothing."""
    errors = np.array([0.0, 0.0, 1.0, 2.0, 3.0])
    found = interpolated_losses(errors, {2: 1e-9, 5: 0.3})
    assert found[1] == pytest.approx(1e-9)
    assert found[-1] == pytest.approx(0.3)
    assert float(found.max()) == found[-1]
