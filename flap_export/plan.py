"""The pruning plan: what each layer keeps, complete before any weight changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from flap_export.errors import PlanError
from flap_export.shapes import DecoderShape, LayerShape
from flap_export.storage import Record, Value

PLAN_NAME = "plan.json"


class LayerPlan(Value):
    """Indices of what one layer keeps of the dense model, ascending."""

    layer: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_channels: tuple[int, ...] = ()
    experts: tuple[tuple[int, ...], ...] = ()
    """Of a mixture, instead of `ffn_channels`: the channels that every routed expert keeps, as many in each."""
    shared_channels: tuple[int, ...] | None = None
    """Beside these the channels that the shared expert keeps, where there is one."""

    @property
    def ffn_width(self) -> int:
        """Channels of the FFN, or of each of its experts."""
        return len(self.experts[0] if self.experts else self.ffn_channels)

    @property
    def shared_width(self) -> int:
        """Channels of the shared expert; 0 where there is none."""
        return len(self.shared_channels or ())

    def shape(self, dense: LayerShape, *, compensated: bool) -> LayerShape:
        """The layer's shape after the cut; compensated, a module that lost something gains an output bias."""
        numbers = tuple(dense.head_numbers[head] for head in self.query_heads) if dense.head_numbers else ()
        return dense.with_heads(len(self.query_heads), len(self.kv_heads)).model_copy(
            update={
                "ffn_channels": self.ffn_width,
                "attention_bias": dense.attention_bias or (compensated and len(self.query_heads) < dense.query_heads),
                "ffn_bias": dense.ffn_bias or (compensated and self.ffn_width < dense.ffn_channels),
                "shared_channels": None if self.shared_channels is None else len(self.shared_channels),
                "shared_bias": dense.shared_bias or (compensated and self.shared_width < dense.shared_width),
                "head_numbers": numbers,
            }
        )

    @model_serializer(mode="wrap")
    def _only_its_own_ffn(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A record states a plain FFN's channels or its experts', and a shared expert's where there is one."""
        fields: dict[str, Any] = serialise(self)
        fields.pop("ffn_channels" if self.experts else "experts")
        if self.shared_channels is None:
            fields.pop("shared_channels")
        return fields


class Ratio(Value):
    """Share of the decoder's attention and FFN weights that goes."""

    requested: float
    achieved: float
    reason: str | None = None
    """Why `achieved` is more than half a unit away from `requested`; None when it is not."""


class PruningPlan(Record):
    """What is kept, layer by layer, and what that decision came from."""

    kind: ClassVar[str] = "pruning plan"

    model: str
    family: str
    ratio: Ratio
    method: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """The options that led to the plan: metric, structure, compensation, seed."""
    layers: tuple[LayerPlan, ...]
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the dense weights and of the calibration statistics."""

    def pruned_shape(self, dense: DecoderShape, *, compensated: bool) -> DecoderShape:
        """The decoder's shape after the cut.

        Args:
            dense: the shape the indices refer to.
            compensated: whether a layer that lost something gains an output bias.

        Raises:
            PlanError: the plan does not fit `dense`.
        """
        self.check(dense)
        layers = (
            kept.shape(full, compensated=compensated) for kept, full in zip(self.layers, dense.layers, strict=True)
        )
        return dense.model_copy(update={"layers": tuple(layers)})

    def check(self, dense: DecoderShape) -> None:
        """Whether every index exists in `dense` and query heads stay with their KV heads.

        Raises:
            PlanError: it does not; the message names the layer.
        """
        if len(self.layers) != len(dense.layers):
            raise PlanError(f"the plan has {len(self.layers)} layers, the model {len(dense.layers)}; use its own plan")
        for index, (kept, full) in enumerate(zip(self.layers, dense.layers, strict=True)):
            if kept.layer != index:
                raise PlanError(f"layer {index}: the plan lists layer {kept.layer} in its place; sort the layers")
            _check_indices(index, "query_heads", kept.query_heads, full.query_heads)
            _check_indices(index, "kv_heads", kept.kv_heads, full.kv_heads)
            _check_ffn(index, kept, full)
            _check_groups(index, kept, full)


def _check_indices(layer: int, what: str, kept: tuple[int, ...], available: int) -> None:
    if any(b <= a for a, b in pairwise(kept)):
        raise PlanError(f"layer {layer}: {what} must be ascending and distinct")
    if kept and (kept[0] < 0 or kept[-1] >= available):
        raise PlanError(f"layer {layer}: {what} must lie in 0..{available - 1}, got {kept[0]}..{kept[-1]}")


def _check_ffn(layer: int, kept: LayerPlan, full: LayerShape) -> None:
    if len(kept.experts) != full.experts or (kept.experts and kept.ffn_channels):
        found = f"{len(kept.experts)} experts" if kept.experts else "ffn_channels alone"
        raise PlanError(
            f"layer {layer}: the plan must list the channels of each of the layer's {full.experts} experts, got {found}"
            if full.experts
            else f"layer {layer}: the plan lists experts, and this layer has none; use its own plan"
        )
    for expert, channels in enumerate(kept.experts):
        _check_indices(layer, f"channels of expert {expert}", channels, full.ffn_channels)
    widths = sorted({len(channels) for channels in kept.experts})
    if len(widths) > 1:
        raise PlanError(f"layer {layer}: every expert must keep the same number of channels, got {widths}")
    _check_indices(layer, "ffn_channels", kept.ffn_channels, full.ffn_channels)
    if (kept.shared_channels is None) != (full.shared_channels is None):
        raise PlanError(
            f"layer {layer}: the plan must list the shared_channels of the model's shared expert, got none"
            if kept.shared_channels is None
            else f"layer {layer}: the plan lists shared_channels, and this layer has no shared expert; use its own plan"
        )
    _check_indices(layer, "shared_channels", kept.shared_channels or (), full.shared_width)


def _check_groups(layer: int, kept: LayerPlan, full: LayerShape) -> None:
    """Kept query heads divide evenly among the kept KV heads, each with its own: shapes then say which is whose."""
    group_size = full.query_heads // full.kv_heads
    per_kv_head = [sum(head // group_size == kv for head in kept.query_heads) for kv in kept.kv_heads]
    if len(set(per_kv_head)) > 1 or 0 in per_kv_head or sum(per_kv_head) != len(kept.query_heads):
        raise PlanError(
            f"layer {layer}: every kept KV head must keep the same number of its {group_size} query heads, "
            f"got {len(kept.query_heads)} query heads as {per_kv_head} on KV heads {list(kept.kv_heads)}"
        )
