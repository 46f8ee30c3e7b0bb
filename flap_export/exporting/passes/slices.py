"""Remove slices that keep everything, which indexing with `[:, 0:]` leaves behind.

Precondition: constants are folded.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import constant_integers

_FROM_HERE_ON_IS_THE_END = 2**31


class RemoveFullSlicesPass(ir.passes.InPlacePass):
    """Slice(x, 0, end, axis, 1) with an end beyond any axis is x."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Slice" and _keeps_everything(node):
                source, result = node.inputs[0], node.outputs[0]
                assert source is not None
                ir.convenience.replace_all_uses_with(result, source)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _keeps_everything(node: ir.Node) -> bool:
    bounds = [constant_integers(value) for value in node.inputs[1:]]
    starts, ends = bounds[0], bounds[1]
    steps = bounds[3] if len(bounds) > 3 else [1]
    if starts is None or ends is None or steps is None or node.outputs[0].is_graph_output():
        return False
    return not any(starts) and all(end >= _FROM_HERE_ON_IS_THE_END for end in ends) and set(steps) == {1}
