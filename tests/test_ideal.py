"""`flap_export.ideal` against brute force over real modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import layer_plan, plan_of, save_pruned, tiny_checkpoint, tiny_statistics
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from flap_export.families import family_of, shape_from_config
from flap_export.ideal import (
    Roofline,
    cache_bytes,
    call_bytes,
    call_flops,
    call_seconds,
    experts_on,
    ideal_speedup,
    read_parameters,
)
from flap_export.models.attention import cache_argument
from flap_export.models.loading import pruned_section
from flap_export.models.modeling_pruned import resize_decoder
from flap_export.models.opening import open_checkpoint
from flap_export.shapes import DecoderShape, LayerShape

TOKENS = 7


def llama(shape: DecoderShape) -> LlamaForCausalLM:
    """A Llama whose layers have the counts of `shape`."""
    heads = 4
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        head_dim=shape.head_dim,
        intermediate_size=48,
        num_hidden_layers=len(shape.layers),
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=shape.vocabulary_size,
        max_position_embeddings=32,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    resize_decoder(model, "model.layers", pruned_section(family_of("llama"), shape), shape.head_dim)
    return model


def decoder(*layers: LayerShape, tied: bool = False) -> DecoderShape:
    return DecoderShape(
        hidden_size=32, head_dim=8, vocabulary_size=64, ffn_matrices=3, tied_embeddings=tied, layers=layers
    )


DENSE = decoder(*[LayerShape(query_heads=4, kv_heads=2, ffn_channels=48)] * 3)
UNEVEN = decoder(
    LayerShape(query_heads=4, kv_heads=2, ffn_channels=48),
    LayerShape(query_heads=2, kv_heads=1, ffn_channels=13, attention_bias=True, ffn_bias=True),
    LayerShape(query_heads=1, kv_heads=1, ffn_channels=7, ffn_bias=True),
)
TIED = decoder(LayerShape(query_heads=4, kv_heads=2, ffn_channels=48), tied=True)


def test_the_shapes_here_are_those_of_the_models() -> None:
    assert shape_from_config(llama(DENSE).config, family_of("llama")) == DENSE


def test_parallel_blocks_stand_behind_one_norm() -> None:
    layers = [LayerShape(query_heads=q, kv_heads=q, ffn_channels=f) for q, f in ((4, 48), (4, 0), (0, 48), (0, 0))]
    in_turn = decoder(*layers)
    parallel = in_turn.model_copy(update={"parallel_blocks": True})
    assert read_parameters(in_turn) - read_parameters(parallel) == in_turn.hidden_size


@pytest.mark.parametrize("shape", [DENSE, UNEVEN, TIED], ids=["dense", "uneven", "tied"])
def test_read_parameters_are_all_but_an_untied_embedding(shape: DecoderShape) -> None:
    model = llama(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = 0 if shape.tied_embeddings else model.model.embed_tokens.weight.numel()
    assert read_parameters(shape) == parameters - embedding


def test_norms_over_all_heads_are_read_whole(tmp_path: Path) -> None:
    """Every parameter of a model that lost heads, but the embedding."""
    dense = tiny_checkpoint("olmo2", tmp_path / "dense")
    checkpoint, statistics = open_checkpoint(dense), tiny_statistics(dense, tmp_path)
    plan = plan_of(checkpoint, [layer_plan(checkpoint, 0, [1], range(7)), layer_plan(checkpoint, 1, [0, 1], range(9))])
    save_pruned(dense, plan, tmp_path / "pruned", statistics, compensation="none")
    for name in ("dense", "pruned"):
        found = open_checkpoint(tmp_path / name)
        assert read_parameters(found.shape) == found.weights.parameters - found.shape.head_parameters


def test_an_emptied_layer_reads_its_biases_only() -> None:
    emptied = LayerShape(query_heads=0, kv_heads=0, ffn_channels=0, attention_bias=True, ffn_bias=True)
    one, two = decoder(*DENSE.layers[:1]), decoder(*DENSE.layers[:1], emptied)
    assert read_parameters(two) - read_parameters(one) == 2 * DENSE.hidden_size


@pytest.mark.parametrize("shape", [DENSE, UNEVEN], ids=["dense", "uneven"])
def test_cache_bytes_are_those_of_a_real_cache(shape: DecoderShape) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model = llama(shape)
        model(torch.zeros(2, TOKENS, dtype=torch.int64), use_cache=True, **{cache_argument(model): cache})
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(shape, batch_size=2, context_length=TOKENS, bytes_per_value=4) == real


def counted_flops(model: LlamaForCausalLM, *, batch_size: int) -> list[int]:
    """Operations of TOKENS calls of one token each: every query meets exactly the keys it may see.

    Rotary angles, which some versions of transformers compute by a product, are not counted.
    """
    cache, counts = DynamicCache(), []
    for _ in range(TOKENS):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch_size, 1, dtype=torch.int64), use_cache=True, **{cache_argument(model): cache})
        rotary = counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
        counts.append(counter.get_total_flops() - sum(rotary.values()))
    return counts


@pytest.mark.parametrize("shape", [DENSE, UNEVEN], ids=["dense", "uneven"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_flops_are_those_torch_counts(shape: DecoderShape, batch_size: int) -> None:
    counted = counted_flops(llama(shape), batch_size=batch_size)
    steps = [call_flops(shape, batch_size=batch_size, new_tokens=1, context_length=length) for length in range(TOKENS)]
    assert steps == counted
    assert call_flops(shape, batch_size=batch_size, new_tokens=TOKENS, logits="all") == sum(counted)


def test_the_last_logits_cost_one_row_of_the_head() -> None:
    every, last = (call_flops(DENSE, batch_size=2, new_tokens=TOKENS, logits=logits) for logits in ("all", "last"))
    assert every - last == 2 * (TOKENS - 1) * 2 * DENSE.head_parameters


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_a_prompt_in_two_chunks_costs_the_same(batch_size: int, first: int, second: int) -> None:
    whole = call_flops(UNEVEN, batch_size=batch_size, new_tokens=first + second, logits="all")
    chunks = call_flops(UNEVEN, batch_size=batch_size, new_tokens=first, logits="all") + call_flops(
        UNEVEN, batch_size=batch_size, new_tokens=second, context_length=first, logits="all"
    )
    assert whole == chunks


def test_decode_speedup_is_the_ratio_of_bytes() -> None:
    speedup = ideal_speedup(DENSE, UNEVEN, "decode", batch_size=2, length=9, bytes_per_weight=2)
    dense, pruned = (
        call_bytes(shape, batch_size=2, new_tokens=1, context_length=9, bytes_per_weight=2) for shape in (DENSE, UNEVEN)
    )
    assert speedup == dense / pruned > 1


def test_prefill_speedup_is_the_ratio_of_operations() -> None:
    speedup = ideal_speedup(DENSE, UNEVEN, "prefill", batch_size=2, length=9, bytes_per_weight=4)
    dense, pruned = (call_flops(shape, batch_size=2, new_tokens=9) for shape in (DENSE, UNEVEN))
    assert speedup == pytest.approx(dense / pruned)


def test_a_model_against_itself_is_no_faster() -> None:
    for phase in ("prefill", "decode"):
        assert ideal_speedup(UNEVEN, UNEVEN, phase, batch_size=1, length=5, bytes_per_weight=4) == 1


def test_a_roofline_takes_the_longer_of_both_times() -> None:
    request = {"batch_size": 1, "length": 8, "bytes_per_weight": 4}
    moved = call_bytes(DENSE, batch_size=1, new_tokens=1, context_length=8, bytes_per_weight=4)
    operations = call_flops(DENSE, batch_size=1, new_tokens=1, context_length=8)
    slow_memory = call_seconds(DENSE, "decode", roofline=Roofline(1e3, 1e12), **request)
    slow_compute = call_seconds(DENSE, "decode", roofline=Roofline(1e12, 1e3), **request)
    assert slow_memory == moved / 1e3
    assert slow_compute == operations / 1e3


def test_decoding_a_large_batch_becomes_bound_by_operations() -> None:
    roofline = Roofline(bandwidth_bytes_per_s=1.0, flops_per_s=10.0)
    pruned = decoder(*[layer.model_copy(update={"ffn_channels": 8}) for layer in DENSE.layers])
    request = {"length": 4, "bytes_per_weight": 4, "roofline": roofline}
    small = ideal_speedup(DENSE, pruned, "decode", batch_size=1, **request)
    large = ideal_speedup(DENSE, pruned, "decode", batch_size=512, **request)
    assert small == ideal_speedup(DENSE, pruned, "decode", batch_size=1, length=4, bytes_per_weight=4)
    operations = [call_flops(shape, batch_size=512, new_tokens=1, context_length=4) for shape in (DENSE, pruned)]
    assert large == pytest.approx(operations[0] / operations[1])


MIXTURE = DecoderShape(
    hidden_size=24,
    head_dim=6,
    vocabulary_size=50,
    ffn_matrices=3,
    tied_embeddings=False,
    experts_per_token=2,
    layers=(
        LayerShape(query_heads=4, kv_heads=2, ffn_channels=9, experts=6),
        LayerShape(query_heads=4, kv_heads=2, ffn_channels=5, experts=6, ffn_bias=True),
        LayerShape(query_heads=4, kv_heads=2, ffn_channels=0, experts=6, ffn_bias=True),
    ),
)
EXPERT_PARAMETERS = 3 * 24 * 9 + 3 * 24 * 5 + 24
"""Of one expert of the first two layers and its bias; the emptied third's are read together."""


def test_one_token_reads_the_experts_it_was_sent_to() -> None:
    assert read_parameters(MIXTURE) - read_parameters(MIXTURE, 1) == pytest.approx((6 - 2) * EXPERT_PARAMETERS)
    assert read_parameters(MIXTURE, 10**6) == pytest.approx(read_parameters(MIXTURE))


@pytest.mark.parametrize("tokens", [2, 3, 7])
def test_tokens_read_as_many_experts_as_an_even_router_picks(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    picks = torch.rand(4000, tokens, 6, generator=draw).topk(2, dim=-1).indices
    distinct = torch.zeros(4000, 6).scatter(1, picks.flatten(1), 1).sum(1).mean().item()
    found = (read_parameters(MIXTURE, tokens) - read_parameters(MIXTURE, 0)) / EXPERT_PARAMETERS
    assert found == pytest.approx(distinct, rel=0.01)


def test_a_call_reads_the_experts_of_its_whole_batch() -> None:
    call = {"batch_size": 3, "new_tokens": 2, "context_length": 0}
    assert call_bytes(MIXTURE, **call, bytes_per_weight=2) == 2 * read_parameters(MIXTURE, 6)
    assert call_bytes(MIXTURE, **call, bytes_per_weight=2, experts="all") == 2 * read_parameters(MIXTURE)


def test_a_token_is_computed_by_its_own_experts() -> None:
    chosen, every = (call_flops(MIXTURE, batch_size=2, new_tokens=5, experts=which) for which in ("chosen", "all"))
    assert every - chosen == 2 * 10 * (6 - 2) * (3 * 24 * 9 + 3 * 24 * 5)


def test_a_record_that_does_not_say_how_many_are_chosen_means_all() -> None:
    older = MIXTURE.model_copy(update={"experts_per_token": 0})
    assert read_parameters(older, 1) == read_parameters(older)
    assert call_flops(older, batch_size=1, new_tokens=1) == call_flops(older, batch_size=1, new_tokens=1, experts="all")


def test_a_gpu_computes_all_experts() -> None:
    assert experts_on("onnxruntime", "cpu") == "chosen"
    assert experts_on("onnxruntime", "cuda:0") == experts_on("tensorrt-rtx", "cpu") == "all"
    pruned = MIXTURE.model_copy(
        update={"layers": tuple(layer.model_copy(update={"ffn_channels": 3}) for layer in MIXTURE.layers)}
    )
    request = {"batch_size": 1, "length": 4, "bytes_per_weight": 4}
    chosen, every = (ideal_speedup(MIXTURE, pruned, "decode", **request, experts=which) for which in ("chosen", "all"))
    assert 1 < chosen < every
