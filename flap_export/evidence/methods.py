"""The pruning methods, as data: what each goes by, and which of FLAP's options it has.

flap         FLAP: fluctuation scores, one ranking over the whole model, a bias (arXiv 2312.11983)
obs          the best here without retraining: second-order elimination within every module, a budget spread by measured
             losses, least squares
wanda-sp     Wanda's scores on columns, the same share everywhere, statistics of the already pruned layers
llm-pruner   first-order Taylor scores of coupled weights, first and last layers spared (arXiv 2305.11627)
magnitude    squared norms of coupled weights, the same share everywhere
random       no reason at all, the same share everywhere
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flap_export.allocation.ladders import HEAD_UNITS, HeadUnits, check_alignment
from flap_export.allocation.rates import LayerRate
from flap_export.allocation.ratios import check_ratio
from flap_export.allocation.stage import STRUCTURES, StructureName
from flap_export.calibration.statistics import StatisticsName
from flap_export.errors import BudgetError, InputError, check_choice
from flap_export.rewriting.compensation import COMPENSATIONS, CompensationName
from flap_export.rewriting.stock import LAYOUTS, Layout
from flap_export.scoring import METRICS, MetricName
from flap_export.storage import Seed, Value

UNIFORM: Final = "ul-um"
MethodName = Literal["flap", "obs", "wanda-sp", "llm-pruner", "magnitude", "random"]
Basis = Literal["statistics", "sensitivity", "gradients", "weights", "chance"]


@final
@dataclass(frozen=True)
class Method:
    """One row of the table."""

    basis: Basis
    """What decides which units go."""
    compensation: CompensationName
    metric: MetricName | None = None
    """None where scores are not those of FLAP's metrics."""
    structure: StructureName | None = None
    """None where the budget follows measured losses."""
    propagates_pruned: bool = False
    """Whether a layer's statistics are of what the already pruned layers give."""
    spares_ends: bool = False
    """Whether the first and the last layers stay whole."""

    @property
    def needs_text(self) -> bool:
        """Whether the choice of units takes calibration text."""
        return self.basis in ("statistics", "sensitivity", "gradients")


METHODS: Final[Mapping[MethodName, Method]] = {
    "flap": Method("statistics", "bias", "wifv", "al-am"),
    "obs": Method("sensitivity", "least-squares"),
    "wanda-sp": Method("statistics", "none", "wifn", "ul-um", propagates_pruned=True),
    "llm-pruner": Method("gradients", "none", structure="ul-um", spares_ends=True),
    "magnitude": Method("weights", "none", structure="ul-um"),
    "random": Method("chance", "none", structure="ul-um"),
}


class PruneOptions(Value):
    """How a model is pruned; None stands for what the method itself does."""

    ratio: float | None = None
    """Share of the decoder's attention and FFN weights that goes, in (0, 1); None for what the rates come to."""
    method: MethodName = "flap"
    metric: MetricName | None = None
    structure: StructureName | None = None
    square_attention: bool | None = None
    """Square attention scores before they are standardised; None does as the statistics do: only the official code
    squares them."""
    compensation: CompensationName | None = None
    sequential: bool = False
    """Fit least squares to the inputs that the already pruned layers give."""
    remove_heads: int = Field(default=0, ge=0)
    """Query heads that go, for the structures al-mm and ul-mm."""
    head_units: HeadUnits = "groups"
    """Whole KV groups, or one query head of every group at a time."""
    align_channels: int = 1
    """FFN widths that are left are multiples of this."""
    layout: Layout = "uneven"
    """Counts of its own for every layer, or the same in all, loadable by the family's own classes."""
    seed: Seed = 0
    """Of the method random."""
    rates: tuple[LayerRate, ...] | None = None
    """Of every layer, instead of a budget that the method spreads."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> PruneOptions:
        if self.ratio is None and self.rates is None:
            raise PydanticCustomError("no_budget", "--ratio must be given, or --rates of every layer")
        return self

    def squares_attention(self, statistics: StatisticsName) -> bool:
        """Whether attention scores of such statistics are squared."""
        return statistics == "reference" if self.square_attention is None else self.square_attention

    @property
    def unused(self) -> str | None:
        """An option that was given and changes nothing, once the structure is known."""
        return "remove_heads" if self.remove_heads and not (self.structure or "").endswith("-mm") else None

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]


def resolved(options: PruneOptions) -> PruneOptions:
    """The options with the method's own choices filled in.

    Raises:
        BudgetError: the ratio is not in (0, 1), or there is another budget beside the rates.
        InputError: an unknown name, or an option that the method does not have.
        PlanError: an alignment that is not positive.
    """
    if options.ratio is not None:
        check_ratio(options.ratio)
    check_alignment(options.align_channels)
    check_choice("method", options.method, METHODS)
    check_choice("head units", options.head_units, HEAD_UNITS)
    check_choice("layout", options.layout, LAYOUTS)
    method = options.row
    for name, given, own, known in (
        ("metric", options.metric, method.metric, METRICS),
        ("structure", options.structure, method.structure, STRUCTURES),
        ("compensation", options.compensation, method.compensation, COMPENSATIONS),
    ):
        if given is not None:
            check_choice(name, given, known)
            if own is None and not (name == "structure" and options.layout == "stock" and given == UNIFORM):
                raise InputError(f"the method {options.method} has no {name} of its own to replace; leave out --{name}")
    filled = options.model_copy(
        update={
            "metric": options.metric or method.metric,
            "structure": options.structure or (UNIFORM if options.layout == "stock" else method.structure),
            "compensation": options.compensation or method.compensation,
        }
    )
    if options.layout == "stock" and (method.spares_ends or not (filled.structure or "").startswith("ul")):
        raise InputError(
            f"--layout stock needs the same counts in every layer, so a structure ul-um or ul-mm and a method that "
            f"spares no layers; got {options.method} with {filled.structure}"
        )
    if options.rates is not None:
        _check_beside_rates(filled)
    if method.propagates_pruned and filled.structure != UNIFORM:
        raise InputError(
            f"{options.method} decides about a layer before it has seen the later ones, so its structure is ul-um; "
            f"got {filled.structure}"
        )
    if filled.square_attention is not None and method.metric is None:
        raise InputError(f"the method {options.method} has no metric whose attention scores could be squared")
    if filled.sequential and filled.compensation != "least-squares":
        raise InputError("--sequential is about --compensation least-squares, which was not chosen")
    return filled


def _check_beside_rates(options: PruneOptions) -> None:
    if options.layout == "stock":
        raise InputError("--layout stock needs the same counts in every layer; leave it out where --rates are given")
    if options.remove_heads and (options.structure or "").endswith("-mm"):
        raise BudgetError(
            f"--remove-heads is a budget of {options.structure} over all layers, --rates are every layer's own; "
            "leave out one of them"
        )
