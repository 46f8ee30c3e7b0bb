"""Built engines of either TensorRT flavour, on a CUDA device. *Untested on hardware*: see the README.

What is here needs no GPU: which profile takes a call, prompts longer than one prefill, what is refused. The device is
behind `Session`, so that all of it can be tested with another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, final

import numpy as np

from flap_export.artifact import LogitsKind
from flap_export.building.record import EngineRecord, load_engine
from flap_export.devices import parsed_device
from flap_export.errors import ArtifactError, InputError
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds
from flap_export.runners.sampling import Sampling


class Session(Protocol):
    """One engine open on a device, with the cache of one batch."""

    def allocate(self, batch_size: int) -> None:
        """Provide an empty cache for `batch_size` sequences."""

    def run(self, profile: int, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        """Feed tokens [B, n] within a profile; logits float32 [B, n, V], or [B, 1, V] of a `last` engine."""

    def run_sampled(self, profile: int, input_ids: TokenIds, write_indices: TokenIds, sampling: Sampling) -> TokenIds:
        """The same, but only the next tokens int64 [B] leave the device."""

    def close(self) -> None:
        """Free everything."""


def open_session(record: EngineRecord, path: Path, logits: LogitsKind, device: str) -> Session:
    """Open an engine on a CUDA device."""
    from flap_export.runners.tensorrt_session import TensorRTSession

    return TensorRTSession(record, path, logits, device)


@final
class TensorRTRunner(Runner):
    """An engine's directory on a GPU; the device `cpu`, which is the default, means the first GPU.

    Raises:
        ArtifactError: the directory is damaged, lacks the wanted engine, or was built for another GPU or version.
        InputError: an unknown device, or a dtype or cache length other than the engine's.
        MissingRequirementError: the flavour's package or a GPU is not there.
    """

    name = "tensorrt"

    def __init__(self, path: Path, options: RunnerOptions) -> None:
        record = load_engine(path)
        _check_options(record, path, options)
        super().__init__(
            max_length=record.max_length, vocabulary_size=record.shape.vocabulary_size, logits=options.logits
        )
        self.name = record.flavour
        self._record = record
        self._session: Session | None = open_session(record, path, options.logits, _cuda_device(options.device))

    def close(self) -> None:
        """Free the engine and its cache."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def _allocate(self, batch_size: int) -> None:
        self._record.profile_for(batch_size, 1)
        self._opened.allocate(batch_size)

    @property
    def _opened(self) -> Session:
        assert self._session is not None, "the runner is closed"
        return self._session

    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        """In pieces where there are more tokens than the largest profile takes."""
        batch_size, new_tokens = input_ids.shape
        step, parts = self._record.largest_step, []
        for start in range(0, new_tokens, step):
            piece = np.ascontiguousarray(input_ids[:, start : start + step])
            profile = self._record.profile_for(batch_size, piece.shape[1])
            parts.append(self._opened.run(profile, piece, write_indices + start))
        return parts[-1] if self.logits == "last" or len(parts) == 1 else np.concatenate(parts, axis=1)

    def _sampled(self, input_ids: TokenIds, write_indices: TokenIds, sampling: Sampling) -> TokenIds:
        profile = self._record.profile_for(*input_ids.shape)
        return self._opened.run_sampled(profile, input_ids, write_indices, sampling)


def _check_options(record: EngineRecord, path: Path, options: RunnerOptions) -> None:
    if options.dtype not in (None, record.dtype):
        raise InputError(f"engine '{path}' computes in {record.dtype}; export and build it again for {options.dtype}")
    if options.max_length not in (None, record.max_length):
        raise InputError(
            f"the cache of engine '{path}' has {record.max_length} rows; export and build it again for "
            f"{options.max_length}"
        )
    if options.logits not in record.engines:
        raise ArtifactError(
            f"'{path}' holds no engine for logits '{options.logits}'; build it with --logits {options.logits}, or both"
        )


def _cuda_device(device: str) -> str:
    """The GPU that is meant; an engine runs on no CPU, which is what is meant where nobody says."""
    _, index = parsed_device(device)
    return f"cuda:{index}"
