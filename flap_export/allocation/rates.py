"""Pruning rates per layer: how they are written down, and which cut points of the ladders they mean.

A layer's rate is the share of its attention and FFN weights that goes. How much of that attention bears, a splitting
decides; FFN channels make up the rest, so that every layer meets its rate to half an FFN step wherever its FFN is large
enough for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flap_export.allocation.budgets import cheapest_first
from flap_export.allocation.ladders import LayerLadders
from flap_export.allocation.ratios import achieved_ratio
from flap_export.allocation.stage import Steps, nearest_steps, plan_layers
from flap_export.errors import BudgetError, InputError
from flap_export.plan import LayerPlan, Ratio
from flap_export.shapes import DecoderShape
from flap_export.storage import Record, Value

RATES_NAME: Final = "rates.json"
TOLERANCE: Final = 0.005
"""Of shares that are stated twice: rates written with two decimals are off by as much."""
_MAX_BYTES: Final = 1 << 24
_ROUNDING: Final = 1e-9
Splitting = Literal["losses", "scores", "uniform"]
"""Attention's part of a layer's rate: where the sum of measured losses is least, lowest scores first, or the same."""
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


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

    def ffn_steps(self, target: float, attention: int) -> int:
        """Steps of the FFN that bring the layer nearest to `target`; fewer where two do.

        Args:
            target: weights of the layer that shall go.
            attention: steps that attention takes.
        """
        return nearest_steps(self.ffn, target - float(self.attention[attention]))

    def attention_steps(self, target: float) -> list[int]:
        """The numbers of attention's steps that the FFN can make up to `target`, to half of one of its own steps.

        Where the FFN is too small for any, those that come nearest. Nothing and all are met exactly.

        Args:
            target: weights of the layer that shall go, from nothing to all.
        """
        if not 0 < target < self.total:
            return [len(self.attention) - 1 if target > 0 else 0]
        rest = target - self.attention
        above = np.clip(np.searchsorted(self.ffn, rest), 1, len(self.ffn) - 1)
        lower, upper = self.ffn[above - 1], self.ffn[above]
        misses = np.minimum(np.abs(upper - rest), np.abs(lower - rest))
        reachable = misses <= (upper - lower) / 2
        return [int(steps) for steps in np.flatnonzero(reachable if reachable.any() else misses <= misses.min())]


def split(costs: LayerCosts, target: float, splitting: Splitting) -> int:
    """Steps of attention in a layer that loses `target` weights.

    Args:
        costs: of the layer.
        target: weights that go, from nothing to all.
        splitting: see `Splitting`; where what it says is out of the FFN's reach, the nearest number within it counts.
    """
    return SPLITTINGS[splitting](costs, target, costs.attention_steps(target))


def _by_losses(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    attention, ffn = (
        np.concatenate([[0.0], np.cumsum(ladder.scores)]) for ladder in (costs.ladders.attention, costs.ladders.ffn)
    )
    # Where two do equally well, the one that leaves more of attention.
    return min(reachable, key=lambda steps: float(attention[steps] + ffn[costs.ffn_steps(target, steps)]))


def _by_scores(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    attention, ffn = costs.ladders.attention, costs.ladders.ffn
    taken, _ = cheapest_first([(attention.scores, attention.costs), (ffn.scores, ffn.costs)], target)
    return min(reachable, key=lambda steps: abs(steps - taken))


def _uniformly(costs: LayerCosts, target: float, reachable: Sequence[int]) -> int:
    removed = costs.ladders.attention.own_removed
    share = target / costs.total * float(removed[-1])
    return min(reachable, key=lambda steps: abs(float(removed[steps]) - share))


SPLITTINGS: Final[Mapping[Splitting, Callable[[LayerCosts, float, Sequence[int]], int]]] = {
    "losses": _by_losses,
    "scores": _by_scores,
    "uniform": _uniformly,
}


class LayerRate(Value):
    """Shares of one layer's weights that go: of the whole layer, of both modules, or both; a number is the layer's."""

    rate: Share | None = None
    attention: Share | None = None
    ffn: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"rate": value} if isinstance(value, (int, float)) else value

    @model_validator(mode="after")
    def _states_something(self) -> LayerRate:
        if (self.attention is None) != (self.ffn is None) or (self.rate is None and self.attention is None):
            raise PydanticCustomError("incomplete_rate", "a layer must state its rate, or both attention and ffn")
        return self

    @property
    def modules(self) -> tuple[float, float] | None:
        """Attention's share and the FFN's, where they are stated."""
        return None if self.attention is None or self.ffn is None else (self.attention, self.ffn)

    def removed(self, attention: int, ffn: int) -> float:
        """Weights that shall go of a layer that has so many.

        Args:
            attention: weights of its attention.
            ffn: weights of its FFN.
        """
        if self.modules is None:
            return (self.rate or 0.0) * (attention + ffn)
        return self.modules[0] * attention + self.modules[1] * ffn


class Rates(Record):
    """`rates.json`: one rate per layer."""

    kind: ClassVar[str] = "file of rates"

    model: str | None = None
    """The dense model they were found for; they are meant as well for any other with as many layers."""
    layers: tuple[LayerRate, ...] = Field(min_length=1)
    digests: dict[str, str] = Field(default_factory=dict)
    """Of what they came from."""

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Read a file of rates: this record, or a JSON list with a number per layer.

        Raises:
            InputError: no such file, or it holds something else.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"'{path}' has {path.stat().st_size >> 20} MiB, which no file of rates has")
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"no {cls.kind} at '{path}'") from error
        except OSError as error:
            raise InputError(f"the {cls.kind} '{path}' cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"the {cls.kind} '{path}' is not valid JSON: {error}") from error
        try:
            return cls.model_validate({"layers": values} if isinstance(values, list) else values)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "top level"
            raise InputError(
                f"the {cls.kind} '{path}' must be a JSON list with a share between 0 and 1 per layer, or "
                f"the rates.json of a search; {where} is {_shown(problem['input'])}: "
                f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
            ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_rates(rates: Sequence[LayerRate], shape: DecoderShape, ratio: float | None = None) -> None:
    """Whether rates fit a model, themselves, and the ratio where one is asked for beside them.

    Args:
        rates: of every layer.
        shape: the dense decoder.
        ratio: share of the decoder's attention and FFN weights that goes.

    Raises:
        BudgetError: as many rates as layers there are not, a layer's do not add up, they remove nothing or everything,
            or another share than `ratio`, by more than `TOLERANCE`.
    """
    if len(rates) != len(shape.layers):
        raise BudgetError(f"there must be a rate for each of the model's {len(shape.layers)} layers, got {len(rates)}")
    for index, (rate, layer) in enumerate(zip(rates, shape.layers, strict=True)):
        attention, ffn = shape.attention_parameters(layer), shape.ffn_parameters(layer)
        share = rate.removed(attention, ffn) / (attention + ffn)
        if rate.rate is not None and abs(rate.rate - share) > TOLERANCE + _ROUNDING:
            raise BudgetError(
                f"layer {index}: attention {rate.attention} and ffn {rate.ffn} together are a rate of {share:.4f} of "
                f"the layer's weights, stated is {rate.rate}; leave out what shall not hold"
            )
    found = ratio_of_rates(rates, shape)
    if not 0 < found < 1:
        raise BudgetError(f"the rates must leave something and remove something, they are {found:g} in every layer")
    if ratio is not None and abs(ratio - found) > TOLERANCE + _ROUNDING:
        raise BudgetError(
            f"the rates remove {found:.2%} of the attention and FFN weights, the ratio asks for {ratio:.2%}; leave "
            f"out the ratio, or give rates that agree with it to {TOLERANCE:.1%}"
        )


def ratio_of_rates(rates: Sequence[LayerRate], shape: DecoderShape) -> float:
    """Share of the decoder's attention and FFN weights that rates remove.

    Args:
        rates: of every layer.
        shape: the dense decoder.
    """
    removed = sum(
        rate.removed(shape.attention_parameters(layer), shape.ffn_parameters(layer))
        for rate, layer in zip(rates, shape.layers, strict=True)
    )
    return removed / shape.decoder_parameters


def allocate_by_rates(
    ladders: Sequence[LayerLadders], shape: DecoderShape, rates: Sequence[LayerRate], splitting: Splitting
) -> tuple[tuple[LayerPlan, ...], Ratio]:
    """What every layer keeps at its own rate.

    Args:
        ladders: of every layer.
        shape: the dense decoder.
        rates: of every layer.
        splitting: decides about attention where a layer's rate alone is stated.

    Raises:
        BudgetError: the rates do not fit the model, see `check_rates`, or what they mean in whole heads and FFN steps
            removes nothing or everything.
    """
    check_rates(rates, shape)
    layers = plan_layers(ladders, shape, steps_of_rates(ladders, rates, splitting))
    reason = "every layer meets its own rate in whole heads and FFN steps"
    return layers, achieved_ratio(shape, layers, ratio_of_rates(rates, shape), reason)


def steps_of_rates(ladders: Sequence[LayerLadders], rates: Sequence[LayerRate], splitting: Splitting) -> Steps:
    """The cut points that rates mean: of both modules the nearest to theirs, or together the nearest to the layer's.

    Args:
        ladders: of every layer.
        rates: of every layer.
        splitting: decides about attention where a layer's rate alone is stated.
    """
    return [_steps(LayerCosts.of(layer), rate, splitting) for layer, rate in zip(ladders, rates, strict=True)]


def _steps(costs: LayerCosts, rate: LayerRate, splitting: Splitting) -> tuple[int, int]:
    whole = int(costs.attention[-1]), int(costs.ffn[-1])
    if rate.modules is not None:
        attention, ffn = (share * weights for share, weights in zip(rate.modules, whole, strict=True))
        return nearest_steps(costs.attention, attention), nearest_steps(costs.ffn, ffn)
    target = rate.removed(*whole)
    taken = split(costs, target, splitting)
    return taken, costs.ffn_steps(target, taken)


def rates_of_steps(ladders: Sequence[LayerLadders], steps: Steps) -> tuple[LayerRate, ...]:
    """The rates that mean these cut points, exactly.

    Args:
        ladders: of every layer.
        steps: how many of each are taken.
    """
    return tuple(_rate(LayerCosts.of(layer), *taken) for layer, taken in zip(ladders, steps, strict=True))


def _rate(costs: LayerCosts, attention: int, ffn: int) -> LayerRate:
    return LayerRate(
        rate=costs.removed(attention, ffn) / costs.total,
        attention=float(costs.attention[attention] / costs.attention[-1]),
        ffn=float(costs.ffn[ffn] / costs.ffn[-1]),
    )
