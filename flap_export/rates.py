"""Pruning rates per layer: how they are written down, and which cut points of the ladders they mean.

A layer's rate is the share of its attention and FFN weights that goes. How much of that attention bears, a splitting
decides; FFN channels make up the rest, so that every layer meets its rate to half a channel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from flap_export.allocation import Steps, achieved_ratio, cheapest_first, plan_layers
from flap_export.errors import BudgetError, InputError
from flap_export.ladders import LayerLadders
from flap_export.plan import LayerPlan, Ratio
from flap_export.shapes import DecoderShape
from flap_export.storage import Record, Value

RATES_NAME: Final = "rates.json"
Splitting = Literal["losses", "scores", "uniform"]
"""Attention's part of a layer's rate: where the sum of measured losses is least, lowest scores first, or the same."""


@final
@dataclass(frozen=True)
class LayerCosts:
    """What a layer has lost after any number of steps of its two ladders, in weights."""

    ladders: LayerLadders
    attention: NDArray[np.int64]
    """After 0, 1, ... steps; [A + 1]."""
    ffn: NDArray[np.int64]
    """[S + 1]"""

    @classmethod
    def of(cls, ladders: LayerLadders) -> LayerCosts:
        """Both ladders' costs, added up."""
        return cls(ladders, *(np.concatenate([[0], np.cumsum(own.costs)]) for own in (ladders.attention, ladders.ffn)))

    @property
    def total(self) -> int:
        """All of the layer's attention and FFN weights."""
        return int(self.attention[-1] + self.ffn[-1])

    def removed(self, attention: int, ffn: int) -> int:
        """Weights that go."""
        return int(self.attention[attention] + self.ffn[ffn])

    def ffn_steps(self, target: float, attention: int) -> int | None:
        """Steps of the FFN that bring the layer nearest to `target`; None where they miss it by more than half a step.

        Args:
            target: weights of the layer that shall go.
            attention: steps that attention takes.
        """
        rest = target - float(self.attention[attention])
        above = int(np.clip(np.searchsorted(self.ffn, rest), 1, len(self.ffn) - 1))
        nearest = above if self.ffn[above] - rest < rest - self.ffn[above - 1] else above - 1
        half_a_step = int(self.ffn[above] - self.ffn[above - 1]) / 2
        return nearest if abs(float(self.ffn[nearest]) - rest) <= half_a_step else None

    def attention_steps(self, target: float) -> list[int]:
        """The numbers of attention's steps that the FFN can make up to `target`."""
        return [steps for steps in range(len(self.attention)) if self.ffn_steps(target, steps) is not None]


def split(costs: LayerCosts, target: float, splitting: Splitting) -> int:
    """Steps of attention in a layer that loses `target` weights.

    Args:
        costs: of the layer.
        target: weights that go, from nothing to all.
        splitting: see `Splitting`; where what it says is out of the FFN's reach, the nearest number within it counts.
    """
    reachable = costs.attention_steps(target)
    if not reachable:
        return len(costs.attention) - 1 if target > costs.total / 2 else 0
    return SPLITTINGS[splitting](costs, target, reachable)


def _by_losses(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    attention, ffn = (
        np.concatenate([[0.0], np.cumsum(ladder.scores)]) for ladder in (costs.ladders.attention, costs.ladders.ffn)
    )
    # Where two do equally well, the one that leaves more of attention.
    return min(reachable, key=lambda steps: float(attention[steps] + ffn[costs.ffn_steps(target, steps) or 0]))


def _by_scores(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    attention, ffn = costs.ladders.attention, costs.ladders.ffn
    taken, _ = cheapest_first([(attention.scores, attention.costs), (ffn.scores, ffn.costs)], target)
    return min(reachable, key=lambda steps: abs(steps - taken))


def _uniformly(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    share = target / costs.total * float(costs.attention[-1])
    return min(reachable, key=lambda steps: abs(float(costs.attention[steps]) - share))


SPLITTINGS: Final[Mapping[Splitting, Callable[[LayerCosts, float, Sequence[int]], int]]] = {
    "losses": _by_losses,
    "scores": _by_scores,
    "uniform": _uniformly,
}


class LayerRate(Value):
    """Shares of one layer's weights that go; either of the whole layer, or of both modules."""

    rate: float | None = Field(default=None, ge=0, le=1)
    attention: float | None = Field(default=None, ge=0, le=1)
    ffn: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _states_something(self) -> LayerRate:
        if (self.attention is None) != (self.ffn is None) or (self.rate is None and self.attention is None):
            raise ValueError("a layer states its rate, or both attention and ffn")
        return self


class Rates(Record):
    """`rates.json`: one rate per layer."""

    kind: ClassVar[str] = "file of rates"

    model: str | None = None
    layers: tuple[LayerRate, ...]
    digests: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Read a file of rates: this record, or a JSON list with a number per layer.

        Raises:
            InputError: no such file, or it holds something else.
        """
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"no file of rates at '{path}'") from error
        except (ValueError, IsADirectoryError) as error:
            raise InputError(f"'{path}' is not a JSON file: {error}") from error
        if not isinstance(values, list):
            return cls.load(path)
        try:
            return cls(layers=tuple(LayerRate(rate=value) for value in values))
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(
                f"'{path}' must list a share between 0 and 1 per layer, got {problem['input']!r}: {problem['msg']}"
            ) from error


def allocate_by_rates(
    ladders: Sequence[LayerLadders], shape: DecoderShape, rates: Sequence[LayerRate], splitting: Splitting
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """What every layer keeps at its own rate.

    Args:
        ladders: of every layer.
        shape: the dense decoder.
        rates: of every layer.
        splitting: decides about attention where a rate is of the whole layer.

    Raises:
        BudgetError: as many rates as layers there are not, or they remove nothing or everything.
    """
    if len(rates) != len(shape.layers):
        raise BudgetError(f"there are {len(rates)} rates for the model's {len(shape.layers)} layers; list one for each")
    steps = [_steps(LayerCosts.of(layer), rate, splitting) for layer, rate in zip(ladders, rates, strict=True)]
    layers = plan_layers(ladders, shape, steps)
    requested = (
        sum(_asked(LayerCosts.of(layer), rate) for layer, rate in zip(ladders, rates, strict=True))
        / shape.decoder_parameters
    )
    return layers, achieved_ratio(shape, layers, requested, "every layer meets its own rate with whole heads and steps")


def _steps(costs: LayerCosts, rate: LayerRate, splitting: Splitting) -> tuple[int, int]:
    if rate.attention is not None and rate.ffn is not None:
        attention = _nearest(costs.attention, rate.attention * float(costs.attention[-1]))
        return attention, _nearest(costs.ffn, rate.ffn * float(costs.ffn[-1]))
    target = _asked(costs, rate)
    attention = split(costs, target, splitting)
    return attention, _nearest(costs.ffn, target - float(costs.attention[attention]))


def _nearest(removed: NDArray[np.int64], target: float) -> int:
    return int(np.argmin(np.abs(removed - target)))


def _asked(costs: LayerCosts, rate: LayerRate) -> float:
    """Weights of a layer that shall go."""
    if rate.attention is None or rate.ffn is None:
        return (rate.rate or 0.0) * costs.total
    return rate.attention * float(costs.attention[-1]) + rate.ffn * float(costs.ffn[-1])


def rates_of_steps(ladders: Sequence[LayerLadders], steps: Steps) -> tuple[LayerRate, ...]:
    """The rates that mean these cut points, exactly."""
    return tuple(_rate(LayerCosts.of(layer), *taken) for layer, taken in zip(ladders, steps, strict=True))


def _rate(costs: LayerCosts, attention: int, ffn: int) -> LayerRate:
    return LayerRate(
        rate=costs.removed(attention, ffn) / costs.total,
        attention=float(costs.attention[attention] / costs.attention[-1]),
        ffn=float(costs.ffn[ffn] / costs.ffn[-1]),
    )
