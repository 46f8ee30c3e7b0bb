"""Least squares on a model of transformers, by hand: what the package's own is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flap_export.calibration.statistics import CutSpace
from flap_export.families import FAMILIES


def site(model: Any, family: str, layer: int, space: CutSpace) -> nn.Linear:
    path = f"{FAMILIES[family].modules.layers}.{layer}.{FAMILIES[family].restoring(space).path}"
    found = model.get_submodule(path)
    if isinstance(found, Conv1D):
        # GPT-2's are transposed; one that is not takes its place.
        linear = nn.Linear(*found.weight.shape, dtype=found.weight.dtype)
        linear.load_state_dict({"weight": found.weight.T, "bias": found.bias})
        model.set_submodule(path, linear)
        found = linear
    assert isinstance(found, nn.Linear)
    return found


@torch.no_grad()
def inputs_of(model: Any, module: nn.Linear, tokens: Tensor) -> NDArray[np.float64]:
    """What enters a module, [tokens, C]."""
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    model(input_ids=tokens, use_cache=False)
    hook.remove()
    return found[0].flatten(0, -2).double().numpy()


def fitted(
    weight: NDArray[np.float64], inputs: NDArray[np.float64], kept: Sequence[int], ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares from its definition: the weight [out, C], zero where columns are gone, and the bias."""
    covariance = np.cov(inputs.T, bias=True).reshape(len(inputs.T), -1)
    removed = [channel for channel in range(weight.shape[1]) if channel not in kept]
    new = np.zeros_like(weight)
    if len(kept):
        within = covariance[np.ix_(kept, kept)]
        # What never varies is correlated with nothing.
        within = within + np.diag(np.where(np.diag(within) > 0, ridge * np.diag(within), 1.0))
        absorbed = np.linalg.solve(within, covariance[np.ix_(kept, removed)])
        new[:, kept] = weight[:, kept] + weight[:, removed] @ absorbed.T
    return new, (weight - new) @ inputs.mean(axis=0)


def replace(module: nn.Linear, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
    """Put in a weight, and add to the bias."""
    own = 0 if module.bias is None else module.bias.detach().double().numpy()
    dtype = module.weight.dtype
    module.weight = nn.Parameter(torch.from_numpy(weight).to(dtype))
    module.bias = nn.Parameter(torch.from_numpy(own + bias).to(dtype))


def refit(module: nn.Linear, inputs: NDArray[np.float64], kept: Sequence[int], ridge: float) -> None:
    """Fit a module's kept columns to what enters it, in place."""
    replace(module, *fitted(module.weight.detach().double().numpy(), inputs, kept, ridge))


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.double(), dim=-1)


def kl(dense: Tensor, other: Tensor) -> float:
    return float((dense.exp() * (dense - other)).sum(dim=-1).mean())
