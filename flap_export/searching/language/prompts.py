"""What a language model is asked in place of each operator. Pure.

A prompt says what is searched and under which constraint, lists what is known, the worst first (LMEA, arXiv 2310.19046;
EvoPrompt, arXiv 2309.08532), and ends with the steps to take and the form of the answer: what a model of short context
does not see is at the front. It is one turn of the user, for not every chat template knows a system.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from flap_export.searching.language.notation import shares, width, written
from flap_export.searching.language.proposers import Message
from flap_export.searching.operators import Pair, Scored
from flap_export.searching.space import Space

OperatorName = Literal["initial", "parents", "crossover", "mutation"]
CANDIDATES_TAG: Final = "candidates"
PARENTS_TAG: Final = "parents"
MAX_CORRECTIONS: Final = 5
"""Problems of the last answer that are spelled out."""


def ask_initial(space: Space, count: int, corrections: Sequence[str] = ()) -> list[Message]:
    """Ask for a first population."""
    steps = (
        "Think about which layers of such a model are redundant and which are not: the first and the last few layers "
        "are often the most sensitive.",
        f"Write {_counted(count, 'candidate')} that follow different ideas about it; all must differ.",
    )
    return _message(_task(space), "", steps, _candidates_form(space, count), corrections)


def ask_parents(
    space: Space, population: Sequence[Scored], pairs: int, corrections: Sequence[str] = ()
) -> list[Message]:
    """Ask who crosses; candidates are numbered as they come in `population`, from 1."""
    steps = (
        "Compare the candidates: what do those with low loss have in common, and which complement each other?",
        f"Choose {_counted(pairs, 'pair')} of two different candidates to cross, by their numbers; good ones more "
        "often.",
    )
    form = (
        f"End your answer with the {_counted(pairs, 'pair')} as JSON within tags and nothing else in them: "
        f"<{PARENTS_TAG}>[[number, number], ...]</{PARENTS_TAG}>."
    )
    return _message(_task(space), _listed(space, population), steps, form, corrections)


def ask_crossover(
    space: Space, pairs: Sequence[Pair], shown: Iterable[Scored] = (), corrections: Sequence[str] = ()
) -> list[Message]:
    """Ask for a child of every pair.

    Args:
        space: that is searched.
        pairs: of parents.
        shown: what else is known and worth showing.
        corrections: what was wrong with the answer before.
    """
    ranked = _ranked([*(parent for pair in pairs for parent in pair), *shown])
    places = {scored.candidate: place for place, scored in enumerate(ranked, start=1)}
    couples = ", ".join(f"{places[one.candidate]} and {places[other.candidate]}" for one, other in pairs)
    steps = (
        f"Cross these pairs of candidates: {couples}. A child takes the rates of some layers from one parent, of the "
        "others from the other, so that it may become better than both.",
        "Adjust single rates until the child keeps the constraint. It must differ from all candidates above.",
    )
    return _message(
        _task(space), _listed(space, ranked), steps, _candidates_form(space, len(pairs), "pair"), corrections
    )


def ask_mutation(
    space: Space, parents: Sequence[Scored], shown: Iterable[Scored] = (), corrections: Sequence[str] = ()
) -> list[Message]:
    """Ask for a changed copy of every parent; the arguments are those of `ask_crossover`."""
    ranked = _ranked([*parents, *shown])
    places = {scored.candidate: place for place, scored in enumerate(ranked, start=1)}
    numbers = ", ".join(str(places[parent.candidate]) for parent in parents)
    steps = (
        f"Change each of these candidates, in copies: {numbers}. Lower the rates of a few layers that seem to be "
        "needed, and raise those of as many others by the same amount.",
        "Check that every result keeps the constraint and differs from all candidates above and from the others.",
    )
    return _message(
        _task(space), _listed(space, ranked), steps, _candidates_form(space, len(parents), "mutated one"), corrections
    )


def _message(task: str, known: str, steps: Sequence[str], form: str, corrections: Sequence[str]) -> list[Message]:
    numbered = "\n".join(f"Step {number}. {step}" for number, step in enumerate((*steps, form), start=1))
    parts = (task, known, _corrected(corrections), numbered)
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def _corrected(corrections: Sequence[str]) -> str:
    if not corrections:
        return ""
    rest = len(corrections) - MAX_CORRECTIONS
    shown = [*corrections[:MAX_CORRECTIONS], *([f"and {rest} more like these"] if rest > 0 else [])]
    return "Of an earlier answer, these could not be used; mind why:\n" + "\n".join(f"- {line}" for line in shown)


def _task(space: Space) -> str:
    count = len(space.layers)
    return "\n".join(
        (
            f"A large language model of {count} layers is pruned structurally: every layer loses a share of its "
            "weights, its pruning rate, as whole attention heads and FFN channels, the least important first. Find "
            "the rates that leave the pruned model with the lowest loss.",
            _form_of_rates(space),
            _budget(space),
            _bounds(space),
        )
    )


def _form_of_rates(space: Space) -> str:
    count = len(space.layers)
    if space.granularity == "layers":
        return f"A candidate is a list of {count} rates between 0 and 1, from the first layer to the last."
    parts = [float(costs.attention[-1]) / costs.total for costs in space.layers]
    same = max(parts) - min(parts) < 1e-3
    held = f"{parts[0]:.3f}" if same else f"[{', '.join(f'{part:.3f}' for part in parts)}], of every layer its own,"
    return (
        f"A candidate is a list of {count} pairs [rate of attention, rate of FFN] between 0 and 1, from the first "
        f"layer to the last. Attention holds {held} of a layer's weights and FFN the rest: weighted by that, the two "
        "make up the layer's rate."
    )


def _budget(space: Space) -> str:
    totals = [costs.total for costs in space.layers]
    mean = space.budget / sum(totals)
    if max(totals) == min(totals):
        return (
            f"Constraint: the layers' rates are multiples of {_number(space.rate(0, 1))}, and their mean is exactly "
            f"{_number(mean)}: they add up to {_number(mean * len(totals))}."
        )
    sizes = ", ".join(f"{total / sum(totals) * len(totals):.3f}" for total in totals)
    return f"Constraint: the mean of the layers' rates, weighted by their sizes [{sizes}], is exactly {_number(mean)}."


def _bounds(space: Space) -> str:
    """Bounds that layers share, each said once; layers are counted from 1."""
    layers_of: dict[str, list[str]] = {}
    for index, (low, high) in enumerate(space.bounds):
        least, greatest = _number(space.rate(index, low)), _number(space.rate(index, high))
        bounds = f"must be {least}" if low == high else f"must lie between {least} and {greatest}"
        layers_of.setdefault(bounds, []).append(str(index + 1))
    if len(layers_of) == 1:
        return f"The rate of every layer {next(iter(layers_of))}."
    return " ".join(f"The rate in layer {', '.join(own)} {bounds}." for bounds, own in layers_of.items())


def _listed(space: Space, scored: Sequence[Scored]) -> str:
    lines = [
        f"{number}. {_worth(one)}: {written(shares(space, one.candidate))}" for number, one in enumerate(scored, 1)
    ]
    return "Candidates known so far, the worst first:\n" + "\n".join(reversed(lines))


def _worth(scored: Scored) -> str:
    latency = "" if scored.latency_ms is None else f", latency {scored.latency_ms:.4g} ms"
    return f"loss {scored.fitness:.6g}{latency}"


def _ranked(scored: Iterable[Scored]) -> list[Scored]:
    """Each candidate once, best first."""
    distinct = {one.candidate: one for one in scored}
    return sorted(distinct.values(), key=lambda one: one.fitness)


def _candidates_form(space: Space, count: int, of: str = "") -> str:
    entry = "rate" if width(space) == 1 else "[rate of attention, rate of FFN]"
    each = f", one for every {of} in that order," if of else ""
    return (
        f"End your answer with the {_counted(count, 'candidate')}{each} as JSON within tags and nothing else in them: "
        f"<{CANDIDATES_TAG}>[[{entry}, ...], ...]</{CANDIDATES_TAG}>, with {len(space.layers)} entries in every "
        "candidate."
    )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")
