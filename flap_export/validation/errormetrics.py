"""How far a candidate's logits are from a reference's: pure functions of two arrays, in float64.

Notation: N positions, V vocabulary size; both arrays are [N, V] and finite. The caller checks with
`non_finite` first: no metric of a NaN means anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def non_finite(values: Array) -> int:
    """How many values are NaN or infinite."""
    return int(np.size(values) - np.count_nonzero(np.isfinite(values)))


def max_abs(reference: Array, candidate: Array) -> float:
    """Largest absolute difference of two logits."""
    return float(np.max(np.abs(_double(candidate) - _double(reference))))


def scale(reference: Array) -> float:
    """Largest magnitude among the reference's logits."""
    return float(np.max(np.abs(_double(reference))))


def max_rel(reference: Array, candidate: Array) -> float:
    """Largest absolute difference over the reference's scale; 0 where both are 0."""
    difference, size = max_abs(reference, candidate), scale(reference)
    if difference == 0.0:
        return 0.0
    return difference / size if size else float("inf")


def kl(reference: Array, candidate: Array) -> float:
    """KL(reference || candidate) of the next-token distributions in nats, mean over positions."""
    log_p, log_q = _log_softmax(_double(reference)), _log_softmax(_double(candidate))
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    # Exactly non-negative; rounding leaves about -1e-17 where the two agree.
    return float(np.mean(np.where(divergence < 0, 0.0, divergence)))


def top1_agreement(reference: Array, candidate: Array) -> float:
    """Share of positions whose most likely token is the same, 0..1."""
    return float(np.mean(np.argmax(reference, axis=-1) == np.argmax(candidate, axis=-1)))


def top1_gap(reference: Array, candidate: Array) -> float:
    """By how much the reference prefers its own token to the candidate's, at worst; 0 where they always agree."""
    chosen = np.take_along_axis(_double(reference), np.argmax(candidate, axis=-1)[:, None], axis=-1)[:, 0]
    return float(np.max(np.max(_double(reference), axis=-1) - chosen))


def _double(values: Array) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True)))
