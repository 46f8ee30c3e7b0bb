"""Cut a fused result once instead of part by part, as Phi-3 does with its queries, keys and values.

Precondition: constants are folded; values carry the shapes the tracer inferred.
Postcondition: Slices that together cover an axis, one after another, are one Split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from flap_export.exporting.passes.values import constant_integers, integers_initializer


@dataclass(frozen=True)
class _Part:
    node: ir.Node
    axis: int
    start: int
    end: int


class SplitSlicesPass(ir.passes.InPlacePass):
    """Slice(x, 0, a), Slice(x, a, b), Slice(x, b, end) becomes Split(x, [a, b - a, end - b])."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        modified = False
        for node in list(model.graph):
            parts = _parts_of(node.outputs[0]) if len(node.outputs) == 1 else []
            if len(parts) > 1 and _cover(parts):
                _split(model.graph, node.outputs[0], parts)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _parts_of(source: ir.Value) -> list[_Part]:
    """What the readers of `source` keep of it, in order; nothing where one of them is no plain slice."""
    readers = [use.node for use in source.uses()]
    parts = [_part(reader, source) for reader in readers if reader.op_type == "Slice"]
    known = [part for part in parts if part is not None]
    return sorted(known, key=lambda part: part.start) if len(known) == len(readers) else []


def _part(node: ir.Node, source: ir.Value) -> _Part | None:
    bounds = [numbers for value in node.inputs[1:] if (numbers := constant_integers(value)) and len(numbers) == 1]
    if source.shape is None or node.inputs[0] is not source or len(bounds) != len(node.inputs) - 1 or len(bounds) < 3:
        return None
    (start,), (end,), (axis,) = bounds[:3]
    size = source.shape[axis]
    if not isinstance(size, int) or start < 0 or end < 0 or bounds[3:] not in ([], [[1]]):
        return None
    return _Part(node, axis % len(source.shape), start, min(end, size))


def _cover(parts: Sequence[_Part]) -> bool:
    """Whether the parts stand one after another and leave nothing of their axis out."""
    source = parts[0].node.inputs[0]
    assert source is not None
    assert source.shape is not None
    ends = [0, *(part.end for part in parts)]
    return (
        len({part.axis for part in parts}) == 1
        and [part.start for part in parts] == ends[:-1]
        and ends[-1] == source.shape[parts[0].axis]
    )


def _split(graph: ir.Graph, source: ir.Value, parts: Sequence[_Part]) -> None:
    sizes = integers_initializer(graph, "split", [part.end - part.start for part in parts])
    split = ir.node("Split", [source, sizes], {"axis": parts[0].axis}, num_outputs=len(parts))
    graph.insert_before(next(node for node in graph if node in {part.node for part in parts}), split)
    for part, new in zip(parts, split.outputs, strict=True):
        old = part.node.outputs[0]
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(part.node, safe=True)
