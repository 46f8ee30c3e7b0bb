"""Spending a budget on ladders: how many steps each goes down. Pure arithmetic on scores and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_BISECTIONS: Final = 200


def cheapest_first(ladders: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]], budget: float) -> list[int]:
    """Take steps from the lowest score on while they fit `budget` to half of the smallest step's cost.

    Args:
        ladders: scores, ascending, and costs of the steps of each; [S] both.
        budget: in the same units as the costs.

    Returns:
        Steps taken of each ladder. A step that costs too much ends its ladder: those behind it are not taken either.
    """
    values = np.concatenate([scores for scores, _ in ladders])
    costs = np.concatenate([step_costs for _, step_costs in ladders])
    owners = np.repeat(np.arange(len(ladders)), [len(scores) for scores, _ in ladders])
    taken, removed, smallest = [0] * len(ladders), 0, int(costs.min())
    ended: set[int] = set()
    # A stable sort: equal scores go in layer order, so that the same statistics always give the same plan.
    for step in np.argsort(values, kind="stable"):
        owner, cost = int(owners[step]), int(costs[step])
        if owner in ended:
            continue
        if removed + cost <= budget + smallest / 2:
            taken[owner] += 1
            removed += cost
        elif cost == smallest:
            break
        else:
            ended.add(owner)
    return taken


def least_loss(ladders: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]], budget: float) -> list[int]:
    """Steps of each ladder that cost at most `budget`, to half of the smallest step, at the least added score.

    Args:
        ladders: what each step adds, and costs of the steps; [S] both.
        budget: in the same units as the costs.
    """
    losses = [np.concatenate([[0.0], np.cumsum(added)]) for added, _ in ladders]
    weights = [np.concatenate([[0], np.cumsum(costs)]) for _, costs in ladders]
    limit = budget + min(int(costs.min()) for _, costs in ladders) / 2

    def at(price: float) -> list[int]:
        return [int(np.argmin(loss - price * weight)) for loss, weight in zip(losses, weights, strict=True)]

    def cost(taken: Sequence[int]) -> int:
        return sum(int(weight[steps]) for weight, steps in zip(weights, taken, strict=True))

    low, high = 0.0, max(float(added.sum() / costs.sum()) for added, costs in ladders) + 1.0
    while cost(at(high)) <= limit and high < np.finfo(np.float64).max / 4:
        low, high = high, 2 * high
        if cost(at(low)) == sum(int(weight[-1]) for weight in weights):
            break
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= limit else (low, middle)
    return _filled(at(low), losses, weights, limit)


def _filled(
    taken: list[int], losses: Sequence[NDArray[np.float64]], weights: Sequence[NDArray[np.int64]], limit: float
) -> list[int]:
    """Go on with the single steps that add least per weight while they fit."""
    removed = sum(int(weight[steps]) for weight, steps in zip(weights, taken, strict=True))
    while True:
        fitting = [
            (float(loss[steps + 1] - loss[steps]) / int(weight[steps + 1] - weight[steps]), index)
            for index, (loss, weight, steps) in enumerate(zip(losses, weights, taken, strict=True))
            if steps + 1 < len(weight) and removed + int(weight[steps + 1] - weight[steps]) <= limit
        ]
        if not fitting:
            return taken
        index = min(fitting)[1]
        removed += int(weights[index][taken[index] + 1] - weights[index][taken[index]])
        taken[index] += 1
