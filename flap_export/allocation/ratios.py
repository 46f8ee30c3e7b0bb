"""The share of a decoder's weights that goes: asked for, achieved, and why the two may differ."""

from __future__ import annotations

from collections.abc import Sequence

from flap_export.errors import BudgetError
from flap_export.plan import LayerPlan, Ratio
from flap_export.shapes import DecoderShape


def check_ratio(ratio: float) -> None:
    """Whether `ratio` lies in (0, 1).

    Raises:
        BudgetError: it does not.
    """
    if not 0 < ratio < 1:
        raise BudgetError(f"the ratio must lie strictly between 0 and 1, got {ratio}; 0.2 removes 20 %")


def achieved_ratio(shape: DecoderShape, layers: Sequence[LayerPlan], ratio: float, reason: str) -> Ratio:
    """What share of the weights a plan removes.

    Args:
        shape: the dense decoder.
        layers: what they keep.
        ratio: what was asked for.
        reason: why it may have been missed by more than half an FFN channel.

    Raises:
        BudgetError: the plan removes nothing, or everything.
    """
    total, unit = shape.decoder_parameters, smallest_unit(shape)
    pruned = tuple(plan.shape(layer, compensated=False) for plan, layer in zip(layers, shape.layers, strict=True))
    kept = shape.model_copy(update={"layers": pruned}).decoder_parameters
    if kept == total:
        raise BudgetError(
            f"a ratio of {ratio} removes nothing: the smallest unit, one FFN channel{_of_every(shape)}, is "
            f"{unit / total:.2g} of the decoder's weights; ask for more than half of that"
        )
    if kept == 0:
        raise BudgetError(f"a ratio of {ratio} would remove every head and channel of the decoder; ask for less")
    missed = abs(total - kept - ratio * total)
    return Ratio(requested=ratio, achieved=(total - kept) / total, reason=reason if missed > unit / 2 else None)


def smallest_unit(shape: DecoderShape) -> int:
    """Weights of the least that can go: one FFN channel, or one of every expert where there are no others."""
    units = [shape.ffn_unit_parameters(layer) for layer in shape.layers if layer.shared_channels is None]
    return min(units) if len(units) == len(shape.layers) else shape.ffn_channel_parameters


def _of_every(shape: DecoderShape) -> str:
    return " of every expert" if smallest_unit(shape) > shape.ffn_channel_parameters else ""


def remainder(shape: DecoderShape, align_channels: int) -> str:
    """Why FFN channels may not make up for what whole heads miss."""
    if align_channels > 1:
        return f"FFN widths are multiples of {align_channels}, so the budget moves {align_channels} channels at a time"
    experts = max(layer.experts for layer in shape.layers)
    if any(shape.ffn_unit_parameters(layer) > smallest_unit(shape) for layer in shape.layers):
        return f"up to {experts} experts of a layer lose a channel each at a time, and smaller units are not next"
    return "no FFN channels are left to make up for whole heads"
