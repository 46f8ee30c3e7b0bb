"""What every module of every layer costs the model when it shrinks: what `flap_export.evidence.measuring` records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flap_export.allocation.ladders import HeadUnits, Ladder, LayerLadders, attention_costs, ffn_steps
from flap_export.calibration.statistics import CUT_SPACES, CutSpace
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
                for space in CUT_SPACES
            }
            return cls(**{name: header[name] for name in _HEADER}, modules=modules)
        except KeyError as error:
            raise InputError(f"'{path}' lacks {error}; measure again") from error

    def ladders(self, shape: DecoderShape, align_channels: int = 1) -> tuple[LayerLadders, ...]:
        """Both ladders of every layer; the scores are what each step adds to the loss."""
        return tuple(
            LayerLadders(
                _attention_ladder(self.modules[index, "query"], shape, layer, self.head_units),
                _ffn_ladder(self.modules[index, "ffn"], shape, layer, align_channels),
            )
            for index, layer in enumerate(shape.layers)
        )


_HEADER: Final = ("model", "source", "sequences", "sequence_length", "seed", "head_units", "digests")


def _attention_ladder(
    module: ModuleSensitivity, shape: DecoderShape, layer: LayerShape, head_units: HeadUnits
) -> Ladder:
    costs, added = attention_costs(shape, layer, head_units), np.diff(module.losses.numpy(), prepend=0.0)
    return Ladder(module.order.numpy(), module.gone.numpy(), costs, added, shape.joint_parameters(layer))


def _ffn_ladder(module: ModuleSensitivity, shape: DecoderShape, layer: LayerShape, align_channels: int) -> Ladder:
    gone = ffn_steps(layer.ffn_channels, align_channels)
    losses = module.losses.numpy()[gone - 1]
    costs = np.diff(gone, prepend=0) * shape.ffn_unit_parameters(layer)
    return Ladder(module.order.numpy(), gone * layer.ffns, costs, np.diff(losses, prepend=0.0))


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
