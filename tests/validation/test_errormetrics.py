from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flap_export.validation import errormetrics

Array = np.ndarray[Any, np.dtype[np.float64]]

shapes = st.tuples(st.integers(1, 5), st.integers(2, 7))


def logits(bound: float = 30.0) -> st.SearchStrategy[Array]:
    values = st.floats(-bound, bound, allow_subnormal=False)
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


def pairs(bound: float = 30.0) -> st.SearchStrategy[tuple[Array, Array]]:
    values = st.floats(-bound, bound, allow_subnormal=False)
    two = shapes.flatmap(lambda shape: arrays(np.float64, (2, *shape), elements=values))
    return two.map(lambda stacked: (stacked[0], stacked[1]))


def test_worked_example() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]))
    assert errormetrics.max_abs(reference, candidate) == pytest.approx(np.log(2))
    assert errormetrics.max_rel(reference, candidate) == pytest.approx(np.log(2) / np.log(10))
    # First position: 0.5 log 2 - 0.25 log 2; second: 0.
    assert errormetrics.kl(reference, candidate) == pytest.approx(0.25 * np.log(2) / 2)
    assert errormetrics.top1_agreement(reference, candidate) == 0.5
    assert errormetrics.top1_gap(reference, candidate) == pytest.approx(np.log(2))


def test_kl_is_from_reference_to_candidate() -> None:
    reference, candidate = np.array([[0.0, 0.0]]), np.array([[4.0, 0.0]])
    forward = errormetrics.kl(reference, candidate)
    assert forward == pytest.approx(np.log(np.cosh(2.0)))
    assert errormetrics.kl(candidate, reference) != pytest.approx(forward, rel=0.1)


def test_differences_below_float32_are_seen() -> None:
    reference = np.array([[1.0, 2.0]])
    assert errormetrics.max_abs(reference.astype(np.float32), reference + 1e-12) == pytest.approx(1e-12, rel=1e-3)


def test_large_logits_do_not_overflow() -> None:
    reference = np.array([[1e4, -1e4, 0.0]])
    assert errormetrics.kl(reference, reference[:, ::-1]) == pytest.approx(1e4)


def test_relative_to_nothing() -> None:
    zeros = np.zeros((1, 3))
    assert errormetrics.max_rel(zeros, zeros) == 0.0
    assert errormetrics.max_rel(zeros, zeros + 1) == float("inf")


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_counted(broken: float) -> None:
    assert errormetrics.non_finite(np.array([[0.0, broken, broken]])) == 2
    assert errormetrics.non_finite(np.zeros((2, 2))) == 0


@given(logits())
def test_nothing_differs_from_itself(reference: Array) -> None:
    assert errormetrics.max_abs(reference, reference) == 0.0
    assert errormetrics.max_rel(reference, reference) == 0.0
    assert errormetrics.kl(reference, reference) == 0.0
    assert errormetrics.top1_agreement(reference, reference) == 1.0
    assert errormetrics.top1_gap(reference, reference) == 0.0


@given(pairs())
def test_ranges(pair: tuple[Array, Array]) -> None:
    reference, candidate = pair
    error = errormetrics.max_abs(reference, candidate)
    assert errormetrics.kl(reference, candidate) >= 0.0
    assert 0.0 <= errormetrics.top1_agreement(reference, candidate) <= 1.0
    # Two logits move by at most `error` each.
    assert 0.0 <= errormetrics.top1_gap(reference, candidate) <= 2 * error + 1e-9
    assert error == errormetrics.max_abs(candidate, reference)


@given(pairs(bound=1.0))
def test_bounded_errors_bound_the_divergence(pair: tuple[Array, Array]) -> None:
    """Hoeffding's lemma, on which the floor of the KL tolerance stands."""
    reference, error = pair
    bound = float(np.abs(error).max())
    assert errormetrics.kl(reference, reference + error) <= bound**2 / 2 + 1e-12


@given(logits(), st.floats(-5, 5))
def test_kl_ignores_a_shift_of_all_logits(reference: Array, shift: float) -> None:
    assert errormetrics.kl(reference, reference + shift) == pytest.approx(0.0, abs=1e-12)


@given(pairs(), st.integers(0, 100))
def test_order_of_positions_is_irrelevant(pair: tuple[Array, Array], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(pair[0]))
    for metric in (errormetrics.max_abs, errormetrics.kl, errormetrics.top1_agreement, errormetrics.top1_gap):
        assert metric(pair[0][order], pair[1][order]) == pytest.approx(metric(*pair), abs=1e-12)
