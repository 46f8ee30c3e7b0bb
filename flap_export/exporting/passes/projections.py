"""Fuse the query, key and value projections, which read the same input, into one product.

Precondition: weights are lazy initializers [in, out].
Postcondition: projections of one input whose results are only reshaped into heads are one MatMul (and one Add where
they have biases), followed by one Split. Weights are joined while they stream to disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from flap_export.exporting.passes.values import integers_initializer, is_weight, lazy_initializer, only_reader


class FuseProjectionsPass(ir.passes.InPlacePass):
    """MatMul(x, Wq), MatMul(x, Wk), MatMul(x, Wv) become Split(MatMul(x, [Wq Wk Wv]))."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse in place."""
        by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if node.op_type == "MatMul" and is_weight(node.inputs[1]) and _becomes_heads(node):
                assert node.inputs[0] is not None
                by_input[node.inputs[0]].append(node)
        groups = [nodes for nodes in by_input.values() if len(nodes) > 1]
        for nodes in groups:
            _fuse(model.graph, nodes)
        return ir.passes.PassResult(model, modified=bool(groups))


def _bias_add(node: ir.Node) -> ir.Node | None:
    reader = only_reader(node.outputs[0])
    return reader if reader is not None and reader.op_type == "Add" and any(map(is_weight, reader.inputs)) else None


def _becomes_heads(node: ir.Node) -> bool:
    result = (_bias_add(node) or node).outputs[0]
    return all(use.node.op_type == "Reshape" for use in result.uses())


def _fuse(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    adds = [_bias_add(node) for node in nodes]
    biases = [next(filter(is_weight, add.inputs)) for add in adds if add is not None]
    # Some with and some without a bias do not occur in any family; such projections stay as they are.
    if len(biases) not in (0, len(nodes)):
        return
    weights = [node.inputs[1] for node in nodes]
    last = [add or node for node, add in zip(nodes, adds, strict=True)]
    widths = [int(weight.shape[-1]) for weight in weights]  # type: ignore[union-attr,index,arg-type]
    product = ir.node("MatMul", [nodes[0].inputs[0], _joined(graph, weights)])
    created = [product]
    if biases:
        created.append(ir.node("Add", [product.outputs[0], _joined(graph, biases)]))
    sizes = integers_initializer(graph, "split", widths)
    split = ir.node("Split", [created[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    created.append(split)
    graph.insert_before(nodes[0], created)
    for old, new in zip(last, split.outputs, strict=True):
        new.name, new.shape, new.type = old.outputs[0].name, old.outputs[0].shape, old.outputs[0].type
        old.outputs[0].name = f"{old.outputs[0].name}.unfused"
        ir.convenience.replace_all_uses_with(old.outputs[0], new)
    for node in [add for add in adds if add is not None] + list(nodes):
        graph.remove(node, safe=True)
    for value in [*weights, *biases]:
        assert value is not None
        assert value.name is not None
        graph.initializers.pop(value.name)


def _joined(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """One lazy initializer that holds `values` side by side along their last axis; named after all of them."""
    tensors = [value.const_value for value in values if value is not None]
    name = "+".join(value.name for value in values if value is not None and value.name)
    first = tensors[0]
    assert first is not None
    width = sum(int(tensor.shape.numpy()[-1]) for tensor in tensors if tensor is not None)
    shape = (*first.shape.numpy()[:-1], width)
    return lazy_initializer(
        graph, name, first.dtype, shape, lambda: np.concatenate([t.numpy() for t in tensors if t is not None], axis=-1)
    )
