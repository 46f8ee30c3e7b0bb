"""The family table: a row for every model family that is supported."""

from __future__ import annotations

from flap_export.errors import ModelError
from flap_export.families.family import Family, Norm, Projection

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

_FALCON_PROJECTIONS = (
    Projection("self_attention.query_key_value", "hidden", ("query", "kv", "kv"), by_group=True),
    Projection("self_attention.dense", "query", ("hidden",)),
    Projection("mlp.dense_h_to_4h", "hidden", ("ffn",)),
    Projection("mlp.dense_4h_to_h", "ffn", ("hidden",)),
)

_GPT2_PROJECTIONS = (
    Projection("attn.c_attn", "hidden", ("query", "kv", "kv")),
    Projection("attn.c_proj", "query", ("hidden",)),
    Projection("mlp.c_fc", "hidden", ("ffn",)),
    Projection("mlp.c_proj", "ffn", ("hidden",)),
)

_GPT_BIGCODE_PROJECTIONS = (
    Projection("attn.c_attn", "hidden", ("query", "kv", "kv"), by_group=True),
    *_GPT2_PROJECTIONS[1:],
)

_GPT_NEOX_PROJECTIONS = (
    Projection("attention.query_key_value", "hidden", ("query", "kv", "kv"), by_group=True),
    Projection("attention.dense", "query", ("hidden",)),
    Projection("mlp.dense_h_to_4h", "hidden", ("ffn",)),
    Projection("mlp.dense_4h_to_h", "ffn", ("hidden",)),
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
        Family(
            "falcon",
            "Falcon",
            _FALCON_PROJECTIONS,
            attention="self_attention",
            decoder="transformer",
            layers="transformer.h",
            embedding="transformer.word_embeddings",
            ffn_matrices=2,
            ffn_width="ffn_hidden_size",
            multi_query={"new_decoder_architecture": False, "multi_query": True},
            kv_heads="num_kv_heads",
            bias_flags={"query": "bias", "ffn": "bias"},
            requires={"alibi": (False, None)},
            excludes=(
                {"new_decoder_architecture": True, "parallel_attn": False},
                {"new_decoder_architecture": False, "parallel_attn": True, "num_ln_in_parallel_attn": 2},
            ),
        ),
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
        Family(
            "gpt2",
            "GPT2",
            _GPT2_PROJECTIONS,
            language_model="LMHeadModel",
            # Before, attention was called without its scale, and sdpa knew of none of its settings.
            since="5.4",
            attention="attn",
            decoder="transformer",
            layers="transformer.h",
            embedding="transformer.wte",
            ffn_matrices=2,
            ffn_width="n_inner",
            ffn_multiple=4,
            buffers=(".attn.bias", ".attn.masked_bias"),
            transposed=True,
            plain_heads=True,
            bias_flags={"query": None, "ffn": None},
            requires={"add_cross_attention": (False,)},
        ),
        Family(
            "gpt_bigcode",
            "GPTBigCode",
            _GPT_BIGCODE_PROJECTIONS,
            # Before, attention was called without what the caller gives beside the usual.
            since="5.4",
            attention="attn",
            decoder="transformer",
            layers="transformer.h",
            embedding="transformer.wte",
            ffn_matrices=2,
            ffn_width="n_inner",
            ffn_multiple=4,
            buffers=("transformer.bias", ".attn.bias", ".attn.masked_bias"),
            multi_query={"multi_query": True},
            kv_heads=None,
            bias_flags={"query": None, "ffn": None},
            requires={"add_cross_attention": (False,)},
        ),
        Family(
            "gpt_neox",
            "GPTNeoX",
            _GPT_NEOX_PROJECTIONS,
            # Before, the head had another name.
            since="5.14",
            attention="attention",
            decoder="gpt_neox",
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            ffn_matrices=2,
            stored_names={"embed_out.": "lm_head."},
            buffers=(".attention.bias", ".attention.masked_bias"),
            plain_heads=True,
            rope_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
            bias_flags={"query": "attention_bias", "ffn": None},
        ),
        # With layer_types, transformers takes it for another family, whose layers differ in their windows.
        Family("mistral", "Mistral", _SEPARATE_PROJECTIONS, requires={"layer_types": (None,)}),
        Family(
            "mixtral",
            "Mixtral",
            _with_experts("w1", "w3", "w2"),
            since="5",
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
            since="5",
            ffn_width="moe_intermediate_size",
            experts="num_experts",
            bias_flags={"query": "attention_bias"},
            requires={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
        ),
    )
}


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
            "A further family is a row of flap_export/families/table.py"
        )
    return FAMILIES[model_type]
