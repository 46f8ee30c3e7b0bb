"""Stage `measure`: what every module of every layer costs the model when it shrinks, measured in one pass.

In each layer the inputs of its restoring projections are observed, their units are ordered by second-order
elimination, and at a few levels of removal the refitted module takes the place of the dense one. What it gives branches
off and is carried through the remaining, dense layers beside the model's own hidden states; at the end stands the KL
divergence between the dense logits and those of every branch. Between the levels the loss follows the projection's
output error, to which it is nearly proportional.

Memory holds one layer, one covariance per projection and one chunk; branches lie in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from flap_export.allocation.ladders import HEAD_UNITS, HeadUnits, attention_costs, expert_elements, units_of_layer
from flap_export.calibration.layerwise import LayerPass, LayerStream, streamed
from flap_export.calibration.moments import RunningComoments
from flap_export.calibration.stage import calibration_windows, compute_dtype
from flap_export.calibration.statistics import CutSpace, Site, cut_spaces
from flap_export.errors import check_choice
from flap_export.evidence.elimination import RIDGE, Elimination, eliminate
from flap_export.evidence.sensitivity import ModuleSensitivity, Sensitivity, interpolated_losses
from flap_export.families import space_widths
from flap_export.models.opening import Checkpoint
from flap_export.progress import Progress, no_progress
from flap_export.rewriting.compensation import complement, least_squares
from flap_export.rewriting.cutting import path_of, sites_of
from flap_export.rewriting.restoring import SiteInputs, check_finite, observed, replace, restoring_module
from flap_export.shapes import DecoderShape

LEVELS: Final = (0.15, 0.35, 0.55, 0.75, 0.9, 1.0)
"""Shares of a module's units at whose removal the loss is measured."""
BRANCH_SEQUENCES: Final = 32
"""Calibration sequences that branches carry at least, if there are as many; they are whole chunks."""


def measure(
    model: str | Path,
    source: str,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    head_units: HeadUnits = "groups",
    levels: Sequence[float] = LEVELS,
    device: str = "cpu",
    dtype: str | None = None,
    chunk_sequences: int = 8,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Order the units of every module and measure what their removal costs.

    Args:
        model: a dense model directory or hub name.
        source: a text source, see `flap_export.text.sources`.
        samples: sequences to use; None takes up to 1024 of what the source holds.
        sequence_length: tokens of one sequence; None is 128, or the shape of a token array.
        seed: chooses the sequences of a longer text.
        head_units: whole KV groups, or one query head of every group; see `flap_export.allocation.ladders`.
        levels: ascending shares of a module's units at whose removal the loss is measured.
        device: where to compute.
        dtype: precision to compute in; None is float32 on a CPU and the checkpoint's own on a GPU.
        chunk_sequences: sequences in memory at a time.
        progress: told after every layer.

    Raises:
        ModelError: the model is unusable, or its activations overflow.
        TextError: the source is unusable or shorter than asked.
    """
    check_choice("head units", head_units, HEAD_UNITS)
    dense, windows = calibration_windows(model, source, samples, sequence_length, seed, dtype)
    tokens = torch.from_numpy(windows.tokens)
    branches: dict[tuple[int, CutSpace], list[_Branch]] = {}
    eliminations: dict[tuple[int, CutSpace], Elimination] = {}
    with streamed(
        dense,
        tokens,
        dtype=compute_dtype(dense, dtype, device),
        device=device,
        chunk_sequences=chunk_sequences,
        fast_linears=True,
        progress=progress,
    ) as stream:
        for visited in stream:
            earlier = [branch for found in branches.values() for branch in found]
            for space, elimination, found in _branched(dense, stream, visited, head_units, levels, device):
                eliminations[visited.index, space], branches[visited.index, space] = elimination, found
            for branch in earlier:
                visited.propagate(branch.hidden)
        losses = _divergences(stream, branches, progress)
    sequences, length = windows.tokens.shape
    return Sensitivity(
        model=dense.name,
        source=source,
        sequences=sequences,
        sequence_length=length,
        seed=seed,
        head_units=head_units,
        modules={
            key: _module(dense.shape, key, head_units, elimination, losses[key])
            for key, elimination in eliminations.items()
        },
        digests={"weights": dense.weights.digest, "calibration": windows.digest},
    )


@final
@dataclass(frozen=True)
class _Branch:
    """The model with one module cut to one level."""

    steps: int
    hidden: Tensor
    """[sequences, length, H]"""


def _branched(
    dense: Checkpoint,
    stream: LayerStream,
    visited: LayerPass,
    head_units: HeadUnits,
    levels: Sequence[float],
    device: str,
) -> Iterator[tuple[CutSpace, Elimination, list[_Branch]]]:
    """Observe a layer, order its units, and let cut versions of it branch off; the dense states move on."""
    # Masks are made for the size of a chunk.
    ends = [chunk.rows.stop for chunk in visited.chunks]
    count = next((end for end in ends if end >= BRANCH_SEQUENCES), ends[-1])
    inputs = visited.hidden[:count].clone()
    with observed(
        dense, visited, list(sites_of(dense, visited.index)), visited.hidden.shape[1], device
    ) as observations:
        visited.propagate()
    for space in cut_spaces(dense.shape.layers[visited.index]):
        sites = {site: observations.pop(site) for site in list(observations) if site.space == space}
        orders = {}
        for site, found in sites.items():
            found.moments.update(found.take_held_out())
            check_finite(found, visited.index, path_of(dense, site))
            orders[site] = _ordered(dense, visited, site, found, head_units)
        steps_of_all = _step_count(dense.shape, visited.index, space, head_units)
        branches = []
        for steps in _levels(steps_of_all, levels):
            with ExitStack() as replacements:
                for site, elimination in orders.items():
                    gone = elimination.order[: steps * (len(elimination.order) // steps_of_all)]
                    removed = _units(dense.shape, site, head_units)[0][gone].flatten()
                    replacements.enter_context(_cut(dense, visited, site, removed, sites[site].moments))
                hidden = stream.new_states(count)
                for rows, output in visited.outputs(inputs):
                    hidden[rows] = output.to("cpu")
            branches.append(_Branch(steps, hidden))
        tokens = [found.moments.count for found in sites.values()]
        yield space, _together(list(orders.values()), tokens), branches


def _ordered(
    dense: Checkpoint, visited: LayerPass, site: Site, inputs: SiteInputs, head_units: HeadUnits
) -> Elimination:
    """Put the units of one projection in order."""
    weight = restoring_module(dense, visited.layer, site).get_parameter("weight").to(inputs.moments.mean.dtype)
    units, groups = _units(dense.shape, site, head_units)
    return eliminate(weight, inputs.moments.products / max(inputs.moments.count, 1), units, groups=groups)


def _together(experts: Sequence[Elimination], tokens: Sequence[int]) -> Elimination:
    """The eliminations of all experts as one, in which each loses a channel at a time; errors count by their tokens."""
    if len(experts) == 1:
        return experts[0]
    order = torch.from_numpy(expert_elements(torch.stack([expert.order for expert in experts]).numpy()))
    shares = torch.tensor(tokens, dtype=torch.float64) / max(sum(tokens), 1)
    losses = sum(share * expert.losses for share, expert in zip(shares, experts, strict=True))
    assert isinstance(losses, Tensor)
    return Elimination(order, losses.repeat_interleave(len(experts)))


def _units(shape: DecoderShape, site: Site, head_units: HeadUnits) -> tuple[Tensor, Tensor | None]:
    """Input channels of every unit [U, n], and the group each belongs to where one of every group goes at a time."""
    layer = shape.layers[site.layer]
    if site.space != "query":
        return torch.arange(space_widths(shape, shape.layers[site.layer])[site.space]).unsqueeze(1), None
    heads = torch.arange(layer.query_heads * shape.head_dim).view(layer.query_heads, shape.head_dim)
    if units_of_layer(layer, head_units) == "groups":
        return heads.view(layer.kv_heads, -1), None
    return heads, torch.arange(layer.query_heads) // (layer.query_heads // layer.kv_heads)


def _step_count(shape: DecoderShape, index: int, space: CutSpace, head_units: HeadUnits) -> int:
    if space != "query":
        return space_widths(shape, shape.layers[index])[space]
    return len(attention_costs(shape, shape.layers[index], head_units))


def _levels(steps: int, levels: Sequence[float]) -> list[int]:
    """Distinct positive numbers of steps, the last of them all."""
    return sorted({min(max(round(level * steps), 1), steps) for level in levels} | {steps})


@contextmanager
def _cut(
    dense: Checkpoint, visited: LayerPass, site: Site, removed: Tensor, moments: RunningComoments
) -> Iterator[None]:
    """Let a layer compute with a refitted projection, and with its own again afterwards."""
    module = restoring_module(dense, visited.layer, site)
    own = dict(module._parameters)
    weight = module.get_parameter("weight").to(moments.mean.dtype)
    kept = complement(removed, weight.shape[1]).to(weight.device)
    replace(dense, visited, site, kept, least_squares(weight, kept, moments, RIDGE))
    try:
        yield
    finally:
        for name, parameter in own.items():
            module.register_parameter(name, parameter)


def _divergences(
    stream: LayerStream, branches: Mapping[tuple[int, CutSpace], list[_Branch]], progress: Progress
) -> dict[tuple[int, CutSpace], dict[int, float]]:
    """KL divergence of every branch from the dense model, nats per token, by steps taken."""
    flat = [(key, branch) for key, module_branches in branches.items() for branch in module_branches]
    states = [stream.hidden[: len(flat[0][1].hidden)], *(branch.hidden for _, branch in flat)]
    totals, sequences = [0.0] * len(flat), 0
    for joint in stream.joint_logits(states):
        reference = torch.log_softmax(next(joint).float(), dim=-1)
        probabilities = reference.exp()
        for position, logits in enumerate(joint):
            missing = reference - torch.log_softmax(logits.float(), dim=-1)
            totals[position] += float((probabilities * missing).sum(dtype=torch.float64))
        sequences += len(reference)
        progress("losses", sequences, len(states[0]))
    tokens = sequences * states[0].shape[1]
    found: dict[tuple[int, CutSpace], dict[int, float]] = {}
    for (key, branch), total in zip(flat, totals, strict=True):
        found.setdefault(key, {})[branch.steps] = max(total / tokens, 0.0)
    return found


def _module(
    shape: DecoderShape,
    key: tuple[int, CutSpace],
    head_units: HeadUnits,
    elimination: Elimination,
    measured: Mapping[int, float],
) -> ModuleSensitivity:
    index, space = key
    layer, order = shape.layers[index], elimination.order
    steps = _step_count(shape, index, space, head_units)
    per_step = len(order) // steps
    errors = elimination.losses[per_step - 1 :: per_step]
    if space == "query" and units_of_layer(layer, head_units) == "groups":
        # A group stands for its query heads.
        size = layer.query_heads // layer.kv_heads
        order, per_step = (order.unsqueeze(1) * size + torch.arange(size)).flatten(), size
    losses = interpolated_losses(errors.numpy(), measured)
    return ModuleSensitivity(order, (torch.arange(steps) + 1) * per_step, torch.from_numpy(losses))
