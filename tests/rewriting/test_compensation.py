from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flap_export.calibration.moments import RunningComoments
from flap_export.rewriting.compensation import (
    DEFAULT_RIDGE,
    RIDGES,
    NestedLeastSquares,
    Restored,
    best_ridge,
    bias_compensation,
    complement,
    least_squares,
    reconstruction_error,
)


def test_the_bias_is_the_removed_channels_mean_contribution() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mean = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    bias = bias_compensation(weight, torch.tensor([0, 2]), mean)
    assert bias.dtype == torch.float64
    assert bias.tolist() == [3010.0, 6040.0]


def test_nothing_removed_adds_nothing() -> None:
    bias = bias_compensation(torch.ones(2, 3), torch.tensor([], dtype=torch.int64), torch.ones(3, dtype=torch.float64))
    assert bias.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_summed_in_float64(dtype: torch.dtype) -> None:
    """In half precision the sum would stick at 2048 (float16) or 256 (bfloat16)."""
    channels = 5000
    bias = bias_compensation(
        torch.ones(1, channels, dtype=dtype), torch.arange(channels), torch.ones(channels, dtype=torch.float64)
    )
    assert bias.tolist() == [channels]


@st.composite
def fits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [out, C], inputs [tokens, C] that are correlated and not centred, kept channels."""
    channels = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = drawn(draw(st.integers(1, 20)), channels) @ (drawn(channels, channels) + torch.eye(channels))
    inputs = (inputs + 3 * drawn(channels)) * torch.exp(2 * drawn(channels))
    if draw(st.booleans()):
        inputs[:, draw(st.integers(0, channels - 1))] = draw(st.sampled_from([0.0, 2.5]))
    kept = sorted(draw(st.sets(st.integers(0, channels - 1))))
    return drawn(3, channels), inputs, torch.tensor(kept, dtype=torch.int64)


def moments_of(inputs: Tensor) -> RunningComoments:
    moments = RunningComoments(inputs.shape[1], dtype=inputs.dtype)
    moments.update(inputs)
    return moments


def bias_alone(weight: Tensor, kept: Tensor, inputs: Tensor) -> Restored:
    removed = complement(kept, weight.shape[1])
    return Restored(weight[:, kept], bias_compensation(weight, removed, inputs.mean(dim=0)))


@given(fits(), st.sampled_from([1e-12, *RIDGES, 100.0]))
def test_least_squares_is_never_worse_than_the_bias(problem: tuple[Tensor, Tensor, Tensor], ridge: float) -> None:
    weight, inputs, kept = problem
    fitted = least_squares(weight, kept, moments_of(inputs), ridge)
    assert fitted.weight.shape == (3, len(kept))
    fitted_error = reconstruction_error(weight, fitted, kept, inputs)
    biased_error = reconstruction_error(weight, bias_alone(weight, kept, inputs), kept, inputs)
    size = float((inputs @ weight.T).square().sum(dim=1).mean())
    assert fitted_error <= biased_error * (1 + 1e-9) + 1e-18 * size


@given(fits(), st.sampled_from([1e-4, 1.0]))
def test_the_mean_is_restored_exactly(problem: tuple[Tensor, Tensor, Tensor], ridge: float) -> None:
    weight, inputs, kept = problem
    fitted = least_squares(weight, kept, moments_of(inputs), ridge)
    mean = (inputs[:, kept] @ fitted.weight.T + fitted.bias).mean(dim=0)
    scale = float((inputs.abs() @ weight.abs().T).max())
    torch.testing.assert_close(mean, (inputs @ weight.T).mean(dim=0), rtol=1e-9, atol=1e-11 * scale + 1e-12)


@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_without_a_ridge_it_is_the_regression_of_the_output(seed: int, chosen: set[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3 * torch.eye(6)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64) @ mixing + 5
    weight, kept = torch.randn(3, 6, generator=generator, dtype=torch.float64), torch.tensor(sorted(chosen))
    fitted = least_squares(weight, kept, moments_of(inputs), 1e-13)
    design = np.concatenate([inputs[:, kept].numpy(), np.ones((40, 1))], axis=1)
    expected = np.linalg.lstsq(design, (inputs @ weight.T).numpy(), rcond=None)[0]
    np.testing.assert_allclose(fitted.weight.numpy(), expected[:-1].T, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fitted.bias.numpy(), expected[-1], rtol=1e-6, atol=1e-5)


@given(fits(), st.floats(1e-3, 10))
def test_the_ridge_is_a_share_of_every_kept_channels_variance(
    problem: tuple[Tensor, Tensor, Tensor], ridge: float
) -> None:
    """By its definition, W_R C_RK (C_KK + ridge diag(C_KK))^-1."""
    weight, inputs, kept = problem
    removed = complement(kept, weight.shape[1])
    centred = (inputs - inputs.mean(dim=0)).numpy()
    covariance = centred.T @ centred / len(inputs)
    within = covariance[np.ix_(kept, kept)]
    absorbed = np.linalg.pinv(within + ridge * np.diag(np.diag(within)), rcond=1e-18, hermitian=False)
    expected = weight[:, kept].numpy() + weight[:, removed].numpy() @ covariance[np.ix_(removed, kept)] @ absorbed
    found = least_squares(weight, kept, moments_of(inputs), ridge).weight.numpy()
    # Compared by what they give: a channel that barely varies may have any weight.
    deviations = centred[:, kept].std(axis=0) if len(kept) else np.zeros(0)
    scale = np.abs(weight.numpy() * centred.std(axis=0)).max() + 1e-30
    np.testing.assert_allclose(found * deviations / scale, expected * deviations / scale, rtol=1e-5, atol=1e-6)


def test_everything_or_nothing_kept() -> None:
    weight, inputs = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0], [3.0, 5.0]])
    nothing = least_squares(weight, torch.tensor([], dtype=torch.int64), moments_of(inputs), 0.1)
    assert nothing.weight.shape == (1, 0)
    assert nothing.bias.tolist() == [-4.0]
    everything = least_squares(weight, torch.tensor([0, 1]), moments_of(inputs), 0.1)
    assert (everything.weight.tolist(), everything.bias.tolist()) == ([[1.0, -2.0]], [0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 50])
def test_what_never_varies_takes_nothing_over_and_leaves_its_mean(tokens: int, dtype: torch.dtype) -> None:
    inputs = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs[:, 1], inputs[:, 3] = 0.5, -2.0
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    kept = torch.tensor([0, 1])
    fitted = least_squares(weight, kept, moments_of(inputs), 1e-3)
    assert bool(fitted.weight.isfinite().all())
    assert float(fitted.weight[0, 1]) == 2.0
    only_constant = least_squares(weight, torch.tensor([0, 1, 2]), moments_of(inputs), 1e-3)
    assert only_constant.weight.tolist() == [[1.0, 2.0, 3.0]]
    assert only_constant.bias.tolist() == pytest.approx([-8.0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_absorbs_all_of_what_was_removed(dtype: torch.dtype) -> None:
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)[:, [0, 1, 0]] + 4
    weight = torch.tensor([[1.0, 2.0, 5.0], [0.5, -1.0, 0.25]], dtype=dtype)
    kept = torch.tensor([0, 1])
    fitted = least_squares(weight, kept, moments_of(inputs), 1e-6)
    torch.testing.assert_close(fitted.weight, torch.tensor([[6.0, 2.0], [0.75, -1.0]], dtype=dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(fitted.bias, torch.zeros(2, dtype=dtype), atol=1e-3, rtol=0)
    assert reconstruction_error(weight, fitted, kept, inputs) < 1e-8


def test_fewer_tokens_than_channels_in_single_precision() -> None:
    """A singular matrix whose rounding no small ridge covers: the ridge grows until it is positive definite."""
    inputs = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(5, 300)
    weight = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    kept = torch.arange(0, 300, 2)
    fitted = least_squares(weight, kept, moments_of(inputs), 1e-12)
    error = reconstruction_error(weight, fitted, kept, inputs)
    without = least_squares(weight, kept, moments_of(inputs), 1e6)
    assert error < 1e-3 * reconstruction_error(weight, without, kept, inputs)


def test_the_ridge_is_chosen_on_tokens_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    weight, kept = torch.randn(2, 10, generator=generator, dtype=torch.float64), torch.arange(8)
    held_out = torch.randn(500, 10, generator=generator, dtype=torch.float64)
    moments = moments_of(noisy)
    by_ridge = {
        ridge: reconstruction_error(weight, least_squares(weight, kept, moments, ridge), kept, held_out)
        for ridge in RIDGES
    }
    assert best_ridge(weight, kept, moments, held_out) == min(by_ridge, key=by_ridge.__getitem__) == RIDGES[-1]
    # The very tokens of the fit like the smallest.
    assert best_ridge(weight, kept, moments, noisy) == RIDGES[0]
    assert best_ridge(weight, kept, moments, noisy[:0]) == DEFAULT_RIDGE
    for all_or_none in (torch.arange(10), torch.arange(0)):
        assert best_ridge(weight, all_or_none, moments, held_out) == DEFAULT_RIDGE


def check_nested(
    weight: Tensor, inputs: Tensor, order: Tensor, cuts: Iterable[int], ridge: float, tolerance: float
) -> None:
    """Against a fit for every cut point alone, by what either gives for the inputs."""
    moments = moments_of(inputs)
    nested = NestedLeastSquares.of(moments, order, ridge)
    size = float((inputs - inputs.mean(dim=0)).abs().max() * weight.abs().max() * weight.shape[1])
    for cut in cuts:
        kept = order[:cut].sort().values
        found, expected = nested.restored(weight, cut), least_squares(weight, kept, moments, ridge)
        assert found.weight.dtype == inputs.dtype
        seen = inputs[:, kept]
        outputs, wanted = (seen @ fit.weight.T + fit.bias for fit in (found, expected))
        torch.testing.assert_close(outputs, wanted, rtol=tolerance, atol=tolerance * (size + 1e-30))


@given(fits(), st.sampled_from(RIDGES), st.integers(0, 10_000))
def test_one_factor_gives_the_fit_at_every_cut_point(
    problem: tuple[Tensor, Tensor, Tensor], ridge: float, seed: int
) -> None:
    """Also of channels that never vary, and of fewer tokens than channels."""
    weight, inputs, _ = problem
    order = torch.randperm(inputs.shape[1], generator=torch.Generator().manual_seed(seed))
    check_nested(weight, inputs, order, range(len(order) + 1), ridge, 1e-9)


@pytest.mark.parametrize("tokens", [20, 500])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_one_factor_gives_the_fit_at_every_cut_point_in_both_precisions(
    dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(tokens, 60, generator=generator) @ torch.randn(60, 60, generator=generator) + 3).to(dtype)
    inputs[:, [7, 31]] = 2.5
    weight = torch.randn(5, 60, generator=generator).to(dtype)
    order = torch.randperm(60, generator=generator)
    check_nested(weight, inputs, order, (0, 1, 2, 29, 30, 59, 60), 1e-2, tolerance)
    # A projection of half precision is fitted in that of the moments.
    nested = NestedLeastSquares.of(moments_of(inputs), order, 1e-2)
    half = weight.to(torch.bfloat16)
    found, expected = nested.restored(half, 30), nested.restored(half.to(dtype), 30)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)


def test_all_channels_of_one_factor_are_the_projection_itself() -> None:
    """Columns as in the model, whatever the order."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (3, 9))
    whole = NestedLeastSquares.of(moments_of(inputs), torch.tensor([4, 0, 5, 2, 1, 3]), 1e-2).restored(weight, 6)
    assert torch.equal(whole.weight, weight)
    torch.testing.assert_close(whole.bias, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
