"""Second-order elimination: in which order the inputs of one projection go, when the rest may be refitted. Pure.

With C the inputs' covariance, M = C^-1 and W the weight, removing the columns B and refitting the others by least
squares adds tr(W_B (M_BB)^-1 W_B^T) to the mean squared error of the output (Hassibi and Stork's Optimal Brain Surgeon,
1993, for groups of columns). The cheapest unit goes; W and M follow in closed form:

    W <- W - W_B (M_BB)^-1 M_B:        M <- M - M_:B (M_BB)^-1 M_B:

Each step sees what earlier ones made the kept columns take over, so redundant channels go one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from flap_export.rewriting.compensation import regular_factor

RIDGE: Final = 1e-3
"""Share of every channel's variance that is added to it: covariances of few tokens have no inverse."""
SHRINK_BELOW: Final = 0.8
"""Share of units alive below which the matrices are copied without the dead ones."""
UNITS_PER_ROUND: Final = 2048
"""Up to so many units go one at a time; of more, the cheapest few go before the rest is refitted."""


@final
@dataclass(frozen=True)
class Elimination:
    """An order of removal and what it costs."""

    order: Tensor
    """Every unit once, the first to go first; int64 [U] on the CPU."""
    losses: Tensor
    """Mean squared output error after each removal, with everything left refitted; float64 [U] on the CPU."""


def eliminate(
    weight: Tensor, covariance: Tensor, units: Tensor, *, groups: Tensor | None = None, ridge: float = RIDGE
) -> Elimination:
    """Order the units of a projection's inputs by what their removal costs.

    Args:
        weight: W [out, C].
        covariance: C of the inputs [C, C], same dtype and device; it is overwritten.
        units: int64 [U, n], the input channels of every unit.
        groups: int64 [U]; units leave in rounds that take one of every group. None sets no such rule.
        ridge: share of every channel's variance that is added to it; it grows where the dtype cannot hold the inverse.
    """
    state = _State(weight, covariance, units, ridge)
    waiting = _Rounds(groups, len(units), weight.device)
    at_once = 1 if groups is not None else max(1, len(units) // UNITS_PER_ROUND)
    order: list[Tensor] = []
    losses: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    while state.alive.numel():
        costs = state.costs().masked_fill(~waiting.may_go(state.alive), torch.inf)
        chosen = costs.argsort(stable=True)[: min(at_once, len(costs))]
        names = state.alive[chosen]
        for loss in state.remove(chosen).to(torch.float64):
            total = total + loss
            losses.append(total)
        order.append(names)
        waiting.went(names)
    return Elimination(torch.cat(order).cpu(), torch.stack(losses).cpu())


@final
class _State:
    """W and M over the units that are left."""

    def __init__(self, weight: Tensor, covariance: Tensor, units: Tensor, ridge: float) -> None:
        count, self._size = units.shape
        channels = units.flatten().to(weight.device)
        # In units of its deviation each channel varies alike; the weights of one that never varies count for nothing.
        deviations = covariance.diagonal().sqrt()
        scale = torch.where(deviations > 0, deviations, torch.ones_like(deviations))
        correlation = covariance.div_(scale.unsqueeze(1)).div_(scale)
        if not torch.equal(channels, torch.arange(len(channels), device=channels.device)):
            correlation = correlation[channels][:, channels]
        self._weight = (weight * deviations)[:, channels]
        self._inverse = torch.cholesky_inverse(regular_factor(correlation, ridge))
        self.alive = torch.arange(count, device=weight.device)
        self._places = self.alive.clone()
        """Where the units that are alive stand in the matrices."""

    def costs(self) -> Tensor:
        """What removing each unit that is alive would add to the error, [alive]."""
        if self._size == 1:
            places = self._places
            costs: Tensor = self._weight.square().sum(dim=0)[places] / self._inverse.diagonal()[places]
            return costs
        columns = self._columns(self._places)
        weight = self._weight[:, columns].view(len(self._weight), -1, self._size).permute(1, 0, 2)
        blocks = self._inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
        added: Tensor = torch.linalg.solve(blocks, weight.transpose(1, 2)) * weight.transpose(1, 2)
        return added.sum(dim=(1, 2))

    def _columns(self, places: Tensor) -> Tensor:
        """Columns of units, [units, n]."""
        return places.unsqueeze(1) * self._size + torch.arange(self._size, device=places.device)

    def remove(self, chosen: Tensor) -> Tensor:
        """Remove units by their position in `alive`; what each adds to the error, in their order."""
        columns = self._columns(self._places[chosen]).flatten()
        rows = self._inverse[columns]
        factor = torch.linalg.cholesky(rows[:, columns])
        # W_B L^-T: the squares of its columns are what one column after another adds.
        spread = torch.linalg.solve_triangular(factor, self._weight[:, columns].T, upper=False)
        along = torch.linalg.solve_triangular(factor, rows, upper=False)
        self._weight.addmm_(spread.T, along, alpha=-1)
        self._inverse.addmm_(along.T, along, alpha=-1)
        added: Tensor = spread.square().sum(dim=1).view(-1, self._size).sum(dim=1)
        stays = torch.ones(len(self.alive), dtype=torch.bool, device=self.alive.device)
        stays[chosen] = False
        self.alive, self._places = self.alive[stays], self._places[stays]
        if 0 < len(self.alive) < SHRINK_BELOW * self._inverse.shape[0] / self._size:
            self._shrink()
        return added

    def _shrink(self) -> None:
        columns = self._columns(self._places).flatten()
        self._weight, self._inverse = self._weight[:, columns], self._inverse[columns][:, columns]
        self._places = torch.arange(len(self.alive), device=self.alive.device)


@final
class _Rounds:
    """Which units may go: any, or those of groups that have not yet lost one in this round."""

    def __init__(self, groups: Tensor | None, units: int, device: torch.device) -> None:
        self._groups = None if groups is None else groups.to(device)
        count = 0 if groups is None else int(groups.max()) + 1
        self._lost = torch.zeros(count, dtype=torch.bool, device=device)
        self._all = torch.ones(units, dtype=torch.bool, device=device)

    def may_go(self, units: Tensor) -> Tensor:
        return self._all[units] if self._groups is None else ~self._lost[self._groups[units]]

    def went(self, units: Tensor) -> None:
        if self._groups is None:
            return
        self._lost[self._groups[units]] = True
        if bool(self._lost.all()):
            self._lost.zero_()
