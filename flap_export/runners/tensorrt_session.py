"""The device calls of `TensorRTRunner`: memory and streams by torch, execution by TensorRT. Needs a GPU throughout.

Every cache is one tensor, bound as `past` input and as `present` output of both profiles' contexts. A decode step has
buffers of its own at fixed addresses: TensorRT's is captured in a CUDA graph once per batch and then replayed;
TensorRT-RTX captures by itself (`CudaGraphStrategy`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from flap_export.artifact import (
    ARTIFACT_NAME,
    INPUT_IDS,
    LOGITS,
    WRITE_INDICES,
    LogitsKind,
    load_artifact,
)
from flap_export.building.flavours import import_tensorrt
from flap_export.building.graphs import write_tensorrt_graph
from flap_export.building.record import EngineRecord, Profile
from flap_export.errors import ArtifactError, MissingRequirementError
from flap_export.runners.base import Logits, TokenIds
from flap_export.runners.sampling import Sampling, sampled
from flap_export.storage import SCRATCH_PREFIX, digest_of_file

_IS_RTX: Final = "tensorrt-rtx"


@final
class TensorRTSession:
    """One engine on one GPU.

    Raises:
        ArtifactError: the engine was built for another GPU or version, or cannot be refitted.
        MissingRequirementError: the flavour's package or a GPU is not there.
    """

    def __init__(self, record: EngineRecord, path: Path, logits: LogitsKind, device: str) -> None:
        self._trt, self._torch = import_tensorrt(record.flavour), _torch_with_gpu(device)
        self._record, self._logits, self._device = record, logits, self._torch.device(device)
        self._artifact = record.artifact
        self._dtype = getattr(self._torch, record.dtype)
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime: Any = None
        self._engine: Any = None
        with self._torch.cuda.device(self._device):
            self._stream = self._torch.cuda.Stream()
            self._engine = self._opened(path / record.engines[logits].file)
            if record.weights is not None:
                self._refit(path / record.weights)
            self._contexts = [self._context(index, profile) for index, profile in enumerate(record.profiles)]
        self._caches: dict[str, Any] = {}
        self._step: tuple[Any, Any, Any] | None = None
        self._graph: Any = None
        self._generators: dict[int, Any] = {}

    def close(self) -> None:
        """Free contexts before their engine, and the engine before its logger."""
        self._graph, self._step, self._caches = None, None, {}
        self._contexts.clear()
        self._engine, self._runtime = None, None

    def allocate(self, batch_size: int) -> None:
        """Zeroed caches: unwritten rows have no weight, but zero times NaN would still be NaN."""
        torch = self._torch
        with self._on_stream():
            self._graph, self._generators = None, {}
            self._caches = {}
            for cache in self._artifact.caches(batch_size):
                rows = torch.zeros(cache.shape, dtype=self._dtype, device=self._device)
                self._caches |= {cache.past: rows, cache.present: rows}
            ids = torch.zeros((batch_size, 1), dtype=torch.int64, device=self._device)
            starts = torch.zeros(batch_size, dtype=torch.int64, device=self._device)
            self._step = ids, starts, self._empty_logits(batch_size, 1)

    def run(self, profile: int, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        """See `Session.run`."""
        with self._on_stream():
            logits = self._executed(profile, input_ids, write_indices)
            copied: Logits = logits.to("cpu", self._torch.float32, copy=True).numpy()
        return copied

    def run_sampled(self, profile: int, input_ids: TokenIds, write_indices: TokenIds, sampling: Sampling) -> TokenIds:
        """See `Session.run_sampled`."""
        with self._on_stream():
            logits = self._executed(profile, input_ids, write_indices)[:, -1].float()
            tokens: TokenIds = sampled(logits, sampling, self._generator(sampling.seed)).cpu().numpy()
        return tokens

    def _executed(self, profile: int, input_ids: TokenIds, write_indices: TokenIds) -> Any:
        """Logits on the device; those of a decode step are overwritten by the next."""
        torch = self._torch
        if self._record.profiles[profile].phase == "decode":
            return self._decoded(profile, input_ids, write_indices)
        ids, starts = (torch.from_numpy(array).to(self._device) for array in (input_ids, write_indices))
        logits = self._empty_logits(*input_ids.shape)
        self._bind(self._contexts[profile], ids, starts, logits)
        self._enqueue(self._contexts[profile])
        return logits

    def _decoded(self, profile: int, input_ids: TokenIds, write_indices: TokenIds) -> Any:
        assert self._step is not None
        (ids, starts, logits), context = self._step, self._contexts[profile]
        ids.copy_(self._torch.from_numpy(input_ids))
        starts.copy_(self._torch.from_numpy(write_indices))
        if self._graph is None:
            self._bind(context, ids, starts, logits)
            self._enqueue(context)
            # The step has been done by now; replaying it would only write the same rows again.
            self._graph = self._captured(context)
        elif self._graph is True:
            self._enqueue(context)
        else:
            self._graph.replay()
        return logits

    def _captured(self, context: Any) -> Any:
        """A CUDA graph of the bound step; True where the runtime replays by itself."""
        if self._record.flavour == _IS_RTX:
            return True
        graph = self._torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with self._torch.cuda.graph(graph, stream=self._stream):
            self._enqueue(context)
        return graph

    def _bind(self, context: Any, ids: Any, starts: Any, logits: Any) -> None:
        """Tell a context shapes and addresses of everything."""
        inputs = {INPUT_IDS: ids, WRITE_INDICES: starts}
        for name, tensor in {**inputs, LOGITS: logits, **self._caches}.items():
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._torch.cuda.current_stream().cuda_stream):
            raise ArtifactError(f"{self._record.flavour} could not run the engine; its log says why")

    def _empty_logits(self, batch_size: int, new_tokens: int) -> Any:
        rows = 1 if self._logits == "last" else new_tokens
        shape = (batch_size, rows, self._artifact.shape.vocabulary_size)
        return self._torch.empty(shape, dtype=self._dtype, device=self._device)

    def _generator(self, seed: int) -> Any:
        """One stream of random numbers per seed and batch."""
        if seed not in self._generators:
            self._generators[seed] = self._torch.Generator(self._device).manual_seed(seed)
        return self._generators[seed]

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
            yield

    def _opened(self, file: Path) -> Any:
        self._runtime = self._trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            built_for = ", ".join(self._record.targets) or "the GPU it was built on"
            raise ArtifactError(
                f"the engine '{file}' cannot be opened here: it was built for {built_for} with "
                f"{self._record.flavour} {self._record.versions}; this GPU is "
                f"{self._torch.cuda.get_device_name(self._device)} and the package {self._trt.__version__}; build again"
            )
        return engine

    def _context(self, index: int, profile: Profile) -> Any:
        """An execution context that stays on one profile."""
        if self._record.flavour == _IS_RTX:
            context = self._engine.create_execution_context(self._runtime_config(profile))
        else:
            context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise ArtifactError(f"the engine has no room or no profile {index} on this GPU; its log says why")
        self._stream.synchronize()
        return context

    def _runtime_config(self, profile: Profile) -> Any:
        """TensorRT-RTX compiles for the GPU when it runs: a decode step's one shape at once, prefills as they come."""
        config, kernels = self._engine.create_runtime_config(), self._trt.DynamicShapesKernelSpecializationStrategy
        is_decode = profile.phase == "decode"
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if is_decode else kernels.LAZY
        graphs = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if is_decode else graphs.DISABLED
        return config

    def _refit(self, source: Path) -> None:
        """Read the weights of a weight-stripped engine from the artifact it was built from."""
        artifact, kind = load_artifact(source), self._logits
        if digest_of_file(source / ARTIFACT_NAME) != self._record.digests["artifact"]:
            raise ArtifactError(
                f"'{source}' is not the artifact this engine was built from; name that one, or build again"
            )
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}refit-") as folder:
            graph = write_tensorrt_graph(source / artifact.graphs[kind], artifact, Path(folder))
            if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
                raise ArtifactError(f"the engine's weights cannot be read from '{source}'; build it again")


def _torch_with_gpu(device: str) -> Any:
    import torch

    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise MissingRequirementError(
            f"an engine runs on an NVIDIA GPU, device '{device}' was asked for, and PyTorch sees {count}",
            "run it on a machine with the GPU it was built for and a CUDA build of torch",
        )
    return torch
