"""Compensation: what the kept weights and a bias take over from the removed channels. Pure arithmetic.

X are the inputs of a restoring projection (o_proj or down_proj) with weight W, of which the channels K are kept and R
removed. The bias alone restores the mean of W X; least squares lets the kept columns absorb what of the removed ones is
linear in the kept inputs, at the same shapes and the same speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from flap_export.calibration.moments import RunningComoments

CompensationName = Literal["none", "bias", "least-squares"]
COMPENSATIONS: Final[tuple[CompensationName, ...]] = ("none", "bias", "least-squares")
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of every kept channel's variance that are tried as its ridge."""
DEFAULT_RIDGE: Final = 1e-2
"""Where no sequences could be held out to choose by."""
RIDGE_OUTPUTS: Final = 128
"""Outputs whose error decides about the ridge."""


def bias_compensation(weight: Tensor, removed: Tensor, mean: Tensor) -> Tensor:
    """The removed channels' mean contribution, W[:, removed] mean[removed] (FLAP, equation 9).

    Args:
        weight: [out, in], any floating dtype.
        removed: int64 [R], indices into the inputs.
        mean: float64 [in], mean input of every channel.

    Returns:
        float64 [out]
    """
    return weight[:, removed].to(torch.float64) @ mean[removed]


@final
@dataclass(frozen=True)
class Restored:
    """A projection after its removed channels were absorbed."""

    weight: Tensor
    """[out, K]"""
    bias: Tensor
    """[out], to be added to the projection's own."""


def least_squares(weight: Tensor, kept: Tensor, moments: RunningComoments, ridge: float) -> Restored:
    """Restore W X from the kept inputs with the smallest squared error, and its mean exactly.

        W'_K = W_K + W_R C_RK (C_KK + ridge diag(C_KK))^-1        b = W mean(X) - W'_K mean(X_K)

    with C the inputs' covariance. A ridge on each channel's own variance, rather than one number for all, keeps its
    meaning where single channels are a thousand times larger than the rest. No ridge makes the error larger than that
    of the bias alone, on the tokens C is of.

    Args:
        weight: W [out, C], in the dtype and on the device of `moments`.
        kept: int64 [K]; may be empty.
        moments: of the inputs.
        ridge: positive.
    """
    removed = complement(kept, weight.shape[1])
    if not len(kept) or not len(removed):
        restored = weight[:, kept]
    else:
        scale = _deviations(moments)
        factor = regular_factor(_correlation(moments, scale, kept, kept), ridge)
        shared = _correlation(moments, scale, kept, removed)
        scaled = (weight[:, removed] * scale[removed]).T
        # As many systems are solved as there are removed channels or outputs, whichever are fewer.
        if scaled.shape[1] < shared.shape[1]:
            added = torch.cholesky_solve(shared @ scaled, factor)
        else:
            added = torch.cholesky_solve(shared, factor) @ scaled
        restored = weight[:, kept] + added.T / scale[kept]
    return Restored(restored, weight @ moments.mean - restored @ moments.mean[kept])


@final
@dataclass(frozen=True)
class NestedLeastSquares:
    """`least_squares` for every cut point of one ranking, from one factorisation.

    With the channels in the order in which they stay longest, the covariance of what any cut point keeps is a leading
    block, and a Cholesky factor's leading blocks are the factors of the matrix's:

        C + ridge diag(C) = L L^T        W'_K = W_K + (W_R L_RK) L_KK^-1
    """

    order: Tensor
    """int64 [C], last to go first."""
    factor: Tensor
    """L of the correlations in that order, [C, C]."""
    scale: Tensor
    """Standard deviations in that order, up to a common factor, [C]."""
    mean: Tensor
    """Of the inputs, in the model's order, [C]."""

    @classmethod
    def of(cls, moments: RunningComoments, order: Tensor, ridge: float) -> NestedLeastSquares:
        """Factorise once; arguments as `least_squares` has them."""
        scale = _deviations(moments)
        factor = regular_factor(_correlation(moments, scale, order, order), ridge)
        return cls(order, factor, scale[order], moments.mean)

    def restored(self, weight: Tensor, kept: int) -> Restored:
        """What the projection becomes when the first `kept` channels of the order stay; columns ascend as in the model.

        Args:
            weight: W [out, C], any floating dtype.
            kept: how many channels stay.
        """
        exact = weight.to(self.mean.dtype)
        by_rank = exact[:, self.order]
        through = (by_rank[:, kept:] * self.scale[kept:]) @ self.factor[kept:, :kept]
        added = torch.linalg.solve_triangular(self.factor[:kept, :kept], through, upper=False, left=False)
        ascending = self.order[:kept].argsort()
        restored = (by_rank[:, :kept] + added / self.scale[:kept])[:, ascending]
        return Restored(restored, exact @ self.mean - restored @ self.mean[self.order[:kept][ascending]])


def regular_factor(correlation: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of a correlation matrix [K, K] with a ridge, which it grows until the working precision holds it.

    Of fewer tokens than channels the matrix itself is singular. It is overwritten.
    """
    assert bool(torch.isfinite(correlation.diagonal()).all()), "no ridge mends NaN"
    diagonal, grown = correlation.diagonal(), 0.0
    while True:
        diagonal.add_(ridge - grown)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(correlation)
        if not int(failed):
            return factor
        ridge, grown = max(ridge * 10, torch.finfo(correlation.dtype).eps), ridge


def complement(indices: Tensor, channels: int) -> Tensor:
    """The other indices of 0..channels-1, int64 and ascending."""
    is_other = torch.ones(channels, dtype=torch.bool, device=indices.device)
    is_other[indices] = False
    return is_other.nonzero().flatten()


def _deviations(moments: RunningComoments) -> Tensor:
    """Standard deviations times sqrt(count), [C]; one where a channel never varies."""
    squares = moments.products.diagonal()
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()


def _correlation(moments: RunningComoments, scale: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Correlations [rows, columns] of the inputs; a channel that never varies has none, not even with itself."""
    return moments.products[rows][:, columns].div_(scale[rows].unsqueeze(1)).div_(scale[columns])


def reconstruction_error(weight: Tensor, restored: Restored, kept: Tensor, inputs: Tensor) -> float:
    """Mean over tokens of |W x - W'_K x_K - b|^2.

    Args:
        weight: W [out, C].
        restored: what stands for it.
        kept: int64 [K].
        inputs: x, [tokens, C] in the dtype of `weight`.
    """
    missing = inputs @ weight.T - inputs[:, kept] @ restored.weight.T - restored.bias
    return float(missing.square().sum(dim=1).mean())


def best_ridge(weight: Tensor, kept: Tensor, moments: RunningComoments, held_out: Tensor) -> float:
    """The ridge of `RIDGES` with the smallest reconstruction error on tokens that are not in `moments`.

    The error is that of a sample of outputs, and it is followed downhill from the default: each ridge tried takes a
    factorisation.

    Args:
        weight: W [out, C].
        kept: int64 [K].
        moments: of the inputs.
        held_out: other inputs, [tokens, C]; none leave the choice at `DEFAULT_RIDGE`.
    """
    if not len(held_out) or not 0 < len(kept) < weight.shape[1]:
        return DEFAULT_RIDGE
    sample = weight[:: max(1, len(weight) // RIDGE_OUTPUTS)]

    def error(position: int) -> float:
        return reconstruction_error(sample, least_squares(sample, kept, moments, RIDGES[position]), kept, held_out)

    best = RIDGES.index(DEFAULT_RIDGE)
    least = error(best)
    for step in (1, -1):
        while 0 <= best + step < len(RIDGES) and (found := error(best + step)) < least:
            best, least = best + step, found
    return RIDGES[best]
