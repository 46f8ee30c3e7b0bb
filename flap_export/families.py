"""The family table: where a model family keeps its attention, FFN and norms, as data.

A projection declares the space of its inputs and of its outputs. Everything that cuts, counts or exports
weights follows from these spaces; a further family is a further row of `FAMILIES`.

    hidden   the residual stream, never cut
    query    Q heads of D channels        kv   K heads of D channels        ffn   F channels

In a mixture of experts every expert has an `ffn` space of its own; `*` in a path stands for the expert's number, as
checkpoints have it. Routers are no projections: they read and write what is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flap_export.errors import ModelError
from flap_export.shapes import DecoderShape, LayerShape

Space = Literal["hidden", "query", "kv", "ffn"]
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
EVERY_EXPERT = "*"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Projection:
    """A linear module below a decoder layer; several output spaces mean fused outputs, stacked in that order."""

    path: str
    inputs: Space
    outputs: tuple[Space, ...]

    @property
    def restores(self) -> bool:
        """Whether it maps a cut space back to the residual stream, so that compensation goes here."""
        return self.inputs != "hidden" and self.outputs == ("hidden",)

    @property
    def part(self) -> Literal["query", "ffn"]:
        """Which part of a layer it belongs to: attention, whose heads are cut, or the FFN."""
        return "ffn" if "ffn" in (self.inputs, *self.outputs) else "query"

    def at(self, expert: int | None) -> str:
        """The path in one expert, or in a plain FFN."""
        return self.path if expert is None else self.path.replace(EVERY_EXPERT, str(expert))


@dataclass(frozen=True)
class Norm:
    """What sets a family's RMS norm apart: x / sqrt(mean(x^2) + epsilon) * (weight + offset)."""

    epsilon: str = "variance_epsilon"
    """The module's attribute that holds it."""
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One row: module paths relative to the causal LM (or to one layer), and class names inside transformers."""

    model_type: str
    class_stem: str
    """`<stem>ForCausalLM` and `<stem>Config` are the classes, `<stem>RMSNorm` its norm."""
    projections: tuple[Projection, ...]
    config_stem: str | None = None
    """Stem of the configuration's class where it is another one."""
    attention: str = "self_attn"
    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    ffn_matrices: int = 3
    ffn_width: str = "intermediate_size"
    """Configuration field that holds F."""
    experts: str | None = None
    """Configuration field that holds E, in mixtures of experts."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Parts of tensors' names in checkpoints, and what the model calls them."""
    plain_heads: bool = False
    """Whether every query head has a KV head of its own and D is H / Q, whatever else a configuration states."""
    norm: Norm = Norm()
    attention_kernel: str = "sdpa"
    """Attention implementation of transformers to run; one that leaves nothing of the family out."""
    bias_flags: Mapping[Space, str] = field(default_factory=dict)
    """Configuration flag that gives all projections around a space a bias. A family with both can hold a
    compensated uniform plan in its own stock classes."""
    requires: Mapping[str, tuple[object, ...] | str] = field(default_factory=dict)
    """What configuration fields must hold: one of these values, or the same as another field."""

    def projection(self, path: str) -> Projection | None:
        """The projection at `path` below a layer, in whichever expert, or None."""
        general = _NUMBER.sub(EVERY_EXPERT, path)
        return next((projection for projection in self.projections if projection.path == general), None)

    def stored_name(self, name: str) -> str:
        """What checkpoints of the family's own class call a tensor."""
        for stored, called in self.stored_names.items():
            name = name.replace(called, stored)
        return name

    def restoring(self, space: Space) -> Projection:
        """The projection that maps `space` back to the residual stream: o_proj for query, down_proj for ffn."""
        return next(p for p in self.projections if p.restores and p.inputs == space)

    def restoring_paths(self, space: Space, layer: LayerShape) -> list[str]:
        """Where the restoring projections of `space` are: one, or that of every expert in turn."""
        restoring = self.restoring(space)
        return [restoring.at(expert) for expert in experts_of(space, layer)]


_SEPARATE_PROJECTIONS = (
    Projection("self_attn.q_proj", "hidden", ("query",)),
    Projection("self_attn.k_proj", "hidden", ("kv",)),
    Projection("self_attn.v_proj", "hidden", ("kv",)),
    Projection("self_attn.o_proj", "query", ("hidden",)),
    Projection("mlp.gate_proj", "hidden", ("ffn",)),
    Projection("mlp.up_proj", "hidden", ("ffn",)),
    Projection("mlp.down_proj", "ffn", ("hidden",)),
)

_FUSED_PROJECTIONS = (
    Projection("self_attn.qkv_proj", "hidden", ("query", "kv", "kv")),
    Projection("self_attn.o_proj", "query", ("hidden",)),
    Projection("mlp.gate_up_proj", "hidden", ("ffn", "ffn")),
    Projection("mlp.down_proj", "ffn", ("hidden",)),
)

_OPT_PROJECTIONS = (
    Projection("self_attn.q_proj", "hidden", ("query",)),
    Projection("self_attn.k_proj", "hidden", ("kv",)),
    Projection("self_attn.v_proj", "hidden", ("kv",)),
    Projection("self_attn.out_proj", "query", ("hidden",)),
    Projection("fc1", "hidden", ("ffn",)),
    Projection("fc2", "ffn", ("hidden",)),
)


def _with_experts(gate: str, up: str, down: str) -> tuple[Projection, ...]:
    """Separate attention projections, and a mixture of gated experts."""
    return (
        *_SEPARATE_PROJECTIONS[:4],
        Projection(f"mlp.experts.*.{gate}", "hidden", ("ffn",)),
        Projection(f"mlp.experts.*.{up}", "hidden", ("ffn",)),
        Projection(f"mlp.experts.*.{down}", "ffn", ("hidden",)),
    )


_GEMMA_NORM = Norm(epsilon="eps", offset=1.0)
_ONE_DIRECTION = {"use_bidirectional_attention": (False, None)}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", _SEPARATE_PROJECTIONS, bias_flags={"query": "attention_bias", "ffn": "mlp_bias"}),
        Family(
            "gemma2",
            "Gemma2",
            _SEPARATE_PROJECTIONS,
            norm=_GEMMA_NORM,
            # Sdpa has no softcap: transformers 5 refuses it, 4.57 leaves the softcap out without a word.
            attention_kernel="eager",
            bias_flags={"query": "attention_bias"},
            requires=_ONE_DIRECTION,
        ),
        Family(
            "gemma3_text",
            "Gemma3",
            _SEPARATE_PROJECTIONS,
            config_stem="Gemma3Text",
            norm=_GEMMA_NORM,
            bias_flags={"query": "attention_bias"},
            requires=_ONE_DIRECTION,
        ),
        # With layer_types, transformers takes it for another family, whose layers differ in their windows.
        Family("mistral", "Mistral", _SEPARATE_PROJECTIONS, requires={"layer_types": (None,)}),
        Family(
            "mixtral",
            "Mixtral",
            _with_experts("w1", "w3", "w2"),
            experts="num_local_experts",
            stored_names={".block_sparse_moe.": ".mlp."},
        ),
        Family(
            "opt",
            "OPT",
            _OPT_PROJECTIONS,
            decoder="model.decoder",
            layers="model.decoder.layers",
            embedding="model.decoder.embed_tokens",
            ffn_matrices=2,
            ffn_width="ffn_dim",
            plain_heads=True,
            bias_flags={"query": "enable_bias", "ffn": "enable_bias"},
            requires={"word_embed_proj_dim": "hidden_size"},
        ),
        Family("phi3", "Phi3", _FUSED_PROJECTIONS),
        Family("qwen2", "Qwen2", _SEPARATE_PROJECTIONS),
        Family("qwen3", "Qwen3", _SEPARATE_PROJECTIONS, bias_flags={"query": "attention_bias"}),
        Family(
            "qwen3_moe",
            "Qwen3Moe",
            _with_experts("gate_proj", "up_proj", "down_proj"),
            ffn_width="moe_intermediate_size",
            experts="num_experts",
            bias_flags={"query": "attention_bias"},
            requires={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
        ),
    )
}


def expert_at(path: str) -> int | None:
    """The number of the expert that a path below a layer leads into, or None."""
    number = _NUMBER.search(path)
    return None if number is None else int(number.group())


def experts_of(space: Space, layer: LayerShape) -> Sequence[int | None]:
    """The experts that have a `space` of their own each; (None,) where there is but one."""
    return range(layer.experts) if space == "ffn" and layer.experts else (None,)


def family_of(model_type: str) -> Family:
    """The row of `model_type`.

    Raises:
        ModelError: the table has no such family.
    """
    if f"{model_type}_text" in FAMILIES:
        raise ModelError(
            f"'{model_type}' models see images too; only their text models, {model_type}_text, are supported; save "
            "that by `AutoModelForImageTextToText.from_pretrained(...).model.language_model.save_pretrained(...)`, and "
            "copy the tokenizer"
        )
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family '{model_type}' is not in the family table; supported are {', '.join(sorted(FAMILIES))}. "
            "A further family is a row of flap_export/families.py"
        )
    return FAMILIES[model_type]


def check_config(config: Any, family: Family) -> None:
    """Whether the model computes nothing that the table does not describe.

    Raises:
        ModelError: it is quantised, or a field asks for something else; the message names it.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("its weights are quantised (quantization_config); start from the full-precision checkpoint")
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise ModelError(f"layer_types holds {sorted(unknown)}; supported are {', '.join(sorted(LAYER_TYPES))}")
    for name, required in family.requires.items():
        allowed = (getattr(config, required),) if isinstance(required, str) else required
        found = getattr(config, name, allowed[0])
        if found not in allowed:
            stated = f"{required} ({allowed[0]})" if isinstance(required, str) else str(allowed[0])
            raise ModelError(f"{family.model_type} is supported with {name} equal to {stated} only, got {found}")


def shape_from_config(config: Any, family: Family) -> DecoderShape:
    """The dense decoder's shape, read from a transformers configuration.

    Raises:
        ModelError: there is no layer, or the query heads are not a multiple of the KV heads.
    """
    if config.num_hidden_layers < 1:
        raise ModelError(f"num_hidden_layers must be at least 1, got {config.num_hidden_layers}")
    heads = config.num_attention_heads
    kv_heads, head_dim = (
        None if family.plain_heads else getattr(config, name, None) for name in ("num_key_value_heads", "head_dim")
    )
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ModelError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    layer = LayerShape(
        query_heads=heads,
        kv_heads=kv_heads,
        ffn_channels=getattr(config, family.ffn_width),
        attention_bias=_has_bias(config, family, "query"),
        ffn_bias=_has_bias(config, family, "ffn"),
        experts=getattr(config, family.experts) if family.experts else 0,
    )
    return DecoderShape(
        hidden_size=config.hidden_size,
        head_dim=head_dim or config.hidden_size // heads,
        vocabulary_size=config.vocab_size,
        ffn_matrices=family.ffn_matrices,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        layers=(layer,) * config.num_hidden_layers,
    )


def _has_bias(config: Any, family: Family, space: Space) -> bool:
    return space in family.bias_flags and bool(getattr(config, family.bias_flags[space], False))
