"""Rotary settings of a configuration: the forms two generations of transformers read, and how far tables hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from flap_export.errors import ModelError

_STATED_BESIDE = ("rope_theta", "partial_rotary_factor")
"""What transformers 5 keeps among the rotary parameters and 4 beside them."""
_NO_NAMES: Mapping[str, str] = MappingProxyType({})


def as_read(raw: Mapping[str, Any], names: Mapping[str, str] = _NO_NAMES, *, generation: int) -> dict[str, Any]:
    """A `config.json` with rotary settings that the running transformers reads.

    Transformers 5 understands the settings of both generations, defaults of its classes included, and is left to it. 4
    takes no notice of what 5 writes, and would turn heads by other angles without a word.

    Args:
        raw: of a `config.json`.
        names: what 4 called parameters of this family, where that is something else.
        generation: of transformers.
    """
    parameters = raw.get("rope_parameters")
    if generation >= 5 or raw.get("rope_scaling") or not isinstance(parameters, dict):
        return dict(raw)
    return {**raw, **_older_form(parameters, names, raw)}


def both_rope_forms(raw: Mapping[str, Any], config: Any, names: Mapping[str, str] = _NO_NAMES) -> dict[str, Any]:
    """The rotary settings as transformers 5 reads them and as 4 does, whichever wrote them.

    Args:
        raw: of a `config.json`.
        config: what the running transformers made of it, whose angles count.
        names: as of `as_read`.
    """
    parameters = getattr(config, "rope_parameters", None) or _newer_form(raw, names)
    if not parameters:
        return dict(raw)
    beside = {"original_max_position_embeddings": getattr(config, "original_max_position_embeddings", None)}
    return {**raw, "rope_parameters": deepcopy(parameters), **_older_form(parameters, names, beside)}


def _newer_form(raw: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any] | None:
    """`rope_parameters` of transformers 5, from what 4 reads; None where nothing is stated."""
    scaling, stated = raw.get("rope_scaling"), raw.get("rope_parameters")
    if stated and not scaling:
        parameters: Mapping[str, Any] = stated
        return parameters
    if "rope_local_base_freq" in raw:
        return _by_layer_type(raw)
    old_names = {name: names.get(name, name) for name in _STATED_BESIDE}
    if not scaling and old_names["rope_theta"] not in raw:
        return None
    beside = {name: raw[old] for name, old in old_names.items() if old in raw}
    return {**(scaling or {"rope_type": "default"}), **beside}


def _by_layer_type(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Gemma 3's rotary parameters of transformers 5: sliding layers have a base of their own and no scaling."""
    scaling = raw.get("rope_scaling") or {"rope_type": "default"}
    theta = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    return {
        "full_attention": {**scaling, **theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": raw["rope_local_base_freq"]},
    }


def _older_form(parameters: Mapping[str, Any], names: Mapping[str, str], beside: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers 4 that say the same; `beside` holds what else 4 reads beside the scaling."""
    full = parameters.get("full_attention")
    if isinstance(full, dict):
        stated = {
            "rope_theta": full.get("rope_theta"),
            "rope_local_base_freq": (parameters.get("sliding_attention") or {}).get("rope_theta"),
        }
        fields = {name: value for name, value in stated.items() if value is not None}
        return {**fields, "rope_scaling": _scaling(full, beside)}
    fields = {names.get(name, name): parameters[name] for name in _STATED_BESIDE if name in parameters}
    return {**fields, "rope_scaling": _scaling(parameters, beside)}


def _scaling(parameters: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4, or None where nothing is scaled."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    left_out = (*_STATED_BESIDE, "rope_type", "type")
    scaling = {name: value for name, value in parameters.items() if name not in left_out}
    if kind != "longrope":
        return {"rope_type": kind, **scaling}
    # Phi-3 of 4 counts the fields and knows the older spelling only.
    return {"type": kind, **{name: value for name, value in scaling.items() if beside.get(name) != value}}


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


def rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding that a configuration states."""
    return {str(kind.get("rope_type", kind.get("type", "default"))) for kind in _kinds(config)}


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
