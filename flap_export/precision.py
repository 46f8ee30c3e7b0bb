"""Number formats: a row says everything that stages and backends ask about a precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, final, get_args

from flap_export.errors import check_choice

if TYPE_CHECKING:
    import torch

DtypeName = Literal["float32", "float16", "bfloat16"]
"""What artifacts and engines are made of."""
ComputeDtypeName = Literal["float32", "float16", "bfloat16", "float64"]
"""What PyTorch computes in."""
COMPUTE_DTYPES: Final[tuple[ComputeDtypeName, ...]] = get_args(ComputeDtypeName)


@final
@dataclass(frozen=True)
class Precision:
    """One row: a precision in itself, and what others call it."""

    bytes_per_value: int
    epsilon: float
    """Distance from 1 to the next number."""
    largest: float
    reference: ComputeDtypeName
    """What PyTorch computes in where something of this precision is held against it."""
    onnx: str
    """Name of the element type in ONNX."""
    onnx_number: int
    """Its number in ONNX files and in ONNX Runtime."""
    onnxruntime: str
    """Its name in the types that ONNX Runtime reports, such as `tensor(float)`."""
    tensorrt: str
    array: str
    """NumPy's type of the same bits; it has no bfloat16."""


PRECISIONS: Final[dict[DtypeName, Precision]] = {
    "float32": Precision(
        4, 2.0**-23, float.fromhex("0x1.fffffep127"), "float64", "FLOAT", 1, "float", "FLOAT", "float32"
    ),
    "float16": Precision(2, 2.0**-10, 65504.0, "float32", "FLOAT16", 10, "float16", "HALF", "float16"),
    "bfloat16": Precision(
        2, 2.0**-7, float.fromhex("0x1.fep127"), "float32", "BFLOAT16", 16, "bfloat16", "BF16", "uint16"
    ),
}


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of a name.

    Raises:
        InputError: it is none that models are computed in.
    """
    import torch

    check_choice("dtype", name, COMPUTE_DTYPES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype
