"""An exported artifact on ONNX Runtime, on the CPU or a CUDA device, with the cache updated in place.

TensorRT's execution providers are offered where an installed onnxruntime has them; they are *untested on hardware*.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from flap_export.artifact import (
    INPUT_IDS,
    LOGITS,
    WRITE_INDICES,
    Artifact,
    LogitsKind,
    load_artifact,
)
from flap_export.building.flavours import Flavour
from flap_export.building.graphs import cuda_graph, tensorrt_graph
from flap_export.building.profiles import profiles_of, provider_options
from flap_export.devices import parsed_device, quota_threads
from flap_export.errors import ArtifactError, InputError, MissingRequirementError
from flap_export.precision import PRECISIONS, DtypeName
from flap_export.runners.base import Logits, Runner, RunnerOptions, TokenIds
from flap_export.runners.growing_cache import GrowingCache, relaxed_graph

_PROVIDERS: Final[dict[Flavour, tuple[str, str]]] = {
    "tensorrt": ("TensorrtExecutionProvider", "trt"),
    "tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", "nv"),
}
"""Name of TensorRT's execution providers, and what their options begin with."""
_OLDEST: Final = (1, 28)
"""Older ones align causality with the cache's first row, whatever `nonpad_kv_seqlen` says: right for a whole prompt and
for one token, wrong for the second piece of a prompt (microsoft/onnxruntime#28958; 1.25 to 1.27 tried)."""
_SESSION_SETTINGS: Final = {
    # Workers that wait by spinning take the cores from sessions run in turns and from anything else on the machine:
    # measured beside one busy process on two cores, a session without spinning was twice as fast, in prefill and in
    # decode. The second setting stops what a build may spin regardless, at the end of each run.
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    "session.force_spinning_stop": "1",
}


@final
class OnnxRuntimeRunner(Runner):
    """One session over the graph that gives the wanted kind of logits.

    Each cache tensor is one `OrtValue`, bound as the graph's `past` input and as its `present` output: only then does
    `TensorScatter` write in place instead of copying the cache at every step.

    Raises:
        ArtifactError: the artifact is damaged or lacks the wanted graph.
        InputError: an unknown device, or a dtype or cache length other than the artifact's.
        MissingRequirementError: onnxruntime, its CUDA provider, or an implementation of the dtype is not there.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, options: RunnerOptions, *, provider: Flavour | None = None) -> None:
        artifact = load_artifact(path)
        if provider is not None:
            self.name = f"onnxruntime-{provider}"
            options = replace(options, device="cuda" if options.device == "cpu" else options.device)
        _check_options(artifact, path, options)
        super().__init__(
            max_length=artifact.max_length, vocabulary_size=artifact.shape.vocabulary_size, logits=options.logits
        )
        self._artifact, self._path, self._flavour = artifact, path, provider
        self._precision = PRECISIONS[artifact.dtype]
        self._array_dtype: np.dtype[Any] = np.dtype(self._precision.array)
        self._device, self._device_id = parsed_device(options.device)
        graph = _graph_file(artifact, path, options.logits)
        changed = self._changed(graph)
        self._grows = changed is not None and self._device == "cpu"
        self._session: Any = self._opened(graph, changed, options.threads)
        self._binding: Any = None
        self._cache: GrowingCache | None = None
        _check_interface(self._session, artifact, path)

    def close(self) -> None:
        """Free the session and its cache."""
        self._session, self._binding, self._cache = None, None, None

    def _changed(self, graph: Path) -> bytes | None:
        """What takes the place of the graph on this device, or None."""
        try:
            if self._flavour is not None:
                return tensorrt_graph(graph, self._artifact)
            return relaxed_graph(graph, self._artifact) if self._device == "cpu" else cuda_graph(graph)
        except ArtifactError:
            raise
        # protobuf's exception has moved between its versions.
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot open '{graph}', which is no ONNX graph; the artifact is damaged, export it again"
            ) from error

    def _opened(self, graph: Path, changed: bytes | None, threads: int | None) -> Any:
        """An InferenceSession on the wanted device; `changed` stands for the graph's file where it is given."""
        onnxruntime = _import_onnxruntime(self._device)
        provider, provider_options = self._provider(onnxruntime)
        options = _session_options(onnxruntime, threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        try:
            session = onnxruntime.InferenceSession(changed or str(graph), options, [(provider, provider_options)])
        # ONNX Runtime's exceptions share no base below Exception.
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot open '{graph}': {_first_line(error)}; the artifact is damaged, export it again"
            ) from error
        if provider not in session.get_providers():
            raise MissingRequirementError(
                f"ONNX Runtime has the {provider} but could not start it", "install the CUDA and cuDNN it asks for"
            )
        return session

    def _provider(self, onnxruntime: Any) -> tuple[str, dict[str, int | str]]:
        if self._flavour is not None:
            return self._tensorrt_provider(onnxruntime, self._flavour)
        if self._device == "cpu":
            return "CPUExecutionProvider", {}
        _check_cuda(onnxruntime)
        # TF32 is on by default, and its errors in float32 are a thousand times those that parity allows.
        return "CUDAExecutionProvider", {"device_id": self._device_id, "use_tf32": 0}

    def _tensorrt_provider(self, onnxruntime: Any, flavour: Flavour) -> tuple[str, dict[str, int | str]]:
        name, prefix = _PROVIDERS[flavour]
        if name not in onnxruntime.get_available_providers():
            raise MissingRequirementError(
                f"the installed onnxruntime has no {name}", f"install a build of onnxruntime with {flavour}"
            )
        _, prefill = profiles_of(self._artifact.max_length, max_prompt=None)
        return name, {"device_id": self._device_id, **provider_options(prefill, self._artifact, prefix)}

    def _allocate(self, batch_size: int) -> None:
        self._binding = self._session.io_binding()
        if self._grows:
            self._cache = GrowingCache(self._binding, self._artifact, batch_size, self._array_dtype)
            return
        for cache in self._artifact.caches(batch_size):
            value = self._zeros(cache.shape)
            self._binding.bind_ortvalue_input(cache.past, value)
            self._binding.bind_ortvalue_output(cache.present, value)

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        """A zeroed OrtValue on the device. Unwritten rows have no weight, but zero times NaN would still be NaN."""
        from onnxruntime import OrtValue

        element_type = self._precision.onnx_number
        value = OrtValue.ortvalue_from_shape_and_type(shape, element_type, self._device, self._device_id)
        value.update_inplace(np.zeros(shape, self._array_dtype))
        return value

    def _forward(self, input_ids: TokenIds, write_indices: TokenIds) -> Logits:
        from onnxruntime import OrtValue

        batch_size, new_tokens = input_ids.shape
        if self._cache is not None:
            self._cache.reserve(int(write_indices.max()) + new_tokens)
        rows = new_tokens if self.logits == "all" else 1
        logits = np.empty((batch_size, rows, self.vocabulary_size), self._array_dtype)
        element_type = self._precision.onnx_number
        self._binding.bind_ortvalue_input(INPUT_IDS, OrtValue.ortvalue_from_numpy(input_ids))
        self._binding.bind_ortvalue_input(WRITE_INDICES, OrtValue.ortvalue_from_numpy(write_indices))
        # The session writes the logits straight into the array.
        self._binding.bind_ortvalue_output(LOGITS, OrtValue.ortvalue_from_numpy_with_onnx_type(logits, element_type))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime failed on the artifact '{self._path}': {_first_line(error)}; export it again"
            ) from error
        return _widened(logits)


def check_runs(device: str, dtype: DtypeName) -> None:
    """Whether artifacts in `dtype` run on `device` of this machine, to be asked before there is one.

    Raises:
        InputError: there is no such kind of device.
        MissingRequirementError: onnxruntime, its CUDA provider, or an implementation of the dtype is not there.
    """
    kind, _ = parsed_device(device)
    _check_precision(device, dtype)
    onnxruntime = _import_onnxruntime(kind)
    if kind != "cpu":
        _check_cuda(onnxruntime)


def _check_cuda(onnxruntime: Any) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingRequirementError(
            "the installed onnxruntime has no CUDA execution provider", "pip install 'flap-export[gpu]'"
        )


def _check_precision(device: str, dtype: DtypeName) -> None:
    if dtype == "bfloat16" and device == "cpu":
        raise MissingRequirementError(
            "ONNX Runtime's CPU provider does not implement bfloat16",
            "run the artifact with --device cuda, or export with --dtype float32",
        )


def _import_onnxruntime(device: str) -> Any:
    if device != "cpu":
        # Where pip has installed the CUDA libraries, PyTorch knows, and what it has loaded ONNX Runtime finds.
        importlib.import_module("torch")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingRequirementError(
            f"running an artifact needs onnxruntime ({error})", "pip install 'flap-export[cpu]'"
        ) from error
    found = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if found < _OLDEST:
        raise MissingRequirementError(
            f"running an artifact needs onnxruntime {'.'.join(map(str, _OLDEST))} or newer, found "
            f"{onnxruntime.__version__}, which computes prompts that are fed in pieces wrongly",
            "pip install --upgrade 'flap-export[cpu]'",
        )
    return onnxruntime


def _check_options(artifact: Artifact, path: Path, options: RunnerOptions) -> None:
    if options.dtype not in (None, artifact.dtype):
        raise InputError(f"artifact '{path}' computes in {artifact.dtype}; export it again for {options.dtype}")
    if options.max_length not in (None, artifact.max_length):
        raise InputError(
            f"the cache of artifact '{path}' has {artifact.max_length} rows; export it again for {options.max_length}"
        )
    _check_precision(options.device, artifact.dtype)


def _graph_file(artifact: Artifact, path: Path, logits: LogitsKind) -> Path:
    if logits not in artifact.graphs:
        raise ArtifactError(f"artifact '{path}' has no graph for logits '{logits}'; export it again")
    return path / artifact.graphs[logits]


def _session_options(onnxruntime: Any, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its own choice, 0, is every core of the machine, also of those that a container has no time for.
    options.intra_op_num_threads = threads or quota_threads() or 0
    options.inter_op_num_threads = 1
    for key, value in _SESSION_SETTINGS.items():
        options.add_session_config_entry(key, value)
    return options


def _check_interface(session: Any, artifact: Artifact, path: Path) -> None:
    """Whether the graph has exactly the inputs and outputs that `artifact.json` implies."""
    real = f"tensor({PRECISIONS[artifact.dtype].onnxruntime})"
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        INPUT_IDS: ("tensor(int64)", (None, None)),
        WRITE_INDICES: ("tensor(int64)", (None,)),
        LOGITS: (real, (None, None, artifact.shape.vocabulary_size)),
    }
    for cache in artifact.caches(1):
        expected |= dict.fromkeys((cache.past, cache.present), (real, (None, *cache.shape[1:])))
    found = {value.name: value for value in [*session.get_inputs(), *session.get_outputs()]}
    differ = [name for name in found.keys() & expected if not _agrees(found[name], *expected[name])]
    wrong = sorted(differ or found.keys() ^ expected)
    if wrong:
        raise ArtifactError(
            f"the graph of artifact '{path}' and its artifact.json disagree about {', '.join(wrong[:4])}; export again"
        )


def _agrees(value: Any, element_type: str, shape: tuple[int | None, ...]) -> bool:
    """Whether an input or output of a graph is of this type and shape, where the graph states one."""
    stated = value.shape
    if value.type != element_type or len(stated) != len(shape):
        return False
    return all(size in (None, found) or not isinstance(found, int) for size, found in zip(shape, stated, strict=True))


def _widened(logits: Any) -> Logits:
    """Logits as float32; uint16 holds the upper half of float32's bits."""
    if logits.dtype == np.uint16:
        bits: Logits = (logits.astype(np.uint32) << 16).view(np.float32)
        return bits
    widened: Logits = logits.astype(np.float32, copy=False)
    return widened


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
