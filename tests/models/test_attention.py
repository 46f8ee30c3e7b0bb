"""Attention through transformers' interface against what the family's own class computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OLD_FALCON, plain_model, tiny_checkpoint, tokens_of
from torch import Tensor
from transformers import DynamicCache

from flap_export.errors import ModelError
from flap_export.families import FAMILIES
from flap_export.models.attention import attend_by, cache_argument
from flap_export.models.loading import check_weights, meta_model
from flap_export.models.opening import open_checkpoint

NAME = "flap_export_test"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, step_cache: Any
) -> tuple[Tensor, None]:
    assert key is step_cache.layers[module.layer_idx].keys
    grouped = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, is_causal=True, enable_gqa=True
    )
    return grouped.transpose(1, 2), None


@pytest.mark.parametrize(
    ("overrides", "kv_heads"),
    [
        ({}, 2),
        ({"num_attention_heads": 8, "bias": True}, 2),
        (OLD_FALCON, 1),
        ({**OLD_FALCON, "multi_query": False}, 4),
    ],
    ids=["grouped", "groups-of-four", "mqa", "mha"],
)
def test_falcon_asks_and_caches_every_key_once(overrides: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    path = tiny_checkpoint("falcon", tmp_path / "dense", **overrides)
    model, tokens = plain_model(path), tokens_of(2, 9)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        attend_by(attention, NAME, model, FAMILIES["falcon"])
        cache = DynamicCache()
        found = model(input_ids=tokens, use_cache=True, **{cache_argument(model): cache}).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [layer.keys.shape[1] for layer in cache.layers] == [kv_heads] * 2
    assert {layer.kv_heads for layer in open_checkpoint(path).shape.layers} == {kv_heads}


def test_a_configuration_whose_numbers_do_not_belong_together(tmp_path: Path) -> None:
    """With a KV head for each query head, transformers makes a projection of that size and cannot run it."""
    path = tiny_checkpoint("falcon", tmp_path / "dense", new_decoder_architecture=False, multi_query=False)
    checkpoint = open_checkpoint(path)
    with pytest.raises(
        ModelError,
        match=r"query_key_value of shape \[96, 32\], where 4 query heads, 2 KV heads .* give \[64, 32\]; such",
    ):
        check_weights(meta_model(checkpoint, torch.float32), checkpoint)
