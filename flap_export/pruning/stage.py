"""Stage `prune`: choose what goes, restore, rewrite and save, from a method's evidence or from scratch."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flap_export.allocation.ladders import HeadUnits, check_widths
from flap_export.allocation.rates import Rates
from flap_export.allocation.stage import StructureName
from flap_export.calibration.stage import compute_dtype
from flap_export.calibration.statistics import CalibrationStatistics, StatisticsName
from flap_export.errors import InputError, TextError
from flap_export.evidence.methods import MethodName, PruneOptions, resolved
from flap_export.evidence.record import CalibrationText, Evidence
from flap_export.evidence.stage import gather
from flap_export.manifest import write_manifest
from flap_export.models.loading import check_weights, meta_model
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.plan import PLAN_NAME, PruningPlan
from flap_export.progress import Progress, no_progress
from flap_export.pruning.choosing import make_plan
from flap_export.rewriting.checkpoint import write_checkpoint
from flap_export.rewriting.compensation import CompensationName
from flap_export.rewriting.cutting import Restore, rewrite
from flap_export.rewriting.restoring import cut_only, fitted_restorer, mean_restorer, restore
from flap_export.rewriting.stock import Layout, check_stock, stock_config, write_stock_checkpoint
from flap_export.scoring import MetricName
from flap_export.storage import SCRATCH_PREFIX, check_output, new_directory, validated
from flap_export.text.windows import read_windows

logger = logging.getLogger(__name__)


def prune(
    model: str | Path,
    output: str | Path,
    *,
    ratio: float | None = None,
    rates: str | Path | None = None,
    calibration: str | None = None,
    method: MethodName = "flap",
    metric: MetricName | None = None,
    structure: StructureName | None = None,
    square_attention: bool | None = None,
    compensation: CompensationName | None = None,
    sequential: bool = False,
    remove_heads: int = 0,
    head_units: HeadUnits = "groups",
    align_channels: int = 1,
    layout: Layout = "uneven",
    statistics: StatisticsName = "welford",
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> PruningPlan:
    """Prune a dense causal LM and save the smaller checkpoint, its plan and what the plan came from.

    Args:
        model: a dense model directory or hub name.
        output: the directory to make; an older checkpoint of this tool there is replaced once the new one is whole.
        ratio: share of the decoder's attention and FFN weights that goes, in (0, 1); may be left out beside `rates`.
        rates: file of every layer's own share, see `flap_export.allocation.rates.Rates.read`, instead of a budget that
            the method spreads.
        calibration: a text source, see `flap_export.text.sources`; `magnitude` and `random` do without.
        method: a row of `flap_export.evidence.methods`; what follows is None for what the method itself does.
        metric: importance of a channel, see `flap_export.scoring`.
        structure: how the budget is spread, see `flap_export.allocation.stage`.
        square_attention: square attention scores before they are standardised; None does so with the statistics
            `reference`, whose code does.
        compensation: see `flap_export.rewriting.compensation`.
        sequential: fit least squares to the inputs that the already pruned layers give.
        remove_heads: query heads that go, for the structures `al-mm` and `ul-mm`.
        head_units: whole KV groups, or one query head of every group at a time; see `flap_export.allocation.ladders`.
        align_channels: FFN widths that are left are multiples of this.
        layout: `uneven`, or `stock` for the same counts in every layer, loadable by the family's own classes.
        statistics: `welford` is exact; `reference` reproduces the official code, its choice of units included.
        samples: calibration sequences.
        sequence_length: tokens of one sequence.
        seed: chooses the sequences of a longer text, and the units of the method `random`.
        device: where to calibrate.
        dtype: precision to calibrate in.
        progress: told after every layer.

    Raises:
        InputError: one of its kinds, for an unusable model, text, budget, file of rates or output directory.
    """
    options = validated(
        PruneOptions,
        {
            "ratio": ratio,
            "rates": Rates.read(Path(rates)).layers if rates is not None else None,
            "method": method,
            "metric": metric,
            "structure": structure,
            "square_attention": square_attention,
            "compensation": compensation,
            "sequential": sequential,
            "remove_heads": remove_heads,
            "head_units": head_units,
            "align_channels": align_channels,
            "layout": layout,
            "seed": seed,
        },
    )
    options = resolved(options)
    values = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "statistics": statistics}
    text = validated(CalibrationText, {"source": calibration or "", "dtype": dtype, **values})
    check_output(Path(output), PLAN_NAME)
    evidence = gather(model, text if calibration else None, options, device=device, progress=progress)
    return prune_with(model, output, evidence, options, device=device, dtype=dtype, progress=progress)


def prune_with(
    model: str | Path,
    output: str | Path,
    evidence: Evidence,
    options: PruneOptions,
    *,
    asked: float | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> PruningPlan:
    """Prune by what was gathered before; see `prune` and `flap_export.evidence.stage.gather`.

    `asked` is the ratio that rates among the options were searched for, which the plan states.
    """
    options = resolved(options)
    dense = open_checkpoint(model)
    check_weights(meta_model(dense, dense.dtype), dense)
    _check_evidence(evidence, dense)
    check_widths(dense.shape, options.align_channels)
    if unused := options.unused:
        logger.warning("--%s is not used: the structure is %s", unused.replace("_", "-"), options.structure)
    if options.layout == "stock":
        check_stock(dense, compensated=options.compensation != "none", align_channels=options.align_channels)
    plan = make_plan(dense, evidence, options)
    if asked is not None:
        plan = plan.model_copy(update={"ratio": plan.ratio.model_copy(update={"requested": asked})})
    shape = plan.pruned_shape(dense.shape, compensated=options.compensation != "none")
    write = write_checkpoint
    if options.layout == "stock":
        stock_config(dense, shape)
        write = write_stock_checkpoint
    with new_directory(Path(output), PLAN_NAME) as directory:
        with _restorer(dense, plan, evidence, options, device, dtype, progress) as restorer:
            write(directory, dense, plan, shape, rewrite(dense, plan, restorer))
        evidence.save(directory)
        write_manifest(directory, digests=plan.digests)
    return plan


@contextmanager
def _restorer(
    dense: Checkpoint,
    plan: PruningPlan,
    evidence: Evidence,
    options: PruneOptions,
    device: str,
    dtype: str | None,
    progress: Progress,
) -> Iterator[Restore]:
    """What stands for the removed channels; fitted weights live as long as the block."""
    if options.compensation == "none":
        yield cut_only
    elif options.compensation == "bias":
        yield mean_restorer(_means(evidence))
    else:
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as folder:
            yield fitted_restorer(
                restore(
                    dense,
                    plan,
                    calibration_tokens(dense, evidence),
                    Path(folder),
                    sequential=options.sequential,
                    dtype=compute_dtype(dense, dtype, device),
                    device=device,
                    progress=progress,
                )
            )


def _means(evidence: Evidence) -> CalibrationStatistics:
    if evidence.statistics is None:
        raise InputError("what was gathered holds no means to compensate by; calibrate again with this compensation")
    return evidence.statistics


def calibration_tokens(dense: Checkpoint, evidence: Evidence) -> Tensor:
    """The very tokens that were calibrated on, int64 [sequences, length].

    Raises:
        InputError: nothing was calibrated on.
        TextError: the text has changed since, or is gone.
    """
    if evidence.text is None:
        raise InputError("least squares needs calibration text; calibrate again and name one")
    text = evidence.text
    windows = read_windows(
        text.source,
        dense.directory,
        dense.shape.vocabulary_size,
        sequence_length=text.sequence_length,
        samples=text.samples,
        seed=text.seed,
        with_bos=dense.family.needs_bos,
    )
    if windows.digest != evidence.digests.get("calibration"):
        raise TextError(f"the text '{text.source}' is not what was calibrated on any more; calibrate again")
    return torch.from_numpy(windows.tokens)


def _check_evidence(evidence: Evidence, dense: Checkpoint) -> None:
    found, required = evidence.digests.get("weights"), dense.weights.digest
    if found != required:
        raise InputError(
            f"what was gathered is of other weights than '{dense.name}' (digest {str(found)[:12]} against "
            f"{required[:12]}); calibrate again"
        )
