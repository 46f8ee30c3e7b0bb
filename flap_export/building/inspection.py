"""What TensorRT's engine inspector says of a built engine: layers, kernels and formats. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from flap_export.errors import ArtifactError

INSPECTION_NAME: Final = "inspection-{}.json"


def inspected(file: Path, trt: Any) -> str:
    """The inspector's JSON dump of the engine in `file`; with layer names only where the engine holds no more.

    Raises:
        ArtifactError: the engine cannot be opened on this machine.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ArtifactError(f"the engine '{file}' that was just built cannot be opened on the GPU at hand")
    dump: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return dump
