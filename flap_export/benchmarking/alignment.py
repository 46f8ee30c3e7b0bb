"""What aligned FFN widths cost in quality and gain in time, against the same method and budget without alignment."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from flap_export.artifact import load_artifact
from flap_export.benchmarking import LatencyReport, bench
from flap_export.evaluation import QualityReport, evaluate
from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import Evidence
from flap_export.exporting import export
from flap_export.precision import DtypeName
from flap_export.progress import Progress, no_progress
from flap_export.pruning.stage import prune_with
from flap_export.storage import SCRATCH_PREFIX, Record

ALIGNMENT_NAME: Final = "alignment.json"


class AlignmentReport(Record):
    """`alignment.json`."""

    kind: ClassVar[str] = "alignment report"

    align_channels: int
    unaligned: QualityReport | None
    """Of the model pruned without alignment; None where no text was given."""
    latency: LatencyReport
    """The aligned artifact, with the unaligned one as its baseline."""


def compare_alignment(
    model: str | Path,
    artifact: Path,
    evidence: Evidence,
    options: PruneOptions,
    *,
    sources: Sequence[str] = (),
    samples: int | None = None,
    sequence_length: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] = (128,),
    repeats: int = 30,
    budget_s: float = 120.0,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> AlignmentReport:
    """Prune once more without alignment, and hold the aligned artifact against that.

    Args:
        model: the dense model.
        artifact: exported from the aligned checkpoint; the unaligned one is exported like it.
        evidence: what both were pruned by.
        options: of the aligned checkpoint.
        sources: texts for perplexity, see `flap_export.text.sources`.
        samples: windows per source.
        sequence_length: tokens of a window.
        batch_sizes: see `flap_export.bench`, as the following.
        prompt_lengths: tokens of a prefill.
        repeats: rounds per phase and shape.
        budget_s: seconds for all rounds together.
        threads: cores one operator may use.
        device: where to compute.
        dtype: precision least squares is fitted in.
        progress: told what is being done.

    Raises:
        InputError: one of its kinds, as for the stages this goes through.
    """
    aligned = load_artifact(artifact)
    exported: DtypeName = aligned.dtype
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as folder:
        pruned, other = Path(folder) / "pruned", Path(folder) / "onnx"
        without = options.model_copy(update={"align_channels": 1})
        prune_with(model, pruned, evidence, without, device=device, dtype=dtype, progress=progress)
        export(pruned, other, dtype=exported, max_length=aligned.max_length)
        quality = None
        if sources:
            quality = evaluate(pruned, sources, samples=samples, sequence_length=sequence_length, device=device)
        latency = bench(
            artifact,
            baseline=other,
            batch_sizes=batch_sizes,
            prompt_lengths=prompt_lengths,
            repeats=repeats,
            budget_s=budget_s,
            threads=threads,
            device=device,
            progress=progress,
        )
    # The folder is gone: its path would tell nobody anything.
    names = {"baseline": "unaligned"}
    if quality is not None:
        quality = quality.model_copy(update={"model": "unaligned"})
    return AlignmentReport(
        align_channels=options.align_channels, unaligned=quality, latency=latency.model_copy(update=names)
    )
