"""Store weights the way MatMul reads them.

Precondition: weights are lazy initializers [out, in], each read through a Transpose.
Postcondition: they are lazy initializers [in, out] under the same name, transposed while they stream to disk. A
weight with another reader (a tied embedding, read by Gather too) keeps its Transpose, so that it is stored once.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import is_weight, lazy_initializer


class TransposeWeightsPass(ir.passes.InPlacePass):
    """Transpose(weight) becomes the transposed weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.op_type == "Transpose" else None
            if source is None or not is_weight(source) or len(source.uses()) != 1:
                continue
            _store_transposed(model.graph, node, source)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _store_transposed(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    tensor, name = source.const_value, source.name
    assert isinstance(tensor, ir.LazyTensor)
    assert name is not None
    assert tuple(node.attributes["perm"].as_ints()) == (1, 0), f"{name} is not a matrix"
    out_features, in_features = tensor.shape.numpy()
    readers = node.outputs[0]
    graph.initializers.pop(name)
    stored = lazy_initializer(graph, name, tensor.dtype, (in_features, out_features), lambda: tensor.numpy().T)
    ir.convenience.replace_all_uses_with(readers, stored)
    graph.remove(node, safe=True)
