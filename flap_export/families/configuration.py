"""A transformers configuration against its family's row: whether the row describes the model, and the model's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from flap_export.errors import ModelError
from flap_export.families.family import Family, Mixture, SharedExpert
from flap_export.families.rope import rope_types
from flap_export.shapes import DecoderShape, LatentSizes, LayerShape

LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_DEQUANTISED: Final = {
    "mxfp4": "save them in bfloat16 by `AutoModelForCausalLM.from_pretrained(..., dtype=torch.bfloat16, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(...)`, and copy the tokenizer"
}
"""How to get full-precision weights of models that are published in fewer bits only, by what holds these."""


def check_config(config: Any, family: Family) -> None:
    """Whether the model computes nothing that the table does not describe.

    Raises:
        ModelError: it is quantised, or a field asks for something else; the message names it.
    """
    _check_precision(config)
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise ModelError(f"layer_types holds {sorted(unknown)}; supported are {', '.join(sorted(LAYER_TYPES))}")
    _check_windows(config)
    _check_rotary_dim(config)
    _check_bases(config)
    if family.mixture is not None and _has_mixtures(config, family.mixture):
        _check_routing(config, family.mixture)
    for name, required in family.requires.items():
        allowed = (getattr(config, required),) if isinstance(required, str) else required
        found = _field(config, name, allowed[0])
        if found not in allowed:
            stated = f"{required} ({allowed[0]})" if isinstance(required, str) else str(allowed[0])
            raise ModelError(f"{family.model_type} is supported with {name} equal to {stated} only, got {found}")
    for settings in family.excludes:
        if _holds(config, settings):
            named = " and ".join(f"{name}={value}" for name, value in settings.items())
            together = " together" if len(settings) > 1 else ""
            raise ModelError(f"transformers' {family.model_type} cannot compute {named}{together}")


def _check_precision(config: Any) -> None:
    """Whether weights are numbers as they are, and where to get such where they were never published."""
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    mending = _DEQUANTISED.get(str(method), "start from the full-precision checkpoint")
    raise ModelError(f"its weights are quantised (quantization_config); {mending}")


def _field(config: Any, path: str, default: object) -> object:
    """What a configuration, or one of its sections, holds; the default where there is no such field."""
    for name in path.split("."):
        if not hasattr(config, name):
            return default
        config = getattr(config, name)
    return config


def _check_windows(config: Any) -> None:
    """Whether there is a window for the layers that want one: transformers' masks and attentions else disagree."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return
    window, used = getattr(config, "sliding_window", None), getattr(config, "use_sliding_window", True)
    if window is None or not used:
        raise ModelError(
            f"layer_types holds sliding_attention, but sliding_window is {window}"
            f"{'' if used else ' and use_sliding_window is false'}; such a model has no meaning, correct the fields"
        )


def _check_rotary_dim(config: Any) -> None:
    """Whether the channels of a head that turn, where a configuration counts them, are pairs, and all there."""
    turning = getattr(config, "rotary_dim", None)
    if turning is None:
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if turning % 2 or turning > size:
        raise ModelError(
            f"rotary_dim must be even and at most the {size} channels of a head, got {turning}; transformers cannot "
            "compute such a model, correct the field"
        )


def _check_bases(config: Any) -> None:
    """Whether every layer has a rotary base, where a configuration states one for each."""
    bases = getattr(config, "layer_rope_theta", None)
    if bases is not None and len(bases) != config.num_hidden_layers:
        raise ModelError(
            f"layer_rope_theta must hold {config.num_hidden_layers} numbers, a layer each, got {len(bases)}"
        )


def _has_mixtures(config: Any, mixture: Mixture) -> bool:
    return mixture.layers is None or any(mixture.layers(config, index) for index in range(config.num_hidden_layers))


def _check_routing(config: Any, mixture: Mixture) -> None:
    """Whether routers have as many experts as they choose, and groups of two or more where they choose groups first."""
    experts = getattr(config, mixture.experts_field)
    name, layers = mixture.chosen_field, config.num_hidden_layers
    chosen = _chosen_counts(config, mixture)
    if len(chosen) != layers:
        raise ModelError(f"{name} must be one number, or one for each of {layers} layers, got {len(chosen)}")
    if any(not isinstance(count, int) or not 1 <= count <= experts for count in chosen):
        raise ModelError(f"{name} must lie in 1..{experts} ({mixture.experts_field}), got {getattr(config, name)}")
    _check_shared_expert(config, mixture.shared)
    groups = getattr(config, "n_group", None)
    if groups is None:
        return
    if groups < 1 or experts % groups or experts // groups < 2:
        raise ModelError(
            f"n_group must divide {mixture.experts_field} ({experts}) into groups of at least 2, got {groups}"
        )
    if not 1 <= config.topk_group <= groups:
        raise ModelError(f"topk_group must lie in 1..{groups} (n_group), got {config.topk_group}")


def _check_shared_expert(config: Any, shared: SharedExpert | None) -> None:
    """Whether there is a shared expert where the class makes one in any case."""
    name = None if shared is None or shared.may_be_missing else shared.count_field or shared.width_field
    if name is not None and not getattr(config, name):
        raise ModelError(f"{name} must be at least 1, got {getattr(config, name)}; such models are not supported")


def shape_from_config(config: Any, family: Family) -> DecoderShape:
    """The dense decoder's shape, read from a transformers configuration.

    Raises:
        ModelError: there is no layer, the query heads are not a multiple of the KV heads, or they do not fill the
            hidden size where the family's class takes that for granted.
    """
    if config.num_hidden_layers < 1:
        raise ModelError(f"num_hidden_layers must be at least 1, got {config.num_hidden_layers}")
    heads, kv_heads = config.num_attention_heads, _kv_heads(config, family)
    field = "v_head_dim" if family.latent else "head_dim"
    head_dim = None if family.heads.derived_size else getattr(config, field, None)
    if kv_heads < 1 or heads % kv_heads:
        raise ModelError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    head_dim = head_dim or config.hidden_size // heads
    if family.heads.fill_hidden and heads * head_dim != config.hidden_size:
        raise ModelError(
            f"the heads of {family.model_type} must fill its hidden size: num_attention_heads times head_dim must be "
            f"hidden_size ({config.hidden_size}), got {heads} times {head_dim}"
        )
    attention = {
        "query_heads": heads,
        "kv_heads": kv_heads,
        "joint_query_heads": heads if family.has_space("joint_query") else 0,
        "joint_key_heads": kv_heads if family.has_space("joint_key") else 0,
        "attention_bias": family.has_bias("query", config),
        "head_numbers": tuple(range(heads)) if family.alibi else (),
    }
    layers = tuple(
        LayerShape(**attention, **_ffn_fields(config, family, index)) for index in range(config.num_hidden_layers)
    )
    return DecoderShape(
        hidden_size=config.hidden_size,
        head_dim=head_dim,
        vocabulary_size=config.vocab_size,
        ffn_matrices=family.ffn_matrices,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        parallel_blocks=_is_set(config, family.parallel_blocks),
        shared_gates=family.mixture is not None and family.mixture.shared is not None and family.mixture.shared.gated,
        experts_per_token=_experts_per_token(config, family, layers),
        latent=_latent_sizes(config) if family.latent else None,
        layers=layers,
    )


def _latent_sizes(config: Any) -> LatentSizes:
    if config.q_lora_rank == 0:
        raise ModelError("q_lora_rank must be at least 1, or null where queries have no latent, got 0")
    return LatentSizes(
        queries=config.q_lora_rank or 0,
        keys_and_values=config.kv_lora_rank,
        score=config.qk_nope_head_dim + config.qk_rope_head_dim,
        turning=config.qk_rope_head_dim,
    )


def heads_are_fixed(config: Any, family: Family) -> bool:
    """Whether the family's own class takes the dense number of heads only, with such a configuration."""
    heads = family.heads
    by_fields = bool(heads.fixed_where) and _holds(config, heads.fixed_where)
    return heads.are_fixed or by_fields or not rope_types(config).isdisjoint(heads.fixed_with_rope)


def _is_set(config: Any, flag: bool | str) -> bool:
    """What a row says outright or a configuration's flag says for it."""
    return bool(getattr(config, flag)) if isinstance(flag, str) else flag


def _kv_heads(config: Any, family: Family) -> int:
    heads: int = config.num_attention_heads
    if family.heads.multi_query is not None and _holds(config, family.heads.multi_query):
        return 1
    field = None if family.heads.plain else family.heads.kv_field
    stated: int | None = None if field is None else getattr(config, field, None)
    return heads if stated is None else stated


def _holds(config: Any, settings: Mapping[str, object]) -> bool:
    """Whether every field holds the stated value; one that holds nothing is false."""
    return all((getattr(config, name) or False) == value for name, value in settings.items())


def _ffn_fields(config: Any, family: Family, index: int) -> dict[str, Any]:
    """The fields of a layer's shape that say what kind of FFN it has, and how large."""
    mixture = family.mixture
    if mixture is None or not (mixture.layers is None or mixture.layers(config, index)):
        return {"ffn_channels": _ffn_channels(config, family), "ffn_bias": family.has_bias("ffn", config)}
    width: int = getattr(config, mixture.width_field)
    return {
        "ffn_channels": width,
        "ffn_bias": family.has_bias("ffn", config),
        "experts": getattr(config, mixture.experts_field),
        "shared_channels": _shared_channels(config, mixture.shared, width),
    }


def _experts_per_token(config: Any, family: Family, layers: Sequence[LayerShape]) -> int:
    """k; 0 without experts, and where layers differ in it."""
    if family.mixture is None:
        return 0
    counts = _chosen_counts(config, family.mixture)
    found = {count for count, layer in zip(counts, layers, strict=True) if layer.experts}
    return found.pop() if len(found) == 1 else 0


def _chosen_counts(config: Any, mixture: Mixture) -> list[int]:
    """How many experts every layer chooses."""
    stated = getattr(config, mixture.chosen_field)
    return list(stated) if isinstance(stated, (list, tuple)) else [stated] * config.num_hidden_layers


def _shared_channels(config: Any, shared: SharedExpert | None, expert_width: int) -> int | None:
    """S, or None where there is no shared expert."""
    if shared is None:
        return None
    if shared.width_field is not None:
        return getattr(config, shared.width_field) or None
    count = 1 if shared.count_field is None else getattr(config, shared.count_field)
    return count * expert_width or None


def _ffn_channels(config: Any, family: Family) -> int:
    field, multiple = family.ffn.width_field, family.ffn.multiple
    stated: Any = None if field is None else getattr(config, field)
    width: int = config.hidden_size * multiple if stated is None and multiple else stated
    return width
