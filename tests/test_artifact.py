from __future__ import annotations

from pathlib import Path

import pytest

from flap_export.artifact import ARTIFACT_NAME, Artifact, CacheTensor, is_artifact, load_artifact
from flap_export.errors import ArtifactError, InputError
from flap_export.shapes import DecoderShape, LayerShape

ARTIFACT = Artifact(
    model="m",
    family="llama",
    dtype="float16",
    max_length=32,
    shape=DecoderShape(
        hidden_size=8,
        head_dim=4,
        vocabulary_size=11,
        ffn_matrices=3,
        tied_embeddings=True,
        layers=(
            LayerShape(query_heads=0, kv_heads=0, ffn_channels=3),
            LayerShape(query_heads=4, kv_heads=2, ffn_channels=0),
        ),
    ),
    graphs={"all": "model.onnx", "last": "model-last.onnx"},
    opset=24,
    digests={"weights": "12"},
    versions={"torch": "2"},
)


def save(folder: Path, *graphs: str) -> Path:
    ARTIFACT.save(folder / ARTIFACT_NAME)
    for graph in graphs:
        (folder / graph).touch()
    return folder


def test_a_saved_artifact_is_the_same(tmp_path: Path) -> None:
    assert not is_artifact(tmp_path)
    assert load_artifact(save(tmp_path, "model.onnx", "model-last.onnx")) == ARTIFACT
    assert is_artifact(tmp_path)


def test_layers_without_heads_have_no_cache() -> None:
    assert ARTIFACT.cache_layers == (1,)
    assert ARTIFACT.caches(3) == (
        CacheTensor("past_key_values.1.key", "present.1.key", (3, 2, 32, 4)),
        CacheTensor("past_key_values.1.value", "present.1.value", (3, 2, 32, 4)),
    )


def test_directories_that_are_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"is no exported artifact \(no artifact\.json in it\); run `flap-export exp"
    ):
        load_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"lacks model-last\.onnx; export it again"):
        load_artifact(save(tmp_path, "model.onnx"))
    (tmp_path / ARTIFACT_NAME).write_text("{}")
    with pytest.raises(InputError, match="is not a valid artifact"):
        load_artifact(tmp_path)
