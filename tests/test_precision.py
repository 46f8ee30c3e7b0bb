"""The rows of the precision table against the libraries they speak for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from flap_export.errors import InputError
from flap_export.precision import COMPUTE_DTYPES, PRECISIONS, DtypeName, torch_dtype


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_row_is_what_the_libraries_say(name: DtypeName) -> None:
    row, found = PRECISIONS[name], torch.finfo(torch_dtype(name))
    assert (8 * row.bytes_per_value, row.epsilon, row.largest) == (found.bits, found.eps, found.max)
    assert onnx.TensorProto.DataType.Name(row.onnx_number) == row.onnx == ir.DataType(row.onnx_number).name
    assert np.dtype(row.array).itemsize == row.bytes_per_value
    assert torch.finfo(torch_dtype(row.reference)).eps < row.epsilon


@pytest.mark.parametrize("name", PRECISIONS)
def test_tensorrt_knows_the_names(name: DtypeName) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    assert hasattr(tensorrt_rtx.DataType, PRECISIONS[name].tensorrt)


def test_names_that_models_are_not_computed_in() -> None:
    assert {torch_dtype(name) for name in COMPUTE_DTYPES} >= {torch.float32, torch.float64}
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16, float64, got 'int8'"):
        torch_dtype("int8")
