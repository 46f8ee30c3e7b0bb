"""From the graph of the last token's logits to the graph of all logits.

Precondition: traced for the last token's logits, so that one Slice from -1 along the token axis leads to the head.
Postcondition: that Slice is gone and the logits are [B, n, V].
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import constant_integers

TOKEN_AXIS = 1


class KeepAllLogitsPass(ir.passes.InPlacePass):
    """Slice(hidden, -1, end, axis 1) in front of the head becomes hidden."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the slice in place and restate the shapes behind it."""
        slices = [node for node in model.graph if _keeps_last_token(node)]
        assert len(slices) == 1, f"expected one slice to the last token, found {len(slices)}"
        source, result = slices[0].inputs[0], slices[0].outputs[0]
        assert source is not None
        assert source.shape is not None
        _restate_shapes(result, source.shape[TOKEN_AXIS])
        ir.convenience.replace_all_uses_with(result, source)
        model.graph.remove(slices[0], safe=True)
        return ir.passes.PassResult(model, modified=True)


def _keeps_last_token(node: ir.Node) -> bool:
    if node.op_type != "Slice":
        return False
    starts, axes = constant_integers(node.inputs[1]), constant_integers(node.inputs[3])
    return starts == [-1] and axes == [TOKEN_AXIS]


def _restate_shapes(value: ir.Value, tokens: ir.SymbolicDim | int) -> None:
    for use in value.uses():
        for output in use.node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape([output.shape[0], tokens, output.shape[2]])
            _restate_shapes(output, tokens)
