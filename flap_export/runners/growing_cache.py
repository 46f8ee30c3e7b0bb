"""A cache that grows on the CPU, where attention takes time for every row of the cache, valid or not.

The artifact's cache has a fixed length L, as TensorRT wants it. Nothing in the graph but the shapes of its cache inputs
and outputs depends on L, masks and capped scores excepted: with L made symbolic in memory, the same nodes run over a
cache that is only as long as the tokens need, and give the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from flap_export.artifact import Artifact, past_names, present_names
from flap_export.errors import ArtifactError

LENGTH_AXIS: Final = 2
LENGTH_NAME: Final = "cache_length"
ROW_STEP: Final = 64
"""Rows are added in multiples of this, so that shapes do not change at every token."""
HEADROOM: Final = 1.25
"""A cache that was too short grows by this factor: copying costs little beside what unused rows would."""
_ATTENTION_MASK_INPUT: Final = 3


def relaxed_graph(graph: Path, artifact: Artifact) -> bytes | None:
    """The graph with a symbolic cache length, weights left in their file; None where a mask has the length built in.

    Raises:
        ArtifactError: the graph and the artifact disagree about the cache's length.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    # Capped scores are computed in plain operators, whose shapes and mask have the length built in.
    if len(attentions) < len(artifact.cache_layers) or any(_is_masked(node) for node in attentions):
        return None
    caches = {n for layer in artifact.cache_layers for n in (*past_names(layer), *present_names(layer))}
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
        for layer in self._artifact.cache_layers:
            batch, heads, _, width = self._artifact.cache_shape(layer, self._batch_size)
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                array = np.zeros((batch, heads, grown, width), self._dtype)
                if past in self._arrays:
                    array[:, :, : self.rows] = self._arrays[past]
                self._bind(past, present, array)
        self.rows = grown

    def _bind(self, past: str, present: str, array: NDArray[np.generic]) -> None:
        from onnxruntime import OrtValue

        # On the CPU the value refers to the array's memory, which must therefore outlive the binding.
        self._arrays[past] = array
        value = OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)
