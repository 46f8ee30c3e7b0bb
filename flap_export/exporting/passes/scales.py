"""Let the attention operator scale its queries, as OPT does by a product of its own.

Precondition: constants are folded.
Postcondition: no query that is only reshaped and transposed on its way to Attention is multiplied by a number before;
the number is part of the operator's `scale`. Query, key and value projections then look alike, and fuse.
"""

from __future__ import annotations

import onnx_ir as ir

from flap_export.exporting.passes.values import constant_number


class FoldQueryScalesPass(ir.passes.InPlacePass):
    """Attention(Transpose(Reshape(Mul(x, number)))) becomes Attention(Transpose(Reshape(x)), scale=number)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place."""
        modified = False
        for node in list(model.graph):
            # Without the attribute, the operator scales by the head size.
            if node.op_type == "Attention" and "scale" in node.attributes:
                modified |= _fold(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _fold(graph: ir.Graph, attention: ir.Node) -> bool:
    reader, product = attention, _producer(attention.inputs[0])
    while product is not None and product.op_type in ("Transpose", "Reshape"):
        reader, product = product, _producer(product.inputs[0])
    if product is None or product.op_type != "Mul" or reader is attention:
        return False
    number = constant_number(product.inputs[1])
    if number is None:
        return False
    reader.replace_input_with(0, product.inputs[0])
    attention.attributes["scale"] = ir.AttrFloat32("scale", attention.attributes["scale"].as_float() * number)
    graph.remove(product, safe=True)
    return True


def _producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes `value`, if nobody else reads it."""
    return value.producer() if value is not None and len(value.uses()) == 1 else None
