"""One pass over the layers that makes least squares ready for any cut point of any ranking.

What is kept per projection is a factor of the covariance of its inputs, in the order in which they stay (see
`flap_export.rewriting.compensation.NestedLeastSquares`); a block at any cut point then takes one triangular solve.
Memory holds one layer and one covariance per projection; the factors lie in files, which every process that searches
maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Final, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flap_export.allocation.ladders import LayerLadders, elements_of
from flap_export.calibration.layerwise import LayerPass, streamed
from flap_export.calibration.statistics import Site
from flap_export.models.opening import Checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.rewriting.compensation import NestedLeastSquares, Restored, best_ridge
from flap_export.rewriting.cutting import path_of, sites_of
from flap_export.rewriting.restoring import SiteInputs, check_finite, observed, restoring_module
from flap_export.shapes import DecoderShape
from flap_export.storage import new_file, writing_errors

RIDGE_SHARE: Final = 0.7
"""Of a ranking's channels, how many stay at the cut point that chooses its ridge."""


@final
class NestedFits:
    """The factors of all projections, in a folder; blocks are solved for on a device."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        with writing_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, site: Site, fit: NestedLeastSquares) -> None:
        """Keep the factor of one projection."""
        tensors = {field.name: getattr(fit, field.name).contiguous().cpu() for field in fields(fit)}
        with new_file(self._path(site)) as partial_path:
            save_file(tensors, partial_path)

    def load(self, site: Site) -> NestedLeastSquares:
        """The factor of one projection; on a CPU it is mapped from its file."""
        return NestedLeastSquares(**load_file(self._path(site), device=self._device))

    def holds(self, sites: Sequence[Site]) -> bool:
        """Whether all of these are there."""
        return all(self._path(site).is_file() for site in sites)

    def restored(self, site: Site, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a projection becomes when the channels `kept` stay; see `flap_export.rewriting.cutting.Restore`.

        Rounded to the weight's dtype before its bias makes up for the mean, as it will be saved.
        """
        fit, dense, kept = self.load(site), weight.to(self._device), kept.to(self._device)
        assert bool(torch.isin(kept, fit.order[: len(kept)]).all()), "what stays is no cut point of the ranking"
        found: Restored = fit.restored(dense, len(kept))
        rounded = found.weight.to(weight.dtype)
        mean = fit.mean
        bias = dense.to(mean.dtype) @ mean - rounded.to(mean.dtype) @ mean[kept]
        return rounded.to(weight.device), bias.to(weight.device)

    def _path(self, site: Site) -> Path:
        return self._folder / f"{site.layer}.{site.space}.{site.expert}.safetensors"


def fit_rankings(
    dense: Checkpoint,
    ladders: Sequence[LayerLadders],
    tokens: Tensor,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    chunk_sequences: int = 8,
    progress: Progress = no_progress,
) -> NestedFits:
    """Observe the inputs of every restoring projection and factorise their covariances.

    Args:
        dense: the dense model.
        ladders: of every layer: the order in which channels go.
        tokens: calibration tokens, int64 [sequences, length].
        folder: where the factors go; those of an interrupted pass are made again.
        dtype: precision to run the model in.
        device: where.
        chunk_sequences: sequences in memory at a time.
        progress: told after every layer.

    Raises:
        ModelError: weights are missing or hold NaN, or the activations overflow.
        OutputError: the disk is full.
    """
    fits = NestedFits(folder)
    every = [site for index in range(len(dense.shape.layers)) for site in sites_of(dense, index)]
    if fits.holds(every):
        return fits
    running = partial(streamed, dtype=dtype, device=device, chunk_sequences=chunk_sequences, progress=progress)
    with running(dense, tokens) as stream:
        for visited in stream:
            sites = [site for site in every if site.layer == visited.index]
            with observed(dense, visited, sites, tokens.shape[1], device) as inputs:
                visited.propagate()
            for site in sites:
                order = staying_order(ladders[site.layer], site, dense.shape).to(device)
                fits.save(site, _fitted(dense, visited, site, order, inputs.pop(site)))
    return fits


def _fitted(dense: Checkpoint, visited: LayerPass, site: Site, order: Tensor, inputs: SiteInputs) -> NestedLeastSquares:
    moments, held_out = inputs.moments, inputs.take_held_out()
    path = path_of(dense, site)
    check_finite(inputs, site.layer, path)
    weight = restoring_module(dense, visited.layer, site).get_parameter("weight").to(moments.mean.dtype)
    kept = order[: max(round(RIDGE_SHARE * len(order)), 1)].sort().values
    ridge = best_ridge(weight, kept, moments, held_out)
    moments.update(held_out)
    check_finite(inputs, site.layer, path)
    return NestedLeastSquares.of(moments, order, ridge)


def staying_order(ladders: LayerLadders, site: Site, shape: DecoderShape) -> Tensor:
    """The input channels of a restoring projection, last to go first; int64 [C]."""
    if site.space == "query":
        heads = torch.from_numpy(ladders.attention.order).flip(0)
        return (heads.unsqueeze(1) * shape.head_dim + torch.arange(shape.head_dim)).flatten()
    elements = torch.from_numpy(ladders.ffn.order).flip(0)
    first, count = elements_of(site.space, site.expert, shape.layers[site.layer])
    return elements[(elements >= first) & (elements < first + count)] - first
