"""What was pruned: per layer, kept units against dense ones, as plots and as a table.

Plots are laid out horizontally in percent of their width, so that one drawing fits any; vertically in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, final

from flap_export.reporting import formats
from flap_export.shapes import DecoderShape, LayerShape

PLOT_HEIGHT_PX: Final = 112.0
MAXIMUM_TICKS: Final = 10
MAXIMUM_UNIT_LINES: Final = 16
"""Units up to which a column shows each of them."""
_BAR_SHARE: Final = 0.8
"""Of a column's slot; the rest is the gap."""


@final
@dataclass(frozen=True)
class Column:
    """One layer: what it keeps, in front of what the dense one has."""

    x_percent: float
    width_percent: float
    dense_px: float
    kept_px: float
    label: str
    is_emptied: bool


@final
@dataclass(frozen=True)
class Tick:
    """A layer's number below the plot."""

    x_percent: float
    label: str


@final
@dataclass(frozen=True)
class LayerChart:
    """What every layer keeps of one kind of unit."""

    title: str
    summary: str
    maximum: str
    columns: tuple[Column, ...]
    ticks: tuple[Tick, ...]
    unit_lines_px: tuple[float, ...]
    emptied: str | None
    """The layers that keep none, in words."""


def layer_chart(title: str, unit: str, kept: Sequence[int], dense: Sequence[int]) -> LayerChart:
    """Columns of kept units against dense ones, layer by layer.

    Args:
        title: heading of the plot.
        unit: what is counted, in the plural.
        kept: units of each layer that stay.
        dense: units of each layer before.
    """
    maximum, slot = max(*dense, 1), 100 / len(dense)
    columns = tuple(
        Column(
            x_percent=(layer + (1 - _BAR_SHARE) / 2) * slot,
            width_percent=_BAR_SHARE * slot,
            dense_px=PLOT_HEIGHT_PX * full / maximum,
            kept_px=PLOT_HEIGHT_PX * units / maximum,
            label=f"Layer {layer}: {units:,} of {full:,} {unit}",
            is_emptied=units == 0,
        )
        for layer, (units, full) in enumerate(zip(kept, dense, strict=True))
    )
    lines = range(1, maximum) if maximum <= MAXIMUM_UNIT_LINES else ()
    emptied = [str(layer) for layer, units in enumerate(kept) if units == 0]
    return LayerChart(
        title=title,
        summary=_summary(kept, dense),
        maximum=formats.count(maximum),
        columns=columns,
        ticks=_ticks(len(dense)),
        unit_lines_px=tuple(PLOT_HEIGHT_PX * line / maximum for line in lines),
        emptied=f"No {unit} left in layer{'s' * (len(emptied) > 1)} {', '.join(emptied)}." if emptied else None,
    )


def _summary(kept: Sequence[int], dense: Sequence[int]) -> str:
    total, full = sum(kept), sum(dense)
    span = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,}–{max(kept):,}"
    return f"{formats.percent(total / full)} kept: {total:,} of {full:,}, {span} per layer"


def _ticks(layers: int) -> tuple[Tick, ...]:
    """Numbers of evenly spaced layers, at most `MAXIMUM_TICKS`, the first one included."""
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if layers <= MAXIMUM_TICKS * step)
    return tuple(Tick((layer + 0.5) * 100 / layers, str(layer)) for layer in range(0, layers, step))


@final
@dataclass(frozen=True)
class LayerRow:
    """One layer in numbers."""

    layer: int
    kv_heads: str
    query_heads: str
    ffn_channels: str
    kept: str


def layer_charts(dense: DecoderShape, pruned: DecoderShape) -> tuple[LayerChart, ...]:
    """Plots of attention and FFNs; query heads have their own only where groups were cut inside."""

    def chart(title: str, unit: str, units: Callable[[LayerShape], int]) -> LayerChart:
        kept, full = ([units(layer) for layer in shape.layers] for shape in (pruned, dense))
        return layer_chart(title, unit, kept, full)

    channels = [chart("FFN channels", "FFN channels", lambda layer: layer.ffn_channels)]
    if any(layer.shared_channels is not None for layer in dense.layers):
        channels.append(chart("Channels of shared experts", "shared channels", lambda layer: layer.shared_width))
    sizes = {
        layer.query_heads / layer.kv_heads for shape in (dense, pruned) for layer in shape.layers if layer.kv_heads
    }
    if sizes == {1}:
        return (chart("Attention heads", "heads", lambda layer: layer.kv_heads), *channels)
    if len(sizes) == 1:
        title = f"KV groups, a KV head and {sizes.pop():g} query heads each"
        return (chart(title, "KV groups", lambda layer: layer.kv_heads), *channels)
    return (
        chart("KV heads", "KV heads", lambda layer: layer.kv_heads),
        chart("Query heads", "query heads", lambda layer: layer.query_heads),
        *channels,
    )


def _channels(kept: LayerShape, full: LayerShape) -> str:
    """Channels of a layer's FFN, or of every routed expert and of a shared one."""
    experts = f"{full.experts:,} x " if full.experts else ""
    shared = f", shared {kept.shared_width:,} of {full.shared_width:,}" if full.shared_channels is not None else ""
    return f"{experts}{kept.ffn_channels:,} of {full.ffn_channels:,}{shared}"


def layer_rows(dense: DecoderShape, pruned: DecoderShape) -> tuple[LayerRow, ...]:
    """Every layer in numbers."""
    rows = []
    for index, (full, kept) in enumerate(zip(dense.layers, pruned.layers, strict=True)):
        before = dense.attention_parameters(full) + dense.ffn_parameters(full)
        after = pruned.attention_parameters(kept) + pruned.ffn_parameters(kept)
        rows.append(
            LayerRow(
                layer=index,
                kv_heads=f"{kept.kv_heads:,} of {full.kv_heads:,}",
                query_heads=f"{kept.query_heads:,} of {full.query_heads:,}",
                ffn_channels=_channels(kept, full),
                kept=formats.percent(after / before if before else math.nan),
            )
        )
    return tuple(rows)
