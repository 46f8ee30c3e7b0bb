"""Perplexity of a model on text, whatever runs it.

Notation:

    B   windows of a batch      n   tokens of a window      V   vocabulary size

Every window is scored on its own, from an empty cache, as FLAP does with windows of 128 tokens: tokens 1..n-1 are
predicted from those before them, the first one is not. Negative log-likelihoods are summed in float64, and

    perplexity = exp(sum of -log p(token | tokens before it in its window) / number of predicted tokens)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flap_export.building.record import check_runnable, is_runnable, load_runnable, record_digest
from flap_export.errors import ArtifactError, GateBreachedError, InputError, ModelError, TextError
from flap_export.families import Family, family_of
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.storage import Record, Value
from flap_export.text.windows import TokenWindows, read_windows

if TYPE_CHECKING:
    from flap_export.runners.base import Runner

QUALITY_NAME: Final = "quality.json"
CALIBRATION_DIGEST: Final = "calibration"
"""Key in a plan's digests of the text it was calibrated on."""


class SourceQuality(Value):
    """Perplexity on one text source."""

    source: str
    perplexity: float
    dense_perplexity: float | None = None
    """Of the model before pruning, on the same windows; None where it was not measured."""
    tokens: int
    """Tokens predicted: n - 1 of every window."""
    contaminated: bool
    """Whether the model was calibrated on this very source."""


class QualityReport(Record):
    """`quality.json`: how well a model predicts text."""

    kind: ClassVar[str] = "quality report"

    model: str
    """The checkpoint or artifact, as named by the user."""
    sources: tuple[SourceQuality, ...]
    digests: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every source (`text:SOURCE`), and of the model: `weights` of a checkpoint, `artifact` (its
    `artifact.json`, which holds further digests) of an artifact."""

    def raise_if_worse(self, maximum_ratio: float) -> None:
        """Hold pruned over dense perplexity, where both were measured, against a gate.

        Raises:
            GateBreachedError: a source is above it; the gate is named `quality`.
        """
        for source in self.sources:
            dense = source.dense_perplexity
            if dense is not None and not source.perplexity <= maximum_ratio * dense:
                raise GateBreachedError(
                    "quality",
                    f"perplexity on '{source.source}' must be at most {maximum_ratio:g} times the dense model's "
                    f"{dense:.2f}, found {source.perplexity:.2f} ({source.perplexity / dense:.2f} times)",
                )


def perplexity_of(total_nll: float, tokens: int) -> float:
    """Perplexity from the summed negative log-likelihood (nats) of `tokens` predicted tokens; may be infinite."""
    assert tokens > 0
    mean_nll = total_nll / tokens
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def window_nll(logits: NDArray[Any], tokens: NDArray[np.int64]) -> tuple[float, int]:
    """Summed negative log-likelihood of tokens 1..n-1 of every window, in nats, and their number.

    Args:
        logits: [B, n, V] of any float dtype; the last position predicts nothing.
        tokens: [B, n]
    """
    assert logits.shape[:2] == tokens.shape, f"logits {logits.shape} for tokens {tokens.shape}"
    # Window by window: a float64 copy of a whole batch of logits may not fit into memory.
    total_nll = math.fsum(_nll(row[:-1], ids[1:]) for row, ids in zip(logits, tokens, strict=True))
    return total_nll, tokens.shape[0] * (tokens.shape[1] - 1)


def _nll(logits: NDArray[Any], targets: NDArray[np.int64]) -> float:
    """Summed negative log-likelihood of targets [m] under logits [m, V]; NaN or infinity where logits hold them."""
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        target_logits = np.take_along_axis(shifted, targets[:, None], axis=-1)
        log_normalizers = np.log(np.exp(shifted, out=shifted).sum(axis=-1))
    return float(log_normalizers.sum() - target_logits.sum())


def perplexity(runner: Runner, windows: TokenWindows, batch_size: int = 8) -> tuple[float, int]:
    """Perplexity of a running model on windows of tokens, and the number of tokens predicted.

    Raises:
        ArtifactError: a window is longer than the runner's cache.
        TextError: windows of one token, which leave nothing to predict.
        ModelError: the perplexity is not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    _check_length(runner.max_length, windows)
    total_nll, predicted = 0.0, 0
    for start in range(0, len(windows.tokens), batch_size):
        tokens = windows.tokens[start : start + batch_size]
        runner.start(len(tokens))
        logits = runner.forward(tokens, np.zeros(len(tokens), dtype=np.int64))
        nll, count = window_nll(logits, tokens)
        total_nll, predicted = total_nll + nll, predicted + count
    value = perplexity_of(total_nll, predicted)
    if not math.isfinite(value):
        raise ModelError(
            f"the perplexity on '{windows.source}' must be finite, got {value}: the model's logits are broken; "
            "check its weights, and whether its dtype holds its activations (float32 does)"
        )
    return value, predicted


def read_texts(
    sources: Sequence[str],
    directory: Path,
    vocabulary_size: int,
    max_length: int,
    *,
    sequence_length: int | None,
    samples: int | None,
    with_bos: bool,
) -> list[TokenWindows]:
    """The windows of every source, checked before any is scored, which may take hours.

    Args:
        sources: see `evaluate`, as the two numbers below.
        directory: of the model's tokenizer.
        vocabulary_size: of the model.
        max_length: tokens that the model takes at most.
        sequence_length: tokens of a window.
        samples: windows per source.
        with_bos: whether the model's family needs them to begin so.

    Raises:
        InputError: a source cannot be used; see `read_windows`.
    """
    read_one = partial(read_windows, sequence_length=sequence_length, samples=samples, with_bos=with_bos)
    read = [read_one(source, directory, vocabulary_size) for source in sources]
    for windows in read:
        _check_length(max_length, windows)
    return read


def _check_length(max_length: int, windows: TokenWindows) -> None:
    length = windows.tokens.shape[1]
    if length < 2:
        raise TextError(
            f"perplexity on '{windows.source}' needs windows of at least 2 tokens, got {length}; "
            "name a longer text or a larger sequence_length"
        )
    if length > max_length:
        raise ArtifactError(
            f"windows of '{windows.source}' must fit into the model's max_length of {max_length} tokens, "
            f"got {length}; evaluate with a smaller sequence_length, or export with a larger max_length"
        )


def evaluate(
    target: str | Path,
    sources: Sequence[str],
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
) -> QualityReport:
    """Perplexity of a checkpoint or an artifact on text sources.

    Args:
        target: directory of a checkpoint or an artifact, or a hub name.
        sources: text sources, see `flap_export.text.sources`.
        sequence_length: tokens of a window; None means 128, or as shaped for sources of token ids.
        samples: windows per source; None means all of them.
        batch_size: windows run at once.
        device: where the model runs, as torch names it.
        dtype: precision of a checkpoint, float32 by default; an artifact has its own.

    Raises:
        InputError: the model, a source or the plan beside the model cannot be used; see `read_windows`, `perplexity`.
        MissingRequirementError: a package or the device is not there.
    """
    from flap_export.runners import open_runner

    if not sources:
        raise InputError("evaluation needs at least one text source, got none")
    directory, family, digests = _identify(target)
    calibration = _calibration_digest(directory)
    qualities = []
    with open_runner(directory, device=device, dtype=dtype, check=False) as runner:
        read = read_texts(
            sources,
            directory,
            runner.vocabulary_size,
            runner.max_length,
            sequence_length=sequence_length,
            samples=samples,
            with_bos=family.needs_bos,
        )
        for windows in read:
            value, predicted = perplexity(runner, windows, batch_size)
            digests[f"text:{windows.source}"] = windows.digest
            contaminated = windows.digest == calibration
            qualities.append(
                SourceQuality(source=windows.source, perplexity=value, tokens=predicted, contaminated=contaminated)
            )
    return QualityReport(model=str(target), sources=tuple(qualities), digests=digests)


def evaluate_both(
    dense: str | Path,
    pruned: str | Path,
    sources: Sequence[str],
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    device: str = "cpu",
) -> QualityReport:
    """The pruned model's perplexity with the dense model's beside it, on the same windows; see `evaluate`."""
    measure = partial(evaluate, sources=sources, sequence_length=sequence_length, samples=samples, device=device)
    before, after = measure(dense), measure(pruned)
    beside = tuple(
        source.model_copy(update={"dense_perplexity": reference.perplexity})
        for source, reference in zip(after.sources, before.sources, strict=True)
    )
    digests = {**after.digests, "dense_weights": before.digests["weights"]}
    return after.model_copy(update={"sources": beside, "digests": digests})


def _identify(target: str | Path) -> tuple[Path, Family, dict[str, str]]:
    """Where the files of a checkpoint or an artifact lie (a hub name is fetched), its family, and which it is."""
    path = Path(target)
    if is_runnable(path):
        digests = {"artifact": record_digest(path, check_runnable(path, weights=True))}
        return path, family_of(load_runnable(path).family), digests
    from flap_export.models.opening import open_checkpoint

    checkpoint = open_checkpoint(target)
    return checkpoint.directory, checkpoint.family, {"weights": checkpoint.weights.digest}


def _calibration_digest(directory: Path) -> str | None:
    """Digest of the text the model was calibrated on, or None where no plan tells."""
    path = directory / PLAN_NAME
    return PruningPlan.load(path).digests.get(CALIBRATION_DIGEST) if path.is_file() else None
