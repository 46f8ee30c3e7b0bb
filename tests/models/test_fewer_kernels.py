"""The same model in fewer kernels: how many a decode step launches, and that it computes what transformers does.

That every family does is seen where the runner that uses it is tested.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint, tiny_pruned, tokens_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flap_export.models import fewer_kernels
from flap_export.models.fewer_kernels import use_fewer_kernels
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.runners import open_runner


class Launches(TorchDispatchMode):
    """Counts operators that compute; on a GPU each of them is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.name().partition("::")[2].partition(".")[0], func(*args, **(kwargs or {}))
        # Some give a view where they can, and a copy where they cannot.
        is_view = func.is_view and not (isinstance(result, torch.Tensor) and address(result) != address(args[0]))
        if not is_view and name != "_unsafe_view":
            self.seen[name] += 1
        return result


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def launches(layers: int, folder: Path, **sizes: Any) -> Counter[str]:
    """Of a decode step."""
    checkpoint = tiny_checkpoint("llama", folder / f"{layers}", num_hidden_layers=layers, **sizes)
    with open_runner(checkpoint, backend="torch-static", dtype="float16", threads=1, max_length=16) as runner:
        runner.start(2)
        with Launches() as counted:
            runner.decode(np.array([1, 2]))
    return counted.seen


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "ungrouped"])
def test_a_layer_of_llama_takes_four_products_and_thirteen_more(kv_heads: int, tmp_path: Path) -> None:
    two, three = (launches(n, tmp_path, num_key_value_heads=kv_heads) for n in (2, 3))
    assert three - two == {
        "linear": 4,
        "rms_norm": 2,
        "cat": 1,
        "mul": 2,
        "addcmul_": 2,
        "scatter_": 2,
        "scaled_dot_product_attention": 1,
        "silu": 1,
        "add": 2,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere", "olmo2", "phi3"])
def test_it_computes_the_same(family: str, pruned: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = (tiny_pruned if pruned else tiny_checkpoint)(family, tmp_path / "checkpoint")
    tokens, found = tokens_of(2, 12), []
    for fewer in (False, True):
        model = load_model(checkpoint, dtype=dtype)
        if fewer:
            use_fewer_kernels(model, open_checkpoint(checkpoint).family)
        with torch.inference_mode():
            found.append(model(input_ids=tokens, use_cache=False).logits.double())
    expected, changed = found
    # In half precision roundings differ; a wrong scale or angle is another model.
    allowed = 32 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((changed - expected).abs().max()) <= allowed
    assert not torch.equal(expected, torch.zeros_like(expected))


def joined(biased: bool = True) -> tuple[nn.ModuleDict, list[nn.Linear]]:
    """A layer with three joined projections, and what they were."""
    layer = nn.ModuleDict(
        {name: nn.Linear(8, width, bias=biased) for name, width in zip("abc", (3, 5, 2), strict=True)}
    )
    own = [layer[name] for name in "abc"]
    fewer_kernels._join(layer, ["a", "b", "c"])
    return layer, own


@pytest.mark.parametrize("order", ["abc", "cab", "aabbcc", "ab"])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_parts_of_a_product_are_what_each_would_be(biased: bool, order: str) -> None:
    """In whatever order, and however often they are asked."""
    layer, own = joined(biased)
    for states in (torch.randn(2, 3, 8), torch.randn(1, 8)):
        for name in order:
            torch.testing.assert_close(layer[name](states), own["abc".index(name)](states))


@torch.no_grad()
def test_a_product_keeps_nothing_that_all_have_been_given() -> None:
    """Of a long prompt the outputs of all layers together would fill the memory."""
    layer, _ = joined()
    states = torch.randn(2, 8)
    parts = [layer[name](states) for name in "abc"]
    held = [weakref.ref(states), *(weakref.ref(part) for part in parts)]
    del states, parts
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


def test_what_differs_in_biases_stays_apart() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3, bias=False)})
    fewer_kernels._join(layer, ["a", "b"])
    assert [type(layer[name]) for name in "ab"] == [nn.Linear, nn.Linear]
