"""The recipes for models people have, against the facts of their published configurations, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flap_export.allocation.stage import allocate
from flap_export.models.loading import meta_model
from flap_export.models.opening import open_checkpoint
from flap_export.recipe import load_recipe
from flap_export.scoring import LayerScores

PIPELINES = Path(__file__).parent.parent / "pipelines"
CONFIGURATIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "llama-2-7b": (
        6.738e9,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.1-8b": (
        8.030e9,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "qwen3-8b": (
        8.191e9,
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
            "rope_theta": 1000000,
        },
    ),
    "mistral-7b": (
        7.242e9,
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    ),
}


def test_every_model_recipe_is_checked() -> None:
    assert {path.stem for path in PIPELINES.glob("*.yaml")} == {"demo", *CONFIGURATIONS}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_recipe_fits_the_model(name: str, tmp_path: Path) -> None:
    parameters, configuration = CONFIGURATIONS[name]
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    recipe, checkpoint = load_recipe(PIPELINES / f"{name}.yaml"), open_checkpoint(tmp_path)
    model = meta_model(checkpoint, torch.float16)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert abs(counted / parameters - 1) < 1e-3
    shape = checkpoint.shape
    norms = sum(parameter.numel() for n, parameter in model.named_parameters() if n.endswith("norm.weight"))
    assert counted == shape.decoder_parameters + 2 * shape.head_parameters + norms
    assert recipe.prune.ratio == 0.2
    assert recipe.export.max_length is not None
    assert recipe.export.max_length <= configuration["max_position_embeddings"]
    random = torch.Generator().manual_seed(0)
    scores = [
        LayerScores(
            torch.randn(layer.query_heads, generator=random, dtype=torch.float64),
            torch.randn(layer.ffn_channels, generator=random, dtype=torch.float64),
        )
        for layer in shape.layers
    ]
    _, ratio = allocate(scores, shape, recipe.prune.ratio, recipe.prune.structure)
    assert abs(ratio.achieved - 0.2) * shape.decoder_parameters <= shape.ffn_channel_parameters / 2
