"""Give every Reshape a constant target.

Precondition: values carry the symbolic shapes the tracer inferred.
Postcondition: batch and new-token axes are copied (0), one further unknown axis is inferred (-1); the nodes that
computed targets from Shape are left without readers.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import integers_initializer


class StaticReshapesPass(ir.passes.InPlacePass):
    """Reshape(x, Concat(Shape...)) becomes Reshape(x, [0, 0, heads, head_dim])."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace targets in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape":
                continue
            target = _constant_target(node)
            if target is None:
                continue
            node.replace_input_with(1, integers_initializer(model.graph, "shape", target))
            node.attributes.pop("allowzero", None)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _constant_target(node: ir.Node) -> tuple[int, ...] | None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    target = []
    for axis, size in enumerate(result.shape):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(source.shape) and source.shape[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    # An axis of size 0 could not be told from a copied one; emptied layers have left the graph before.
    copied = [axis for axis, size in enumerate(result.shape) if size == 0]
    return None if copied or target.count(-1) > 1 else tuple(target)
