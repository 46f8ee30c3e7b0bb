"""TensorRT and CUDA as far as a session calls them, on the CPU: engines run their graphs on ONNX Runtime.

An engine reads its inputs from the addresses it was given and writes its outputs there, in the order it was asked to,
so that a wrong address, shape, profile or order shows in the numbers. What is captured runs when it is replayed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch

from flap_export.artifact import load_artifact
from flap_export.building.graphs import tensorrt_graph
from flap_export.building.record import EngineRecord

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeCuda:
    """`torch.cuda`; work that is enqueued while a graph is captured is kept for its replays."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None
        self.replays = 0

    def device(self, device: Any) -> Any:
        return nullcontext()

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def Stream(self) -> Any:
        return SimpleNamespace(cuda_stream=7, synchronize=lambda: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(cuda_stream=7)

    def get_device_name(self, device: Any) -> str:
        return "Fake GPU"

    def CUDAGraph(self) -> Any:
        cuda, work = self, []

        def replay() -> None:
            cuda.replays += 1
            for step in work:
                step()

        return SimpleNamespace(work=work, replay=replay)

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.captured = graph.work
        yield
        self.captured = None


class FakeTorch:
    """torch with another `torch.cuda`."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> Any:
        return torch.device("cpu")


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.record.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        batch, tokens = self.shapes["input_ids"]
        if not self.engine.record.profiles[self.profile].takes(batch, tokens) or stream != 7:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def work() -> None:
            self.engine.run(shapes, addresses)

        captured = self.engine.cuda.captured
        work() if captured is None else captured.append(work)
        return True


class FakeEngine:
    def __init__(self, record: EngineRecord, graph: Path, cuda: FakeCuda, trt: Any) -> None:
        self.record, self.cuda, self.trt = record, cuda, trt
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        content = tensorrt_graph(graph, record.artifact)
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        self.contexts: list[FakeContext] = []
        self.runs = 0

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.runs += 1
        feeds = {name: memory(addresses[name], shapes[name], kind).copy() for name, kind in self.inputs.items()}
        results = self.session.run(None, feeds)
        for output, result in zip(self.session.get_outputs(), results, strict=True):
            memory(addresses[output.name], result.shape, result.dtype)[...] = result


def memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def fake_tensorrt(record: EngineRecord, artifact: Path, cuda: FakeCuda) -> Any:
    """The module; its runtime opens a directory's engines by running the artifact they were built from."""
    opened = load_artifact(artifact)
    sizes = {engine.size_bytes: kind for kind, engine in record.engines.items()}
    trt = SimpleNamespace(
        __version__="fake",
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", LAZY="lazy"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="capture", DISABLED="disabled"),
        opened=[],
    )

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            if len(content) not in sizes:
                return None
            graph = artifact / opened.graphs[sizes[len(content)]]
            trt.opened.append(FakeEngine(record, graph, cuda, trt))
            return trt.opened[-1]

    trt.Runtime = Runtime
    return trt
