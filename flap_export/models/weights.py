"""Weights as they lie on disk: named tensors read one at a time from safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.families import EVERY_EXPERT, Stack
from flap_export.storage import digest_of_file, digest_of_json

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_NO_PARAMETERS: Final = (".rotary_emb.inv_freq",)
"""Computed from the configuration; checkpoints of old versions of transformers, those of LLaMA's first two generations
among them, hold it in every layer."""


@final
@dataclass(frozen=True)
class _Place:
    """Where a tensor is on disk: all of a stored tensor, or one expert's part of a stack."""

    file: Path
    stored: str
    expert: int | None = None
    """Its place on the first axis, where the tensors of all experts are stored as one."""
    stack: Stack | None = None
    part: int = 0

    def read(self) -> Tensor:
        """The tensor; nothing of other experts is read."""
        with safe_open(self.file, framework="pt") as file:
            if self.expert is None:
                whole: Tensor = file.get_tensor(self.stored)
                return whole
            # A copy, which lets go of the part that was read with it.
            return self.within(file.get_slice(self.stored)[self.expert]).clone(memory_format=torch.contiguous_format)

    def within(self, stored: Tensor) -> Tensor:
        """The tensor in what its expert has of a stack."""
        assert self.stack is not None
        outputs = stored.T if self.stack.transposed else stored
        return outputs[self.stack.outputs_of(self.part, len(outputs))]

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, from that of what is stored."""
        if self.expert is None:
            return tuple(stored)
        return tuple(self.within(torch.empty(tuple(stored)[1:], device="meta")).shape)


@final
class Weights:
    """The parameters of a model directory, by name; nothing stays in memory.

    Raises:
        ModelError: no safetensors weights, a shard is missing, or a file is truncated.
    """

    def __init__(
        self,
        directory: Path,
        renamed: Mapping[str, str] | None = None,
        *,
        base: str = "",
        head: str = "",
        buffers: tuple[str, ...] = (),
        unused: tuple[str, ...] = (),
        transposed: Callable[[str], bool] = lambda name: False,
        stacks: Sequence[Stack] = (),
    ) -> None:
        """Look at the files' headers.

        Args:
            directory: where they are.
            renamed: parts of the names on disk, and what stands in their place here.
            base: the module that all names but the head's begin with; models that were saved without a head leave it
                out, as transformers knows.
            head: the head's module.
            buffers: ends of further names that are left out, because the model computes what they hold.
            unused: beginnings of those that are left out, because the model does without them.
            transposed: says of a name here whether its matrix is given as the transpose of what is on disk.
            stacks: tensors on disk of which every expert's part has a name of its own here.
        """
        self.directory, self._transposed = directory, transposed
        left = (*_NO_PARAMETERS, *buffers)
        files = {
            name: file
            for name, file in _files_by_name(directory).items()
            if not name.endswith(left) and not name.startswith(unused)
        }
        for file in set(files.values()):
            _check_complete(file, {name for name, holder in files.items() if holder == file})
        names = {name: _renamed(name, renamed or {}) for name in files}
        left_out = f"{base}." if base and not any(own.startswith(f"{base}.") for own in names.values()) else ""
        whole = {
            own if own.startswith(f"{head}.") else left_out + own: _Place(files[stored], stored)
            for stored, own in names.items()
        }
        self._places = {own: part for name, place in whole.items() for own, part in _parts(name, place, stacks)}

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({place.file for place in self._places.values()}))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ModelError: there is no such tensor.
        """
        if name not in self._places:
            raise ModelError(f"weights in '{self.directory}' lack the tensor '{name}'; the checkpoint is incomplete")
        tensor = self._places[name].read()
        return tensor.T if self._transposed(name) else tensor

    def finite(self, name: str) -> Tensor:
        """Read one tensor that must hold neither NaN nor infinity.

        Raises:
            ModelError: it holds one.
        """
        tensor = self[name]
        if not is_finite(tensor):
            broken = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"tensor '{name}' in '{self.directory}' holds {broken} values that are NaN or infinite; "
                "the weights are damaged, fetch them again"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        shape = self._headers[name][0]
        return shape[::-1] if self._transposed(name) else shape

    def dtype(self, name: str) -> str:
        """Kind of numbers of one tensor, as safetensors calls it (`BF16`, `F8_E4M3`), from the file's header."""
        return self._headers[name][1]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, as the headers have it; tied ones are there once."""
        return sum(math.prod(shape) for shape, _ in self._headers.values())

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """All shapes and dtypes: mixtures of experts have tens of thousands of tensors, too many to open a file for."""
        headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name, place in self._places.items():
                    if place.file == path:
                        header = file.get_slice(place.stored)
                        headers[name] = (place.shape(header.get_shape()), header.get_dtype())
        return headers

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of all files."""
        return digest_of_json({file.name: digest_of_file(file) for file in self.files})


def _parts(name: str, place: _Place, stacks: Sequence[Stack]) -> Iterator[tuple[str, _Place]]:
    """The names here of what is stored under one name: that alone, or the tensors of every expert."""
    stack = next((stack for stack in stacks if name.endswith(f".{stack.name}")), None)
    if stack is None:
        yield name, place
        return
    with safe_open(place.file, framework="pt") as file:
        shape = file.get_slice(place.stored).get_shape()
    # What no experts can lie in is one of the tensors that are missing.
    experts = shape[0] if len(shape) > 1 else 0
    layer = name.removesuffix(stack.name)
    for expert in range(experts):
        for part, own in enumerate(stack.parts):
            yield layer + own.replace(EVERY_EXPERT, str(expert)), _Place(place.file, place.stored, expert, stack, part)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, told by the extremes, which NaN spreads to.

    Looking at every value would take 30 times longer in float16, and longer than all else that reading does.
    """
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for stored, called in parts.items():
        name = name.replace(stored, called)
    return name


def _files_by_name(directory: Path) -> dict[str, Path]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        files = _files_from_index(index)
        # Whoever reads the other of the two computes another model.
        if single.is_file() and single not in files.values():
            raise ModelError(
                f"'{directory}' must hold one set of weights, and holds two: {SINGLE_FILE}, and {INDEX_FILE}, which "
                "does not list it; remove the one that is not the model's"
            )
        return files
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    is_pickled = any(directory.glob("*.bin"))
    found = "it has pickled weights only" if is_pickled else f"expected {SINGLE_FILE} or {INDEX_FILE}"
    raise ModelError(
        f"no safetensors weights in '{directory}': {found}; save pickled ones with "
        "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
    )


def _files_from_index(index: Path) -> dict[str, Path]:
    try:
        names = {str(name): str(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{index}' is not a safetensors index; fetch the checkpoint again") from error
    missing = sorted({shard for shard in names.values() if not (index.parent / shard).is_file()})
    if missing:
        raise ModelError(f"'{index.parent}' lacks the weight files {', '.join(missing)}; fetch the checkpoint again")
    return {name: index.parent / shard for name, shard in names.items()}


def _check_complete(file: Path, names: set[str]) -> None:
    with _opened(file) as opened:
        missing = sorted(names - set(opened.keys()))
    if missing:
        raise ModelError(
            f"weight file '{file}' lacks {len(missing)} tensors that the index says it holds, such as '{missing[0]}'; "
            "fetch the checkpoint again"
        )


def _opened(file: Path) -> safe_open:
    """Open a safetensors file; its header is checked against the file's size on opening."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weight file '{file}' is truncated or damaged ({error}); fetch the checkpoint again"
        ) from error
