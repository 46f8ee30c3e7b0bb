"""Lay out the heads of a fused projection once instead of three times.

Precondition: query, key and value come from one Split along the last axis, each reshaped into heads, perhaps normed
per head, and transposed to [B, heads, n, D].
Postcondition: one Reshape and one Transpose stand before the Split, which cuts along the heads; queries and keys that
go straight into rotary embeddings share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from flap_export.exporting.passes.values import constant_integers, integers_initializer, only_reader

_HEADS_FIRST = (0, 2, 1, 3)
_HEAD_AXIS = 1


@dataclass(frozen=True)
class _Path:
    """From one output of the Split to heads [B, heads, n, D]."""

    reshape: ir.Node
    norm: ir.Node | None
    transpose: ir.Node
    heads: int
    head_dim: int

    @property
    def result(self) -> ir.Value:
        return self.transpose.outputs[0]


class LayOutHeadsPass(ir.passes.InPlacePass):
    """Split -> 3 x (Reshape, Transpose) becomes Reshape -> Transpose -> Split."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Split" or len(node.outputs) != 3:
                continue
            paths = [_path_from(output) for output in node.outputs]
            known = [path for path in paths if path is not None]
            if len(known) == 3 and len({path.head_dim for path in known}) == 1:
                _rewrite(model.graph, node, known)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _path_from(value: ir.Value) -> _Path | None:
    reshape = only_reader(value)
    if reshape is None or reshape.op_type != "Reshape":
        return None
    target = constant_integers(reshape.inputs[1])
    after = only_reader(reshape.outputs[0])
    norm = after if after is not None and after.op_type == "RMSNormalization" else None
    transpose = only_reader(norm.outputs[0]) if norm is not None else after
    if target is None or len(target) != 4 or target[:2] != [0, 0] or transpose is None:
        return None
    if transpose.op_type != "Transpose" or tuple(transpose.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    return _Path(reshape, norm, transpose, heads=target[2], head_dim=target[3])


def _rewrite(graph: ir.Graph, split: ir.Node, paths: Sequence[_Path]) -> None:
    heads = [path.heads for path in paths]
    shape = integers_initializer(graph, "shape", [0, 0, sum(heads), paths[0].head_dim])
    reshape = ir.node("Reshape", [split.inputs[0], shape])
    transpose = ir.node("Transpose", [reshape.outputs[0]], {"perm": _HEADS_FIRST})
    graph.insert_before(split, [reshape, transpose])
    rotaries = _shared_rotaries(paths)
    if rotaries:
        _split_around_rotary(graph, split, transpose, paths, rotaries)
    else:
        cut = _cut(graph, split, transpose.outputs[0], heads)
        for path, part in zip(paths, cut, strict=True):
            _continue_from(path, part)
    obsolete = [node for path in paths for node in (path.transpose, path.reshape)]
    for node in [*rotaries, *obsolete, split]:
        graph.remove(node, safe=True)


def _shared_rotaries(paths: Sequence[_Path]) -> list[ir.Node]:
    """The rotary embeddings of query and key where both follow directly and read the same tables; else none."""
    readers = [only_reader(path.result) for path in paths[:2]]
    found = [node for node in readers if node is not None and node.op_type == "RotaryEmbedding"]
    if len(found) != 2 or any(path.norm is not None for path in paths):
        return []
    alike = list(found[0].inputs[1:]) == list(found[1].inputs[1:]) and found[0].attributes == found[1].attributes
    return found if alike else []


def _split_around_rotary(
    graph: ir.Graph, split: ir.Node, laid_out: ir.Node, paths: Sequence[_Path], rotaries: Sequence[ir.Node]
) -> None:
    query, key, value = (path.heads for path in paths)
    both, values = _cut(graph, split, laid_out.outputs[0], [query + key, value])
    rotary = ir.node("RotaryEmbedding", [both, *rotaries[0].inputs[1:]], rotaries[0].attributes)
    graph.insert_before(rotaries[0], rotary)
    for old, new in zip(rotaries, _cut(graph, rotaries[0], rotary.outputs[0], [query, key]), strict=True):
        _replace(old.outputs[0], new)
    _replace(paths[2].result, values)


def _cut(graph: ir.Graph, before: ir.Node, source: ir.Value, heads: Sequence[int]) -> Sequence[ir.Value]:
    sizes = integers_initializer(graph, "split", heads)
    node = ir.node("Split", [source, sizes], {"axis": _HEAD_AXIS}, num_outputs=len(heads))
    graph.insert_before(before, node)
    return node.outputs


def _continue_from(path: _Path, part: ir.Value) -> None:
    """Let what followed the old transpose read `part`, through the norm where there is one."""
    if path.norm is None:
        _replace(path.result, part)
        return
    path.norm.replace_input_with(0, part)
    path.norm.outputs[0].shape = path.result.shape
    ir.convenience.replace_all_uses_with(path.result, path.norm.outputs[0])


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
