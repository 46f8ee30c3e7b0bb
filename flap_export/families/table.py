"""The family table: a row for every model family that is supported."""

from __future__ import annotations

from dataclasses import replace

from flap_export.errors import ModelError
from flap_export.families import sparsity
from flap_export.families.family import (
    Family,
    FeedForward,
    Heads,
    Mixture,
    Modules,
    Norm,
    Projection,
    Rotary,
    SharedExpert,
    Space,
    Stack,
    Stored,
)

_DIVIDING_HEADS = Heads(divide_hidden=True)
_SEPARATE_PROJECTIONS = (
    Projection("self_attn.q_proj", "hidden", ("query",)),
    Projection("self_attn.k_proj", "hidden", ("kv",)),
    Projection("self_attn.v_proj", "hidden", ("kv",)),
    Projection("self_attn.o_proj", "query", ("hidden",)),
    Projection("mlp.gate_proj", "hidden", ("ffn",)),
    Projection("mlp.up_proj", "hidden", ("ffn",)),
    Projection("mlp.down_proj", "ffn", ("hidden",)),
)

_LATENT_PROJECTIONS = (
    Projection("self_attn.q_proj", "hidden", ("score",), where=("q_lora_rank", False)),
    Projection("self_attn.q_b_proj", "query_latent", ("score",), where=("q_lora_rank", True)),
    Projection("self_attn.kv_b_proj", "kv_latent", ("key_value",)),
    *_SEPARATE_PROJECTIONS[3:],
)

_JOINTLY_NORMED_PROJECTIONS = (
    Projection("self_attn.q_proj", "hidden", ("joint_query",)),
    Projection("self_attn.k_proj", "hidden", ("joint_key",)),
    *_SEPARATE_PROJECTIONS[2:],
)

_UNGATED_PROJECTIONS = (*_SEPARATE_PROJECTIONS[:4], *_SEPARATE_PROJECTIONS[5:])

_FUSED_PROJECTIONS = (
    Projection("self_attn.qkv_proj", "hidden", ("query", "kv", "kv")),
    Projection("self_attn.o_proj", "query", ("hidden",)),
    Projection("mlp.gate_up_proj", "hidden", ("ffn", "ffn")),
    Projection("mlp.down_proj", "ffn", ("hidden",)),
)

_GLM_PROJECTIONS = (*_SEPARATE_PROJECTIONS[:4], *_FUSED_PROJECTIONS[2:])

_PHI_PROJECTIONS = (
    *_SEPARATE_PROJECTIONS[:3],
    Projection("self_attn.dense", "query", ("hidden",)),
    Projection("mlp.fc1", "hidden", ("ffn",)),
    Projection("mlp.fc2", "ffn", ("hidden",)),
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
    Projection("self_attention.query_key_value", "hidden", ("query", "kv", "kv"), blocks=None),
    Projection("self_attention.dense", "query", ("hidden",)),
    Projection("mlp.dense_h_to_4h", "hidden", ("ffn",)),
    Projection("mlp.dense_4h_to_h", "ffn", ("hidden",)),
)

_FALCON_MODULES = Modules(
    attention="self_attention",
    decoder="transformer",
    layers="transformer.h",
    embedding="transformer.word_embeddings",
)

_GPT2_PROJECTIONS = (
    Projection("attn.c_attn", "hidden", ("query", "kv", "kv")),
    Projection("attn.c_proj", "query", ("hidden",)),
    Projection("mlp.c_fc", "hidden", ("ffn",)),
    Projection("mlp.c_proj", "ffn", ("hidden",)),
)

_GPT2_MODULES = Modules(decoder="transformer", layers="transformer.h", embedding="transformer.wte", attention="attn")

_GPT_BIGCODE_PROJECTIONS = (
    Projection("attn.c_attn", "hidden", ("query", "kv", "kv"), blocks=None),
    *_GPT2_PROJECTIONS[1:],
)

_GPT_NEO_PROJECTIONS = (
    Projection("attn.attention.q_proj", "hidden", ("query",)),
    Projection("attn.attention.k_proj", "hidden", ("kv",)),
    Projection("attn.attention.v_proj", "hidden", ("kv",)),
    Projection("attn.attention.out_proj", "query", ("hidden",)),
    *_GPT2_PROJECTIONS[2:],
)

_GPTJ_PROJECTIONS = (
    Projection("attn.q_proj", "hidden", ("query",)),
    Projection("attn.k_proj", "hidden", ("kv",)),
    Projection("attn.v_proj", "hidden", ("kv",)),
    Projection("attn.out_proj", "query", ("hidden",)),
    Projection("mlp.fc_in", "hidden", ("ffn",)),
    Projection("mlp.fc_out", "ffn", ("hidden",)),
)

_GPT_NEOX_PROJECTIONS = (
    Projection("attention.query_key_value", "hidden", ("query", "kv", "kv"), blocks=None),
    Projection("attention.dense", "query", ("hidden",)),
    *_FALCON_PROJECTIONS[2:],
)


def _gated(
    path: str, space: Space, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Projection, ...]:
    """The projections of a gated FFN at `path`."""
    gate, up, down = names
    return (
        Projection(f"{path}.{gate}", "hidden", (space,)),
        Projection(f"{path}.{up}", "hidden", (space,)),
        Projection(f"{path}.{down}", space, ("hidden",)),
    )


_MIXTRAL_PROJECTIONS = (*_SEPARATE_PROJECTIONS[:4], *_gated("mlp.experts.*", "ffn", ("w1", "w3", "w2")))
_JOINTLY_NORMED_MIXTURE = (*_JOINTLY_NORMED_PROJECTIONS[:4], *_gated("mlp.experts.*", "ffn"))
_EXPERTS_IN_SOME_LAYERS = (*_SEPARATE_PROJECTIONS, *_gated("mlp.experts.*", "ffn"))
_LATENT_MIXTURE = (*_LATENT_PROJECTIONS, *_gated("mlp.experts.*", "ffn"), *_gated("mlp.shared_experts", "shared"))
_WITH_SHARED_EXPERTS = (*_EXPERTS_IN_SOME_LAYERS, *_gated("mlp.shared_experts", "shared"))


def _stack(name: str, *parts: str, alternating: bool = False, transposed: bool = False) -> Stack:
    """A tensor of all experts, beside which the model has parts for every one."""
    path = name.partition(".")[0]
    own = tuple(f"{path}.experts.*.{part}" for part in parts)
    return Stack(name, own, alternating=alternating, transposed=transposed)


_GPT_OSS_STACKS = (
    _stack("mlp.experts.gate_up_proj", "gate_proj.weight", "up_proj.weight", alternating=True, transposed=True),
    _stack("mlp.experts.gate_up_proj_bias", "gate_proj.bias", "up_proj.bias", alternating=True),
    _stack("mlp.experts.down_proj", "down_proj.weight", transposed=True),
    _stack("mlp.experts.down_proj_bias", "down_proj.bias"),
)

_COHERE_NORM = Norm(is_centred=True, suffix="LayerNorm")
_GEMMA_NORM = Norm(epsilon="eps", offset=1.0)
_LLAMA_BIAS_FLAGS: dict[Space, str] = {"query": "attention_bias", "ffn": "mlp_bias"}
_MISTRAL_WITH_IMAGES = ("mistral3",)
_JOINT_NORMS: dict[str, Space] = {"self_attn.q_norm.weight": "joint_query", "self_attn.k_norm.weight": "joint_key"}
_ROUTERS_CHOOSE = "5.24"
"""Before, mixtures chose experts themselves, and other weights of routers were in single precision."""
_EVERY_LAYER_A_MIXTURE = Mixture("num_experts", width_field="intermediate_size")
_MIXTURE_AFTER_THE_FIRST = Mixture(
    "n_routed_experts",
    shared=SharedExpert(count_field="n_shared_experts"),
    layers=sparsity.after_the_first,
    router_in_float32=True,
)
_MIXTURE_WHERE_NAMED = Mixture(
    "num_experts",
    shared=SharedExpert(count_field="num_shared_experts"),
    layers=sparsity.by_name,
    router_in_float32=True,
)
_OWN_KEYS_TURNED_BY_PAIRS: dict[str, tuple[object, ...] | str] = {
    "num_key_value_heads": "num_attention_heads",
    "rope_interleave": (True,),
}
_PARTIAL_ROTARY = Rotary(partial=True)
_COUNTED_ROTARY = Rotary(partial=True, counted_apart=True)
_NO_ROTARY_DIM = ({"rotary_dim": False},)
_ONE_DIRECTION = {"use_bidirectional_attention": (False, None)}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "apertus",
            "Apertus",
            _UNGATED_PROJECTIONS,
            # Before, its activation could not be made without weights.
            since="5",
            bias_flags={"query": "attention_bias"},
        ),
        Family("arcee", "Arcee", _UNGATED_PROJECTIONS, heads=_DIVIDING_HEADS, bias_flags=_LLAMA_BIAS_FLAGS),
        Family(
            "bloom",
            "Bloom",
            _FALCON_PROJECTIONS,
            modules=_FALCON_MODULES,
            # Its width is 4 H, whatever a configuration states.
            ffn=FeedForward(width_field=None, multiple=4),
            heads=Heads(plain=True),
            alibi="alibi",
            # Before, its model took neither positions nor a number of logits.
            since="5",
            attention_kernel="eager",
            bias_flags={"query": None, "ffn": None},
            # Products of slices, whose widths are those of the hidden size.
            requires={"slow_but_exact": (False,)},
        ),
        Family(
            "codegen",
            "CodeGen",
            # In each of four blocks, for as many devices: queries, values, keys.
            (Projection("attn.qkv_proj", "hidden", ("query", "kv", "kv"), blocks=4), *_GPTJ_PROJECTIONS[3:]),
            # Before, every attention had a table of its own.
            since="5.24",
            modules=_GPT2_MODULES,
            ffn=FeedForward(width_field="n_inner", multiple=4),
            stored=Stored(buffers=(".attn.causal_mask",)),
            heads=Heads(plain=True),
            rotary=Rotary(interleaved=True, sines_first=True, angles_once=True),
            parallel_blocks=True,
            bias_flags={"ffn": None},
            excludes=_NO_ROTARY_DIM,
        ),
        Family(
            "cohere",
            "Cohere",
            _SEPARATE_PROJECTIONS,
            rotary=Rotary(interleaved=True, in_float32=True),
            heads=Heads(parameters={"self_attn.q_norm.weight": "query", "self_attn.k_norm.weight": "kv"}),
            parallel_blocks=True,
            norm=_COHERE_NORM,
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "cohere2",
            "Cohere2",
            _SEPARATE_PROJECTIONS,
            heads=Heads(size_follows_in_4=True),
            rotary=Rotary(interleaved=True, in_float32=True),
            parallel_blocks=True,
            norm=_COHERE_NORM,
            bias_flags={"query": "attention_bias"},
        ),
        Family("cwm", "Cwm", _SEPARATE_PROJECTIONS, heads=_DIVIDING_HEADS, bias_flags={"ffn": "mlp_bias"}),
        Family(
            "deepseek_v2",
            "DeepseekV2",
            _LATENT_MIXTURE,
            since=_ROUTERS_CHOOSE,
            latent=True,
            heads=_DIVIDING_HEADS,
            mixture=_MIXTURE_AFTER_THE_FIRST,
            rotary=Rotary(interleaved=True, angles_once=True, in_float32=True),
            bias_flags={"query": "attention_bias"},
            # Routed experts have none in any case.
            requires={
                "num_key_value_heads": "num_attention_heads",
                "topk_method": ("greedy", "group_limited_greedy"),
                # Its class reads neither.
                "scoring_func": ("softmax",),
                "norm_topk_prob": (False, None),
                "mlp_bias": (False, None),
            },
            excludes=({"topk_method": "group_limited_greedy", "n_group": False},),
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3",
            _LATENT_MIXTURE,
            since=_ROUTERS_CHOOSE,
            latent=True,
            mixture=_MIXTURE_AFTER_THE_FIRST,
            rotary=Rotary(interleaved=True),
            stored=Stored(unused=("model.layers.{layers}.",)),
            bias_flags={"query": "attention_bias"},
            requires={**_OWN_KEYS_TURNED_BY_PAIRS, "scoring_func": ("sigmoid",)},
            excludes=({"n_group": False}, {"topk_group": False}),
        ),
        Family(
            "dots1",
            "Dots1",
            _WITH_SHARED_EXPERTS,
            since=_ROUTERS_CHOOSE,
            mixture=_MIXTURE_AFTER_THE_FIRST,
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "ernie4_5",
            "Ernie4_5",
            _SEPARATE_PROJECTIONS,
            rotary=Rotary(interleaved=True, in_float32=True),
            bias_flags={"query": "use_bias", "ffn": "use_bias"},
        ),
        Family(
            "ernie4_5_moe",
            "Ernie4_5_Moe",
            _WITH_SHARED_EXPERTS,
            since=_ROUTERS_CHOOSE,
            mixture=Mixture(
                "moe_num_experts",
                shared=SharedExpert(count_field="moe_num_shared_experts", may_be_missing=True),
                layers=sparsity.in_range,
                router_in_float32=True,
            ),
            rotary=Rotary(interleaved=True, in_float32=True),
            stored=Stored(names={".mlp.moe_statics.": ".mlp.gate.moe_statics."}, unused=("model.mtp_",)),
            # Routed experts have none in any case.
            requires={"use_bias": (False, None)},
        ),
        # Transformers computes it by Llama's classes, and calls its weights as Llama's are called.
        Family(
            "exaone",
            "Llama",
            _SEPARATE_PROJECTIONS,
            config_stem="Exaone",
            heads=_DIVIDING_HEADS,
            stored=Stored(
                names={
                    "transformer.wte.": "model.embed_tokens.",
                    "transformer.h.": "model.layers.",
                    "transformer.ln_f.": "model.norm.",
                    ".attn.attention.out_proj.": ".self_attn.o_proj.",
                    ".attn.attention.": ".self_attn.",
                    ".ln_1.": ".input_layernorm.",
                    ".ln_2.": ".post_attention_layernorm.",
                    ".mlp.c_fc_0.": ".mlp.gate_proj.",
                    ".mlp.c_fc_1.": ".mlp.up_proj.",
                    ".mlp.c_proj.": ".mlp.down_proj.",
                }
            ),
            bias_flags=_LLAMA_BIAS_FLAGS,
        ),
        Family("exaone4", "Exaone4", _SEPARATE_PROJECTIONS),
        Family(
            "exaone_moe",
            "ExaoneMoe",
            _WITH_SHARED_EXPERTS,
            since=_ROUTERS_CHOOSE,
            mixture=_MIXTURE_WHERE_NAMED,
            stored=Stored(
                names={".mlp.e_score_correction_bias": ".mlp.gate.e_score_correction_bias"}, unused=("mtp.",)
            ),
        ),
        Family(
            "falcon",
            "Falcon",
            _FALCON_PROJECTIONS,
            modules=_FALCON_MODULES,
            ffn=FeedForward(width_field="ffn_hidden_size"),
            heads=Heads(multi_query={"new_decoder_architecture": False, "multi_query": True}, kv_field="num_kv_heads"),
            bias_flags={"query": "bias", "ffn": "bias"},
            requires={"alibi": (False, None)},
            excludes=(
                {"new_decoder_architecture": True, "parallel_attn": False},
                {"new_decoder_architecture": False, "parallel_attn": True, "num_ln_in_parallel_attn": 2},
            ),
        ),
        Family(
            "flex_olmo",
            "FlexOlmo",
            _JOINTLY_NORMED_MIXTURE,
            since="5",
            mixture=_EVERY_LAYER_A_MIXTURE,
            heads=Heads(parameters=_JOINT_NORMS),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "gemma",
            "Gemma",
            _SEPARATE_PROJECTIONS,
            norm=_GEMMA_NORM,
            needs_bos=True,
            bias_flags={"query": "attention_bias"},
            requires=_ONE_DIRECTION,
        ),
        Family(
            "gemma2",
            "Gemma2",
            _SEPARATE_PROJECTIONS,
            heads=_DIVIDING_HEADS,
            norm=_GEMMA_NORM,
            needs_bos=True,
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
            heads=_DIVIDING_HEADS,
            norm=_GEMMA_NORM,
            needs_bos=True,
            bias_flags={"query": "attention_bias"},
            requires=_ONE_DIRECTION,
        ),
        Family("glm", "Glm", _GLM_PROJECTIONS, rotary=Rotary(interleaved=True, partial=True)),
        Family("glm4", "Glm4", _GLM_PROJECTIONS, rotary=Rotary(interleaved=True, partial=True)),
        Family(
            "glm4_moe",
            "Glm4Moe",
            _WITH_SHARED_EXPERTS,
            since=_ROUTERS_CHOOSE,
            mixture=_MIXTURE_AFTER_THE_FIRST,
            rotary=_PARTIAL_ROTARY,
            stored=Stored(unused=("model.layers.{layers}.",)),
        ),
        Family(
            "glm4_moe_lite",
            "Glm4MoeLite",
            _LATENT_MIXTURE,
            since=_ROUTERS_CHOOSE,
            latent=True,
            mixture=replace(_MIXTURE_AFTER_THE_FIRST, layers=sparsity.by_name),
            rotary=Rotary(interleaved=True),
            stored=Stored(unused=("model.layers.{layers}.",)),
            bias_flags={"query": "attention_bias"},
            requires=_OWN_KEYS_TURNED_BY_PAIRS,
        ),
        Family(
            "gpt2",
            "GPT2",
            _GPT2_PROJECTIONS,
            language_model="LMHeadModel",
            # Before, attention was called without its scale, and sdpa knew of none of its settings.
            since="5.4",
            modules=_GPT2_MODULES,
            ffn=FeedForward(width_field="n_inner", multiple=4),
            stored=Stored(buffers=(".attn.bias", ".attn.masked_bias"), transposed=True),
            heads=Heads(plain=True),
            bias_flags={"query": None, "ffn": None},
            requires={"add_cross_attention": (False,)},
        ),
        Family(
            "gpt_bigcode",
            "GPTBigCode",
            _GPT_BIGCODE_PROJECTIONS,
            # Before, attention was called without what the caller gives beside the usual.
            since="5.4",
            modules=_GPT2_MODULES,
            ffn=FeedForward(width_field="n_inner", multiple=4),
            stored=Stored(
                buffers=("transformer.bias", ".attn.bias", ".attn.masked_bias"), unread=("transformer.bias",)
            ),
            heads=Heads(multi_query={"multi_query": True}, kv_field=None),
            bias_flags={"query": None, "ffn": None},
            requires={"add_cross_attention": (False,)},
        ),
        Family(
            "gpt_neo",
            "GPTNeo",
            _GPT_NEO_PROJECTIONS,
            # Before, transformers kept the values of its masks to itself.
            since="5",
            modules=Modules(
                attention="attn.attention", decoder="transformer", layers="transformer.h", embedding="transformer.wte"
            ),
            ffn=FeedForward(multiple=4),
            stored=Stored(buffers=(".attn.attention.bias", ".attn.attention.masked_bias")),
            heads=Heads(plain=True),
            attention_kernel="eager",
            bias_flags={"query": None, "ffn": None},
        ),
        Family(
            "gpt_neox",
            "GPTNeoX",
            _GPT_NEOX_PROJECTIONS,
            # Before, the head had another name.
            since="5.14",
            modules=Modules(
                attention="attention", decoder="gpt_neox", layers="gpt_neox.layers", embedding="gpt_neox.embed_in"
            ),
            stored=Stored(names={"embed_out.": "lm_head."}, buffers=(".attention.bias", ".attention.masked_bias")),
            heads=Heads(plain=True),
            rotary=Rotary(
                partial=True, names_in_4={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
            ),
            bias_flags={"query": "attention_bias", "ffn": None},
        ),
        Family(
            "gptj",
            "GPTJ",
            _GPTJ_PROJECTIONS,
            # Before, every attention had a table of its own.
            since="5.24",
            modules=_GPT2_MODULES,
            ffn=FeedForward(width_field="n_inner", multiple=4),
            stored=Stored(buffers=(".attn.bias", ".attn.masked_bias")),
            heads=Heads(plain=True),
            rotary=Rotary(interleaved=True, sines_first=True, angles_once=True),
            parallel_blocks=True,
            bias_flags={"ffn": None},
            excludes=_NO_ROTARY_DIM,
        ),
        Family(
            "gpt_oss",
            "GptOss",
            (*_SEPARATE_PROJECTIONS[:4], *_gated("mlp.experts.*", "ffn")),
            since=_ROUTERS_CHOOSE,
            mixture=Mixture("num_local_experts", width_field="intermediate_size", router="mlp.router"),
            stored=Stored(stacks=_GPT_OSS_STACKS),
            heads=Heads(parameters={"self_attn.sinks": "query"}),
            rotary=Rotary(angles_once=True),
            # Nothing else knows of its sinks.
            attention_kernel="eager",
            bias_flags={"query": "attention_bias", "ffn": None},
        ),
        Family("granite", "Granite", _SEPARATE_PROJECTIONS, bias_flags=_LLAMA_BIAS_FLAGS),
        Family(
            "granite_swa",
            "GraniteSWA",
            _SEPARATE_PROJECTIONS,
            since=_ROUTERS_CHOOSE,
            heads=Heads(parameters={"self_attn.sinks": "query"}),
            # Nothing else knows of its sinks.
            attention_kernel="eager",
            bias_flags=_LLAMA_BIAS_FLAGS,
        ),
        Family(
            "granitemoe",
            "GraniteMoe",
            (*_SEPARATE_PROJECTIONS[:4], *_gated("block_sparse_moe.experts.*", "ffn")),
            since=_ROUTERS_CHOOSE,
            mixture=Mixture("num_local_experts", width_field="intermediate_size", router="block_sparse_moe.router"),
            stored=Stored(
                names={".block_sparse_moe.router.layer.": ".block_sparse_moe.router."},
                stacks=(
                    _stack("block_sparse_moe.input_linear.weight", "gate_proj.weight", "up_proj.weight"),
                    _stack("block_sparse_moe.output_linear.weight", "down_proj.weight"),
                ),
            ),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "helium",
            "Helium",
            _SEPARATE_PROJECTIONS,
            heads=Heads(fill_hidden=True),
            rotary=Rotary(interleaved=True),
            bias_flags={"ffn": "mlp_bias"},
        ),
        Family(
            "hyperclovax",
            "HyperCLOVAX",
            _SEPARATE_PROJECTIONS,
            heads=_DIVIDING_HEADS,
            bias_flags=_LLAMA_BIAS_FLAGS,
        ),
        Family("hunyuan_v1_dense", "HunYuanDenseV1", _SEPARATE_PROJECTIONS, bias_flags={"query": "attention_bias"}),
        Family(
            "hunyuan_v1_moe",
            "HunYuanMoEV1",
            (
                *_SEPARATE_PROJECTIONS[:4],
                *_gated("mlp.experts.*", "ffn"),
                *_gated("mlp.shared_mlp", "shared"),
            ),
            since=_ROUTERS_CHOOSE,
            mixture=Mixture(
                "num_experts", width_field="intermediate_size", shared=SharedExpert(), router_in_float32=True
            ),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "hy_v3",
            "HYV3",
            _WITH_SHARED_EXPERTS,
            since=_ROUTERS_CHOOSE,
            mixture=_MIXTURE_WHERE_NAMED,
            stored=Stored(
                names={
                    ".mlp.router.gate.": ".mlp.gate.",
                    ".mlp.expert_bias": ".mlp.e_score_correction_bias",
                    ".mlp.shared_mlp.": ".mlp.shared_experts.",
                },
                unused=("model.layers.{layers}.",),
            ),
            bias_flags={"query": "attention_bias"},
            # Routed experts have none in any case.
            requires={"mlp_bias": (False, None)},
        ),
        # Transformers computes it by Llama's classes, with biases everywhere or nowhere; no checkpoint has them.
        Family(
            "internlm3",
            "Llama",
            _SEPARATE_PROJECTIONS,
            config_stem="InternLM3",
            heads=_DIVIDING_HEADS,
            requires={"attention_bias": (False,), "mlp_bias": (False,)},
        ),
        Family(
            "iquestcoder",
            "Llama",
            _SEPARATE_PROJECTIONS,
            config_stem="IQuestCoder",
            heads=_DIVIDING_HEADS,
            bias_flags=_LLAMA_BIAS_FLAGS,
        ),
        Family("jais2", "Jais2", _UNGATED_PROJECTIONS, heads=_DIVIDING_HEADS, bias_flags=_LLAMA_BIAS_FLAGS),
        Family("llama", "Llama", _SEPARATE_PROJECTIONS, heads=_DIVIDING_HEADS, bias_flags=_LLAMA_BIAS_FLAGS),
        Family(
            "mellum",
            "Mellum",
            _EXPERTS_IN_SOME_LAYERS,
            since=_ROUTERS_CHOOSE,
            mixture=Mixture("num_experts", layers=sparsity.by_name),
            rotary=Rotary(newer_form_only=True),
            stored=Stored(unused=("mtp.",)),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "minimax_m2",
            "MiniMaxM2",
            (*_JOINTLY_NORMED_PROJECTIONS[:4], *_MIXTRAL_PROJECTIONS[4:]),
            since=_ROUTERS_CHOOSE,
            mixture=Mixture("num_local_experts", width_field="intermediate_size"),
            heads=Heads(parameters=_JOINT_NORMS),
            rotary=_PARTIAL_ROTARY,
            stored=Stored(names={".block_sparse_moe.": ".mlp."}),
        ),
        Family(
            "minicpm3",
            "MiniCPM3",
            _LATENT_PROJECTIONS,
            since=_ROUTERS_CHOOSE,
            latent=True,
            heads=_DIVIDING_HEADS,
            bias_flags=_LLAMA_BIAS_FLAGS,
            requires={"num_key_value_heads": "num_attention_heads"},
        ),
        Family("ministral", "Ministral", _SEPARATE_PROJECTIONS),
        Family(
            "ministral3",
            "Ministral3",
            _SEPARATE_PROJECTIONS,
            inside=_MISTRAL_WITH_IMAGES,
            rotary=Rotary(required_fields=("llama_4_scaling_beta", "original_max_position_embeddings")),
            requires={"layer_types": (None,)},
        ),
        # With layer_types it is a ministral, whose layers differ in their windows: see `open_checkpoint`.
        Family(
            "mistral",
            "Mistral",
            _SEPARATE_PROJECTIONS,
            inside=_MISTRAL_WITH_IMAGES,
            requires={"layer_types": (None,)},
        ),
        Family(
            "mixtral",
            "Mixtral",
            _MIXTRAL_PROJECTIONS,
            since="5",
            mixture=Mixture("num_local_experts", width_field="intermediate_size"),
            stored=Stored(names={".block_sparse_moe.": ".mlp."}),
        ),
        # Its class has slopes of one kind and no learned positions, whatever a configuration states.
        Family(
            "mpt",
            "Mpt",
            (
                Projection("attn.Wqkv", "hidden", ("query", "kv", "kv")),
                Projection("attn.out_proj", "query", ("hidden",)),
                Projection("ffn.up_proj", "hidden", ("ffn",)),
                Projection("ffn.down_proj", "ffn", ("hidden",)),
            ),
            # Before, its model took neither positions nor a number of logits.
            since="5",
            modules=Modules(
                attention="attn", decoder="transformer", layers="transformer.blocks", embedding="transformer.wte"
            ),
            ffn=FeedForward(width_field=None, multiple=4),
            heads=Heads(plain=True),
            positions_field="max_seq_len",
            alibi="position_bias",
            attention_kernel="eager",
            requires={
                "attn_config.alibi": (True,),
                "attn_config.alibi_bias_max": (8,),
                "attn_config.attn_type": ("multihead_attention",),
                "attn_config.prefix_lm": (False,),
                "attn_config.qk_ln": (False,),
                "expansion_ratio": (4,),
                "logit_scale": (None,),
                "no_bias": (True,),
            },
        ),
        Family(
            "nanochat",
            "NanoChat",
            (*_PHI_PROJECTIONS[:3], *_SEPARATE_PROJECTIONS[3:4], *_PHI_PROJECTIONS[4:]),
            since=_ROUTERS_CHOOSE,
            rotary=Rotary(backwards=True),
            norm=Norm(epsilon="eps"),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "nemotron",
            "Nemotron",
            _UNGATED_PROJECTIONS,
            since="5",
            rotary=_PARTIAL_ROTARY,
            norm=Norm(epsilon="eps", offset=1.0, is_centred=True, suffix="LayerNorm1P"),
            bias_flags=_LLAMA_BIAS_FLAGS,
        ),
        Family(
            "olmo",
            "Olmo",
            _SEPARATE_PROJECTIONS,
            norm=Norm(epsilon=1e-5, is_centred=True, suffix="LayerNorm"),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "olmo2",
            "Olmo2",
            _JOINTLY_NORMED_PROJECTIONS,
            heads=Heads(parameters=_JOINT_NORMS),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "olmo3",
            "Olmo3",
            _JOINTLY_NORMED_PROJECTIONS,
            # Earlier versions of transformers 5 turned all layers by one set of parameters, with windows or without.
            since="5.13",
            heads=Heads(parameters=_JOINT_NORMS),
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "olmoe",
            "Olmoe",
            _JOINTLY_NORMED_MIXTURE,
            since="5",
            mixture=_EVERY_LAYER_A_MIXTURE,
            heads=Heads(parameters=_JOINT_NORMS, fill_hidden=True),
            bias_flags={"query": "attention_bias"},
            # Its class hands a window to attention, and makes masks without one.
            requires={"sliding_window": (None,)},
        ),
        Family(
            "opt",
            "OPT",
            _OPT_PROJECTIONS,
            modules=Modules(
                decoder="model.decoder", layers="model.decoder.layers", embedding="model.decoder.embed_tokens"
            ),
            ffn=FeedForward(width_field="ffn_dim"),
            heads=Heads(plain=True),
            bias_flags={"query": "enable_bias", "ffn": "enable_bias"},
            requires={"word_embed_proj_dim": "hidden_size"},
        ),
        Family(
            "persimmon",
            "Persimmon",
            (
                Projection("self_attn.query_key_value", "hidden", ("query", "kv", "kv"), blocks=None),
                *_PHI_PROJECTIONS[3:4],
                *_FALCON_PROJECTIONS[2:],
            ),
            # Before, every attention had a rotary embedding beside the model's, which nothing read.
            since="5",
            heads=Heads(plain=True),
            rotary=_COUNTED_ROTARY,
            bias_flags={"query": None, "ffn": None},
        ),
        Family(
            "phi",
            "Phi",
            _PHI_PROJECTIONS,
            # Its norms of queries and keys have H / Q channels.
            heads=Heads(fixed_where={"qk_layernorm": True}),
            rotary=_COUNTED_ROTARY,
            parallel_blocks=True,
            bias_flags={"query": None, "ffn": None},
        ),
        # It holds the factors of longrope against H / Q.
        Family("phi3", "Phi3", _FUSED_PROJECTIONS, heads=Heads(fixed_with_rope=("longrope",)), rotary=_PARTIAL_ROTARY),
        Family("qwen2", "Qwen2", _SEPARATE_PROJECTIONS),
        Family(
            "qwen2_moe",
            "Qwen2Moe",
            (*_EXPERTS_IN_SOME_LAYERS, *_gated("mlp.shared_expert", "shared")),
            since="5",
            mixture=Mixture(
                "num_experts",
                shared=SharedExpert(width_field="shared_expert_intermediate_size", gated=True),
                layers=sparsity.by_step,
            ),
        ),
        Family("qwen3", "Qwen3", _SEPARATE_PROJECTIONS, bias_flags={"query": "attention_bias"}),
        Family(
            "qwen3_moe",
            "Qwen3Moe",
            _EXPERTS_IN_SOME_LAYERS,
            since="5",
            mixture=Mixture("num_experts", layers=sparsity.by_step),
            bias_flags={"query": "attention_bias"},
        ),
        # Its flag attention_bias is of queries, keys and values only.
        Family(
            "seed_oss",
            "SeedOss",
            _SEPARATE_PROJECTIONS,
            bias_flags={"query": "attention_out_bias", "ffn": "mlp_bias"},
        ),
        Family("smollm3", "SmolLM3", _SEPARATE_PROJECTIONS, bias_flags=_LLAMA_BIAS_FLAGS),
        Family(
            "solar_open",
            "SolarOpen",
            (*_SEPARATE_PROJECTIONS[:4], *_WITH_SHARED_EXPERTS[7:]),
            since=_ROUTERS_CHOOSE,
            mixture=replace(_MIXTURE_AFTER_THE_FIRST, layers=None),
        ),
        Family(
            "stablelm",
            "StableLm",
            _SEPARATE_PROJECTIONS,
            since="5",
            heads=Heads(size_follows=True),
            rotary=_COUNTED_ROTARY,
            parallel_blocks="use_parallel_residual",
            # A norm of its own for every head.
            requires={"qk_layernorm": (False,)},
        ),
        Family(
            "starcoder2",
            "Starcoder2",
            (
                *_SEPARATE_PROJECTIONS[:4],
                Projection("mlp.c_fc", "hidden", ("ffn",)),
                Projection("mlp.c_proj", "ffn", ("hidden",)),
            ),
            bias_flags={"query": "use_bias", "ffn": "use_bias"},
        ),
        Family(
            "vaultgemma",
            "VaultGemma",
            _SEPARATE_PROJECTIONS,
            heads=_DIVIDING_HEADS,
            norm=_GEMMA_NORM,
            needs_bos=True,
            attention_kernel="eager",
            bias_flags={"query": "attention_bias"},
        ),
        Family(
            "youtu",
            "Youtu",
            _LATENT_PROJECTIONS,
            since=_ROUTERS_CHOOSE,
            latent=True,
            rotary=Rotary(interleaved=True),
            bias_flags={"query": "attention_bias"},
            requires=_OWN_KEYS_TURNED_BY_PAIRS,
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
    texts = sorted(family.model_type for family in FAMILIES.values() if model_type in family.inside)
    if texts:
        raise ModelError(
            f"'{model_type}' models see images too; only their text models, {' and '.join(texts)}, are supported; save "
            "that by `model = AutoModelForImageTextToText.from_pretrained(...); text = model.model.language_model; "
            "text.save_pretrained(..., state_dict={f'model.{k}': v for k, v in text.state_dict().items()} | "
            "{'lm_head.weight': model.lm_head.weight.clone()})`, and copy the tokenizer"
        )
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family '{model_type}' is not in the family table; supported are {', '.join(sorted(FAMILIES))}. "
            "A further family is a row of flap_export/families/table.py"
        )
    return FAMILIES[model_type]
