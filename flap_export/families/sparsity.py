"""Which layers of a configuration are mixtures of experts, where a family has plain layers among them."""

from __future__ import annotations

from typing import Any


def by_step(config: Any, index: int) -> bool:
    """Every so many layers one, but those that are named as plain."""
    is_due: bool = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
    return is_due and index not in (config.mlp_only_layers or ())


def after_the_first(config: Any, index: int) -> bool:
    """All behind so many plain ones."""
    first: int = config.first_k_dense_replace or 0
    return index >= first


def in_range(config: Any, index: int) -> bool:
    """Every so many layers one, from one layer to another."""
    first, last, interval = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    return index in range(first, last + 1) and (index + 1) % interval == 0


def by_name(config: Any, index: int) -> bool:
    """Those that are called so."""
    is_sparse: bool = config.mlp_layer_types[index] == "sparse"
    return is_sparse
