from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parity_models
import pytest
import torch
import transformers
from tiny import (
    ALL_FAMILIES,
    MIXTURES,
    PLAIN_FAMILIES,
    layer_plan,
    plan_of,
    save_pruned,
    tiny_checkpoint,
    tiny_pruned,
    tiny_statistics,
    tokens_of,
)

from flap_export import devices
from flap_export.artifact import ARTIFACT_NAME, Artifact
from flap_export.errors import ArtifactError, FlapExportError, InputError, MissingRequirementError, TextError
from flap_export.exporting import export
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.runners import Logits, Runner, open_runner
from flap_export.runners.growing_cache import relaxed_graph
from flap_export.runners.static_torch_runner import grouped_attention

MAX_LENGTH, VOCABULARY = parity_models.MAX_LENGTH, parity_models.VOCABULARY
LOCAL = ("torch", "torch-static", "onnxruntime")
"""Backends that run without a GPU."""
RAGGED = ((5, 6, 7), (11,), (21, 22, 23, 24, 25, 26, 27), (31, 32, 33))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity_models.save_dense(tmp_path_factory.mktemp("dense") / "checkpoint")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity_models.save_uneven(tmp_path_factory.mktemp("uneven") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "onnx"
    export(dense, path, max_length=MAX_LENGTH)
    return path


@pytest.fixture
def damaged(artifact: Path, tmp_path: Path) -> Path:
    """Without a manifest, which would tell the damage before what these tests are about is reached."""
    return Path(shutil.copytree(artifact, tmp_path / "damaged", ignore=shutil.ignore_patterns("manifest.json")))


def without_cache(checkpoint: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits [V] after `tokens`, float64, from one forward pass without any cache."""
    model: Any = load_model(checkpoint, dtype=torch.float64)
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1])


def greedy(runner: Runner, prompts: tuple[tuple[int, ...], ...], steps: int) -> list[list[int]]:
    tokens = runner.prefill(prompts).argmax(-1)
    rows = [tokens]
    for _ in range(steps - 1):
        rows.append(runner.decode(rows[-1]).argmax(-1))
    return np.stack(rows, axis=1).tolist()


# --- PyTorch


def test_torch_ragged_batch_equals_one_sequence_at_a_time(dense: Path) -> None:
    steps = np.array([[1, 2, 3, 4], [9, 8, 7, 6]])
    with open_runner(dense, dtype="float64", threads=1) as runner:
        together = [runner.prefill(RAGGED), *(runner.decode(tokens) for tokens in steps)]
        assert runner.lengths.tolist() == [5, 3, 9, 5]
        for row, prompt in enumerate(RAGGED):
            alone = [runner.prefill([prompt]), *(runner.decode(tokens[row : row + 1]) for tokens in steps)]
            np.testing.assert_allclose(np.stack(together)[:, row], np.concatenate(alone), rtol=0, atol=1e-12)


def test_torch_chunks_equal_the_whole(dense: Path) -> None:
    ids = np.arange(24, dtype=np.int64).reshape(2, 12)
    with open_runner(dense, dtype="float64", threads=1) as runner:
        runner.start(2)
        whole = runner.forward(ids, np.zeros(2, np.int64))
        runner.start(2)
        parts = [runner.forward(ids[:, a:b], np.full(2, a)) for a, b in ((0, 7), (7, 8), (8, 12))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", LOCAL)
def test_writing_again_replaces_what_stood_there(backend: Any, dense: Path, artifact: Path) -> None:
    with open_runner(artifact if backend == "onnxruntime" else dense, backend=backend, threads=1) as runner:
        expected = runner.prefill([[1, 2, 3]])
        runner.prefill([[1, 2, 9, 9, 9]])
        rewound = runner.forward(np.array([[3]]), np.array([2]))[:, -1]
    np.testing.assert_allclose(rewound, expected, rtol=0, atol=1e-4)


def test_torch_keeps_the_rows_a_sliding_window_has_left(tmp_path: Path) -> None:
    checkpoint = parity_models.save_sliding(tmp_path / "sliding", window=4)
    prompt = list(range(1, 11))
    with open_runner(checkpoint, dtype="float64", threads=1) as runner:
        runner.prefill([prompt, prompt[:7]])
        decoded = runner.decode(np.array([50, 51]))
        rewound = runner.forward(np.array([[60], [61]]), np.array([8, 5]))[:, -1]
    np.testing.assert_allclose(decoded[0], without_cache(checkpoint, [*prompt, 50]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(decoded[1], without_cache(checkpoint, [*prompt[:7], 51]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(rewound[0], without_cache(checkpoint, [*prompt[:8], 60]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(rewound[1], without_cache(checkpoint, [*prompt[:5], 61]), rtol=0, atol=1e-12)


def test_torch_runs_layers_that_kept_nothing(uneven: Path) -> None:
    with open_runner(uneven, dtype="float64", threads=1) as runner:
        runner.prefill(RAGGED)
        decoded = runner.decode(np.array([1, 2, 3, 4]))
    for row, prompt in enumerate(RAGGED):
        np.testing.assert_allclose(decoded[row], without_cache(uneven, [*prompt, row + 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "returned"), [("float16", np.float32), ("bfloat16", np.float32), ("float64", np.float64)]
)
def test_torch_computes_in_the_dtype_asked_for(dtype: str, returned: type, dense: Path) -> None:
    with open_runner(dense, dtype=dtype, threads=1) as runner:
        logits = runner.prefill([[1, 2, 3]])
    exact = without_cache(dense, [1, 2, 3])
    assert logits.dtype == (np.float64 if dtype == "float64" else np.float32)
    error = float(np.abs(logits[0] - exact).max())
    assert error < 1e-12 if dtype == "float64" else 1e-4 < error < 0.3


def test_torch_leaves_the_thread_count_of_the_process_alone(dense: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with open_runner(dense, threads=before + 1) as runner:
        runner._model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))  # type: ignore[attr-defined]
        runner.prefill([[1]])
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_torch_cache_is_as_long_as_the_context_unless_told(dense: Path) -> None:
    with open_runner(dense) as runner:
        assert runner.max_length == 128
    with open_runner(dense, max_length=7) as runner:
        assert runner.max_length == 7


# --- ONNX Runtime


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("prompts", [RAGGED, RAGGED[:1], (RAGGED[0], RAGGED[3])])
def test_onnxruntime_agrees_with_torch(logits: Any, prompts: Any, dense: Path, artifact: Path) -> None:
    tokens = [np.arange(len(prompts)) + step for step in range(4)]
    with open_runner(dense, dtype="float64", threads=1) as reference:
        expected = [reference.prefill(prompts), *(reference.decode(step) for step in tokens)]
    with open_runner(artifact, logits=logits, threads=1) as runner:
        found = [runner.prefill(prompts), *(runner.decode(step) for step in tokens)]
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-4)


def test_onnxruntime_runs_layers_that_kept_nothing(uneven: Path, tmp_path: Path) -> None:
    export(uneven, tmp_path / "onnx", max_length=16)
    with open_runner(uneven, dtype="float64", threads=1) as runner:
        expected = greedy(runner, RAGGED, 6)
    with open_runner(tmp_path / "onnx", threads=1) as runner:
        assert greedy(runner, RAGGED, 6) == expected


def test_onnxruntime_fills_its_cache_to_the_last_row_and_no_further(artifact: Path) -> None:
    with open_runner(artifact, logits="last", threads=1) as runner:
        runner.prefill([[1] * (MAX_LENGTH - 1)])
        runner.decode(np.array([2]))
        with pytest.raises(ArtifactError, match=r"64 rows, got 64 \+ 1; shorten the prompt"):
            runner.decode(np.array([3]))


def test_a_new_batch_does_not_see_the_last_one(artifact: Path) -> None:
    with open_runner(artifact, threads=1) as runner:
        first = runner.prefill([[1, 2, 3]])
        runner.prefill([[9] * 30, [8] * 30])
        np.testing.assert_array_equal(runner.prefill([[1, 2, 3]]), first)


def test_cache_is_updated_in_place(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_runner(artifact, threads=1) as runner:
        runner.prefill(RAGGED)
        runner.decode(np.array([1, 2, 3, 4]))
    assert capfd.readouterr().err == ""


def test_onnxruntime_complains_about_caches_that_are_not_shared(
    artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the test above relies on: without a shared cache ONNX Runtime does write a warning."""
    import onnxruntime

    description = Artifact.load(artifact / ARTIFACT_NAME)
    session = onnxruntime.InferenceSession(
        str(artifact / description.graphs["all"]), providers=["CPUExecutionProvider"]
    )
    feeds = {"input_ids": np.ones((1, 2), np.int64), "write_indices": np.zeros(1, np.int64)}
    feeds |= {cache.past: np.zeros(cache.shape, np.float32) for cache in description.caches(1)}
    session.run(None, feeds)
    assert "TensorScatter" in capfd.readouterr().err


def test_idle_sessions_do_not_spin(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    made: list[Any] = []
    real = onnxruntime.SessionOptions
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: made.append(real()) or made[-1])
    with open_runner(artifact, threads=2):
        assert made[0].get_session_config_entry("session.force_spinning_stop") == "1"
        assert made[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert made[0].intra_op_num_threads == 2


def test_a_session_takes_no_more_threads_than_a_container_has_time_for(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    made: list[Any] = []
    real = onnxruntime.SessionOptions
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: made.append(real()) or made[-1])
    monkeypatch.setattr(devices, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    for threads in (None, 1):
        open_runner(artifact, threads=threads).close()
    assert [options.intra_op_num_threads for options in made] == [2, 1]


# --- what is refused, and how


def feed(ids: Any, write: Any) -> Callable[[Runner], Any]:
    def run(runner: Runner) -> None:
        runner.prefill([[1, 2, 3], [4, 5, 6]])
        runner.forward(np.asarray(ids), np.asarray(write))

    return run


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (lambda r: r.decode(np.array([1])), ArtifactError, "holds no batch; call start"),
        (lambda r: r.start(0), ArtifactError, "at least one sequence, got batch_size=0"),
        (lambda r: r.prefill([]), ArtifactError, "at least one prompt"),
        (lambda r: r.prefill([[1], []]), TextError, "prompt 1 is empty"),
        (lambda r: r.prefill([[1] * 65]), ArtifactError, r"64 rows, got 0 \+ 65"),
        (lambda r: r.prefill([[1, VOCABULARY]]), TextError, r"0\.\.95, got 1\.\.96; use the tokenizer"),
        (lambda r: r.prefill([[-1, 2]]), TextError, r"got -1\.\.2"),
        (feed([[1], [2]], [3, 4]), ArtifactError, r"sequence 1: write_indices must lie in 0\.\.3 .*, got 4"),
        (feed([[1], [2]], [-1, 3]), ArtifactError, "sequence 0: write_indices must lie"),
        (feed([[1] * 62, [2] * 62], [2, 3]), ArtifactError, r"sequence 1: .* got 3 \+ 62"),
        (feed([[1]], [3]), ArtifactError, r"input_ids must be \[2, n\]"),
        (feed([1, 2], [3, 3]), ArtifactError, r"input_ids must be \[2, n\] .* got \[2\]"),
        (feed(np.ones((2, 0), np.int64), [3, 3]), ArtifactError, "n >= 1"),
        (feed([[1], [2]], [3]), ArtifactError, r"write_indices must be \[2\], got \[1\]"),
        (feed(np.ones((2, 1), np.int32), [3, 3]), ArtifactError, "must be int64, got int32"),
    ],
)
@pytest.mark.parametrize("backend", LOCAL)
def test_bad_feeds_are_refused_in_our_words(
    backend: Any, action: Any, error: type[FlapExportError], message: str, dense: Path, artifact: Path
) -> None:
    path, max_length = (artifact, None) if backend == "onnxruntime" else (dense, MAX_LENGTH)
    with open_runner(path, backend=backend, max_length=max_length) as runner, pytest.raises(error, match=message):
        action(runner)


@pytest.mark.parametrize("backend", LOCAL)
def test_a_closed_runner_is_closed(backend: Any, dense: Path, artifact: Path) -> None:
    with open_runner(artifact if backend == "onnxruntime" else dense, backend=backend) as runner:
        runner.prefill([[1]])
    with pytest.raises(ArtifactError, match="holds no batch"):
        runner.decode(np.array([1]))


def test_auto_goes_by_what_the_path_is(dense: Path, artifact: Path) -> None:
    with open_runner(dense) as on_torch, open_runner(artifact) as on_onnxruntime:
        assert (on_torch.name, on_onnxruntime.name) == ("torch", "onnxruntime")
        assert (on_onnxruntime.max_length, on_onnxruntime.vocabulary_size) == (MAX_LENGTH, VOCABULARY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "backend must be auto or one of torch, .*, got 'tvm'"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:x"}, "device must be cpu, cuda or cuda:N"),
        ({"dtype": "float16"}, "computes in float32; export it again for float16"),
        ({"max_length": 32}, "has 64 rows; export it again for 32"),
    ],
)
def test_options_the_artifact_does_not_have(options: Any, message: str, artifact: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_runner(artifact, **options)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"device": "tpu"}])
def test_options_a_checkpoint_does_not_have(options: Any, dense: Path) -> None:
    with pytest.raises(InputError, match="must be"):
        open_runner(dense, **options)


def test_artifact_is_not_a_checkpoint_nor_the_other_way_round(dense: Path, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="no exported artifact"):
        open_runner(dense, backend="onnxruntime")
    with pytest.raises(FlapExportError):
        open_runner(artifact, backend="torch")


def test_missing_onnxruntime_names_the_extra(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'flap-export\[cpu\]'"):
        open_runner(artifact)


def test_an_onnxruntime_that_computes_wrongly_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.27.2")
    with pytest.raises(MissingRequirementError, match=r"onnxruntime 1\.28 or newer, found 1\.27\.2.*--upgrade"):
        open_runner(artifact)


def test_missing_cuda_names_the_extra(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingRequirementError, match=r"pip install 'flap-export\[gpu\]'"):
        open_runner(artifact, device="cuda")


def test_float32_on_cuda_is_float32(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen: dict[str, Any] = {}

    def refusing(graph: str, options: Any, providers: Any) -> Any:
        seen.update(dict(providers))
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with pytest.raises(ArtifactError, match="no GPU"):
        open_runner(artifact, device="cuda:1")
    assert seen == {"CUDAExecutionProvider": {"device_id": 1, "use_tf32": 0}}


@pytest.mark.skipif("mixtral" not in ALL_FAMILIES, reason="transformers 4.57 keeps experts in other classes")
def test_experts_are_joined_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    import onnxruntime

    export(tiny_checkpoint("mixtral", tmp_path / "dense"), tmp_path / "onnx", max_length=20)
    seen: dict[str, bytes] = {}

    def refusing(graph: bytes, options: Any, providers: Any) -> Any:
        seen.update(graph=graph)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with pytest.raises(ArtifactError, match="no GPU"):
        open_runner(tmp_path / "onnx", device="cuda")
    assert "Scan" not in {node.op_type for node in onnx.load_from_string(seen["graph"]).graph.node}


def test_missing_cuda_on_torch(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match="no CUDA device"):
        open_runner(dense, device="cuda")


@pytest.mark.parametrize("threads", [100_000, 0, -1])
def test_threads_that_this_machine_has_no_use_for(threads: int, dense: Path) -> None:
    with pytest.raises(InputError, match=rf"threads must lie in 1\.\..* got {threads};"):
        open_runner(dense, threads=threads)


def test_bfloat16_on_the_cpu_is_missing_not_wrong(dense: Path, tmp_path: Path) -> None:
    export(dense, tmp_path / "onnx", dtype="bfloat16", max_length=16)
    with pytest.raises(MissingRequirementError, match="CPU provider does not implement bfloat16"):
        open_runner(tmp_path / "onnx")


def test_float16_artifact(dense: Path, tmp_path: Path) -> None:
    export(dense, tmp_path / "onnx", dtype="float16", max_length=16)
    with open_runner(tmp_path / "onnx", threads=1) as runner:
        logits = runner.prefill([[1, 2, 3]])
    assert logits.dtype == np.float32
    assert 1e-4 < np.abs(logits[0] - without_cache(dense, [1, 2, 3])).max() < 0.3


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_truncated_files(name: str, damaged: Path) -> None:
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"cannot open .*model\.onnx.*export it again"):
        open_runner(damaged)


def test_missing_graph(damaged: Path) -> None:
    artifact = Artifact.load(damaged / ARTIFACT_NAME)
    artifact.model_copy(update={"graphs": {"all": artifact.graphs["all"]}}).save(damaged / ARTIFACT_NAME)
    with open_runner(damaged) as runner:
        assert runner.logits == "all"
    with pytest.raises(ArtifactError, match="no graph for logits 'last'"):
        open_runner(damaged, logits="last")


def test_description_of_another_graph(damaged: Path) -> None:
    artifact = Artifact.load(damaged / ARTIFACT_NAME)
    shape = artifact.shape.model_copy(update={"layers": artifact.shape.layers[:-1]})
    artifact.model_copy(update={"shape": shape}).save(damaged / ARTIFACT_NAME)
    with pytest.raises(ArtifactError, match=r"disagree about past_key_values\.2\.key"):
        open_runner(damaged)


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ("shape", "head_dim", -1, r"shape\.head_dim: .* greater than or equal to 1"),
        ("shape", "head_dim", 10**9, r"shape\.head_dim: .* less than or equal to"),
        ("shape", "head_dim", 16, r"disagree about past_key_values\.0\.key"),
        ("shape", "vocabulary_size", 10**9, r"shape\.vocabulary_size: .* less than or equal to"),
        ("shape", "vocabulary_size", 97, "disagree about logits"),
        ("layer", "kv_heads", -1, r"shape\.layers\.0\.kv_heads: .* greater than or equal to 0"),
        ("layer", "kv_heads", 10**9, r"shape\.layers\.0\.kv_heads: .* less than or equal to"),
        ("layer", "kv_heads", 1, r"disagree about past_key_values\.0\.key"),
        ("artifact", "max_length", 0, "max_length: .* greater than or equal to 1"),
        ("artifact", "dtype", "float16", "disagree about logits, past_key_values"),
    ],
)
def test_a_description_that_is_not_of_its_graph(
    where: str, field: str, value: Any, message: str, damaged: Path
) -> None:
    record = json.loads((damaged / ARTIFACT_NAME).read_text())
    shape = record["shape"]
    {"artifact": record, "shape": shape, "layer": shape["layers"][0]}[where][field] = value
    (damaged / ARTIFACT_NAME).write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        open_runner(damaged)


def test_cache_of_another_length_fails_in_our_words(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.load(damaged / ARTIFACT_NAME)
    artifact.model_copy(update={"max_length": MAX_LENGTH + 1}).save(damaged / ARTIFACT_NAME)
    with pytest.raises(ArtifactError, match=rf"cache of {MAX_LENGTH} rows, .* says {MAX_LENGTH + 1}; export it again"):
        open_runner(damaged)
    for check in ("relaxed_graph", "_check_interface"):
        monkeypatch.setattr(f"flap_export.runners.onnxruntime_runner.{check}", lambda *_: None)
    with open_runner(damaged) as runner, pytest.raises(ArtifactError, match="ONNX Runtime failed"):
        runner.prefill([[1, 2]])


GROWING = ["llama", "mistral", "gemma2", *(f for f in ("bloom", "gpt_neo", "gpt_oss") if f in ALL_FAMILIES)]


@pytest.mark.parametrize("family", GROWING)
def test_a_growing_cache_gives_the_same_logits_as_the_artifacts_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over prefill, several growths and a ragged batch; bit for bit, but where masks hold causality.

    Rows that they hide are added as zeros, and how many there are decides about the order in which others are added.
    """
    from flap_export.runners import onnxruntime_runner

    checkpoint = tiny_checkpoint(family, tmp_path / "dense", max_position_embeddings=256)
    export(checkpoint, tmp_path / "onnx", max_length=200)
    prompts = [tokens_of(1, length, seed=length)[0].tolist() for length in (50, 61)]

    def logits_of(runner: Runner) -> list[Logits]:
        found = [runner.prefill(prompts)]
        for step in range(100):
            found.append(runner.decode(np.array([step % 80, 7], np.int64)))
        return found

    with open_runner(tmp_path / "onnx", threads=1) as growing:
        grown = logits_of(growing)
        assert isinstance(growing, onnxruntime_runner.OnnxRuntimeRunner)
        assert growing._cache is not None
        assert 161 <= growing._cache.rows <= 200
    monkeypatch.setattr(onnxruntime_runner, "relaxed_graph", lambda *_: None)
    with open_runner(tmp_path / "onnx", threads=1) as static:
        fixed = logits_of(static)
    for one, two in zip(grown, fixed, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=0 if family == "llama" else 1e-5)


@pytest.mark.parametrize(("stated", "grows"), [(200, False), (199, True)])
def test_a_graph_whose_shapes_state_the_length_keeps_its_cache(stated: int, grows: bool, tmp_path: Path) -> None:
    """As those of capped scores did."""
    import onnx

    dense = tiny_checkpoint("gemma2", tmp_path / "dense", max_position_embeddings=256)
    artifact = export(dense, tmp_path / "onnx", max_length=200)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, stated]), "target"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["input_ids", "target"], ["reshaped"]))
    onnx.save(model, tmp_path / "onnx" / "older.onnx")
    relaxed = relaxed_graph(tmp_path / "onnx" / "older.onnx", artifact)
    assert (relaxed is not None) == grows


@pytest.mark.skipif("bloom" not in ALL_FAMILIES, reason="transformers is too old")
def test_caches_grow_where_layers_see_by_different_masks(tmp_path: Path) -> None:
    """Every layer of a pruned model with ALiBi has slopes, and so a mask, of its own."""
    dense = open_checkpoint(tiny_checkpoint("bloom", tmp_path / "dense"))
    plan = plan_of(dense, [layer_plan(dense, index, [index, 3], range(9)) for index in range(2)])
    pruned = save_pruned(Path(dense.name), plan, tmp_path / "pruned", tiny_statistics(Path(dense.name), tmp_path))
    export(pruned, tmp_path / "onnx", max_length=300)
    prompts = [tokens_of(1, length, seed=length)[0].tolist() for length in (50, 61)]
    found = []
    for path in (tmp_path / "onnx", pruned):
        with open_runner(path, threads=1) as runner:
            found.append([runner.prefill(prompts), *(runner.decode(np.array([step, 7])) for step in range(8))])
    for grown, torch_logits in zip(*found, strict=True):
        np.testing.assert_allclose(grown, torch_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_agrees_on_both_backends(family: str, tmp_path: Path) -> None:
    """Ragged prompts, one longer than a window; the artifact's cache has room for more rows than are used."""
    pruned = tiny_pruned(family, tmp_path, max_position_embeddings=200)
    export(pruned, tmp_path / "onnx", max_length=130)
    prompts, steps = (*RAGGED, tuple(range(40, 52))), np.arange(10).reshape(2, 5)
    found: dict[str, Any] = {}
    for name in ("dense", "onnx"):
        path, options = (pruned, {"dtype": "float64"}) if name == "dense" else (tmp_path / "onnx", {})
        with open_runner(path, threads=1, max_length=130, **options) as runner:
            found[name] = np.stack([runner.prefill(prompts), *(runner.decode(tokens) for tokens in steps)])
    np.testing.assert_allclose(found["onnx"], found["dense"], rtol=1e-4, atol=1e-4)


# --- TensorRT's execution providers, stood in for by the CPU's


@pytest.mark.parametrize(
    ("backend", "provider", "prefix"),
    [
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider", "trt"),
        ("onnxruntime-tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "nv"),
    ],
)
def test_tensorrt_providers_get_explicit_masks_and_profiles(
    backend: Any, provider: str, prefix: str, dense: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnxruntime

    seen: dict[str, Any] = {}
    real, zeros = onnxruntime.InferenceSession, onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def on_the_cpu(graph: bytes, options: Any, providers: Any) -> Any:
        seen.update(graph=graph, provider=providers[0][0], options=providers[0][1])
        session = real(graph, options, ["CPUExecutionProvider"])
        monkeypatch.setattr(session, "get_providers", lambda: [provider])
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_shape_and_type", lambda shape, kind, *_: zeros(shape, kind, "cpu", 0)
    )
    with open_runner(dense, dtype="float64", threads=1) as reference:
        expected = [reference.prefill(RAGGED), reference.decode(np.arange(4))]
    with open_runner(artifact, backend=backend, threads=1) as runner:
        assert runner.name == backend
        found = [runner.prefill(RAGGED), runner.decode(np.arange(4))]
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-4)
    assert seen["provider"] == provider
    assert seen["options"][f"{prefix}_profile_max_shapes"].startswith("input_ids:4x64,write_indices:4,past_key_values")
    attentions = [node for node in onnx.load_from_string(seen["graph"]).graph.node if node.op_type == "Attention"]
    assert attentions
    assert all(len(node.input) == 4 and node.input[3] for node in attentions)


@pytest.mark.parametrize("backend", ["onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_a_missing_tensorrt_provider(backend: Any, artifact: Path) -> None:
    with pytest.raises(MissingRequirementError, match=r"the installed onnxruntime has no (Tensorrt|NvTensorRTRTX)"):
        open_runner(artifact, backend=backend)


# --- PyTorch with caches of a fixed length


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_static_torch_agrees_with_torch(family: str, pruned: bool, tmp_path: Path) -> None:
    """Every family, uneven too: windows, caps, partial rotary embeddings, layers without heads."""
    checkpoint = (tiny_pruned if pruned else tiny_checkpoint)(family, tmp_path / "checkpoint")
    prompts = [tokens_of(1, length, seed=length)[0].tolist() for length in (9, 3, 12)]
    steps = [np.arange(3) + step for step in range(4)]
    found = {}
    for backend in ("torch", "torch-static"):
        with open_runner(checkpoint, backend=backend, dtype="float64", threads=1, max_length=32) as runner:
            found[backend] = np.stack([runner.prefill(prompts), *(runner.decode(step) for step in steps)])
    np.testing.assert_allclose(found["torch-static"], found["torch"], rtol=0, atol=1e-9)


def test_masks_of_static_caches_are_aligned(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch copies others into aligned ones in every layer; caches hold what was asked for all the same."""
    attention, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def spied(*tensors: Any, attn_mask: Any, **options: Any) -> Any:
        seen.add(attn_mask.shape[-1])
        return attention(*tensors, attn_mask=attn_mask, **options)

    found = {}
    for backend in ("torch", "torch-static"):
        with open_runner(dense, backend=backend, threads=1, max_length=21) as runner, monkeypatch.context() as patched:
            if backend == "torch-static":
                patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
            found[backend] = [runner.prefill([[*range(13)]]), *(runner.decode(np.array([step])) for step in range(8))]
            with pytest.raises(ArtifactError, match="must not exceed the cache's 21 rows"):
                runner.decode(np.array([1]))
    assert seen == {16, 32}
    np.testing.assert_allclose(found["torch-static"], found["torch"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("by_head", [False, True], ids=["one-mask", "mask-per-head"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("tokens", [1, 5])
def test_query_heads_below_each_other_see_what_each_would(
    heads: int, kv_heads: int, tokens: int, by_head: bool
) -> None:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(3, heads, tokens, 8, generator=generator)
    key, value = torch.randn(2, 3, kv_heads, 7, 8, generator=generator)
    shown = torch.rand(3, heads if by_head else 1, tokens, 7, generator=generator)
    mask = torch.where(shown < 0.4, torch.finfo(torch.float32).min, -shown if by_head else 0.0)
    repeated = (caches.repeat_interleave(heads // kv_heads, dim=1) for caches in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(grouped_attention(query, key, value, mask, 0.7), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("max_length", "asks"), [(64, False), (65, True)])
def test_static_torch_asks_no_position_within_the_models_own(max_length: int, asks: bool, tmp_path: Path) -> None:
    """Dynamic rotary embeddings would, which ends the capture of a CUDA graph; what they compute is the same."""
    rope = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 6.0}
    checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", rope_parameters=rope)
    with open_runner(checkpoint, backend="torch-static", threads=1, max_length=max_length) as runner:
        model: Any = runner._model  # type: ignore[attr-defined]
        assert (model.model.rotary_emb.rope_type == "dynamic") == asks
        found = runner.prefill(RAGGED)
    with open_runner(checkpoint, backend="torch", threads=1) as runner:
        np.testing.assert_allclose(found, runner.prefill(RAGGED), rtol=0, atol=1e-5)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 asks the imitated device for more")
def test_a_decode_step_of_every_family_can_be_captured(tmp_path: Path) -> None:
    """But those of mixtures, which are not."""
    script, written = Path(__file__).with_name("captured_steps.py"), tmp_path / "steps.json"
    path = os.pathsep.join([str(script.parents[1]), *sys.path])
    command = [sys.executable, str(script), str(tmp_path), str(written)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    steps = json.loads(written.read_text())
    assert list(steps) == ALL_FAMILIES
    assert [family for family, step in steps.items() if not step["captured"]] == MIXTURES
    assert all("nonzero" in steps[family]["waited"] for family in MIXTURES)
    assert all(steps[family] == {"captured": True, "waited": None, "host": []} for family in PLAIN_FAMILIES)


def test_static_torch_captures_on_its_own_device(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is made for no device belongs to the current one, and takes in nothing of another."""
    seen: list[Any] = []

    class Stream:
        def __init__(self, device: Any = "the current one") -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            pass

    @contextmanager
    def entered(kind: str, what: Any) -> Iterator[None]:
        seen.append((kind, what))
        yield

    fakes = {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": object,
        "device": lambda device: entered("device", device),
        "stream": lambda stream: entered("stream", stream.device),
        "graph": lambda graph, stream=None: entered("graph", (stream or Stream()).device),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with open_runner(dense, backend="torch-static", max_length=MAX_LENGTH) as runner:
        runner._device, runner._called = torch.device("cuda:1"), lambda ids, starts, length: ids  # type: ignore[attr-defined]
        runner._captured(torch.zeros(1, 1), torch.zeros(1))  # type: ignore[attr-defined]
    assert seen == [(kind, torch.device("cuda:1")) for kind in ("device", "stream", "graph")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [12, 16], ids=["any-kernel", "fused"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3"])
def test_static_torch_replays_a_graph(family: str, size: int, dtype: Any, tmp_path: Path) -> None:
    """Of heads whose size is no multiple of 8 no fused kernel takes half precision."""
    checkpoint = tiny_pruned(family, tmp_path, head_dim=size)
    steps = [np.array([step, step + 1]) for step in range(5)]
    found = {}
    for backend, own in (("torch", "float32"), ("torch-static", dtype)):
        with open_runner(checkpoint, backend=backend, device="cuda", dtype=own, max_length=MAX_LENGTH) as runner:  # type: ignore[arg-type]
            found[backend] = np.stack([runner.prefill(RAGGED[:2]), *(runner.decode(step) for step in steps)])
    allowed = 32 * torch.finfo(getattr(torch, dtype)).eps * np.abs(found["torch"]).max()
    np.testing.assert_allclose(found["torch-static"], found["torch"], rtol=0, atol=max(allowed, 1e-3))
