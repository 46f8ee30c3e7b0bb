"""Rotary settings of a configuration: the forms two generations of transformers read, and how far tables hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flap_export.errors import ModelError

_STATED_BESIDE = ("rope_theta", "partial_rotary_factor")
"""What transformers 5 keeps among the rotary parameters and 4.x beside them."""


def both_rope_forms(config: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """State the rotary settings as transformers 5 reads them and as 4.x does; each ignores the other's form.

    Args:
        config: of a `config.json`.
        names: what 4.x called parameters of this family, where that is something else.
    """
    old_names = {name: names.get(name, name) for name in _STATED_BESIDE}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        return {**config, **_beside_by_layer_type(parameters, config)}
    if "rope_local_base_freq" in config:
        return {**config, "rope_parameters": _by_layer_type(config)}
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        beside = {old: parameters[name] for name, old in old_names.items() if name in parameters}
        return {**config, **beside, "rope_scaling": _scaling(parameters, config)}
    if old_names["rope_theta"] in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        beside = {name: config[old] for name, old in old_names.items() if old in config}
        return {**config, "rope_parameters": {**scaling, **beside}}
    return dict(config)


def _by_layer_type(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Gemma 3's rotary parameters of transformers 5: sliding layers have a base of their own and no scaling."""
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {
        "full_attention": {**scaling, **theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]},
    }


def _beside_by_layer_type(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as Gemma 3 of transformers 4.x states it."""
    full, sliding = parameters["full_attention"], parameters.get("sliding_attention") or {}
    stated = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": sliding.get("rope_theta")}
    return {
        **{name: value for name, value in stated.items() if value is not None},
        "rope_scaling": _scaling(full, config),
    }


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


def check_rope(config: Any, fields: Sequence[str] = ()) -> None:
    """Whether transformers knows the kinds of rotary embedding that a configuration states.

    Args:
        config: a transformers configuration.
        fields: further parameters that must be there.

    Raises:
        ModelError: it does not know one, or a parameter is missing.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"default", *ROPE_INIT_FUNCTIONS}
    for kind in _kinds(config):
        stated = kind.get("rope_type", kind.get("type", "default"))
        if stated not in known:
            raise ModelError(f"rope_type is '{stated}'; this version of transformers knows {', '.join(sorted(known))}")
        missing = [name for name in fields if kind.get(name) is None]
        if missing:
            raise ModelError(f"rope_parameters lack {', '.join(missing)}, which {config.model_type} cannot do without")


def _kinds(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of every kind of layers: one, or one of each where they turn differently."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]


def table_positions(config: Any) -> int | None:
    """Positions up to which one rotary table holds, or None where any number does.

    Longrope turns every angle by other factors once a sequence is longer than the original training length.

    Args:
        config: a transformers configuration.
    """
    beside = getattr(config, "original_max_position_embeddings", None)
    held = [
        int(beside or kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in _kinds(config)
        if kind.get("rope_type", kind.get("type")) == "longrope"
    ]
    return min(held, default=None)
