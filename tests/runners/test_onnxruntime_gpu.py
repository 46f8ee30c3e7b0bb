"""What only a GPU can show of ONNX Runtime on CUDA: that every node has a kernel there which computes what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tiny import ALL_FAMILIES, FAMILY_SIZES, tiny_checkpoint, tiny_pruned

from flap_export.exporting import export
from flap_export.validation import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="needs an NVIDIA GPU, a CUDA build of torch and onnxruntime-gpu",
    ),
]
CASES = [
    *(("llama", pruned, dtype) for pruned in (False, True) for dtype in ("float32", "bfloat16")),
    *((family, True, "float16") for family in ALL_FAMILIES),
]


@pytest.mark.parametrize(("family", "pruned", "dtype"), CASES)
def test_parity(family: str, pruned: bool, dtype: Any, tmp_path: Path) -> None:
    """Prompts whole, in pieces and of different lengths, and decode steps; heads are of a size that kernels take."""
    sizes = {"hidden_size": 128} | ({"head_dim": 32} if "head_dim" in FAMILY_SIZES.get(family, {}) else {})
    checkpoint = (tiny_pruned if pruned else tiny_checkpoint)(family, tmp_path / "checkpoint", **sizes)
    export(checkpoint, tmp_path / "onnx", dtype=dtype, max_length=32)
    report = validate(tmp_path / "onnx", reference=checkpoint, decode_steps=8, device="cuda")
    assert report.passed, report.worst
