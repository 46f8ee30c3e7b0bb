"""ALiBi (arXiv:2108.12409): every head lowers the scores of keys in proportion to their distance, by its own slope.

Slopes belong to the heads of the dense model: a pruned layer keeps those of its heads, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flap_export.models.opening import Checkpoint


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of as many heads, float32 [heads]: 2^(-8 i / P) for i = 1..P, with P heads a power of two.

    Of the next power of two otherwise, with every other one first: 2, 4, .., P, 1, 3, ..
    """
    power = 1 << (heads - 1).bit_length()
    every = torch.arange(1, power + 1)
    order = every if power == heads else torch.cat([every[1::2], every[::2]])[:heads]
    return torch.exp2(order * (-8 / power))


def slope_tables(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """Slopes [Q, 1, 1] of every layer's attention that kept a head, by name; none in families without.

    Layers with the same heads have one tensor.
    """
    if checkpoint.family.alibi is None:
        return {}
    slopes, modules = alibi_slopes(checkpoint.config.num_attention_heads), checkpoint.family.modules
    kept = [layer.head_numbers for layer in checkpoint.shape.layers]
    tables = {numbers: slopes[list(numbers)].view(-1, 1, 1).to(device, dtype) for numbers in set(kept)}
    return {
        f"{modules.layers}.{index}.{modules.attention}.slopes": tables[numbers]
        for index, numbers in enumerate(kept)
        if numbers
    }


def register_tables(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Let modules of `model` hold tables, each by its path and name."""
    for path, table in tables.items():
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner).register_buffer(name, table)
