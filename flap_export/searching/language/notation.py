"""How prompts and answers write a candidate: of every layer its rate, or with attention apart a pair of rates. Pure."""

from __future__ import annotations

import json

import numpy as np

from flap_export.searching.space import Candidate, Space

Shares = tuple[tuple[float, ...], ...]
"""Of every layer (rate,), or (rate of attention, rate of FFN); each a share of the weights it is of."""
_DIGITS = 3


def width(space: Space) -> int:
    """Rates of one layer."""
    return 1 if space.granularity == "layers" else 2


def shares(space: Space, candidate: Candidate) -> Shares:
    """What a candidate takes of every layer."""
    if space.granularity == "layers":
        return tuple((rate,) for rate in space.rates(candidate))
    return tuple(
        (float(costs.attention[attention] / costs.attention[-1]), float(costs.ffn[ffn] / costs.ffn[-1]))
        for costs, (attention, ffn) in zip(space.layers, space.steps(candidate), strict=True)
    )


def written(found: Shares) -> str:
    """Rates as JSON: a list of numbers, or of pairs."""
    rounded = [[round(share, _DIGITS) for share in layer] for layer in found]
    return json.dumps([layer[0] if len(layer) == 1 else layer for layer in rounded])


def meant(space: Space, asked: Shares, random: np.random.Generator) -> Candidate:
    """The candidate of the space that is nearest to what was asked for.

    Args:
        space: says what a layer's shares are.
        asked: shares in 0..1, which may miss bounds, levels and budget.
        random: for ties.
    """
    if space.granularity == "layers":
        return space.repaired([rate for (rate,) in asked], None, random)
    rates, attention = [], []
    for costs, (of_attention, of_ffn) in zip(space.layers, asked, strict=True):
        target = of_attention * float(costs.attention[-1])
        rates.append((target + of_ffn * float(costs.ffn[-1])) / costs.total)
        attention.append(int(np.argmin(np.abs(costs.attention - target))))
    return space.repaired(rates, attention, random)


def distance(asked: Shares, found: Shares) -> float:
    """How far a repair moved: the changes of all rates, added up."""
    pairs = zip(asked, found, strict=True)
    return sum(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
