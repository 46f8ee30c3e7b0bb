from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from flap_export.calibration.moments import Moments, RunningComoments

VALUES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def merged(chunks: Sequence[Tensor], channels: int) -> Moments:
    total = Moments.empty(channels)
    for chunk in chunks:
        total = total.merged(Moments.of(chunk))
    return total


def check(moments: Moments, values: np.ndarray) -> None:
    exact = values.astype(np.float64)
    scale = np.abs(exact).max() ** 2 + 1e-30
    assert moments.count == len(values)
    assert moments.mean.dtype == moments.square_sum.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(axis=0), rtol=1e-12, atol=1e-12 * scale**0.5)
    np.testing.assert_allclose(moments.variance.numpy(), exact.var(axis=0), rtol=1e-9, atol=1e-12 * scale)
    norms = np.square(exact).sum(axis=0)
    np.testing.assert_allclose(moments.square_norm.numpy(), norms, rtol=1e-9, atol=1e-12 * scale * len(values))


@given(VALUES, st.lists(st.integers(0, 12), max_size=4))
def test_any_chunking_gives_mean_and_variance(values: np.ndarray, cuts: list[int]) -> None:
    """Chunks may be empty too: no token changes nothing."""
    chunks = torch.from_numpy(values).tensor_split(sorted(min(cut, len(values)) for cut in cuts))
    check(merged(chunks, values.shape[1]), values)


@given(VALUES, VALUES)
def test_merging_is_symmetric(one: np.ndarray, other: np.ndarray) -> None:
    channels = min(one.shape[1], other.shape[1])
    a, b = (Moments.of(torch.from_numpy(values[:, :channels].copy())) for values in (one, other))
    forth, back = a.merged(b), b.merged(a)
    assert forth.count == back.count
    torch.testing.assert_close(forth.mean, back.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forth.square_sum, back.square_sum, rtol=1e-9, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_values_around_a_large_mean(dtype: torch.dtype) -> None:
    """In float16 the squares of these values overflow, and their sum does after 64 rows."""
    values = (1000 + torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    check(merged(values.split(100), 3), values.double().numpy())


def test_a_small_variance_around_a_large_mean_is_not_cancelled() -> None:
    """The difference of E[x^2] and E[x]^2 would hold no correct digit here."""
    values = 1e8 + np.array([[0.0], [1.0], [2.0], [3.0]])
    assert merged(torch.from_numpy(values).split(1), 1).variance.tolist() == pytest.approx([1.25], rel=1e-12)


def test_the_empty_set_is_neutral() -> None:
    values, empty = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 2.0]])), Moments.empty(2)
    for merged_ in (values.merged(empty), empty.merged(values)):
        assert merged_.count == 2
        assert merged_.mean.tolist() == [2, 2]
        assert merged_.variance.tolist() == [1, 0]
    for none in (empty.merged(empty), empty.merged(Moments.of(torch.empty(0, 2))), Moments.of(torch.empty(0, 2))):
        assert none.count == 0
        assert none.mean.tolist() == none.variance.tolist() == none.square_norm.tolist() == [0, 0]


def comoments(chunks: Sequence[Tensor], channels: int, dtype: torch.dtype = torch.float64) -> RunningComoments:
    running = RunningComoments(channels, dtype=dtype)
    for chunk in chunks:
        running.update(chunk)
    return running


@given(VALUES, st.lists(st.integers(0, 12), max_size=4), st.sampled_from([0.0, 1e6]))
def test_any_chunking_gives_the_covariance(values: np.ndarray, cuts: list[int], shift: float) -> None:
    """Empty chunks change nothing; a mean far above the deviation costs no digits."""
    exact = values.astype(np.float64)
    deviation = exact.std(axis=0).max() or 1.0
    exact = exact + shift * deviation
    chunks = torch.from_numpy(exact).tensor_split(sorted(min(cut, len(values)) for cut in cuts))
    running = comoments(chunks, values.shape[1])
    centred = exact - exact.mean(axis=0)
    assert running.count == len(values)
    scale = np.abs(exact).max() + 1e-30
    np.testing.assert_allclose(running.mean.numpy(), exact.mean(axis=0), rtol=1e-12, atol=1e-12 * scale)
    # Rounding the inputs' mean, 1e6 deviations away, leaves 1e-10 of a deviation.
    tolerance = 1e-8 * len(values) * np.square(centred).max() + (1e-15 * scale) ** 2 * len(values)
    np.testing.assert_allclose(running.products.numpy(), centred.T @ centred, rtol=0, atol=tolerance + 1e-12)


def test_leading_dimensions_are_all_tokens() -> None:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = comoments([values], 4), comoments([values[0], values[1]], 4)
    assert whole.count == parts.count == 6
    torch.testing.assert_close(whole.products, parts.products)
    torch.testing.assert_close(whole.products, torch.cov(values.double().flatten(0, 1).T, correction=0) * 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chunks_are_multiplied_in_the_wider_dtype(dtype: torch.dtype) -> None:
    values = (1000 + torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    running = comoments(values.split(100), 3, torch.float32)
    assert running.products.dtype == running.mean.dtype == torch.float32
    expected = torch.cov(values.double().T, correction=0) * 300
    torch.testing.assert_close(running.products.double(), expected, rtol=1e-3, atol=10.0)
