from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint, tiny_statistics, tokens_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flap_export.calibration.moments import Moments
from flap_export.calibration.statistics import CalibrationStatistics, SiteStatistics
from flap_export.errors import PlanError
from flap_export.models.opening import open_checkpoint
from flap_export.scoring import METRICS, MetricName, head_means, score, standardised
from flap_export.shapes import LayerShape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("scoring") / "dense", num_key_value_heads=2)


@pytest.fixture(scope="module")
def statistics(checkpoint: Path) -> CalibrationStatistics:
    return tiny_statistics(checkpoint, checkpoint.parent)


@torch.no_grad()
def captured(checkpoint: Path) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Inputs [tokens, C] and weight of every o_proj and down_proj, in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for space, module in (("query", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):

            def note(module: nn.Module, inputs: Any, key: tuple[int, str] = (index, space)) -> None:
                found[key] = (inputs[0].flatten(0, 1).double(), module.weight.double())

            module.register_forward_pre_hook(note)
    model(input_ids=tokens_of(6, 11, seed=7), use_cache=False)
    return found


def brute_force(metric: MetricName, inputs: Tensor, weight: Tensor) -> Tensor:
    tokens, channels = inputs.shape
    scores = []
    for j in range(channels):
        mean = sum(inputs[t, j] for t in range(tokens)) / tokens
        variance = sum((inputs[t, j] - mean) ** 2 for t in range(tokens)) / tokens
        scores.append(
            {
                "ifv": variance,
                "wifv": variance * (weight[:, j] ** 2).sum(),
                "wifn": weight[:, j].abs().mean() * (inputs[:, j] ** 2).sum().sqrt(),
            }[metric]
        )
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in scores])


@pytest.mark.parametrize("metric", METRICS)
def test_scores_follow_the_formulas(metric: MetricName, checkpoint: Path, statistics: CalibrationStatistics) -> None:
    shape, activations = open_checkpoint(checkpoint).shape, captured(checkpoint)
    for index, layer in enumerate(score(statistics, shape, metric)):
        ffn = brute_force(metric, *activations[index, "ffn"])
        expected = (ffn - ffn.mean()) / ffn.std()
        torch.testing.assert_close(layer.ffn_channels, expected, rtol=1e-4, atol=1e-4)
        attention = brute_force(metric, *activations[index, "query"])
        attention = (attention - attention.mean()) / attention.std()
        # Four heads of eight channels.
        expected = torch.stack([head.mean() for head in attention.split(8)])
        torch.testing.assert_close(layer.query_heads, expected, rtol=1e-4, atol=1e-4)


def test_metrics_differ(checkpoint: Path, statistics: CalibrationStatistics) -> None:
    shape = open_checkpoint(checkpoint).shape
    orders = {tuple(score(statistics, shape, metric)[0].ffn_channels.argsort().tolist()) for metric in METRICS}
    assert len(orders) == 3


def test_standardised_scores_have_mean_zero_and_deviation_one() -> None:
    found = standardised(torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64))
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.std().item() == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 7e12])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 1001])
def test_identical_scores_are_standardised_to_zero(value: float, count: int) -> None:
    """The mean of equal numbers may be off by a rounding; that must not turn into scores of plus or minus one."""
    assert standardised(torch.full((count,), value, dtype=torch.float64)).tolist() == [0.0] * count


def test_head_means_take_whole_heads() -> None:
    layer = LayerShape(query_heads=4, kv_heads=2, ffn_channels=1)
    assert head_means(torch.arange(12.0), layer).tolist() == [1.0, 4.0, 7.0, 10.0]


def test_statistics_of_another_shape_are_refused(checkpoint: Path, statistics: CalibrationStatistics) -> None:
    shape = open_checkpoint(checkpoint).shape
    wider = shape.layers[1].model_copy(update={"ffn_channels": 41})
    with pytest.raises(
        PlanError, match=r"layer 1: the statistics are of 32 attention and 40 FFN.*32 and 41.*calibrate"
    ):
        score(statistics, shape.model_copy(update={"layers": (shape.layers[0], wider)}))
    with pytest.raises(PlanError, match=r"layer 2: the statistics are of None"):
        score(statistics, shape.model_copy(update={"layers": (*shape.layers, wider)}))


def test_a_channel_that_never_fires_scores_lowest() -> None:
    silent = Moments.of(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    ones = torch.ones(2, dtype=torch.float64)
    site = SiteStatistics(silent.mean, silent.variance, silent.square_norm, ones, ones)
    for metric in METRICS.values():
        assert metric(site)[0] == 0 < metric(site)[1]
