"""Let the rotary operator leave a part of every head as it is, where a family cuts that part off and joins it again.

Precondition: slices that cover an axis are Splits; values carry the shapes the tracer inferred.
Postcondition: no rotary embedding stands between a Split of heads in two and a Concat of the two parts.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import only_reader

_LAST_AXES = (-1, 3)


class JoinPartialRotariesPass(ir.passes.InPlacePass):
    """Concat(RotaryEmbedding(Split(x)[0]), Split(x)[1]) becomes RotaryEmbedding(x) of the first channels only."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "RotaryEmbedding":
                modified |= _join(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _join(graph: ir.Graph, rotary: ir.Node) -> bool:
    turned = rotary.inputs[0]
    split = turned.producer() if turned is not None else None
    if turned is None or split is None or not _cuts_in_two(split) or split.outputs[0] is not turned:
        return False
    left = split.outputs[1]
    concat = only_reader(rotary.outputs[0])
    if concat is None or concat.op_type != "Concat" or list(concat.inputs) != [rotary.outputs[0], left]:
        return False
    if concat.attributes["axis"].as_int() not in _LAST_AXES or len(turned.uses()) > 1 or len(left.uses()) > 1:
        return False
    assert turned.shape is not None
    width = turned.shape[-1]
    assert isinstance(width, int)
    whole = ir.node(
        "RotaryEmbedding",
        [split.inputs[0], *rotary.inputs[1:]],
        {**rotary.attributes, "rotary_embedding_dim": ir.AttrInt64("rotary_embedding_dim", width)},
    )
    graph.insert_before(rotary, whole)
    old, new = concat.outputs[0], whole.outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    for node in (concat, rotary, split):
        graph.remove(node, safe=True)
    return True


def _cuts_in_two(node: ir.Node) -> bool:
    return node.op_type == "Split" and len(node.outputs) == 2 and node.attributes["axis"].as_int() in _LAST_AXES
