"""Stage `calibrate`: stream calibration tokens through the dense model and gather channel statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from flap_export.calibration.layerwise import LayerPass, streamed
from flap_export.calibration.moments import RunningMoments
from flap_export.calibration.reference import ReferenceMoments
from flap_export.calibration.statistics import (
    CalibrationStatistics,
    CutSpace,
    SiteStatistics,
    StatisticsName,
    cut_spaces,
    stacked_sites,
)
from flap_export.devices import check_device
from flap_export.errors import InputError, ModelError, TextError, check_choice
from flap_export.models.loading import check_weights, meta_model
from flap_export.models.opening import Checkpoint, open_checkpoint
from flap_export.precision import COMPUTE_DTYPES, torch_dtype
from flap_export.progress import Progress, no_progress
from flap_export.text.windows import TokenWindows, read_windows

DEFAULT_SAMPLES = 1024
"""FLAP's number of calibration samples; fewer are used where the text is shorter."""

Sites = Mapping[tuple[int, CutSpace], SiteStatistics]
RemovedChannels = Callable[[int, Sites], Mapping[CutSpace, Tensor]]
ACCUMULATORS: Final[dict[StatisticsName, type[RunningMoments] | type[ReferenceMoments]]] = {
    "welford": RunningMoments,
    "reference": ReferenceMoments,
}


def calibrate(
    model: str | Path,
    source: str,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    statistics: StatisticsName = "welford",
    device: str = "cpu",
    dtype: str | None = None,
    chunk_sequences: int = 8,
    removed: RemovedChannels | None = None,
    progress: Progress = no_progress,
) -> CalibrationStatistics:
    """Gather mean and variance of every channel that enters `o_proj` and `down_proj` (FLAP, section 3.2).

    Args:
        model: a dense model directory or hub name.
        source: a text source, see `flap_export.text.sources`.
        samples: sequences to use; None takes up to 1024 of what the source holds.
        sequence_length: tokens of one sequence; None is 128, or the shape of a token array.
        seed: chooses the sequences of a longer text.
        statistics: exact, or as the official code computes them; see `flap_export.calibration.reference`.
        device: where to compute.
        dtype: precision to compute in; None is float32 on a CPU and the checkpoint's own on a GPU.
        chunk_sequences: sequences in memory at a time.
        removed: says of every layer, from its statistics, which channels of its sites are held at zero before it
            hands its outputs on, so that later layers see what the pruned ones give. None hands on what the dense layer
            gives.
        progress: told after every layer.

    Raises:
        InputError: unknown statistics or device, or statistics that do not know the family.
        ModelError: the model is unusable, or its activations overflow.
        TextError: the source is unusable or shorter than asked.
        MissingRequirementError: the device is not on this machine.
    """
    check_choice("statistics", statistics, ACCUMULATORS)
    check_device(device)
    checkpoint, windows = calibration_windows(model, source, samples, sequence_length, seed, dtype)
    if statistics == "reference" and checkpoint.family.mixture:
        raise InputError(
            f"--statistics reference reproduces code that knows no mixtures of experts, and {checkpoint.name} is one; "
            "use --statistics welford"
        )
    sites: dict[tuple[int, CutSpace], SiteStatistics] = {}
    sequences, length = windows.tokens.shape
    with streamed(
        checkpoint,
        torch.from_numpy(windows.tokens),
        dtype=compute_dtype(checkpoint, dtype, device),
        device=device,
        chunk_sequences=chunk_sequences,
        fast_linears=True,
        progress=progress,
    ) as stream:
        for visited in stream:
            with _observed(checkpoint, statistics, length, sites, visited.index, visited.layer):
                visited.observe() if removed else visited.propagate()
            if removed is not None:
                _zero_columns(checkpoint, visited, removed(visited.index, sites))
                visited.propagate()
    digests = {"weights": checkpoint.weights.digest, "calibration": windows.digest}
    return CalibrationStatistics(checkpoint.name, source, sequences, length, seed, statistics, sites, digests)


def calibration_windows(
    model: str | Path,
    source: str,
    samples: int | None,
    sequence_length: int | None,
    seed: int,
    dtype: str | None = None,
) -> tuple[Checkpoint, TokenWindows]:
    """Open a dense model with all its weights in place, and read what it is calibrated on; see `calibrate`.

    Raises:
        ModelError: the model is unusable.
        TextError: the source is unusable, shorter than asked, or of sequences longer than the model's positions.
    """
    check_choice("dtype", dtype or "float32", COMPUTE_DTYPES)
    checkpoint = open_dense(model)
    windows = read_windows(
        source,
        checkpoint.directory,
        checkpoint.shape.vocabulary_size,
        sequence_length=sequence_length,
        samples=samples,
        seed=seed,
        default_samples=DEFAULT_SAMPLES,
        with_bos=checkpoint.family.needs_bos,
    )
    length, positions = windows.tokens.shape[1], checkpoint.positions
    if positions is not None and length > positions:
        raise TextError(
            f"text source '{source}' gives sequences of {length} tokens, the model has {positions} positions; "
            f"calibrate with a sequence_length of at most {positions}"
        )
    return checkpoint, windows


def open_dense(model: str | Path) -> Checkpoint:
    """A dense model whose weights are all there.

    Raises:
        ModelError: it is not, or it is pruned already.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.is_pruned:
        raise ModelError(f"'{model}' is pruned already; prune the dense model at a higher ratio instead")
    check_weights(meta_model(checkpoint, torch.float32), checkpoint)
    return checkpoint


def compute_dtype(checkpoint: Checkpoint, dtype: str | None, device: str) -> torch.dtype:
    """The named dtype, or float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype is not None:
        return torch_dtype(dtype)
    return torch.float32 if device == "cpu" else checkpoint.dtype


@contextmanager
def _observed(
    checkpoint: Checkpoint,
    kind: StatisticsName,
    length: int,
    sites: dict[tuple[int, CutSpace], SiteStatistics],
    index: int,
    layer: nn.Module,
) -> Iterator[None]:
    """Gather the statistics of one layer while it runs."""
    shape = checkpoint.shape.layers[index]
    modules = {space: _restoring_modules(checkpoint, index, layer, space) for space in cut_spaces(shape)}
    running = {
        space: [ACCUMULATORS[kind](module.get_parameter("weight").shape[1]) for module in own]
        for space, own in modules.items()
    }

    def observe(found: RunningMoments | ReferenceMoments, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # OPT's FFN sees all tokens of a chunk in one row, an expert any number of them.
        tokens = inputs[0].flatten(0, -2)
        found.update(tokens.view(-1, length if len(tokens) % length == 0 else len(tokens), tokens.shape[-1]))

    hooks = [
        module.register_forward_pre_hook(partial(observe, found))
        for space, own in modules.items()
        for found, module in zip(running[space], own, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for space, own in modules.items():
        found = [
            _site(moments, module.get_parameter("weight").to(torch.float64))
            for moments, module in zip(running[space], own, strict=True)
        ]
        sites[index, space] = stacked_sites(found) if space == "ffn" and shape.experts else found[0]
        _check_finite(sites[index, space], index, checkpoint.family.restoring(space, shape).path)


def _restoring_modules(checkpoint: Checkpoint, index: int, layer: nn.Module, space: CutSpace) -> list[nn.Module]:
    """The projections of a layer that map `space` back to the residual stream: one, or one of every expert."""
    paths = checkpoint.family.restoring_paths(space, checkpoint.shape.layers[index])
    return [layer.get_submodule(path) for path in paths]


def _zero_columns(checkpoint: Checkpoint, visited: LayerPass, removed: Mapping[CutSpace, Tensor]) -> None:
    """Let the restoring projections ignore channels, [R] or [E, R]."""
    for space, channels in removed.items():
        modules = _restoring_modules(checkpoint, visited.index, visited.layer, space)
        for module, own in zip(modules, channels if channels.ndim == 2 else [channels], strict=True):
            weight = module.get_parameter("weight")
            weight[:, own.to(weight.device)] = 0


def _site(running: RunningMoments | ReferenceMoments, weight: Tensor) -> SiteStatistics:
    return SiteStatistics(
        mean=running.mean.to(torch.float64),
        variance=running.fluctuation.to(torch.float64),
        square_norm=running.square_norm.to(torch.float64),
        weight_square_norm=weight.square().sum(dim=0).cpu(),
        weight_absolute_mean=weight.abs().mean(dim=0).cpu(),
    )


def _check_finite(site: SiteStatistics, layer: int, path: str) -> None:
    if bool(torch.isfinite(site.mean).all() and torch.isfinite(site.variance).all()):
        return
    raise ModelError(
        f"layer {layer}: what enters {path} is NaN or infinite; the model overflows in this precision, "
        "set --dtype float32"
    )
