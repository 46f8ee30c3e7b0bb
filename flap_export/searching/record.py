"""What a search was asked, and what it found."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import Field

from flap_export.evidence.methods import PruneOptions
from flap_export.evidence.record import CalibrationText
from flap_export.plan import Ratio
from flap_export.searching.fitness import FitnessName
from flap_export.searching.judging import CurvePoint
from flap_export.searching.language.asking import Usage
from flap_export.searching.space import Granularity
from flap_export.searching.strategies import StrategyName
from flap_export.storage import Record, Value

SEARCH_NAME: Final = "search.json"
REQUEST_NAME: Final = "request.json"


class SearchOptions(Value):
    """How rates are searched; how units are ranked and restored, `flap_export.evidence.methods.PruneOptions` says."""

    strategy: StrategyName = "evolutionary"
    proposer: str | None = None
    """Who answers prompts in place of chance, in a population: `openai:URL`, `local:PATH`, `self`; None is chance."""
    proposer_model: str | None = None
    """The model's name at a server."""
    proposer_timeout_s: float = Field(default=120.0, gt=0)
    """For a server to answer."""
    proposer_retries: int = Field(default=5, ge=0)
    """Requests to a server after the first, for one answer, each after a longer wait."""
    prices: tuple[float, float] | None = None
    """Of a million tokens in prompts and in answers, in any currency."""
    evaluations: float = Field(default=430.0, ge=1)
    """Looks at one candidate on all of the text; partial ones count their part."""
    population: int = Field(default=30, ge=2)
    mutations: int = Field(default=10, ge=0)
    """Of one generation of a population."""
    crossovers: int = Field(default=10, ge=0)
    granularity: Granularity = "layers"
    step: float = Field(default=0.05, gt=0, le=0.5)
    """Of a rate, at most."""
    least: float = Field(default=0.0, ge=0, le=1)
    greatest: float = Field(default=0.9, ge=0, le=1)
    bounds: dict[int, tuple[float, float]] = Field(default_factory=dict)
    """Least and greatest rate of single layers."""
    protect_first: int = Field(default=0, ge=0)
    protect_last: int = Field(default=0, ge=0)
    fitness: FitnessName = "kl"
    fitness_samples: int | None = Field(default=None, ge=1)
    """Calibration sequences that fitness is measured on, others than those that units are ranked by; None: up to 64
    of what the text holds."""
    stages: tuple[float, ...] = (0.125, 0.5, 1.0)
    """Shares of them that a candidate has been seen on after each look; the last is 1."""
    informed: bool = True
    """Begin with known rates: uniform, and the method's own allocation."""
    latency: str | None = None
    """A row of `flap_export.prediction.GPUS` whose expected decode latency is the second objective."""
    latency_batch: int = Field(default=1, ge=1)
    latency_context: int = Field(default=1024, ge=1)


_OF_A_RUN: Final = {
    "strategy",
    "proposer",
    "proposer_model",
    "proposer_timeout_s",
    "proposer_retries",
    "prices",
    "evaluations",
}
"""Options that may change while a search's problem stays the same."""


class SearchRequest(Record):
    """`request.json`: what a search was asked for."""

    kind: ClassVar[str] = "search request"

    model: str
    calibration: CalibrationText
    prune: PruneOptions
    options: SearchOptions

    def settings(self) -> dict[str, Any]:
        """What must stay the same for a search to go on: all but who searches for how long."""
        options = self.options.model_dump(mode="json", exclude=_OF_A_RUN)
        return {
            "model": self.model,
            "calibration": self.calibration.model_dump(mode="json"),
            "prune": self.prune.model_dump(mode="json"),
            **{f"options.{name}": value for name, value in options.items()},
        }


class Found(Value):
    """One candidate of the result."""

    rates: tuple[float, ...]
    """Of every layer."""
    attention: tuple[float, ...]
    """Of every layer's attention."""
    ffn: tuple[float, ...]
    fitness: float
    latency_ms: float | None = None


class SearchRun(Value):
    """One strategy from one seed."""

    name: str
    strategy: StrategyName
    proposer: str | None
    seed: int
    best: Found
    front: tuple[Found, ...] = ()
    """The trade-off, where there is a second objective."""
    evaluations: float
    looks: int
    """Candidates that were seen, on however little text."""
    seconds: float
    """To the last generation; of one that was interrupted, what it had finished before counts too."""
    curve: tuple[CurvePoint, ...]
    usage: Usage | None = None
    """Of the language model."""
    cost: float | None = None
    """Of its tokens, at the prices given."""


class SearchReport(Record):
    """`search.json`."""

    kind: ClassVar[str] = "search report"

    model: str
    ratio: Ratio
    options: SearchOptions
    prune: PruneOptions
    calibration: CalibrationText
    fitness_sequences: int
    fitness_shares_calibration: bool
    """Whether the text was too short for sequences of its own to measure fitness on."""
    references: dict[str, float]
    """Fitness of known rates under the same budget."""
    runs: tuple[SearchRun, ...]
    chosen: str
    """The run whose best was taken."""
    prepare_s: float
    digests: dict[str, str] = Field(default_factory=dict)
