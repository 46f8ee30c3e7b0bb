"""Running mean, variance and covariance of channels, exact for any chunking.

Pairwise update of Chan, Golub and LeVeque (1979), which is Welford's for chunks of one; float64 throughout, so that
neither half-precision inputs nor millions of tokens lose digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Moments:
    """First and second central moments of C channels over `count` tokens."""

    count: int
    mean: Tensor
    """float64 [C]"""
    square_sum: Tensor
    """float64 [C]: sum over tokens of (x - mean)^2."""

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Moments of no token at all."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, zeros)

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Moments of one chunk of values [tokens, C], any floating dtype; of no token, those of `empty`."""
        if not len(values):
            return cls.empty(values.shape[1])
        exact = values.to(torch.float64)
        mean = exact.mean(dim=0)
        return cls(values.shape[0], mean, (exact - mean).square().sum(dim=0))

    def merged(self, other: Moments) -> Moments:
        """Moments of both token sets together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        cross = delta.square() * (self.count * other.count / count)
        return Moments(count, mean, self.square_sum + other.square_sum + cross)

    @property
    def variance(self) -> Tensor:
        """float64 [C]: population variance, Var(X_j)."""
        return self.square_sum / max(self.count, 1)

    @property
    def square_norm(self) -> Tensor:
        """float64 [C]: sum over tokens of x^2, ||X_j||^2."""
        return self.square_sum + self.count * self.mean.square()


@final
class RunningMoments:
    """Moments of everything seen so far, kept on the CPU."""

    def __init__(self, channels: int) -> None:
        self._moments = Moments.empty(channels)

    def update(self, inputs: Tensor) -> None:
        """Take in a chunk [B, n, C]."""
        chunk = Moments.of(inputs.flatten(0, 1))
        self._moments = self._moments.merged(Moments(chunk.count, chunk.mean.cpu(), chunk.square_sum.cpu()))

    @property
    def mean(self) -> Tensor:
        """Mean, float64 [C]."""
        return self._moments.mean

    @property
    def fluctuation(self) -> Tensor:
        """Variance, float64 [C]."""
        return self._moments.variance

    @property
    def square_norm(self) -> Tensor:
        """Sum of squares, float64 [C]."""
        return self._moments.square_norm


@final
class RunningComoments:
    """Mean and covariance of everything seen so far, in one matrix that is updated in place.

    Each chunk is centred at its own mean before it is multiplied: a mean far above the deviation costs no digits.
    """

    def __init__(
        self, channels: int, *, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
    ) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=dtype, device=device)
        self._products = torch.zeros(channels, channels, dtype=dtype, device=device)

    def update(self, inputs: Tensor) -> None:
        """Take in a chunk [..., C]."""
        values = inputs.reshape(-1, inputs.shape[-1]).to(self.mean.dtype)
        if not len(values):
            return
        mean, before, after = values.mean(dim=0), self.count, self.count + len(values)
        centred = values - mean
        delta = mean - self.mean
        if inputs.dtype == self._products.dtype or self._products.dtype == torch.float32:
            self._products.addmm_(centred.T, centred)
        else:
            # Inputs of lower precision do not fill float64: a chunk's products take float32, their sum does not.
            centred = centred.to(torch.float32)
            self._products.add_(centred.T @ centred)
        self._products.addr_(delta, delta, alpha=before * len(values) / after)
        self.mean.add_(delta, alpha=len(values) / after)
        self.count = after

    @property
    def products(self) -> Tensor:
        """Sums over tokens of the centred products, [C, C]; `count` times the covariance, not a copy."""
        return self._products
