"""Importance of coupled weights: what a unit's rows and columns, in all projections around it, are worth together.

The baselines beside FLAP score a query head or an FFN channel by all weights that leave with it. A KV head's own
weights count for its query heads in equal parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.families import Projection, Space, experts_of, space_widths
from flap_export.models.loading import load_model
from flap_export.models.opening import Checkpoint
from flap_export.rewriting.cutting import grouped_order
from flap_export.scoring import LayerScores, standardised
from flap_export.shapes import DecoderShape

GRADIENT_SEQUENCES: Final = 10
"""LLM-Pruner's number of calibration sequences."""


def magnitude_scores(dense: Checkpoint) -> tuple[LayerScores, ...]:
    """Squared norms, read one tensor at a time.

    Raises:
        ModelError: a tensor holds NaN.
    """
    return _scores(dense, lambda name: dense.weights.finite(name).to(torch.float64).square())


def random_scores(shape: DecoderShape, seed: int) -> tuple[LayerScores, ...]:
    """Scores that say nothing."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    return tuple(
        LayerScores(
            drawn(layer.query_heads),
            drawn(layer.ffns * layer.ffn_channels).view(layer.ffn_scores),
            None if layer.shared_channels is None else drawn(layer.shared_channels),
        )
        for layer in shape.layers
    )


def taylor_scores(
    dense: Checkpoint, tokens: Tensor, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[LayerScores, ...]:
    """First-order Taylor scores, the sum of |w dL/dw| over coupled weights (LLM-Pruner, equation 5).

    Holds the whole model and its gradients in memory.

    Args:
        dense: the dense model.
        tokens: calibration tokens int64 [sequences, length], of which the first ten are used.
        dtype: precision to compute in.
        device: where.

    Raises:
        ModelError: weights are missing or hold NaN, or the gradients overflow.
    """
    model = load_model(dense.directory, dtype=dtype, device=device)
    for name, parameter in model.named_parameters():
        in_layer = name.startswith(f"{dense.family.modules.layers}.")
        parameter.requires_grad_(in_layer and dense.family.projection(_below_layer(name, dense)) is not None)
    with torch.enable_grad():
        for sequence in tokens[:GRADIENT_SEQUENCES].to(device):
            logits = model(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), sequence[1:]).backward()  # type: ignore[no-untyped-call]

    def salience(name: str) -> Tensor:
        weight = model.get_parameter(name)
        if weight.grad is None:
            # An expert that got no token.
            return torch.zeros(weight.shape, dtype=torch.float64)
        # Weight times gradient is below what half precision holds.
        return (weight.detach().to("cpu", torch.float64) * weight.grad.to("cpu", torch.float64)).abs()

    scores = _scores(dense, salience)
    for index, layer in enumerate(scores):
        found = (layer.query_heads, layer.ffn_channels, layer.shared_channels)
        if not all(bool(torch.isfinite(own).all()) for own in found if own is not None):
            raise ModelError(
                f"layer {index}: gradients are NaN or infinite; the model overflows in this precision, "
                "set --dtype float32"
            )
    return scores


def _below_layer(name: str, dense: Checkpoint) -> str:
    return name.removeprefix(f"{dense.family.modules.layers}.").partition(".")[2].removesuffix(".weight")


def _scores(dense: Checkpoint, importance: Callable[[str], Tensor]) -> tuple[LayerScores, ...]:
    """Standardised scores from an importance [out, in] of every weight, by its name."""
    return tuple(_layer_scores(dense, index, importance) for index in range(len(dense.shape.layers)))


def _layer_scores(dense: Checkpoint, index: int, importance: Callable[[str], Tensor]) -> LayerScores:
    layer, size = dense.shape.layers[index], dense.shape.head_dim
    widths = space_widths(dense.shape, layer)
    totals = {space: torch.zeros(width, dtype=torch.float64) for space, width in widths.items()}
    by_expert = [torch.zeros_like(totals["ffn"]) for _ in range(layer.ffns)]
    for projection in dense.family.projections_of(layer):
        for expert in experts_of(projection.space, layer):
            own = {**totals, "ffn": by_expert[expert or 0]}
            values = importance(f"{dense.family.modules.layers}.{index}.{projection.at(expert)}.weight")
            _add_rows(own, projection, values.sum(dim=1), widths, layer.kv_heads)
            own[projection.inputs] += values.sum(dim=0)
    ffn = torch.stack(by_expert) if layer.experts else by_expert[0]
    group_size = layer.query_heads // layer.kv_heads
    of_heads = [totals[space] for space in ("query", "score", "key_value") if widths[space]]
    heads = torch.stack([own.view(layer.query_heads, -1).sum(dim=1) for own in of_heads]).sum(dim=0)
    keys_and_values = totals["kv"].view(layer.kv_heads, size).sum(dim=1) / group_size
    return LayerScores(
        standardised(heads + keys_and_values.repeat_interleave(group_size)),
        standardised(ffn),
        None if layer.shared_channels is None else standardised(totals["shared"]),
    )


def _add_rows(
    totals: dict[Space, Tensor], projection: Projection, rows: Tensor, widths: dict[Space, int], groups: int
) -> None:
    sizes = [widths[space] for space in projection.outputs]
    rows = torch.empty_like(rows).scatter_(0, grouped_order(sizes, projection.dense_blocks(groups)), rows)
    for space, part in zip(projection.outputs, torch.split(rows, sizes), strict=True):
        totals[space] += part
