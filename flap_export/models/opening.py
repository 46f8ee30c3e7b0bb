"""Understand a model directory or hub name, dense or pruned: its family, configuration and shape, without its weights.

Our own pruned checkpoints are read through their configuration, never by running the modelling file they carry.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from packaging.version import Version

from flap_export.errors import ModelError
from flap_export.families import Family, check_config, family_of, shape_from_config
from flap_export.families.rope import as_read, check_rope
from flap_export.models.weights import Weights
from flap_export.shapes import DecoderShape, LayerShape

PRUNED_PREFIX: Final = "flap_"
_NOT_THE_MODELS: Final = frozenset(
    {
        "model_type",
        "pruned",
        "auto_map",
        "architectures",
        "transformers_version",
        # How calls answer, which is ours to say.
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Fields of a `config.json` that say nothing about what the model computes."""
_UNBOUNDED_TOKENS: Final = 2048
"""Tokens of a sequence at most, where a model takes any number: what caches are made for has to end somewhere."""
_HUB_FILES: Final = [
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
]
_NOT_READ: Final = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights once more, as other libraries want them: Mistral's and gpt-oss's repositories hold them twice."""


@final
@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been understood: family, configuration and shape; weights stay on disk."""

    name: str
    """As the user named it: a path or a hub name."""
    directory: Path
    family: Family
    config: Any
    """The dense family's transformers configuration."""
    shape: DecoderShape
    is_pruned: bool

    @cached_property
    def weights(self) -> Weights:
        """The tensors on disk."""
        family = self.family
        return Weights(
            self.directory,
            family.stored.names,
            base=family.modules.decoder.partition(".")[0],
            head=family.modules.head,
            buffers=family.stored.buffers,
            unused=tuple(name.format(layers=len(self.shape.layers)) for name in family.stored.unused),
            transposed=family.stores_transposed,
            stacks=family.stored.stacks,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the configuration states; float32 when it states none."""
        stated = getattr(self.config, "dtype", None)
        if isinstance(stated, str):
            stated = getattr(torch, stated.removeprefix("torch."), None)
        return stated if isinstance(stated, torch.dtype) else torch.float32

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where any number does, as ALiBi allows."""
        stated: int | None = getattr(self.config, self.family.positions_field, None)
        return stated

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text by the configuration, which transformers goes by without generation settings.

        Raises:
            ModelError: it states something else.
        """
        try:
            return listed_tokens(getattr(self.config, "eos_token_id", None))
        except ValueError as error:
            raise ModelError(
                f"'{self.directory / 'config.json'}' must state a token id or a list of them as eos_token_id "
                f"({error}); fetch the configuration again"
            ) from error

    @property
    def longest_sequence(self) -> int:
        """Tokens of a sequence at most, where nobody asks for another number."""
        return self.positions or _UNBOUNDED_TOKENS


def listed_tokens(stated: object) -> list[int]:
    """The tokens of a field that holds one, a list of them, or nothing.

    Raises:
        ValueError: it holds something else.
    """
    listed: list[Any] = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int for token in listed):
        raise ValueError(f"eos_token_id is {stated!r}")
    return listed


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Understand a Hugging Face directory or hub name, without reading weights.

    Raises:
        ModelError: no such model, an unreadable configuration, or a family outside the table.
    """
    directory = _directory_of(model)
    raw = _read_config(directory)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"'{directory / 'config.json'}' states no model_type; it is not a transformers model")
    is_pruned, model_type = model_type.startswith(PRUNED_PREFIX), model_type.removeprefix(PRUNED_PREFIX)
    # As transformers does; Mistral's own class would give every layer the same window.
    family = family_of("ministral" if model_type == "mistral" and raw.get("layer_types") else model_type)
    _check_version(family)
    config = config_from(raw, family, directory)
    family = family.of(config)
    shape = _dense_shape(config, family, directory)
    if is_pruned:
        shape = shape.model_copy(update={"layers": _pruned_layers(raw, config.num_hidden_layers, directory)})
    return Checkpoint(str(model), directory, family, config, shape, is_pruned)


def _transformers() -> Version:
    import transformers

    return Version(transformers.__version__)


def _check_version(family: Family) -> None:
    import transformers

    found = _transformers()
    if found.release < Version(family.since).release:
        raise ModelError(
            f"{family.model_type} is supported from transformers {family.since} on, found {found}; "
            f"pip install 'transformers>={family.since}'"
        )
    if family.model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"transformers {found} does not know {family.model_type} yet; pip install --upgrade transformers"
        )


def _directory_of(model: str | Path) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ModelError(f"'{model}' is a file; name the directory that holds config.json and the weights")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        hint = "" if "/" in name else "; a name on the hub reads OWNER/NAME"
        raise ModelError(f"no model directory at '{model}'{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_READ))
    # The hub's client raises a wide range of its own, of requests' and of the standard library's exceptions.
    except Exception as error:
        raise ModelError(
            f"'{name}' is neither a local directory nor could it be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
        ) from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"'{directory}' holds no config.json; name a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"'{path}' must hold a JSON object")
    return raw


def config_from(raw: Mapping[str, Any], family: Family, directory: Path) -> Any:
    """The family's transformers configuration with the values of a `config.json`.

    Raises:
        ModelError: transformers takes them for no valid configuration; the message names `directory`.
    """
    from transformers import AutoConfig

    # Transformers writes defaults into the dictionaries that it is given.
    values = {key: copy.deepcopy(raw[key]) for key in raw if key not in _NOT_THE_MODELS}
    for name in ("dtype", "torch_dtype"):
        if values.get(name) == "auto":
            del values[name]
    try:
        values = as_read(values, family.rotary.names_in_4, generation=_transformers().major)
        return AutoConfig.for_model(family.model_type, **values)
    # transformers validates configurations with exceptions of several libraries.
    except Exception as error:
        raise ModelError(
            f"'{directory / 'config.json'}' is not a valid {family.model_type} configuration: {error}"
        ) from error


def _dense_shape(config: Any, family: Family, directory: Path) -> DecoderShape:
    path = directory / "config.json"
    try:
        check_config(config, family)
        check_rope(config, family.rotary.required_fields)
        return shape_from_config(config, family)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error
    # Transformers takes zeros and lists that are too short, and 4.57 fields of any type.
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"'{path}' is not a valid {family.model_type} configuration: {error}") from error


def _pruned_layers(raw: Mapping[str, Any], count: int, directory: Path) -> tuple[LayerShape, ...]:
    try:
        layers = tuple(LayerShape(**layer) for layer in raw["pruned"]["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"'{directory / 'config.json'}' is a pruned model's but lacks valid pruned.layers") from error
    if len(layers) != count:
        raise ModelError(
            f"'{directory / 'config.json'}' lists {len(layers)} pruned.layers but {count} num_hidden_layers; the "
            "checkpoint is damaged, prune again"
        )
    return layers
