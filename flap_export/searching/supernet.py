"""All candidates of a search in one model: every layer at every cut point, put together from blocks.

A block is attention, or the FFN, of one layer at one cut point, already cut and compensated; it is made when it is
first asked for, by the very code that rewrites checkpoints, and kept while memory allows. A candidate is a list of
blocks: nothing is computed to make one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor, nn

from flap_export.allocation.ladders import LayerLadders, layer_plan
from flap_export.calibration.products import with_fast_linears
from flap_export.families import Part
from flap_export.models.loading import MetaLayers, materialize
from flap_export.models.opening import Checkpoint
from flap_export.rewriting.cutting import Restore, kept_channels, rewrite_layer

BLOCK_BYTES: Final = 4 << 30
"""Memory for blocks on a CPU; what was used longest ago goes first, and is made again when it is asked for."""


@final
class Supernet:
    """See the module."""

    def __init__(
        self,
        dense: Checkpoint,
        ladders: Sequence[LayerLadders],
        restore: Restore,
        *,
        compensated: bool,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        block_bytes: int | None = None,
    ) -> None:
        """Nothing is made yet.

        Args:
            dense: the dense model; its weights are read as blocks are made.
            ladders: of every layer.
            restore: what a restoring projection that lost inputs becomes.
            compensated: whether it gains a bias by that.
            dtype: precision to compute in.
            device: where.
            block_bytes: memory for blocks; None is `BLOCK_BYTES`, or half of what is free on a GPU.
        """
        self._dense, self._ladders, self._restore = dense, tuple(ladders), restore
        self._compensated, self._dtype, self._device = compensated, dtype, device
        self._limit = _room(device) if block_bytes is None else block_bytes
        self._meta = MetaLayers(dense, dtype)
        self._blocks: OrderedDict[tuple[int, Part, int], dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._layers: dict[tuple[int, int, int], nn.Module] = {}

    def layer(self, index: int, attention: int, ffn: int) -> nn.Module:
        """Layer `index` after so many steps of its two ladders, with its weights."""
        key = index, attention, ffn
        tensors = {**self._block(index, "query", attention), **self._block(index, "ffn", ffn)}
        if key not in self._layers:
            plan = layer_plan(index, self._dense.shape, self._ladders[index], attention, ffn)
            shape = plan.shape(self._dense.shape.layers[index], compensated=self._compensated)
            layer = with_fast_linears(self._meta.made(index, shape))
            materialize(layer, tensors.items(), dtype=self._dtype, device=self._device)
            self._layers[key] = layer.to(self._device)
        return self._layers[key]

    def layers_at_once(self, weights: int) -> int:
        """How many layers of so many weights there is memory for; one at least."""
        return max(self._limit // (weights * self._dtype.itemsize), 1)

    def _block(self, index: int, part: Part, steps: int) -> dict[str, Tensor]:
        key = index, part, steps
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        block = self._made(index, part, steps)
        self._blocks[key] = block
        self._bytes += _size(block)
        # The block that is asked for and its layer's other one stay, however little memory there is.
        while self._bytes > self._limit and len(self._blocks) > 2:
            self._forget(*self._blocks.popitem(last=False))
        return block

    def _made(self, index: int, part: Part, steps: int) -> dict[str, Tensor]:
        attention, ffn = (steps, 0) if part == "query" else (0, steps)
        plan = layer_plan(index, self._dense.shape, self._ladders[index], attention, ffn)
        kept = kept_channels(plan, self._dense.shape)
        prefix = f"{self._dense.family.modules.layers}.{index}."
        rewritten = rewrite_layer(self._dense, index, kept, self._restore, (part,))
        own = ((name.removeprefix(prefix), tensor) for name, tensor in rewritten)
        return {name: tensor.to(device=self._device, dtype=self._meta.precision(index, name)) for name, tensor in own}

    def _forget(self, key: tuple[int, Part, int], block: dict[str, Tensor]) -> None:
        self._bytes -= _size(block)
        index, part, steps = key
        position = 1 if part == "query" else 2
        for layer in [other for other in self._layers if other[0] == index and other[position] == steps]:
            del self._layers[layer]


def _room(device: str) -> int:
    if device == "cpu":
        return BLOCK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) // 2


def _size(block: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in block.values())
