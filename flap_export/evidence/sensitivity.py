"""What every module of every layer costs the model when it shrinks: what `flap_export.evidence.measuring` records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flap_export.allocation.ladders import (
    HeadUnits,
    Ladder,
    LayerLadders,
    attention_costs,
    elements_of,
    ffn_steps,
    in_proportion,
    merged,
    numbered_from,
)
from flap_export.calibration.statistics import CutSpace, stored_spaces
from flap_export.errors import InputError
from flap_export.shapes import DecoderShape, LayerShape
from flap_export.storage import load_tensors, save_tensors

SENSITIVITY_NAME: Final = "sensitivity.safetensors"
SCHEMA_VERSION: Final = 1


@final
@dataclass(frozen=True)
class ModuleSensitivity:
    """One projection's units in the order they go, and what that does."""

    order: Tensor
    """Query heads or FFN channels, first to go first, numbered as in `flap_export.allocation.ladders`; int64 [N]."""
    gone: Tensor
    """How many of them are gone after each step; int64 [S]."""
    losses: Tensor
    """KL divergence from the dense model after each step, nats per token; float64 [S], never falling."""


@final
@dataclass(frozen=True)
class Sensitivity:
    """What shrinking every module costs, and where that was measured."""

    model: str
    source: str
    sequences: int
    sequence_length: int
    seed: int
    head_units: HeadUnits
    modules: Mapping[tuple[int, CutSpace], ModuleSensitivity]
    digests: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as safetensors, under a temporary name first."""
        tensors = {
            f"layers.{layer}.{space}.{name}": getattr(module, name)
            for (layer, space), module in self.modules.items()
            for name in ("order", "gone", "losses")
        }
        header = {name: getattr(self, name) for name in _HEADER}
        layers = len({layer for layer, _ in self.modules})
        save_tensors(path, "sensitivity", SCHEMA_VERSION, tensors, {**header, "layers": layers})

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Read a saved one.

        Raises:
            InputError: no such file, or it holds something else.
        """
        tensors, header = load_tensors(path, "sensitivity", SCHEMA_VERSION)
        try:
            modules = {
                (layer, space): ModuleSensitivity(
                    *(tensors[f"layers.{layer}.{space}.{name}"] for name in ("order", "gone", "losses"))
                )
                for layer in range(header["layers"])
                for space in stored_spaces(tensors, layer)
            }
            return cls(**{name: header[name] for name in _HEADER}, modules=modules)
        except KeyError as error:
            raise InputError(f"'{path}' lacks {error}; measure again") from error

    def ladders(
        self, shape: DecoderShape, align_channels: int = 1, *, proportional: bool = False
    ) -> tuple[LayerLadders, ...]:
        """Both ladders of every layer; the scores are what each step adds to the loss.

        Args:
            shape: the dense decoder.
            align_channels: FFN widths that are left are multiples of this, or the dense width.
            proportional: whether routed experts and a shared one lose the same share, whatever that costs.
        """
        return tuple(
            LayerLadders(
                _attention_ladder(self.modules[index, "query"], shape, layer, self.head_units),
                self._ffn_ladder(shape, index, align_channels, proportional),
            )
            for index, layer in enumerate(shape.layers)
        )

    def _ffn_ladder(self, shape: DecoderShape, index: int, align_channels: int, proportional: bool) -> Ladder:
        """The ladder of all FFNs of a layer; losses of routed experts and of a shared one are taken to add up."""
        layer = shape.layers[index]
        routed = _ffn_ladder(self.modules[index, "ffn"], layer.ffn_channels, layer.ffns, shape, align_channels)
        if layer.shared_channels is None:
            return routed
        own = _ffn_ladder(self.modules[index, "shared"], layer.shared_channels, 1, shape, align_channels)
        shared = numbered_from(elements_of("shared", None, layer)[0], own)
        if proportional:
            return in_proportion(routed, shared)
        return merged([routed, shared], [hull_slopes(routed), hull_slopes(shared)])


_HEADER: Final = ("model", "source", "sequences", "sequence_length", "seed", "head_units", "digests")


def _attention_ladder(
    module: ModuleSensitivity, shape: DecoderShape, layer: LayerShape, head_units: HeadUnits
) -> Ladder:
    costs, added = attention_costs(shape, layer, head_units), np.diff(module.losses.numpy(), prepend=0.0)
    return Ladder(module.order.numpy(), module.gone.numpy(), costs, added, shape.joint_parameters(layer))


def _ffn_ladder(module: ModuleSensitivity, width: int, ffns: int, shape: DecoderShape, align_channels: int) -> Ladder:
    """Of so many FFNs side by side that lose a channel each at a time."""
    gone = ffn_steps(width, align_channels)
    losses = module.losses.numpy()[gone - 1]
    costs = np.diff(gone, prepend=0) * ffns * shape.ffn_channel_parameters
    return Ladder(module.order.numpy(), gone * ffns, costs, np.diff(losses, prepend=0.0))


def hull_slopes(ladder: Ladder) -> NDArray[np.float64]:
    """Loss per weight of every step along the lower convex hull of loss over weights; [S], never falling.

    Steps of several ladders in this order remove any number of weights at nearly the least loss.
    """
    weights, losses = (np.concatenate([[0.0], np.cumsum(values)]) for values in (ladder.costs, ladder.scores))
    corners = [0]
    for point in range(1, len(weights)):
        while len(corners) > 1 and _slope(weights, losses, *corners[-2:]) >= _slope(
            weights, losses, corners[-1], point
        ):
            corners.pop()
        corners.append(point)
    slopes = [_slope(weights, losses, first, last) for first, last in pairwise(corners)]
    return np.repeat(slopes, np.diff(corners))


def _slope(weights: NDArray[np.float64], losses: NDArray[np.float64], first: int, last: int) -> float:
    return float((losses[last] - losses[first]) / (weights[last] - weights[first]))


def interpolated_losses(errors: NDArray[np.float64], measured: Mapping[int, float]) -> NDArray[np.float64]:
    """The loss after every step, from the output error after every step and the loss after a few.

    Loss over error changes slowly with the number of steps; its logarithm is interpolated linearly. No loss exceeds the
    next measured one: where errors are nearly zero the ratio is noise.

    Args:
        errors: output error after each step, [S].
        measured: loss by number of steps taken.

    Returns:
        [S], never falling.
    """
    tiny = np.finfo(np.float64).tiny
    known = sorted(measured)
    levels = np.log(np.maximum.accumulate([max(measured[steps], tiny) for steps in known]))
    growth = np.log(np.maximum(errors, tiny))
    taken = np.arange(1, len(errors) + 1)
    losses = np.interp(taken, known, levels - growth[np.array(known) - 1]) + growth
    next_measured = np.append(levels, np.inf)[np.searchsorted(known, taken)]
    return np.maximum.accumulate(np.exp(np.minimum(losses, next_measured)))
