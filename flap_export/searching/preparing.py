"""From a model and a text to a problem: rank the units, make least squares ready, lay out the space."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from flap_export.allocation.ladders import LayerLadders
from flap_export.calibration.stage import compute_dtype
from flap_export.errors import BudgetError, FlapExportError, InputError, TextError
from flap_export.evidence.methods import PruneOptions, resolved
from flap_export.evidence.record import EVIDENCE_NAME, CalibrationText, Evidence
from flap_export.evidence.stage import evidence_options, gather
from flap_export.manifest import verify, write_manifest
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PruningPlan
from flap_export.progress import Progress, no_progress
from flap_export.pruning.choosing import ladders_of, make_plan, splitting_of
from flap_export.pruning.stage import calibration_tokens
from flap_export.searching.fitting import fit_rankings
from flap_export.searching.problem import Problem
from flap_export.searching.record import SearchOptions
from flap_export.searching.space import Candidate, Space
from flap_export.storage import new_directory
from flap_export.text.windows import read_windows

_logger = logging.getLogger(__name__)

DEFAULT_FITNESS_SAMPLES: Final = 64
EVIDENCE_FOLDER: Final = "evidence"
FITS_FOLDER: Final = "fits"
_OPTIONS_NAME: Final = "options.json"
CHUNK_TOKENS: Final = 512
"""Tokens that go through a layer at once, about: enough to keep cores busy, few enough for short early looks."""
GPU_CHUNK_TOKENS: Final = 8192


@final
@dataclass(frozen=True)
class Prepared:
    """A problem, and what is known about it beforehand."""

    problem: Problem
    dense: Checkpoint
    ladders: tuple[LayerLadders, ...]
    evidence: Evidence
    references: dict[str, Candidate]
    """Known rates under the same budget: uniform, the method's own allocation, FLAP's."""
    start: tuple[Candidate, ...]
    """Those of them that a search may begin with: whether it is compared with others does not change it."""
    shares_calibration: bool
    calibrated: Tensor
    """What was calibrated on, int64 [sequences, length]."""

    def make_fits(self, progress: Progress = no_progress) -> None:
        """Make the factors that least squares takes, or find them made.

        Raises:
            ModelError: weights are missing or hold NaN, or the activations overflow.
            OutputError: the disk is full.
        """
        problem = self.problem
        if problem.fits is not None:
            tokens, folder, dtype, device = self.calibrated, problem.fits, problem.dtype, problem.device
            fit_rankings(self.dense, self.ladders, tokens, folder, dtype=dtype, device=device, progress=progress)


def prepared(
    model: str | Path,
    directory: Path,
    text: CalibrationText,
    prune: PruneOptions,
    options: SearchOptions,
    *,
    compares: bool,
    device: str,
    progress: Progress,
    evidence: Evidence | None = None,
    fits: bool = True,
) -> Prepared:
    """Do, or find done, all that comes before the first candidate.

    Args:
        model: a dense model directory or hub name.
        directory: of the search; what takes long is kept there.
        text: what to calibrate on.
        prune: resolved options of the method that ranks and restores.
        options: of the search.
        compares: whether FLAP's allocation is wanted beside the method's own.
        device: where to compute.
        progress: told after every layer.
        evidence: what the method goes by, of this model and text, where it has been gathered already.
        fits: make the factors that least squares takes at once; else before the problem is opened, by `make_fits`.

    Raises:
        InputError: one of its kinds, for an unusable model, text, budget or bounds.
    """
    if evidence is None:
        evidence = _evidence(model, directory / EVIDENCE_FOLDER, text, prune, device, progress)
    dense = open_checkpoint(model)
    ladders = ladders_of(dense, evidence, prune)
    assert prune.ratio is not None
    space = Space.of(
        ladders,
        prune.ratio,
        granularity=options.granularity,
        splitting=splitting_of(prune),
        step=options.step,
        least=options.least,
        greatest=options.greatest,
        bounds=options.bounds,
        protect_first=options.protect_first,
        protect_last=options.protect_last,
    )
    tokens = calibration_tokens(dense, evidence)
    chunk = max((CHUNK_TOKENS if device == "cpu" else GPU_CHUNK_TOKENS) // tokens.shape[1], 1)
    dtype = compute_dtype(dense, text.dtype, device)
    own, shares = fitness_tokens(dense, text, tokens, options.fitness_samples, chunk)
    problem = Problem(
        str(dense.directory),
        space,
        own,
        options.fitness,
        prune.compensation or "none",
        directory / FITS_FOLDER / _fits_name(evidence) if prune.compensation == "least-squares" else None,
        evidence.statistics,
        dtype,
        device,
        min(chunk, len(own)),
    )
    references = {"uniform": space.uniform()}
    _add_allocation(references, prune.method, dense, evidence, prune, ladders, space)
    start = tuple(dict.fromkeys(references.values()))
    if compares and prune.method != "flap":
        flap = resolved(PruneOptions(ratio=prune.ratio, align_channels=prune.align_channels))
        found = _evidence(model, directory / "evidence-flap", text, flap, device, progress)
        _add_allocation(references, "flap", dense, found, flap, ladders, space)
    ready = Prepared(problem, dense, ladders, evidence, references, start, shares, tokens)
    if fits:
        ready.make_fits(progress)
    return ready


def _fits_name(evidence: Evidence) -> str:
    return "-".join(evidence.digests[source][:12] for source in ("weights", "calibration"))


def _evidence(
    model: str | Path, folder: Path, text: CalibrationText, prune: PruneOptions, device: str, progress: Progress
) -> Evidence:
    """What the method goes by, from the folder where it is of the same model and text."""
    wanted = evidence_options(prune)
    if _is_whole(folder):
        kept = Evidence.load(folder)
        same = kept.method == wanted.method and kept.digests.get("weights") == open_checkpoint(model).weights.digest
        if same and (folder / _OPTIONS_NAME).read_text(encoding="utf-8") == _described(text, wanted):
            return kept
    found = gather(model, text, wanted, device=device, progress=progress)
    # The folder is the search's own, whatever became of it.
    shutil.rmtree(folder, ignore_errors=True)
    with new_directory(folder, EVIDENCE_NAME) as whole:
        found.save(whole)
        (whole / _OPTIONS_NAME).write_text(_described(text, wanted), encoding="utf-8")
        write_manifest(whole, digests=found.digests)
    return found


def _is_whole(folder: Path) -> bool:
    """Whether all that was gathered is there as it was written: losses in a journal are of that ranking only."""
    if not folder.is_dir():
        return False
    try:
        verify(folder)
    except (FlapExportError, OSError) as error:
        _logger.warning("what was gathered is damaged, and gathered again: %s", error)
        return False
    return True


def _described(text: CalibrationText, wanted: PruneOptions) -> str:
    return text.model_dump_json() + wanted.model_dump_json()


def _add_allocation(
    references: dict[str, Candidate],
    name: str,
    dense: Checkpoint,
    evidence: Evidence,
    prune: PruneOptions,
    ladders: Sequence[LayerLadders],
    space: Space,
) -> None:
    """What a method would choose without a search, as the space has it; nothing where it cannot meet the budget."""
    try:
        plan = make_plan(dense, evidence, prune)
    except BudgetError:
        return
    references[name] = space.nearest(cut_points(plan, ladders, dense))


def cut_points(plan: PruningPlan, ladders: Sequence[LayerLadders], dense: Checkpoint) -> list[tuple[int, int]]:
    """How far a plan goes down ladders, by its counts; whether it is these ladders' units that go does not matter."""
    found = []
    for layer, own, shape in zip(plan.layers, ladders, dense.shape.layers, strict=True):
        heads = shape.query_heads - len(layer.query_heads)
        shared = shape.shared_width - layer.shared_width
        elements = (shape.ffn_channels - layer.ffn_width) * shape.ffns + shared
        found.append(
            (int(np.searchsorted(own.attention.gone, heads + 0.5)), int(np.searchsorted(own.ffn.gone, elements + 0.5)))
        )
    return found


def fitness_tokens(
    dense: Checkpoint, text: CalibrationText, calibrated: Tensor, samples: int | None, chunk: int
) -> tuple[Tensor, bool]:
    """Sequences to measure fitness on, other ones than those calibrated on where the text has enough.

    Args:
        dense: the model, for its tokenizer.
        text: what was calibrated on.
        calibrated: int64 [sequences, length].
        samples: how many are wanted; whole chunks are taken. None takes up to 64 of what there is.
        chunk: sequences of one.

    Returns:
        int64 [sequences, length], and whether they are among those calibrated on.

    Raises:
        TextError: the text has not as many sequences.
    """
    every = read_windows(
        text.source,
        dense.directory,
        dense.shape.vocabulary_size,
        sequence_length=calibrated.shape[1],
        with_bos=dense.family.needs_bos,
    ).tokens
    used = {row.tobytes() for row in calibrated.numpy()}
    others = np.array([row for row in every if row.tobytes() not in used], dtype=np.int64)
    wanted = _whole_chunks(samples or DEFAULT_FITNESS_SAMPLES, chunk)
    shares = len(others) < wanted
    source = calibrated.numpy() if shares else others
    if samples is None:
        wanted = _whole_chunks(min(wanted, len(source)), chunk)
    if len(source) < wanted:
        raise TextError(
            f"fitness is measured on {wanted} sequences, and '{text.source}' has {len(source)} of this length; name a "
            "longer text, or fewer --fitness-samples"
        )
    chosen = np.random.default_rng(text.seed).permutation(len(source))[:wanted]
    return torch.from_numpy(source[np.sort(chosen)]), shares


def _whole_chunks(samples: int, chunk: int) -> int:
    return samples - samples % chunk if samples >= chunk else samples


def stage_sequences(shares: Sequence[float], sequences: int, chunk: int) -> tuple[int, ...]:
    """Sequences that a candidate has been seen on after each stage: whole chunks, ascending, at last all.

    Raises:
        InputError: shares that do not ascend to 1.
    """
    if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
        raise InputError(f"the stages must be ascending shares of the text up to 1, got {list(shares)}")
    rounded = (max(round(share * sequences / chunk), 1) * chunk for share in shares)
    return tuple(sorted({min(count, sequences) for count in rounded} | {sequences}))
