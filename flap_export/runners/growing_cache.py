"""A cache that grows on the CPU, where attention takes time for every row of the cache, valid or not.

The artifact's cache has a fixed length L, as TensorRT wants it. Only two things in the graph depend on L: the shapes of
its cache inputs and outputs, and masks, which are made of the positions of all keys. With L made symbolic, in memory
only, and masks made of as many positions as the cache has rows, the same nodes run over a cache that is only as long as
the tokens need, and give the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from flap_export.artifact import Artifact
from flap_export.errors import ArtifactError

LENGTH_AXIS: Final = 2
LENGTH_NAME: Final = "cache_length"
ROW_STEP: Final = 64
"""Rows are added in multiples of this, so that shapes do not change at every token."""
HEADROOM: Final = 1.25
"""A cache that was too short grows by this factor: copying costs little beside what unused rows would."""
_ATTENTION_MASK_INPUT: Final = 3


def relaxed_graph(graph: Path, artifact: Artifact) -> bytes | None:
    """The graph with a symbolic cache length, weights left in their file; None where it has the length built in.

    Raises:
        ArtifactError: the graph and the artifact disagree about the cache's length.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    in_plain_operators = len(attentions) < len(artifact.cache_layers)
    if in_plain_operators and _states_length(model.graph, artifact.max_length):
        return None
    if in_plain_operators or any(_is_masked(node) for node in attentions):
        keys = _key_positions(model.graph, graph.parent, artifact.max_length)
        if keys is None:
            return None
        _follow_the_cache(model.graph, keys, artifact.caches(1)[0].past)
    caches = {name for cache in artifact.caches(1) for name in (cache.past, cache.present)}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in caches:
            length = value.type.tensor_type.shape.dim[LENGTH_AXIS]
            if length.dim_value != artifact.max_length:
                raise ArtifactError(
                    f"'{graph}' has a cache of {length.dim_value} rows, its artifact.json says {artifact.max_length}; "
                    "export it again"
                )
            length.dim_param = LENGTH_NAME
    serialized: bytes = model.SerializeToString()
    return serialized


def _states_length(graph: Any, length: int) -> bool:
    """Whether a shape may have the length built in, as capped scores of older artifacts do."""
    from onnx import numpy_helper

    targets = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    shapes = (numpy_helper.to_array(stored) for stored in graph.initializer if stored.name in targets)
    return any(length in shape for shape in shapes)


def _key_positions(graph: Any, folder: Path, length: int) -> str | None:
    """The constant [1, 1, 1, L] with the positions of all keys, by its name; None where no mask is made of it."""
    from onnx import TensorProto, numpy_helper

    positions = np.arange(length).reshape(1, 1, 1, -1)
    for stored in graph.initializer:
        if stored.data_type == TensorProto.INT64 and tuple(stored.dims) == positions.shape:
            read = TensorProto()
            read.CopyFrom(stored)
            if np.array_equal(numpy_helper.to_array(read, str(folder)), positions):
                name: str = stored.name
                return name
    return None


def _follow_the_cache(graph: Any, keys: str, cache: str) -> None:
    """Let masks be made for as many of the keys as the cache has rows."""
    from onnx import helper, numpy_helper

    seen = f"{keys}_rows"
    for node in graph.node:
        node.input[:] = [seen if name == keys else name for name in node.input]
    constants = {f"{keys}_first": 0, f"{keys}_axis": -1}
    graph.initializer.extend(numpy_helper.from_array(np.array([n], np.int64), name) for name, n in constants.items())
    rows = helper.make_node("Shape", [cache], [f"{keys}_count"], start=LENGTH_AXIS, end=LENGTH_AXIS + 1)
    cut = helper.make_node("Slice", [keys, f"{keys}_first", f"{keys}_count", f"{keys}_axis"], [seen])
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([rows, cut, *others])
    # What they say of masks holds for one length only.
    del graph.value_info[:]


def _is_masked(node: Any) -> bool:
    return len(node.input) > _ATTENTION_MASK_INPUT and bool(node.input[_ATTENTION_MASK_INPUT])


@final
class GrowingCache:
    """Key and value arrays [B, K_i, rows, D] of all layers in host memory, bound in place."""

    def __init__(self, binding: Any, artifact: Artifact, batch_size: int, dtype: np.dtype[Any]) -> None:
        self._binding, self._artifact, self._batch_size, self._dtype = binding, artifact, batch_size, dtype
        self._arrays: dict[str, NDArray[np.generic]] = {}
        self.rows = 0

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows, which must not exceed the artifact's cache length."""
        if rows <= self.rows:
            return
        wanted = rows * HEADROOM if self.rows else rows
        grown = min(self._artifact.max_length, -(-int(wanted) // ROW_STEP) * ROW_STEP)
        for cache in self._artifact.caches(self._batch_size):
            batch, heads, _, width = cache.shape
            array = np.zeros((batch, heads, grown, width), self._dtype)
            if cache.past in self._arrays:
                array[:, :, : self.rows] = self._arrays[cache.past]
            self._bind(cache.past, cache.present, array)
        self.rows = grown

    def _bind(self, past: str, present: str, array: NDArray[np.generic]) -> None:
        from onnxruntime import OrtValue

        # On the CPU the value refers to the array's memory, which must therefore outlive the binding.
        self._arrays[past] = array
        value = OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)
