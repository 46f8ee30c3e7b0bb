"""Loops over experts as wide products: what a mixture's graph must say before a GPU computes it.

The artifact goes from expert to expert and selects each one's tokens. TensorRT's parser knows no NonZero inside of a
loop, and on CUDA every expert of every layer would wait for the host to learn how many tokens there are. So here the
experts of a layer are one FFN with the channels of all, weighed by the router: three products for all tokens, which
read every expert.

Precondition: an exported graph; its loops (Scan) are those that `flap_export.exporting.dialect.experts` writes.
Postcondition: no loop is left. Weights are the same bytes, [E F, H] instead of [E, F, H].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def join_experts(model: ir.Model) -> int:
    """Replace every loop over experts of `model` in place; returns how many there were."""
    from onnx_ir.passes import common

    loops = [_Loop.read(node) for node in model.graph if node.op_type == "Scan"]
    for loop in loops:
        _replace(model.graph, loop)
    common.RemoveUnusedNodesPass()(model)
    return len(loops)


@dataclass(frozen=True)
class _Loop:
    """The parts of one loop; those of a round are named after what they are of one expert."""

    node: ir.Node
    hidden_states: ir.Value
    """[T, H]"""
    own: ir.Value
    """Of a round: the expert's tokens."""
    share: ir.Value
    """Of a round: the router's weight of every token, or zero."""
    channels: ir.Value
    """Of a round: what the down projection reads."""
    down: ir.Value
    bias: ir.Value | None

    @classmethod
    def read(cls, node: ir.Node) -> _Loop:
        """Find the parts by what reads them."""
        body = node.attributes["body"].as_graph()
        nodes, inputs = list(body), set(body.inputs)
        own = next(found for found in nodes if found.op_type == "GatherND" and found.inputs[0] not in inputs)
        down = next(found for found in nodes if found.op_type == "MatMul" and found.inputs[1] in inputs)
        share = next(found for found in nodes if found.op_type == "NonZero")
        bias = [use.node for use in down.outputs[0].uses() if use.node.op_type == "Add"]
        return cls(
            node,
            _given(own.inputs[0]),
            own.outputs[0],
            _given(share.inputs[0]),
            _given(down.inputs[0]),
            _given(down.inputs[1]),
            _given(bias[0].inputs[1]) if bias else None,
        )

    def of_all(self, of_one: ir.Value) -> ir.Value:
        """What stands outside for all experts, [E, ...], where a round sees `of_one`."""
        place = list(self.node.attributes["body"].as_graph().inputs).index(of_one)
        return _given(self.node.inputs[place])


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _replace(graph: ir.Graph, loop: _Loop) -> None:
    import onnx_ir as ir

    wide = _computed_at_once(graph, loop)
    tape, down = ir.tape.Tape(), loop.of_all(loop.down)
    experts, width, _ = down.shape.numpy() if down.shape is not None else ()
    dtype = down.dtype
    assert dtype is not None

    def constant(kind: str, values: object, numbers: type = np.int64) -> ir.Value:
        name = f"{loop.node.outputs[0].name}.{kind}"
        return tape.initializer(ir.tensor(np.asarray(values, numbers), name=name), name=name)

    shares = tape.op("Transpose", [loop.of_all(loop.share)], {"perm": [1, 0]})
    shares = tape.op("Cast", [shares], {"to": dtype})
    share = tape.op("Unsqueeze", [shares, constant("last_axis", [-1])])
    by_expert = tape.op("Reshape", [wide, constant("by_expert", [-1, experts, width])])
    weighed = tape.op("Mul", [by_expert, share])
    zero = tape.op("Cast", [constant("zero", 0, np.float32)], {"to": dtype})
    # What an expert makes of tokens that are not meant for it may overflow, and infinity times zero is not zero.
    weighed = tape.op("Where", [tape.op("Greater", [share, zero]), weighed, zero])
    joined = tape.op("Reshape", [weighed, constant("joined", [-1, experts * width])])
    output = tape.op("MatMul", [joined, _side_by_side(down, _rank(loop.down))])
    if loop.bias is not None:
        output = tape.op("Add", [output, tape.op("MatMul", [shares, loop.of_all(loop.bias)])])
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(loop.node, tape.nodes)
    _take_the_place_of(graph, loop.node, output)


def _computed_at_once(graph: ir.Graph, loop: _Loop) -> ir.Value:
    """Move what a round computes of an expert's tokens before the loop, where it reads all tokens and all experts.

    Returns:
        The channels of all experts, [T, E F].
    """
    import onnx_ir as ir

    body = loop.node.attributes["body"].as_graph()
    needed, pending = set[ir.Node](), [loop.channels]
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer.graph is body and producer is not loop.own.producer():
            needed.add(producer)
            pending += [value for value in producer.inputs if value is not None]
    moved = [node for node in body if node in needed]
    body.remove(moved)
    for node in moved:
        for place, value in enumerate(node.inputs):
            if value is loop.own:
                node.replace_input_with(place, loop.hidden_states)
            elif value in body.inputs:
                node.replace_input_with(place, _side_by_side(loop.of_all(_given(value)), _rank(value)))
        for output in node.outputs:
            output.shape = None
    graph.insert_before(loop.node, moved)
    return loop.channels


def _rank(value: ir.Value | None) -> int:
    shape = _given(value).shape
    assert shape is not None
    return len(shape)


def _side_by_side(weight: ir.Value, rank: int) -> ir.Value:
    """An initializer [E, F, ...], of which one expert's part has so many axes, as [E F, ...], in place."""
    import onnx_ir as ir

    tensor = weight.const_value
    assert tensor is not None
    if len(tensor.shape) == rank:
        return weight
    experts, width, *columns = tensor.shape.numpy()
    shape = ir.Shape((experts * width, *columns))
    if isinstance(tensor, ir.ExternalTensor):
        weight.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=shape, name=weight.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        values = tensor.numpy().reshape(experts * width, *columns)
        weight.const_value = ir.Tensor(values, dtype=tensor.dtype, name=weight.name)
    weight.shape = shape
    return weight


def _take_the_place_of(graph: ir.Graph, loop: ir.Node, output: ir.Value) -> None:
    """Let `output` be read in place of the loop's sum, which is float32 and cast to the precision that `output` has."""
    import onnx_ir as ir

    total = loop.outputs[0]
    casts = [use.node for use in total.uses() if use.node.op_type == "Cast"]
    old = casts[0].outputs[0] if casts else total
    output.shape, output.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, output)
    graph.remove([*casts, loop], safe=True)
