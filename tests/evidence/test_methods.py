"""Every method from a model directory to a checkpoint, and the options each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import plain_model, save_tokens, tiny_checkpoint, tokens_of

from flap_export.errors import BudgetError, FlapExportError, InputError, PlanError
from flap_export.evidence.methods import METHODS, MethodName, PruneOptions, resolved
from flap_export.exporting import export
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.pruning.stage import prune

NEED_NO_TEXT: tuple[MethodName, ...] = ("magnitude", "random")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("obs", {"metric": "ifv"}, r"obs has no metric of its own to replace; leave out --metric"),
        ("obs", {"structure": "al-am"}, r"obs has no structure of its own to replace; leave out --structure"),
        ("llm-pruner", {"metric": "wifv"}, "llm-pruner has no metric"),
        ("magnitude", {"metric": "wifv"}, "magnitude has no metric"),
        ("random", {"metric": "wifn"}, "random has no metric"),
        ("magnitude", {"square_attention": True}, "magnitude has no metric whose attention scores"),
        ("obs", {"square_attention": False}, "obs has no metric whose attention scores"),
        (
            "wanda-sp",
            {"structure": "al-am"},
            "wanda-sp decides about a layer before .* its structure is ul-um; got al-am",
        ),
        ("wanda-sp", {"structure": "ul-mm"}, "its structure is ul-um; got ul-mm"),
        ("flap", {"sequential": True}, "--sequential is about --compensation least-squares, which was not chosen"),
        ("flap", {"layout": "stock"}, None),
        ("llm-pruner", {"layout": "stock"}, "--layout stock needs the same counts in every layer"),
        ("flap", {"layout": "stock", "structure": "al-mm"}, "--layout stock needs the same counts in every layer"),
    ],
)
def test_options_a_method_does_not_have(method: MethodName, given: dict[str, Any], message: str | None) -> None:
    options = PruneOptions(ratio=0.3, method=method, **given)
    if message is None:
        assert resolved(options).structure == "ul-um"
        return
    with pytest.raises(InputError, match=message):
        resolved(options)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"ratio": 0.0}, BudgetError), ({"ratio": 1.0}, BudgetError), ({"ratio": 0.3, "align_channels": 0}, PlanError)],
)
def test_numbers_out_of_range(given: dict[str, Any], error: type[FlapExportError]) -> None:
    with pytest.raises(error):
        resolved(PruneOptions(**given))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_open_is_the_methods_own(method: MethodName) -> None:
    row, filled = METHODS[method], resolved(PruneOptions(ratio=0.3, method=method))
    assert (filled.metric, filled.structure, filled.compensation) == (row.metric, row.structure, row.compensation)
    assert resolved(filled) == filled


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_model_of_the_asked_size(method: MethodName, family: str, tmp_path: Path) -> None:
    """Llama with grouped queries; four layers, so that two can be spared."""
    path = tiny_checkpoint(family, tmp_path / "dense", num_hidden_layers=4)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    text = None if method in NEED_NO_TEXT else source
    plan = prune(path, tmp_path / "out", ratio=0.3, method=method, calibration=text)
    before, after = (open_checkpoint(tmp_path / name).shape for name in ("dense", "out"))
    assert 1 - after.decoder_parameters / before.decoder_parameters == pytest.approx(plan.ratio.achieved)
    # Uniform structures move a channel of every layer at a time.
    assert abs(plan.ratio.achieved - 0.3) * before.decoder_parameters <= 2 * before.ffn_channel_parameters
    assert (abs(plan.ratio.achieved - 0.3) * before.decoder_parameters > before.ffn_channel_parameters / 2) == (
        plan.ratio.reason is not None
    )
    assert plan.method["method"] == method
    assert plan.method["calibration"] == text
    assert PruningPlan.load(tmp_path / "out" / "plan.json") == plan
    with torch.no_grad():
        assert load_model(tmp_path / "out", dtype=torch.float32)(tokens_of(1, 4)).logits.isfinite().all()


def test_llm_pruner_spares_the_ends(tmp_path: Path) -> None:
    """One layer of eight at the front and one at the back; what they keep the others lose."""
    path = tiny_checkpoint("llama", tmp_path / "dense", num_hidden_layers=8)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(3, 8))
    plan = prune(path, tmp_path / "out", ratio=0.4, method="llm-pruner", calibration=source)
    sizes = [(len(layer.kv_heads), len(layer.query_heads), len(layer.ffn_channels)) for layer in plan.layers]
    assert sizes[0] == sizes[-1] == (2, 4, 40)
    assert len(set(sizes[1:-1])) == 1
    assert sizes[1] < sizes[0]
    shape = open_checkpoint(path).shape
    assert abs(plan.ratio.achieved - 0.4) * shape.decoder_parameters <= 3 * shape.ffn_channel_parameters
    with pytest.raises(BudgetError, match=r"llm-pruner spares the first 1 and the last 1 of 8 layers.*ratio of 0\.8"):
        prune(path, tmp_path / "more", ratio=0.8, method="llm-pruner", calibration=source)


def test_two_layers_leave_none_to_spare(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    source = save_tokens(tmp_path / "ids.npy", tokens_of(3, 8))
    plan = prune(path, tmp_path / "out", ratio=0.4, method="llm-pruner", calibration=source)
    assert all(len(layer.ffn_channels) < 40 for layer in plan.layers)


def test_chance_has_a_seed(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    plans = [prune(path, tmp_path / "out", ratio=0.4, method="random", seed=seed).layers for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("method", NEED_NO_TEXT)
def test_weights_alone_need_no_text_but_a_bias_does(method: MethodName, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense")
    for compensation in ("bias", "least-squares"):
        with pytest.raises(InputError, match=rf"{method} with compensation {compensation} .* with --calibration"):
            prune(path, tmp_path / "out", ratio=0.4, method=method, compensation=compensation)  # type: ignore[arg-type]
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    plain = prune(path, tmp_path / "plain", ratio=0.4, method=method)
    biased = prune(path, tmp_path / "biased", ratio=0.4, method=method, compensation="bias", calibration=source)
    assert plain.layers == biased.layers
    assert not any(".bias" in name for name in open_checkpoint(tmp_path / "plain").weights)
    assert any(".bias" in name for name in open_checkpoint(tmp_path / "biased").weights)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in NEED_NO_TEXT])
def test_the_others_need_text(method: MethodName, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"the method {method} .* name one with --calibration"):
        prune(tiny_checkpoint("llama", tmp_path / "dense"), tmp_path / "out", ratio=0.4, method=method)


@pytest.mark.parametrize(("method", "family"), [("obs", "llama"), ("flap", "opt")])
def test_aligned_widths_and_query_heads_all_the_way_to_onnx(method: MethodName, family: str, tmp_path: Path) -> None:
    """PyTorch and ONNX Runtime agree on a checkpoint restored by least squares."""
    from flap_export.runners import open_runner

    sizes: dict[str, Any] = {} if family == "opt" else {"num_attention_heads": 8}
    path = tiny_checkpoint(family, tmp_path / "dense", **sizes)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 8))
    plan = prune(
        path,
        tmp_path / "out",
        ratio=0.45,
        method=method,
        calibration=source,
        compensation="least-squares",
        sequential=method == "flap",
        head_units="queries" if family == "llama" else "groups",
        align_channels=4,
    )
    for layer in plan.layers:
        assert len(layer.ffn_channels) % 4 == 0
        assert family == "opt" or len(layer.kv_heads) in (0, 2)
    heads = open_checkpoint(path).shape.layers[0].query_heads
    assert any(len(layer.query_heads) < heads for layer in plan.layers)
    export(tmp_path / "out", tmp_path / "onnx", max_length=16)
    tokens = tokens_of(2, 6)
    with torch.no_grad():
        expected = load_model(tmp_path / "out", dtype=torch.float32)(input_ids=tokens, use_cache=False).logits
    with open_runner(tmp_path / "onnx", threads=1) as runner:
        found = runner.prefill([np.array(row) for row in tokens.tolist()])
    np.testing.assert_allclose(found, expected[:, -1].numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["flap", "obs", "wanda-sp", "magnitude"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
        {"tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("ratio", [0.01, 0.9])
def test_edges_work_or_are_refused_with_a_reason(
    ratio: float, sizes: dict[str, Any], method: MethodName, tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama", tmp_path / "dense", **sizes)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(2, 6))
    shape = open_checkpoint(path).shape
    try:
        plan = prune(path, tmp_path / "out", ratio=ratio, method=method, calibration=source)
    except BudgetError as error:
        # Uniform structures cannot take a hundredth of a layer.
        assert "removes nothing" in str(error)  # noqa: PT017
        assert ratio == 0.01
        assert method in ("wanda-sp", "magnitude")
        return
    missed = abs(plan.ratio.achieved - ratio) * shape.decoder_parameters
    assert plan.ratio.reason is not None or missed <= shape.ffn_channel_parameters / 2
    with torch.no_grad():
        assert load_model(tmp_path / "out", dtype=torch.float32)(tokens_of(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("method", ["flap", "obs", "wanda-sp", "llm-pruner", "magnitude"])
def test_units_that_are_all_alike(method: MethodName, tmp_path: Path) -> None:
    """All weights equal: no score tells one unit from another, and the budget is met all the same."""
    path = tiny_checkpoint("llama", tmp_path / "dense")
    model = plain_model(path)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.ndim == 2:
            weight.data.fill_(0.1)
    model.save_pretrained(path)
    source = save_tokens(tmp_path / "ids.npy", tokens_of(9, 6))
    plan = prune(path, tmp_path / "out", ratio=0.4, method=method, calibration=source)
    assert plan.ratio.achieved == pytest.approx(0.4, abs=0.02)
    with torch.no_grad():
        found = load_model(tmp_path / "out", dtype=torch.float32)(tokens_of(2, 4)).logits
    assert found.isfinite().all()
    if method == "obs":
        # Every unit is a copy of the others.
        with torch.no_grad():
            expected = plain_model(path)(tokens_of(2, 4)).logits
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
