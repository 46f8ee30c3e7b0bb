"""Matrix products of a layer on processors where PyTorch's choice is not the fastest.

In single precision PyTorch multiplies with MKL, which keeps to AVX2 on processors that Intel did not make. oneDNN,
which PyTorch brings along too and compiles models to, uses AVX-512 wherever it is (`benchmarks/cpu_products.py`). Both
sum in single precision; only the order differs. Calibration and searches multiply so.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn

_CPU_INFO: Final = Path("/proc/cpuinfo")


@cache
def onednn_is_faster() -> bool:
    """Whether linear modules in single precision should go to oneDNN on this machine."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _CPU_INFO.is_file()
        and "GenuineIntel" not in _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    )


@final
class _FastLinear(nn.Linear):
    """A linear module in the fastest way.

    A class, not a `forward` set on modules: that would refer to its module, and keep the weights of every layer that is
    let go in memory until the next collection of cycles.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if inputs.dtype == weight.dtype == torch.float32 and inputs.device.type == "cpu" and inputs.numel():
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
            return outputs
        return nn.functional.linear(inputs, weight, bias)


def with_fast_linears(module: nn.Module) -> nn.Module:
    """Let the linear modules within `module` multiply in the fastest way; without gradients.

    They keep their parameters, hooks and names, and follow when they are given weights of another dtype or moved.
    """
    if onednn_is_faster():
        for linear in module.modules():
            if type(linear) is nn.Linear:
                linear.__class__ = _FastLinear
    return module
