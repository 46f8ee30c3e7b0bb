"""Linear modules through oneDNN against PyTorch's own; on other processors both are the same."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flap_export.calibration import products
from flap_export.calibration.products import onednn_is_faster, with_fast_linears


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a processor on which oneDNN is faster; it computes on all of them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("needs a build of torch with oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


drawn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
INPUTS = {
    "a vector": drawn(24),
    "one row": drawn(1, 24),
    "sequences": drawn(3, 5, 24),
    "four axes": drawn(2, 3, 5, 24),
    "columns of a wider tensor": drawn(6, 48)[:, ::2],
    "another order of axes": drawn(24, 6).T,
    "the same row again": drawn(1, 24).expand(7, 24),
    "no rows": drawn(0, 24),
}


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_outputs_are_those_of_pytorch(inputs: Tensor, bias: bool) -> None:
    own = linear(24, 17, bias)
    fast = with_fast_linears(copy.deepcopy(own))
    found = fast(inputs)
    assert found.shape == (*inputs.shape[:-1], 17)
    torch.testing.assert_close(found, own(inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("onednn")
@torch.no_grad()
def test_it_is_onednn_that_computes() -> None:
    fast = with_fast_linears(nn.Sequential(linear(8, 8), nn.ReLU()))
    with torch.profiler.profile() as profile:
        fast(torch.randn(2, 8))
    assert any("mkldnn" in event.key for event in profile.key_averages())


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_precisions_stay_with_pytorch(dtype: torch.dtype) -> None:
    own = linear(8, 5).to(dtype)
    inputs = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(with_fast_linears(copy.deepcopy(own))(inputs), own(inputs))


@pytest.mark.usefixtures("onednn")
@torch.no_grad()
def test_copies_hooks_and_new_weights_are_followed() -> None:
    fast = with_fast_linears(linear(8, 5))
    seen: list[Tensor] = []
    other = copy.deepcopy(fast)
    other.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    other.register_parameter("weight", nn.Parameter(torch.ones(5, 8), requires_grad=False))
    other.register_parameter("bias", None)
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(other(inputs), inputs.sum(1, keepdim=True).expand(3, 5))
    assert seen == [inputs]
    assert not torch.allclose(fast(inputs), other(inputs))


@pytest.mark.usefixtures("onednn")
def test_what_is_let_go_leaves_memory_at_once() -> None:
    """Blocks of a search are forgotten to make room: their weights may not wait for a collection of cycles."""
    fast = with_fast_linears(linear(8, 5))
    known = weakref.ref(fast.weight)
    gc.disable()
    try:
        del fast
        assert known() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_where_it_is_not_faster_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    own = linear(8, 5)
    assert type(with_fast_linears(own)) is nn.Linear
    assert "forward" not in vars(own)


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_the_processor_decides(
    capability: str, vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "_CPU_INFO", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() is expected
    finally:
        onednn_is_faster.cache_clear()
