"""Rotary settings of a configuration: the forms two generations of transformers read, and how far tables hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STATED_BESIDE = ("rope_theta", "partial_rotary_factor")
"""What transformers 5 keeps among the rotary parameters and 4.x beside them."""


def both_rope_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the rotary settings as transformers 5 reads them and as 4.x does; each ignores the other's form."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        beside = {name: parameters[name] for name in _STATED_BESIDE if name in parameters}
        return {**config, **beside, "rope_scaling": _scaling(parameters, config)}
    if "rope_theta" in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        beside = {name: config[name] for name in _STATED_BESIDE if name in config}
        return {**config, "rope_parameters": {**scaling, **beside}}
    return dict(config)


def _scaling(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4.x, or None where nothing is scaled."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {name: value for name, value in parameters.items() if name not in _STATED_BESIDE}
    if kind != "longrope":
        return scaling
    # Phi-3 of 4.x counts the fields and knows the older spelling only.
    del scaling["rope_type"]
    stated = {name for name in scaling if name in config and config[name] == scaling[name]}
    return {"type": kind, **{name: value for name, value in scaling.items() if name not in stated}}


def table_positions(config: Any) -> int | None:
    """Positions up to which one rotary table holds, or None where any number does.

    Longrope turns every angle by other factors once a sequence is longer than the original training length.

    Args:
        config: a transformers configuration.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if parameters.get("rope_type", parameters.get("type")) != "longrope":
        return None
    inside, beside = (
        parameters.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
    )
    stated = beside or inside or config.max_position_embeddings
    return int(stated)
