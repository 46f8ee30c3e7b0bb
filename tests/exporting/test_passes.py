"""Each pass on a small graph made by hand: what it changes, and what it must leave alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from flap_export.exporting.dialect.node import AFTER_ALL, CARRIED, EACH, MARKS
from flap_export.exporting.passes.constants import FoldConstantsPass
from flap_export.exporting.passes.heads import LayOutHeadsPass
from flap_export.exporting.passes.logits import KeepAllLogitsPass
from flap_export.exporting.passes.loops import MakeLoopsPass
from flap_export.exporting.passes.projections import FuseProjectionsPass
from flap_export.exporting.passes.reshapes import StaticReshapesPass
from flap_export.exporting.passes.rotaries import JoinPartialRotariesPass
from flap_export.exporting.passes.scales import FoldQueryScalesPass
from flap_export.exporting.passes.sharing import ShareConstantsPass
from flap_export.exporting.passes.slices import RemoveFullSlicesPass
from flap_export.exporting.passes.splits import SplitSlicesPass
from flap_export.exporting.passes.transposes import TransposeWeightsPass
from flap_export.exporting.passes.values import constant_integers, is_weight, lazy_initializer

END = 2**63 - 1
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Graph:
    """A graph in the making: values by name, nodes in order."""

    def __init__(self, **inputs: Sequence[int | str]) -> None:
        self.inputs = [
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT)) for name, shape in inputs.items()
        ]
        self.graph = ir.Graph(self.inputs, [], nodes=[], opset_imports={"": 24}, name="hand_made")
        self.reads: dict[str, int] = {}

    def weight(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """A lazy initializer; `reads` counts how often its values were asked for."""

        def compute() -> NDArray[np.float32]:
            self.reads[name] = self.reads.get(name, 0) + 1
            return values

        return lazy_initializer(self.graph, name, FLOAT, values.shape, compute)

    def constant(self, *values: int) -> ir.Value:
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=f"constant_{len(self.graph.initializers)}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(INT64), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, *inputs: ir.Value, shape: Sequence[int | str], name: str, **attributes: Any
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        self.graph.append(node)
        result = node.outputs[0]
        result.name, result.shape, result.type = name, ir.Shape(shape), ir.TensorType(FLOAT)
        return result

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Outputs on ONNX Runtime."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[NDArray[Any]] = session.run(None, feeds)
    return results


def check_same_results(
    build: Callable[[], ir.Model], graph_pass: ir.passes.PassBase, **feeds: NDArray[np.float32]
) -> ir.Model:
    """Run `build()` before and after `graph_pass`; returns the changed model."""
    changed = build()
    result = graph_pass(changed)
    assert result.modified
    for one, other in zip(run(build(), **feeds), run(changed, **feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    again = graph_pass(changed)
    assert not again.modified, "a second run must find nothing to do"
    return changed


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


class TestTransposeWeights:
    def test_a_weight_is_stored_as_matmul_reads_it(self) -> None:
        values, graphs = random(3, 4), []

        def build() -> ir.Model:
            graph = Graph(x=["n", 4])
            graphs.append(graph)
            transposed = graph.node("Transpose", graph.weight("w", values), shape=[4, 3], name="t", perm=[1, 0])
            return graph.model(graph.node("MatMul", graph.inputs[0], transposed, shape=["n", 3], name="y"))

        model = build()
        TransposeWeightsPass()(model)
        assert graphs[0].reads == {}, "the pass read a weight"
        model = check_same_results(build, TransposeWeightsPass(), x=random(2, 4))
        assert ops(model) == ["MatMul"]
        stored = model.graph.initializers["w"].const_value
        assert isinstance(stored, ir.LazyTensor)
        assert np.array_equal(stored.numpy(), values.T)
        assert stored.numpy().flags.c_contiguous

    def test_a_weight_with_another_reader_keeps_its_transpose(self) -> None:
        graph = Graph(x=["n", 4])
        weight = graph.weight("w", random(4, 4))
        transposed = graph.node("Transpose", weight, shape=[4, 4], name="t", perm=[1, 0])
        first = graph.node("MatMul", graph.inputs[0], transposed, shape=["n", 4], name="a")
        model = graph.model(first, graph.node("MatMul", graph.inputs[0], weight, shape=["n", 4], name="b"))
        assert not TransposeWeightsPass()(model).modified
        assert ops(model) == ["Transpose", "MatMul", "MatMul"]

    def test_activations_stay(self) -> None:
        graph = Graph(x=["n", 4])
        model = graph.model(graph.node("Transpose", graph.inputs[0], shape=[4, "n"], name="t", perm=[1, 0]))
        assert not TransposeWeightsPass()(model).modified


class TestShareConstants:
    @staticmethod
    def twice(first: Sequence[int], second: Sequence[int]) -> ir.Model:
        graph = Graph(x=["n", 1])
        outputs = [
            graph.node("Unsqueeze", graph.inputs[0], graph.constant(*axes), shape=["n", 1, 1], name=name)
            for name, axes in (("a", first), ("b", second))
        ]
        return graph.model(*outputs)

    def test_what_is_computed_from_equal_constants_is_the_same(self) -> None:
        model = check_same_results(lambda: self.twice([1], [1]), ShareConstantsPass(), x=random(2, 1))
        first, second = model.graph
        assert first.inputs[1] is second.inputs[1]
        assert len(model.graph.initializers) == 1

    @pytest.mark.parametrize("other", [[0], [1, 2]])
    def test_others_stay(self, other: list[int]) -> None:
        model = self.twice([1], other)
        assert not ShareConstantsPass()(model).modified
        assert len(model.graph.initializers) == 2

    def test_a_type_is_part_of_a_constant(self) -> None:
        graph = Graph(x=["n"])
        half = ir.tensor(np.array([0], dtype=np.uint64), name="half")
        value = ir.Value(name="half", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.UINT64), const_value=half)
        graph.graph.register_initializer(value)
        zero = graph.constant(0)
        model = graph.model(graph.inputs[0])
        assert not ShareConstantsPass()(model).modified
        assert set(model.graph.initializers) == {"half", zero.name}

    def test_weights_are_neither_read_nor_shared(self) -> None:
        """Two biases of zeros would leave one of two projections without."""
        graph = Graph(x=["n", 2])
        sums = [
            graph.node(
                "Add", graph.inputs[0], graph.weight(name, np.zeros(2, np.float32)), shape=["n", 2], name=f"+{name}"
            )
            for name in ("q", "k")
        ]
        model = graph.model(*sums)
        assert not ShareConstantsPass()(model).modified
        assert set(model.graph.initializers) == {"q", "k"}
        assert graph.reads == {}


class TestFuseProjections:
    @staticmethod
    def attention(widths: Sequence[int], biased: Sequence[bool], last_op: str = "Reshape") -> ir.Model:
        graph = Graph(x=["b", "n", 4])
        outputs = []
        for index, (width, has_bias) in enumerate(zip(widths, biased, strict=True)):
            result = graph.node(
                "MatMul",
                graph.inputs[0],
                graph.weight(f"w{index}", random(4, width) + index),
                shape=["b", "n", width],
                name=f"p{index}",
            )
            if has_bias:
                # Torch puts the bias on either side.
                bias = graph.weight(f"bias{index}", random(width) - index)
                pair = (result, bias) if index % 2 else (bias, result)
                result = graph.node("Add", *pair, shape=["b", "n", width], name=f"a{index}")
            shape: list[int | str] = ["b", "n", width // 2, 2]
            if last_op == "Reshape":
                result = graph.node("Reshape", result, graph.constant(0, 0, -1, 2), shape=shape, name=f"h{index}")
            else:
                result = graph.node(last_op, result, shape=["b", "n", width], name=f"h{index}")
            outputs.append(result)
        return graph.model(*outputs)

    @pytest.mark.parametrize("widths", [(8, 4, 4), (6, 2, 2), (4, 4)])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_projections_of_one_input_become_one_product(self, widths: Sequence[int], has_bias: bool) -> None:
        model = check_same_results(
            lambda: self.attention(widths, [has_bias] * len(widths)), FuseProjectionsPass(), x=random(2, 3, 4)
        )
        expected = ["MatMul", "Add", "Split"] if has_bias else ["MatMul", "Split"]
        assert ops(model) == [*expected, *["Reshape"] * len(widths)]
        joined = "+".join(f"w{index}" for index in range(len(widths)))
        assert model.graph.initializers[joined].shape == ir.Shape([4, sum(widths)])
        assert not any(name in model.graph.initializers for name in ("w0", "w1", "bias0"))

    def test_no_weight_is_read(self) -> None:
        graph_reads: list[dict[str, int]] = []
        original = Graph.__init__

        def remember(self: Graph, **inputs: Sequence[int | str]) -> None:
            original(self, **inputs)
            graph_reads.append(self.reads)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Graph, "__init__", remember)
            FuseProjectionsPass()(self.attention((8, 4, 4), [True] * 3))
        assert graph_reads == [{}]

    @pytest.mark.parametrize(
        ("biased", "last_op"), [((True, False, True), "Reshape"), ((False, False, False), "Sigmoid")]
    )
    def test_what_does_not_fit_stays(self, biased: Sequence[bool], last_op: str) -> None:
        """Some with a bias and some without; gate and up projections of an FFN."""
        model = self.attention((4, 4, 4), biased, last_op)
        before = ops(model)
        FuseProjectionsPass()(model)
        assert ops(model) == before
        assert {"w0", "w1", "w2"} <= set(model.graph.initializers)


class TestLayOutHeads:
    """Grouped queries: two heads of queries for each of two heads of keys and values, four channels each."""

    HEADS = (4, 2, 2)
    SIZE = 4

    def attention(
        self, *, has_rotary: bool = True, has_norm: bool = False, perm: Sequence[int] = (0, 2, 1, 3), tables: int = 1
    ) -> ir.Model:
        graph = Graph(x=["b", "n", self.SIZE * sum(self.HEADS)])
        angles = [
            (graph.weight(f"cosine{i}", np.cos(random(9, 2) + i)), graph.weight(f"sine{i}", np.sin(random(9, 2) + i)))
            for i in range(tables)
        ]
        positions = graph.constant(3, 5, 8)
        positions.shape, positions.const_value = ir.Shape([2, 3]), ir.tensor(np.array([[3, 5, 8], [0, 1, 2]]))
        sizes = graph.constant(*(heads * self.SIZE for heads in self.HEADS))
        split = ir.node("Split", [graph.inputs[0], sizes], {"axis": -1}, num_outputs=3)
        graph.graph.append(split)
        outputs = []
        for index, (part, heads) in enumerate(zip(split.outputs, self.HEADS, strict=True)):
            part.name, part.type = f"part{index}", ir.TensorType(FLOAT)
            part.shape = ir.Shape(["b", "n", heads * self.SIZE])
            target = graph.constant(0, 0, heads, self.SIZE)
            value = graph.node("Reshape", part, target, shape=["b", "n", heads, self.SIZE], name=f"reshaped{index}")
            if has_norm and index < 2:
                scale = graph.weight(f"norm{index}", random(self.SIZE))
                value = graph.node("RMSNormalization", value, scale, shape=["b", "n", heads, 4], name=f"normed{index}")
            shape = ["b", heads, "n", self.SIZE]
            value = graph.node("Transpose", value, shape=shape, name=f"heads{index}", perm=perm)
            if has_rotary and index < 2:
                table = angles[index % tables]
                value = graph.node("RotaryEmbedding", value, *table, positions, shape=shape, name=f"turned{index}")
            outputs.append(graph.node("Neg", value, shape=shape, name=f"y{index}"))
        return graph.model(*outputs)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, {"Reshape": 1, "Transpose": 1, "Split": 2, "RotaryEmbedding": 1}),
            ({"has_rotary": False}, {"Reshape": 1, "Transpose": 1, "Split": 1}),
            # Other tables for the keys than for the queries.
            ({"tables": 2}, {"Reshape": 1, "Transpose": 1, "Split": 1, "RotaryEmbedding": 2}),
            (
                {"has_norm": True},
                {"Reshape": 1, "Transpose": 1, "Split": 1, "RotaryEmbedding": 2, "RMSNormalization": 2},
            ),
        ],
        ids=["rotary", "plain", "two-tables", "norm"],
    )
    def test_heads_are_laid_out_once(self, options: dict[str, Any], expected: dict[str, int]) -> None:
        x = random(2, 3, self.SIZE * sum(self.HEADS))
        model = check_same_results(lambda: self.attention(**options), LayOutHeadsPass(), x=x)
        assert {op: count for op, count in Counter(ops(model)).items() if op != "Neg"} == expected

    def test_another_layout_stays(self) -> None:
        model = self.attention(perm=(0, 2, 3, 1), has_rotary=False)
        assert not LayOutHeadsPass()(model).modified

    def test_a_part_that_is_read_twice_stays(self) -> None:
        model = self.attention()
        split = next(node for node in model.graph if node.op_type == "Split")
        model.graph.append(ir.node("Neg", [split.outputs[2]]))
        assert not LayOutHeadsPass()(model).modified


class TestJoinPartialRotaries:
    """Heads of eight channels, of which the first four turn."""

    @staticmethod
    def heads(*, order: tuple[int, int] = (0, 1), axis: int = -1, interleaved: int = 0) -> ir.Model:
        graph = Graph(x=["b", 2, "n", 8])
        tables = [graph.weight(name, random(9, 2)) for name in ("cosine", "sine")]
        positions = graph.constant(3, 5, 8)
        positions.shape, positions.const_value = ir.Shape([2, 3]), ir.tensor(np.array([[3, 5, 8], [0, 1, 2]]))
        split = ir.node("Split", [graph.inputs[0], graph.constant(4, 4)], {"axis": axis}, num_outputs=2)
        graph.graph.append(split)
        for index, part in enumerate(split.outputs):
            part.name, part.type, part.shape = f"part{index}", ir.TensorType(FLOAT), ir.Shape(["b", 2, "n", 4])
        turned = graph.node(
            "RotaryEmbedding",
            split.outputs[0],
            *tables,
            positions,
            shape=["b", 2, "n", 4],
            name="turned",
            interleaved=interleaved,
        )
        parts = (turned, split.outputs[1])
        joined = graph.node("Concat", *(parts[i] for i in order), shape=["b", 2, "n", 8], name="joined", axis=axis)
        return graph.model(graph.node("Neg", joined, shape=["b", 2, "n", 8], name="y"))

    @pytest.mark.parametrize("interleaved", [0, 1])
    @pytest.mark.parametrize("axis", [-1, 3])
    def test_the_operator_takes_whole_heads(self, axis: int, interleaved: int) -> None:
        x = random(2, 2, 3, 8)
        model = check_same_results(
            partial(self.heads, axis=axis, interleaved=interleaved), JoinPartialRotariesPass(), x=x
        )
        assert ops(model) == ["RotaryEmbedding", "Neg"]

    def test_parts_in_another_order_stay(self) -> None:
        assert not JoinPartialRotariesPass()(self.heads(order=(1, 0))).modified

    def test_parts_that_are_read_elsewhere_stay(self) -> None:
        for read in (0, 1):
            model = self.heads()
            split = next(node for node in model.graph if node.op_type == "Split")
            model.graph.append(ir.node("Neg", [split.outputs[read]]))
            assert not JoinPartialRotariesPass()(model).modified


class TestStaticReshapes:
    @staticmethod
    def reshaped(source: Sequence[int | str], result: Sequence[int | str], op_type: str = "Reshape") -> ir.Model:
        graph = Graph(x=source)
        shape = graph.node("Shape", graph.inputs[0], shape=[len(source)], name="s")
        assert shape.type is not None
        shape.type = ir.TensorType(INT64)
        return graph.model(graph.node(op_type, graph.inputs[0], shape, shape=result, name="y"))

    @pytest.mark.parametrize(
        ("source", "result", "target"),
        [
            (["b", "n", 12], ["b", "n", 3, 4], [0, 0, 3, 4]),
            (["b", "n", 3, 4], ["b", "n", 12], [0, 0, 12]),
            (["b", "n", 12], ["b*n", 12], [-1, 12]),
            (["b", 12], [12, "b"], [12, -1]),
            ([2, 12], [24], [24]),
        ],
    )
    def test_targets_become_constants(
        self, source: Sequence[int | str], result: Sequence[int | str], target: list[int]
    ) -> None:
        model = self.reshaped(source, result)
        assert StaticReshapesPass()(model).modified
        assert constant_integers(list(model.graph)[-1].inputs[1]) == target

    def test_two_unknown_axes_cannot_be_inferred(self) -> None:
        model = self.reshaped(["b", "n", 12], ["n", "b", 12])
        assert not StaticReshapesPass()(model).modified

    def test_unknown_shapes_are_left_alone(self) -> None:
        model = self.reshaped(["b", 12], ["b", 12])
        list(model.graph)[-1].outputs[0].shape = None
        assert not StaticReshapesPass()(model).modified

    def test_equal_targets_share_one_constant(self) -> None:
        graph = Graph(x=["b", 12])
        target = graph.constant(1, 2, 3)
        results = [graph.node("Reshape", graph.inputs[0], target, shape=["b", 3, 4], name=f"y{i}") for i in range(2)]
        model = graph.model(*results)
        StaticReshapesPass()(model)
        assert len({node.inputs[1] for node in model.graph}) == 1


class TestRemoveFullSlices:
    @staticmethod
    def sliced(*bounds: int, result_is_read: bool = True) -> ir.Model:
        graph = Graph(x=["n", 6])
        constants = [graph.constant(bound) for bound in bounds]
        value = graph.node("Slice", graph.inputs[0], *constants, shape=["n", 6], name="s")
        return graph.model(graph.node("Neg", value, shape=["n", 6], name="y") if result_is_read else value)

    @pytest.mark.parametrize("bounds", [(0, END, 1, 1), (0, END, 1), (0, 2**31, 0, 1)])
    def test_slices_that_keep_everything_leave(self, bounds: Sequence[int]) -> None:
        model = check_same_results(lambda: self.sliced(*bounds), RemoveFullSlicesPass(), x=random(3, 6))
        assert ops(model) == ["Neg"]

    @pytest.mark.parametrize("bounds", [(1, END, 1, 1), (0, 6, 1, 1), (-1, END, 1, 1), (0, END, 1, 2), (0, -1, 1, 1)])
    def test_slices_that_cut_stay(self, bounds: Sequence[int]) -> None:
        """An end of 6 happens to keep all here, but says nothing about it."""
        model = self.sliced(*bounds)
        assert not RemoveFullSlicesPass()(model).modified

    def test_a_graph_output_keeps_its_slice(self) -> None:
        model = self.sliced(0, END, 1, 1, result_is_read=False)
        assert not RemoveFullSlicesPass()(model).modified


class TestKeepAllLogits:
    @staticmethod
    def head(*, slices: int = 1) -> ir.Model:
        graph = Graph(x=["b", "n", 4])
        hidden = graph.inputs[0]
        for index in range(slices):
            bounds = [graph.constant(value) for value in (-1, END, 1, 1)]
            hidden = graph.node("Slice", hidden, *bounds, shape=["b", 1, 4], name=f"s{index}")
        product = graph.node("MatMul", hidden, graph.weight("head", random(4, 5)), shape=["b", 1, 5], name="logits")
        return graph.model(product)

    def test_the_last_token_becomes_all_tokens(self) -> None:
        model, x = self.head(), random(2, 3, 4)
        last = run(self.head(), x=x)[0]
        KeepAllLogitsPass()(model)
        assert ops(model) == ["MatMul"]
        assert [str(size) for size in model.graph.outputs[0].shape or ()] == ["b", "n", "5"]
        every = run(model, x=x)[0]
        assert every.shape == (2, 3, 5)
        np.testing.assert_allclose(every[:, -1:], last, rtol=1e-6)

    @pytest.mark.parametrize("slices", [0, 2])
    def test_exactly_one_slice_is_expected(self, slices: int) -> None:
        with pytest.raises(Exception, match=f"expected one slice to the last token, found {slices}") as caught:
            KeepAllLogitsPass()(self.head(slices=slices))
        assert caught.value is not None


class TestFoldConstants:
    def test_constants_fold_and_weights_are_not_read(self) -> None:
        graph = Graph(x=["n", 4])
        weight = graph.weight("w", random(3, 4))
        transposed = graph.node("Transpose", weight, shape=[4, 3], name="t", perm=[1, 0])
        product = graph.node("MatMul", graph.inputs[0], transposed, shape=["n", 3], name="p")
        nodes = [ir.node("Constant", [], {"value": ir.tensor(np.float32(value))}) for value in (2, 3)]
        for node, name in zip(nodes, ("two", "three"), strict=True):
            node.outputs[0].name = name
            graph.graph.append(node)
        six = graph.node("Mul", *(node.outputs[0] for node in nodes), shape=[], name="six")
        model = graph.model(graph.node("Mul", product, six, shape=["n", 3], name="y"))
        expected = run(ir.from_proto(ir.to_proto(model)), x=random(2, 4))[0]
        graph.reads.clear()
        FoldConstantsPass()(model)
        assert graph.reads == {}
        assert ops(model).count("Transpose") == 1
        assert ops(model).count("Mul") == 1
        np.testing.assert_allclose(run(model, x=random(2, 4))[0], expected, rtol=1e-6)


class TestValues:
    def test_constant_integers(self) -> None:
        graph = Graph(x=["n"])
        assert constant_integers(graph.constant(3, -1)) == [3, -1]
        assert constant_integers(graph.constant(*range(16))) == list(range(16))
        assert constant_integers(graph.constant(*range(17))) is None
        assert constant_integers(graph.inputs[0]) is None
        assert constant_integers(None) is None

    def test_weights_are_lazy_initializers(self) -> None:
        graph = Graph(x=["n"])
        assert is_weight(graph.weight("w", random(2, 2)))
        assert not is_weight(graph.constant(1))
        assert not is_weight(graph.inputs[0])
        assert not is_weight(None)

    def test_values_are_computed_when_written_and_not_kept(self) -> None:
        graph = Graph(x=["n"])
        weight = graph.weight("w", random(2, 3))
        assert graph.reads == {}
        for count in (1, 2):
            assert weight.const_value is not None
            assert weight.const_value.tobytes() == random(2, 3).tobytes()
            assert graph.reads == {"w": count}


class TestSplitSlices:
    @staticmethod
    def sliced(*bounds: tuple[int, int], steps: int = 1, axis: int = 1, is_read: bool = False) -> ir.Model:
        """Relu(x) of [n, 7], cut from a to b for each of `bounds`."""
        graph = Graph(x=["n", 7])
        whole = graph.node("Relu", graph.inputs[0], shape=["n", 7], name="whole")
        parts = [
            graph.node(
                "Slice",
                whole,
                *map(graph.constant, (start, end, axis, steps)),
                shape=["n", min(end, 7) - start] if steps == 1 else ["n", "some"],
                name=f"part_{position}",
            )
            for position, (start, end) in enumerate(bounds)
        ]
        negated = [
            graph.node("Neg", part, shape=part.shape or [], name=f"y_{position}") for position, part in enumerate(parts)
        ]
        return graph.model(*negated, *([graph.node("Neg", whole, shape=["n", 7], name="all")] if is_read else []))

    @pytest.mark.parametrize("axis", [1, -1])
    @pytest.mark.parametrize("bounds", [((0, 2), (2, 5), (5, END)), ((3, 7), (0, 3)), ((0, 1), (1, 2), (2, 7))])
    def test_slices_that_cover_an_axis_are_one_split(self, bounds: Any, axis: int) -> None:
        model = check_same_results(lambda: self.sliced(*bounds, axis=axis), SplitSlicesPass(), x=random(4, 7))
        assert Counter(ops(model)) == {"Relu": 1, "Split": 1, "Neg": len(bounds)}

    @pytest.mark.parametrize(
        "options",
        [
            {"bounds": [(0, 2), (2, 6)]},
            {"bounds": [(0, 2), (3, 7)]},
            {"bounds": [(0, 4), (3, 7)]},
            {"bounds": [(0, 7)]},
            {"bounds": [(0, 2), (2, 7)], "steps": 2},
            {"bounds": [(0, 2), (2, 7)], "is_read": True},
        ],
        ids=["short", "gap", "overlap", "alone", "steps", "read-whole"],
    )
    def test_others_stay(self, options: dict[str, Any]) -> None:
        bounds = options.pop("bounds")
        assert not SplitSlicesPass()(self.sliced(*bounds, **options)).modified


class TestFoldQueryScales:
    @staticmethod
    def attention(*, factor: float | None = 0.5, scale: float | None = 2.0, is_read: bool = False) -> ir.Model:
        """x [2, 3, 8] times a number, as 2 heads of 4, attending to themselves."""
        graph = Graph(x=[2, 3, 8], other=[1])
        number = graph.inputs[1]
        if factor is not None:
            tensor = ir.tensor(np.float32(factor), name="factor")
            number = ir.Value(name="factor", shape=ir.Shape(()), type=ir.TensorType(FLOAT), const_value=tensor)
            graph.graph.register_initializer(number)
        product = graph.node("Mul", graph.inputs[0], number, shape=[2, 3, 8], name="product")
        heads = graph.node("Reshape", product, graph.constant(2, 3, 2, 4), shape=[2, 3, 2, 4], name="heads")
        query = graph.node("Transpose", heads, shape=[2, 2, 3, 4], name="query", perm=[0, 2, 1, 3])
        key = graph.node("Reshape", graph.inputs[0], graph.constant(2, 2, 3, 4), shape=[2, 2, 3, 4], name="key")
        attributes = {} if scale is None else {"scale": scale}
        result = graph.node("Attention", query, key, key, shape=[2, 2, 3, 4], name="y", **attributes)
        outputs = [result, graph.node("Neg", product, shape=[2, 3, 8], name="z")] if is_read else [result]
        return graph.model(*outputs)

    def test_the_factor_becomes_the_operators(self) -> None:
        feeds = {"x": random(2, 3, 8), "other": random(1)}
        model = check_same_results(self.attention, FoldQueryScalesPass(), **feeds)
        assert "Mul" not in ops(model)

    @pytest.mark.parametrize(
        "options",
        [{"factor": None}, {"scale": None}, {"is_read": True}],
        ids=["no-constant", "default-scale", "read-elsewhere"],
    )
    def test_others_stay(self, options: dict[str, Any]) -> None:
        assert not FoldQueryScalesPass()(self.attention(**options)).modified


class TestMakeLoops:
    @staticmethod
    def rounds(graph: Graph, initial: ir.Value, factors: ir.Value, name: str) -> ir.Value:
        """One round of: multiply by a row of factors, add |x|."""

        def mark(kind: str, value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
            marked = graph.node(kind, value, shape=shape, name=f"{name}.{kind}")
            marked.producer().domain = MARKS  # type: ignore[union-attr]
            return marked

        total = mark(CARRIED, initial, [3])
        factor = mark(EACH, factors, [3])
        outside = graph.node("Abs", graph.inputs[0], shape=[3], name=f"{name}.outside")
        product = graph.node("Mul", total, factor, shape=[3], name=f"{name}.product")
        return mark(AFTER_ALL, graph.node("Add", product, outside, shape=[3], name=f"{name}.made"), [3])

    def test_a_round_between_marks_becomes_a_loop(self) -> None:
        graph = Graph(x=[3], first=[4, 3], second=[2, 3])
        graph.graph.opset_imports[MARKS] = 1
        between = self.rounds(graph, graph.inputs[0], graph.inputs[1], "a")
        model = graph.model(graph.node("Neg", self.rounds(graph, between, graph.inputs[2], "b"), shape=[3], name="y"))
        assert MakeLoopsPass()(model).modified
        assert ops(model) == ["Abs", "Scan", "Abs", "Scan", "Neg"]
        assert model.graph.opset_imports == {"": 24}
        bodies = [
            [n.op_type for n in node.attributes["body"].as_graph()] for node in model.graph if node.op_type == "Scan"
        ]
        assert bodies == [["Mul", "Add"], ["Mul", "Add"]]
        x, first, second = random(3), random(4, 3), random(2, 3)
        expected = x
        for factor in (*first, *second):
            expected = expected * factor + np.abs(x)
        np.testing.assert_allclose(run(model, x=x, first=first, second=second)[0], -expected, rtol=1e-6)
        assert not MakeLoopsPass()(model).modified
