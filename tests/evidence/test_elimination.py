"""Second-order elimination against brute force: every remaining unit refitted by least squares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flap_export.evidence.elimination import RIDGE, Elimination, eliminate


def problem(seed: int, channels: int, *, tokens: int = 60, outputs: int = 3) -> tuple[Tensor, Tensor]:
    """A weight [out, C] and a covariance [C, C] of correlated channels on scales a hundredfold apart."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        drawn(tokens, channels) @ (drawn(channels, channels) + 3 * torch.eye(channels)) * torch.exp(drawn(channels))
    )
    centred = inputs - inputs.mean(dim=0)
    return drawn(outputs, channels), centred.T @ centred / tokens


def refitted_error(weight: Tensor, covariance: Tensor, removed: list[int]) -> float:
    """Mean squared output error without `removed`, everything left refitted by least squares."""
    kept = [channel for channel in range(weight.shape[1]) if channel not in removed]
    matrix, target = covariance.numpy(), weight.numpy()
    # The columns' fit is the regression of the removed inputs on the kept ones, in the metric of the covariance.
    absorbed = np.linalg.lstsq(matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, removed)], rcond=None)[0]
    change = np.zeros_like(target)
    change[:, removed] = -target[:, removed]
    change[:, kept] = target[:, removed] @ absorbed.T
    return float(np.einsum("oi,ij,oj->", change, matrix, change))


def with_ridge(covariance: Tensor, ridge: float) -> Tensor:
    return covariance + ridge * torch.diag(covariance.diagonal())


def check_greedy(found: Elimination, weight: Tensor, covariance: Tensor, units: Tensor, groups: Tensor | None) -> None:
    """Every removal is the cheapest that was allowed, and the losses are those of a refit from scratch."""
    gone: list[int] = []
    total = float(found.losses[-1])
    lost: set[int] = set()
    assert sorted(found.order.tolist()) == list(range(len(units)))
    for unit, loss in zip(found.order.tolist(), found.losses.tolist(), strict=True):
        left = [u for u in range(len(units)) if u not in gone and (groups is None or int(groups[u]) not in lost)]
        errors = {u: refitted_error(weight, covariance, units[[*gone, u]].flatten().tolist()) for u in left}
        assert errors[unit] <= min(errors.values()) + 1e-10 * total
        assert loss == pytest.approx(errors[unit], rel=1e-6, abs=1e-10 * total)
        gone.append(unit)
        if groups is not None:
            lost.add(int(groups[unit]))
            if len(lost) == len(groups.unique()):
                lost.clear()


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_single_channels_go_as_brute_force_says(seed: int, channels: int) -> None:
    weight, covariance = problem(seed, channels)
    units = torch.arange(channels).unsqueeze(1)
    found = eliminate(weight, covariance.clone(), units, ridge=1e-12)
    check_greedy(found, weight, covariance, units, None)
    assert (found.order.dtype, found.losses.dtype) == (torch.int64, torch.float64)


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([2, 3]))
def test_blocks_go_together(seed: int, count: int, size: int) -> None:
    weight, covariance = problem(seed, count * size)
    units = torch.arange(count * size).view(count, size)
    check_greedy(eliminate(weight, covariance.clone(), units, ridge=1e-12), weight, covariance, units, None)


@given(st.integers(0, 10_000), st.permutations(range(8)))
def test_channels_of_a_unit_may_lie_anywhere(seed: int, channels: list[int]) -> None:
    weight, covariance = problem(seed, 8)
    units = torch.tensor(channels).view(4, 2)
    check_greedy(eliminate(weight, covariance.clone(), units, ridge=1e-12), weight, covariance, units, None)


@given(st.integers(0, 10_000), st.sampled_from([(2, 3), (3, 2), (1, 4)]), st.sampled_from([1, 2]))
def test_rounds_take_one_of_every_group(seed: int, sizes: tuple[int, int], width: int) -> None:
    groups = torch.arange(sizes[0]).repeat_interleave(sizes[1])
    weight, covariance = problem(seed, len(groups) * width)
    units = torch.arange(len(groups) * width).view(-1, width)
    found = eliminate(weight, covariance.clone(), units, groups=groups, ridge=1e-12)
    check_greedy(found, weight, covariance, units, groups)
    for round_ in found.order.view(-1, sizes[0]):
        assert sorted(groups[round_].tolist()) == list(range(sizes[0]))


@given(st.integers(0, 10_000))
def test_a_ridge_is_a_share_of_every_channels_variance(seed: int) -> None:
    """Losses then hold what the ridge adds: they are errors in the covariance with it."""
    weight, covariance = problem(seed, 7)
    units = torch.arange(7).unsqueeze(1)
    check_greedy(
        eliminate(weight, covariance.clone(), units, ridge=0.3), weight, with_ridge(covariance, 0.3), units, None
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("at_once", [2, 3, 5])
def test_several_at_once_cost_what_their_refit_costs(at_once: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flap_export.evidence.elimination.UNITS_PER_ROUND", 12 // at_once)
    weight, covariance = problem(1, 12 * size)
    units = torch.arange(12 * size).view(12, size)
    found = eliminate(weight, covariance.clone(), units, ridge=1e-12)
    single = [refitted_error(weight, covariance, unit.tolist()) for unit in units]
    assert set(found.order[:at_once].tolist()) == set(np.argsort(single)[:at_once].tolist())
    for count, loss in enumerate(found.losses.tolist(), start=1):
        expected = refitted_error(weight, covariance, units[found.order[:count]].flatten().tolist())
        assert loss == pytest.approx(expected, rel=1e-6), count


@pytest.mark.parametrize("shrink_below", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("size", [1, 2])
def test_copying_without_the_dead_changes_nothing(
    shrink_below: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never, at times, and after every step."""
    weight, covariance = problem(2, 10 * size)
    units = torch.arange(10 * size).view(10, size)
    before = eliminate(weight, covariance.clone(), units)
    monkeypatch.setattr("flap_export.evidence.elimination.SHRINK_BELOW", shrink_below)
    after = eliminate(weight, covariance.clone(), units)
    assert after.order.tolist() == before.order.tolist()
    torch.testing.assert_close(after.losses, before.losses, rtol=1e-9, atol=0)


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_losses_never_fall_and_end_at_all_of_the_output(seed: int, channels: int) -> None:
    weight, covariance = problem(seed, channels)
    losses = eliminate(weight, covariance.clone(), torch.arange(channels).unsqueeze(1)).losses.tolist()
    assert all(a <= b for a, b in pairwise(losses))
    everything = float(torch.einsum("oi,ij,oj->", weight, with_ridge(covariance, RIDGE), weight))
    assert losses[-1] == pytest.approx(everything, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_tokens_than_channels_leave_as_many_for_nothing(dtype: torch.dtype) -> None:
    """A covariance of rank 5: 35 of 40 channels are redundant, and go first."""
    weight, covariance = problem(3, 40, tokens=6)
    units = torch.arange(40).unsqueeze(1)
    losses = eliminate(weight.to(dtype), covariance.to(dtype), units).losses
    assert bool(losses.isfinite().all())
    assert float(losses[34] / losses[-1]) < 0.02
    assert float(losses[36] / losses[-1]) > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_goes_for_nothing_and_the_one_left_counts_for_both(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=generator, dtype=torch.float64)[:, [0, 1, 0, 2]]
    covariance = (inputs - inputs.mean(dim=0)).T @ (inputs - inputs.mean(dim=0)) / 200
    # Apart channels 0 and 2 matter less than 1 and 3, together more.
    weight = torch.tensor([[2.0, 3.0, 2.0, 3.0]], dtype=torch.float64)
    found = eliminate(weight.to(dtype), covariance.to(dtype), torch.arange(4).unsqueeze(1))
    assert found.order[0] in (0, 2)
    assert float(found.losses[0] / found.losses[-1]) < 1e-3
    assert sorted(found.order[1:3].tolist()) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_never_varies_goes_first(dtype: torch.dtype) -> None:
    weight, covariance = problem(4, 6)
    weight[:, 4] = 1e3
    covariance[4], covariance[:, 4] = 0, 0
    found = eliminate(weight.to(dtype), covariance.to(dtype), torch.arange(6).unsqueeze(1))
    assert found.order[0] == 4
    assert float(found.losses[0] / found.losses[-1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2])
def test_a_single_token_gives_an_order_too(size: int, dtype: torch.dtype) -> None:
    """Nothing varies at all: every order is as good, and none costs anything."""
    units = torch.arange(6).view(-1, size)
    found = eliminate(torch.ones(3, 6, dtype=dtype), torch.zeros(6, 6, dtype=dtype), units)
    assert sorted(found.order.tolist()) == list(range(len(units)))
    assert float(found.losses.abs().max()) < 1e-15


def test_single_precision_orders_as_double_does() -> None:
    weight, covariance = problem(5, 200, tokens=150)
    units = torch.arange(200).unsqueeze(1)
    exact = eliminate(weight, covariance.clone(), units)
    single = eliminate(weight.float(), covariance.float(), units)
    spent: NDArray[np.float64] = np.asarray(exact.losses / exact.losses[-1])
    np.testing.assert_allclose(np.asarray(single.losses / single.losses[-1]), spent, rtol=0.05, atol=1e-4)


def test_a_ridge_too_small_for_the_precision_grows() -> None:
    """One direction holds nearly all variance, as single tokens make it in wide FFNs: singular to single precision."""
    generator = torch.Generator().manual_seed(6)
    shared = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(400, 160, generator=generator, dtype=torch.float64)
    inputs = (shared + 1e-3 * own) * torch.exp(torch.randn(160, generator=generator, dtype=torch.float64))
    centred = inputs - inputs.mean(dim=0)
    covariance = centred.T @ centred / len(inputs)
    weight, units = torch.randn(8, 160, generator=generator, dtype=torch.float64), torch.arange(160).unsqueeze(1)
    exact = eliminate(weight, covariance.clone(), units, ridge=1e-7)
    single = eliminate(weight.float(), covariance.float(), units, ridge=1e-7)
    assert bool(single.losses.isfinite().all())
    assert len({*single.order[:80].tolist()} & {*exact.order[:80].tolist()}) > 70
