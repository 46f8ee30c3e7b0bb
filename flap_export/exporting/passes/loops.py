"""Make loops of the rounds that were traced once, between marks (`each`, `carried` and `after_all` of the dialect).

Precondition: the graph is sorted; loops neither overlap nor nest, and nothing but their end reads what is inside.
Postcondition: no mark is left, nor their domain. What a round computed is the body of a Scan, which reads where it lies
what does not change from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flap_export.exporting.dialect.node import AFTER_ALL, CARRIED, EACH, MARKS


class MakeLoopsPass(ir.passes.InPlacePass):
    """AfterAll(f(Carried(x), Each(y))) becomes Scan(x, y), whose body is f."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        modified = False
        begins: list[ir.Node] = []
        inside: list[ir.Node] = []
        for node in list(model.graph):
            if node.domain == MARKS and node.op_type in (EACH, CARRIED):
                begins.append(node)
            elif node.domain == MARKS and node.op_type == AFTER_ALL:
                _make_loop(model.graph, begins, inside, node)
                begins, inside, modified = [], [], True
            elif any(_producer(value) in (*begins, *inside) for value in node.inputs):
                inside.append(node)
        assert not begins, "a loop has no end"
        model.graph.opset_imports.pop(MARKS, None)
        return ir.passes.PassResult(model, modified=modified)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _make_loop(graph: ir.Graph, begins: Sequence[ir.Node], inside: Sequence[ir.Node], end: ir.Node) -> None:
    states, elements = ([node for node in begins if node.op_type == kind] for kind in (CARRIED, EACH))
    made = end.inputs[0]
    assert made is not None
    assert len(states) == 1, "one value is carried from round to round"
    assert elements, "something must differ from round to round"
    body = ir.Graph([_body_input(begin) for begin in (*states, *elements)], [made], nodes=[], name=f"{made.name}.round")
    loop = ir.node(
        "Scan",
        [begin.inputs[0] for begin in (*states, *elements)],
        {"body": body, "num_scan_inputs": len(elements)},
    )
    graph.insert_before(end, loop)
    loop.outputs[0].shape, loop.outputs[0].type = end.outputs[0].shape, end.outputs[0].type
    ir.convenience.replace_all_uses_with(end.outputs[0], loop.outputs[0])
    graph.remove([end, *begins], safe=True)
    graph.remove(inside)
    body.extend(inside)


def _body_input(begin: ir.Node) -> ir.Value:
    mark = begin.outputs[0]
    value = ir.Value(name=f"{mark.name}.of_round", shape=mark.shape, type=mark.type)
    ir.convenience.replace_all_uses_with(mark, value)
    return value
