"""Stage `restore`: refit the kept columns of every pruned projection by least squares, one layer at a time.

Runs once the plan is known. Covariances are streamed; what is held at a time is one layer, one covariance matrix per
projection and the held-out inputs that choose the ridge. The restored weights go to a folder, to be read when the
checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flap_export.calibration.layerwise import LayerPass, streamed
from flap_export.calibration.moments import RunningComoments
from flap_export.calibration.statistics import CalibrationStatistics, Site, part_of
from flap_export.errors import ModelError
from flap_export.families import PARTS
from flap_export.models.opening import Checkpoint
from flap_export.plan import PruningPlan
from flap_export.progress import Progress, no_progress
from flap_export.rewriting.compensation import Restored, best_ridge, bias_compensation, complement, least_squares
from flap_export.rewriting.cutting import Restore, kept_channels, of_expert, path_of, sites_of
from flap_export.storage import writing_errors

HELD_OUT_EVERY: Final = 8
"""One sequence in so many chooses the ridge before it joins the covariance."""
HELD_OUT_SEQUENCES: Final = 32
HELD_OUT_TOKENS: Final = 512
"""Of those sent to one expert."""
EXACT_CHANNELS: Final = 4096
"""Widths up to which covariances are in float64; float32 halves the memory of wider ones."""


@final
class RestoredWeights:
    """Restored projections in a folder, written and read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, site: Site, restored: Restored) -> None:
        """Keep one."""
        tensors = {"weight": restored.weight.contiguous().cpu(), "bias": restored.bias.contiguous().cpu()}
        path = self._path(site)
        with writing_errors(path):
            save_file(tensors, path)

    def load(self, site: Site) -> Restored:
        """What was kept."""
        return Restored(**load_file(self._path(site)))

    def _path(self, site: Site) -> Path:
        return self._folder / f"{site.layer}.{site.space}.{site.expert}.safetensors"


@final
class SiteInputs:
    """What enters one projection: moments of most sequences, and the inputs of those held out."""

    def __init__(self, channels: int, length: int, device: str, *, held_out: int | None = None) -> None:
        dtype = torch.float64 if channels <= EXACT_CHANNELS else torch.float32
        self.moments = RunningComoments(channels, dtype=dtype, device=device)
        self._length, self._seen = length, 0
        self._limit = HELD_OUT_SEQUENCES if held_out is None else held_out
        self._held_out: list[Tensor] = []

    def update(self, inputs: Tensor) -> None:
        """Take in a chunk of whole sequences."""
        sequences = inputs.reshape(-1, self._length, inputs.shape[-1])
        turns = torch.arange(self._seen, self._seen + len(sequences), device=inputs.device)
        self._seen += len(sequences)
        held_out = turns % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        held_out &= held_out.cumsum(0) <= self._limit - sum(map(len, self._held_out))
        self._held_out.append(sequences[held_out].to(self.moments.mean.dtype))
        self.moments.update(sequences[~held_out])

    def take_held_out(self) -> Tensor:
        """The inputs held out so far, [tokens, C]; they join the moments when they are given back."""
        taken, self._held_out = self._held_out, []
        empty = self.moments.mean.new_empty(0, self.moments.mean.numel())
        return torch.cat([empty, *(sequences.flatten(0, 1) for sequences in taken)])


def restore(
    dense: Checkpoint,
    plan: PruningPlan,
    tokens: Tensor,
    folder: Path,
    *,
    sequential: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    chunk_sequences: int = 8,
    progress: Progress = no_progress,
) -> RestoredWeights:
    """Fit what the kept columns of every pruned o_proj and down_proj become.

    Args:
        dense: the dense model.
        plan: what every layer keeps.
        tokens: calibration tokens, int64 [sequences, length].
        folder: where the restored weights go, as large as these projections in the pruned checkpoint.
        sequential: fit to the inputs that the already pruned layers give, instead of the dense model's.
        dtype: precision to run the model in.
        device: where.
        chunk_sequences: sequences in memory at a time.
        progress: told after every layer.

    Raises:
        ModelError: weights are missing or hold NaN, or the activations overflow.
        OutputError: the disk is full.
    """
    kept = [kept_channels(layer, dense.shape) for layer in plan.layers]
    restored = RestoredWeights(folder)
    length = tokens.shape[1]
    with streamed(
        dense,
        tokens,
        dtype=dtype,
        device=device,
        chunk_sequences=chunk_sequences,
        fast_linears=True,
        progress=progress,
    ) as stream:
        for visited in stream:
            cut = {
                site: channels.to(device)
                for site in sites_of(dense, visited.index)
                if (channels := of_expert(kept[visited.index][site.space], site.expert)) is not None
            }
            # The FFN's inputs depend on what attention became: in sequence, each is observed on its own.
            rounds = [[s for s in cut if part_of(s.space) == part] for part in PARTS] if sequential else [list(cut)]
            for sites in rounds:
                with observed(dense, visited, sites, length, device) as inputs:
                    visited.observe() if sequential else visited.propagate()
                for site in sites:
                    fitted = _fit(dense, visited, site, cut[site], inputs.pop(site))
                    restored.save(site, fitted)
                    if sequential:
                        replace(dense, visited, site, cut[site], fitted)
            if sequential:
                visited.propagate()
    return restored


@contextmanager
def observed(
    dense: Checkpoint, visited: LayerPass, sites: Sequence[Site], length: int, device: str
) -> Iterator[dict[Site, SiteInputs]]:
    """Gather what enters the restoring projections at `sites` while the layer runs."""
    inputs, hooks = {}, []

    def observe(found: SiteInputs, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.update(arguments[0])

    for site in sites:
        module = restoring_module(dense, visited.layer, site)
        channels = module.get_parameter("weight").shape[1]
        if site.expert is None:
            inputs[site] = SiteInputs(channels, length, device)
        else:
            # An expert gets single tokens.
            inputs[site] = SiteInputs(channels, 1, device, held_out=HELD_OUT_TOKENS)
        hooks.append(module.register_forward_pre_hook(partial(observe, inputs[site])))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def restoring_module(dense: Checkpoint, layer: nn.Module, site: Site) -> nn.Module:
    """The projection of `layer` that maps a space back to the residual stream."""
    return layer.get_submodule(path_of(dense, site))


def _fit(dense: Checkpoint, visited: LayerPass, site: Site, kept: Tensor, inputs: SiteInputs) -> Restored:
    moments, held_out = inputs.moments, inputs.take_held_out()
    path = path_of(dense, site)
    check_finite(inputs, site.layer, path)
    weight = restoring_module(dense, visited.layer, site).get_parameter("weight").to(moments.mean.dtype)
    ridge = best_ridge(weight, kept, moments, held_out)
    moments.update(held_out)
    check_finite(inputs, site.layer, path)
    # Rounded as it will be saved, whatever the configuration states, before the bias makes up for the mean.
    saved = dense.weights[f"{dense.family.modules.layers}.{site.layer}.{path}.weight"].dtype
    rounded = least_squares(weight, kept, moments, ridge).weight.to(saved)
    means = moments.mean
    return Restored(rounded, weight @ means - rounded.to(means.dtype) @ means[kept])


def check_finite(inputs: SiteInputs, layer: int, path: str) -> None:
    """Whether what entered a projection was finite.

    Raises:
        ModelError: it was not.
    """
    moments = inputs.moments
    if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.products.diagonal()).all()):
        raise ModelError(
            f"layer {layer}: what enters {path} is NaN or infinite; the model overflows in this precision, "
            "set --dtype float32"
        )


def replace(dense: Checkpoint, visited: LayerPass, site: Site, kept: Tensor, restored: Restored) -> None:
    """Let the layer compute with a restored projection; columns that are gone are zero."""
    module = restoring_module(dense, visited.layer, site)
    old = module.get_parameter("weight")
    weight = torch.zeros_like(old)
    weight[:, kept] = restored.weight.to(old.dtype)
    bias = restored.bias.to(old.dtype)
    own = module._parameters.get("bias")
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    module.register_parameter("bias", nn.Parameter(bias if own is None else own + bias, requires_grad=False))


def cut_only(site: Site, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Restore nothing."""
    return weight[:, kept], None


def mean_restorer(statistics: CalibrationStatistics) -> Restore:
    """Restore the mean of what was removed, by a bias."""

    def restored(site: Site, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = statistics.sites[site.layer, site.space].mean
        removed = complement(kept, weight.shape[1])
        return weight[:, kept], bias_compensation(weight, removed, mean if site.expert is None else mean[site.expert])

    return restored


def fitted_restorer(fitted: RestoredWeights) -> Restore:
    """Put in what was fitted."""

    def restored(site: Site, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        found = fitted.load(site)
        return found.weight, found.bias

    return restored
