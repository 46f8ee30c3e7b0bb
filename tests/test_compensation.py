from __future__ import annotations

import pytest
import torch

from flap_export.compensation import bias_compensation


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
