"""Everything that computes on a device stays on it: the same results on an imitated GPU as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imitated_gpu import COMPILER, DEVICE, Imitated, imitated_gpu
from safetensors.torch import load_file
from tiny import ALL_FAMILIES, MIXTURES, save_tokens, tiny_checkpoint, tiny_pruned, tokens_of
from torch.nn import functional

from flap_export import evaluate, prune
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.runners import open_runner
from flap_export.searching import SearchOptions, search

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
FAMILIES = [family for family in ("llama", "gemma3_text", "gpt2", *MIXTURES[:1]) if family in ALL_FAMILIES]
METHODS: dict[str, dict[str, Any]] = {
    "flap": {},
    "least-squares": {"compensation": "least-squares"},
    "sequential": {"compensation": "least-squares", "sequential": True},
    "obs": {"method": "obs"},
    "wanda-sp": {"method": "wanda-sp"},
}


@torch.no_grad()
def test_mixing_devices_fails_as_on_a_gpu() -> None:
    here = torch.ones(2, 3)
    with imitated_gpu():
        there = here.to("cuda:0")
        assert there.device == DEVICE
        assert torch.equal((there @ there.T).cpu(), here @ here.T)
        assert torch.equal(there[torch.tensor([1])].cpu(), here[:1])
        for mixed in (lambda: there @ here.T, lambda: here + there, lambda: here[torch.tensor([0], device="cuda:0")]):
            with pytest.raises(RuntimeError, match="on one device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert there.add_(1) is there
        assert float(there[0, 0]) == 2
        assert not isinstance(there.cpu(), Imitated)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_pruned_there_as_here(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    dense, source = tiny_checkpoint(family, tmp_path / "dense"), save_tokens(tmp_path / "ids.npy", tokens_of(6, 16))
    expected = prune(dense, tmp_path / "here", ratio=0.3, calibration=source, **options)
    with imitated_gpu():
        plan = prune(dense, tmp_path / "there", ratio=0.3, calibration=source, device="cuda:0", **options)
    assert plan.layers == expected.layers
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_runs_there_as_here(family: str, tmp_path: Path) -> None:
    pruned, source = tiny_pruned(family, tmp_path / "pruned"), save_tokens(tmp_path / "ids.npy", tokens_of(4, 16))
    expected = evaluate(pruned, [source]).sources[0].perplexity
    with imitated_gpu():
        assert evaluate(pruned, [source], device="cuda:0").sources[0].perplexity == pytest.approx(expected, rel=1e-4)
    tokens, logits = tokens_of(2, 6).numpy(), []
    for backend, device in (("torch", "cpu"), ("torch-static", "cuda:0")):
        with imitated_gpu(), open_runner(pruned, backend=backend, device=device) as runner:
            prefilled = runner.prefill(tokens)
            logits.append(np.concatenate([prefilled.ravel(), runner.decode(tokens[:, -1]).ravel()]))
    np.testing.assert_allclose(*logits, atol=1e-3, rtol=1e-3)


def test_a_step_there_waits_for_no_plan_of_cudnn(tmp_path: Path, monkeypatch: Any) -> None:
    """It makes one for every new shape, and caches are seen at many lengths; what was chosen before is put back."""
    dense, attention, asked = tiny_checkpoint("llama", tmp_path / "dense"), functional.scaled_dot_product_attention, []

    def seen(*tensors: Any, **options: Any) -> Any:
        asked.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return attention(*tensors, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", seen)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for device, wanted in (("cpu", (before, True)), ("cuda:0", (False, True))):
        asked.clear()
        with imitated_gpu(), open_runner(dense, backend="torch-static", device=device) as runner:
            runner.prefill(tokens_of(2, 6).numpy())
            runner.decode(np.array([1, 2]))
        assert set(asked) == {wanted}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_rates_are_searched_there_as_here(tmp_path: Path) -> None:
    dense, source = tiny_checkpoint("llama", tmp_path / "dense"), save_tokens(tmp_path / "ids.npy", tokens_of(6, 16))
    found = []
    for name, device in (("here", "cpu"), ("there", "cuda:0")):
        with imitated_gpu():
            found.append(
                search(
                    dense,
                    tmp_path / name,
                    calibration=CalibrationText(source=source),
                    prune=PruneOptions(ratio=0.3),
                    options=SearchOptions(evaluations=10),
                    device=device,
                )
            )
    here, there = (report.references for report in found)
    assert there == pytest.approx(here, rel=1e-3)
