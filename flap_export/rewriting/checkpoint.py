"""Save a pruned model so that transformers loads it anywhere, and flap_export reads it back exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from flap_export.families import Family
from flap_export.families.rope import both_rope_forms
from flap_export.models.loading import pruned_section
from flap_export.models.opening import PRUNED_PREFIX, Checkpoint
from flap_export.models.weights import INDEX_FILE, SINGLE_FILE
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.shapes import DecoderShape

MODELING_NAME: Final = "modeling_pruned.py"
MAX_SHARD_BYTES: Final = 1024**3
"""Tensors of a file are in memory together, twice while it is written."""
GENERATION_SETTINGS: Final = "generation_config.json"
COMPANIONS: Final = (
    "tokenizer*",
    # The code of a tokenizer that transformers does not know; never run here.
    "tokenization_*.py",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    GENERATION_SETTINGS,
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files that travel along unchanged: tokenizer and generation settings."""


def write_checkpoint(
    directory: Path,
    dense: Checkpoint,
    plan: PruningPlan,
    shape: DecoderShape,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write an uneven checkpoint into an empty directory: weights, configuration, modelling file, plan, tokenizer.

    Args:
        directory: where to write.
        dense: the model the plan was made for.
        plan: what was kept.
        shape: the pruned decoder's shape.
        tensors: names and tensors, taken one at a time; at most `max_shard_bytes` are held.
        max_shard_bytes: size at which a further weight file is begun.
    """
    write_shards(directory, as_stored(dense.family, tensors), max_shard_bytes)
    write_beside_uneven(directory, dense, plan, shape)


def write_beside_uneven(directory: Path, dense: Checkpoint, plan: PruningPlan, shape: DecoderShape) -> None:
    """Write all of an uneven checkpoint but its weights; see `write_checkpoint`."""
    config = uneven_config(dense, shape)
    (directory / MODELING_NAME).write_text(modeling_source(dense.family), encoding="utf-8")
    write_beside_weights(directory, dense, plan, config)


def as_stored(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as checkpoints of the family hold them: some families' projections are transposed there."""
    for name, tensor in tensors:
        yield name, tensor.T.contiguous() if family.stores_transposed(name) else tensor


def write_beside_weights(directory: Path, dense: Checkpoint, plan: PruningPlan, config: dict[str, Any]) -> None:
    """Write configuration and plan, and copy tokenizer and generation settings."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plan.save(directory / PLAN_NAME)
    copy_companions(dense.directory, directory)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of a checkpoint that was opened, with rotary settings that every transformers reads."""
    raw: dict[str, Any] = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
    rotary = checkpoint.family.rotary
    return raw if rotary.newer_form_only else both_rope_forms(raw, checkpoint.config, rotary.names_in_4)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_generation_settings(checkpoint: Checkpoint, target: Path) -> None:
    """Say which tokens end a text where there are no generation settings to copy and no configuration comes along.

    Raises:
        ModelError: the configuration states no such tokens.
    """
    path, end_tokens = target / GENERATION_SETTINGS, checkpoint.end_tokens
    if end_tokens and not path.exists():
        path.write_text(json.dumps({"eos_token_id": end_tokens}) + "\n", encoding="utf-8")


def companions(directory: Path) -> list[str]:
    """Files of `directory` that travel along, by their paths below it."""
    found = {file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(directory).as_posix() for file in found)


def uneven_config(dense: Checkpoint, shape: DecoderShape) -> dict[str, Any]:
    """The dense configuration with a model type of its own and what every layer kept.

    The dense head counts stay: transformers checks that they divide the hidden size. The per-layer counts stand in
    the section `pruned`.
    """
    return {
        **read_config(dense),
        "model_type": PRUNED_PREFIX + dense.family.model_type,
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_pruned.PrunedConfig",
            "AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM",
        },
        "pruned": pruned_section(dense.family, shape),
    }


def modeling_source(family: Family) -> str:
    """The self-contained modelling file for checkpoints of `family`."""
    source = files("flap_export.models").joinpath(MODELING_NAME).read_text(encoding="utf-8")
    named = {"Config": f"{family.config_stem or family.class_stem}Config", "ForCausalLM": family.class_name}
    for role, name in named.items():
        line = f"from transformers import Llama{role} as Base{role}"
        assert line in source, line
        source = source.replace(line, f"from transformers import {name} as Base{role}")
    return source


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write tensors as safetensors: one file if they fit, else numbered shards and their index."""
    pending: dict[str, Tensor] = {}
    names: list[list[str]] = []
    total_bytes = pending_bytes = 0

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(names)}", metadata={"format": "pt"})
        names.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    _name_shards(directory, names, total_bytes)


def _name_shards(directory: Path, names: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, which tell how many there are."""
    if len(names) == 1:
        (directory / "shard-0").rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for position, shard_names in enumerate(names):
        file_name = f"model-{position + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"shard-{position}").rename(directory / file_name)
        weight_map.update(dict.fromkeys(shard_names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
