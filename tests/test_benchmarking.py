"""`flap_export.benchmarking`: what it computes, how it samples, and what happens when a worker fails.

No test here depends on how long anything takes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flap_export.artifact import ARTIFACT_NAME, load_artifact
from flap_export.benchmarking import LatencyReport, PhaseLatency, bench
from flap_export.benchmarking import worker as worker_module
from flap_export.benchmarking.machine import peak_memory_bytes, reset_peak_memory, this_machine
from flap_export.benchmarking.report import phase_latency
from flap_export.benchmarking.rounds import INTERVAL_ROUNDS, round_orders, take_rounds
from flap_export.benchmarking.statistics import median_interval, ratio_interval, ratio_of_medians
from flap_export.benchmarking.worker import Sample, Worker, WorkerOptions
from flap_export.benchmarking.workload import Workload, prepared_call
from flap_export.errors import ArtifactError, FlapExportError, GateBreachedError, InputError, MissingRequirementError
from flap_export.exporting import export
from flap_export.ideal import ideal_speedup
from flap_export.manifest import write_manifest
from flap_export.prediction import expected_ms
from flap_export.runners import open_runner

OPTIONS = WorkerOptions(device="cpu", threads=1, seed=0)
DECODE = Workload("decode", 2, 5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense Llama and one with half its FFN."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, ffn_channels in (("dense", 64), ("pruned", 32)):
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=ffn_channels,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            max_position_embeddings=64,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / name)
    return {"dense": root / "dense", "pruned": root / "pruned"}


@pytest.fixture(scope="module")
def dense(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "dense"
    export(checkpoints["dense"], path, max_length=32)
    return path


@pytest.fixture(scope="module")
def pruned(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "pruned"
    export(checkpoints["pruned"], path, max_length=32)
    return path


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    """What `report` was told of its progress."""
    return []


@pytest.fixture(scope="module")
def report(dense: Path, pruned: Path, told: list[tuple[str, int, int]]) -> LatencyReport:
    return bench(
        pruned,
        baseline=dense,
        batch_sizes=(1, 2),
        prompt_lengths=(4, 8),
        repeats=3,
        budget_s=5.0,
        threads=1,
        progress=lambda *step: told.append(step),
    )


@pytest.fixture
def worker(dense: Path) -> Iterator[Worker]:
    with Worker(dense, OPTIONS) as worker:
        assert worker.backend() == "onnxruntime"
        yield worker


def has_ended(process_id: int) -> bool:
    """Whether neither the process nor its zombie is there."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    return False


# statistics


def test_the_interval_of_ten_samples_leaves_out_one_on_each_side() -> None:
    """P(Binomial(10, 1/2) < 2) = 11 / 1024 = 1.1 %, but P(... < 3) = 5.5 %."""
    assert median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5, 10]) == (2, 9)


def test_the_interval_of_few_samples_is_their_range() -> None:
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([5, 3, 4]) == (3, 5)


def test_the_interval_covers_the_median_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = median_interval(generator.exponential(size=25))
        covered += low <= np.log(2) <= high
    assert 940 <= covered <= 985


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(0, 5))
def test_the_intervals_hold_their_medians(samples: list[float], seed: int) -> None:
    low, high = median_interval(samples)
    assert min(samples) <= low <= np.median(samples) <= high <= max(samples)
    doubled = [2 * sample for sample in samples]
    assert ratio_interval(doubled, samples, seed=seed) == (2, 2)
    assert ratio_of_medians(doubled, samples) == 2


def test_noise_that_hits_both_sides_of_a_round_stays_out_of_the_ratio() -> None:
    noise = np.random.default_rng(0).exponential(size=20) + 1
    other = np.random.default_rng(1).exponential(size=20) + 1
    paired, unpaired = (ratio_interval(3 * noise, below, seed=0) for below in (noise, other))
    assert paired == pytest.approx((3, 3))
    assert unpaired[1] - unpaired[0] > 0.5


def test_the_interval_of_the_speedup_covers_it_after_the_fewest_rounds() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        dense, pruned = np.exp(generator.normal(0, 0.1, size=(2, INTERVAL_ROUNDS)))
        low, high = ratio_interval(dense, pruned, seed=seed)
        covered += low <= 1 <= high
    assert 360 <= covered <= 395


# rounds


def test_rounds_come_in_opposite_pairs() -> None:
    orders = list(round_orders(3, 100, random.Random(0)))
    assert len(orders) == 100
    assert all(first == second[::-1] for first, second in zip(orders[::2], orders[1::2], strict=True))
    assert {tuple(order) for order in orders} == set(itertools.permutations(range(3)))
    assert len(list(round_orders(2, 3, random.Random(0)))) == 3


class Recorder:
    """A worker that notes what it is asked and answers at once."""

    def __init__(self, name: str, call_ms: float, log: list[tuple[str, int]]) -> None:
        self.name, self.call_ms, self.log = name, call_ms, log

    def prepare(self, workload: Workload) -> Sample:
        return Sample(self.call_ms, None)

    def measure(self, calls: int) -> Sample:
        self.log.append((self.name, calls))
        return Sample(self.call_ms, 1)


def test_short_calls_are_repeated_within_a_sample() -> None:
    log: list[tuple[str, int]] = []
    fast, slow = Recorder("pruned", 0.5, log), Recorder("dense", 400.0, log)
    dense, pruned = take_rounds((slow, fast), DECODE, repeats=4, budget_s=60.0, draw=random.Random(0))
    assert sorted(log) == [("dense", 1)] * 4 + [("pruned", 50)] * 4
    assert [sample.call_ms for sample in dense] == [400.0] * 4
    assert [sample.call_ms for sample in pruned] == [0.5] * 4
    assert all(first[0] != second[0] for first, second in zip(log[::2], log[1::2], strict=True))


def test_a_spent_budget_ends_the_rounds_but_not_before_their_interval_covers_95_percent() -> None:
    log: list[tuple[str, int]] = []
    workers = Recorder("dense", 1.0, log), Recorder("pruned", 1.0, log)
    samples = take_rounds(workers, DECODE, repeats=50, budget_s=0.0, draw=random.Random(0))
    assert [len(taken) for taken in samples] == [INTERVAL_ROUNDS] * 2


# what is timed


def test_a_sample_begins_with_a_call_that_is_not_timed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a turn of the other candidate caches are cold."""
    requests = iter([DECODE, 3])
    answers: list[Any] = []
    calls: list[str] = []
    connection: Any = SimpleNamespace(recv=lambda: next(requests), send=answers.append)
    monkeypatch.setattr(worker_module, "prepared_call", lambda *_: lambda: calls.append("called"))
    monkeypatch.setattr(worker_module, "timed_ms", lambda call, count: calls.append(f"timed {count}") or 1.0)
    with pytest.raises(StopIteration):
        worker_module._answer_requests(connection, dense, OPTIONS)
    assert calls == ["called", "called", "timed 1", "called", "timed 3"]
    assert [type(answer) for answer in answers] == [str, Sample, Sample]


def test_every_decode_step_has_the_same_context(dense: Path) -> None:
    with open_runner(dense, logits="last") as runner:
        call = prepared_call(runner, DECODE, seed=3)
        first, second = call(), call()
        assert runner.lengths.tolist() == [6, 6]
    np.testing.assert_array_equal(first, second)


def test_decoding_has_the_cache_filled_with_its_context(dense: Path) -> None:
    """The same tokens in one prefill give the same logits as the last step over the filled cache."""
    tokens = np.random.default_rng(3).integers(0, 64, (2, 6), dtype=np.int64)
    with open_runner(dense, logits="last") as runner:
        step = prepared_call(runner, DECODE, seed=3)()
        runner.start(2)
        whole = runner.forward(tokens, np.zeros(2, np.int64))
    np.testing.assert_allclose(step, whole, atol=1e-5)


# workers


def test_a_worker_prepares_and_measures(worker: Worker) -> None:
    warm, sample = worker.prepare(DECODE), worker.measure(3)
    assert warm.call_ms > 0
    assert sample.call_ms > 0


def test_a_worker_ends_with_its_block(dense: Path) -> None:
    with Worker(dense, OPTIONS) as worker:
        worker.backend()
    assert has_ended(worker.process_id)


def test_a_killed_worker_is_an_error_that_names_memory(worker: Worker) -> None:
    worker.prepare(DECODE)
    os.kill(worker.process_id, signal.SIGKILL)
    with pytest.raises(FlapExportError, match=r"SIGKILL.*memory"):
        worker.measure(1)
    assert has_ended(worker.process_id)


def test_a_worker_killed_before_it_is_asked_is_an_error_too(dense: Path) -> None:
    with Worker(dense, OPTIONS) as worker:
        os.kill(worker.process_id, signal.SIGTERM)
        with pytest.raises(FlapExportError, match="SIGTERM"):
            worker.backend()


def test_a_worker_in_the_middle_of_something_is_ended_on_an_error(dense: Path) -> None:
    with pytest.raises(ZeroDivisionError), Worker(dense, OPTIONS) as worker:
        raise ZeroDivisionError
    assert has_ended(worker.process_id)


def test_the_workers_own_error_arrives_as_it_was(dense: Path, tmp_path: Path) -> None:
    with Worker(tmp_path, OPTIONS) as worker, pytest.raises(FlapExportError, match="holds no config"):
        worker.backend()
    cuda = WorkerOptions(device="cuda:7", threads=None, seed=0)
    with Worker(dense, cuda) as worker, pytest.raises(MissingRequirementError) as caught:
        worker.backend()
    assert caught.value.remedy in str(caught.value)
    assert caught.value.exit_code == 3


def test_what_nobody_foresaw_arrives_and_the_worker_says_where_it_happened(
    dense: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Worker(dense, OPTIONS) as worker:
        worker.backend()
        with pytest.raises(FlapExportError, match=f"measuring '{dense}' failed with AssertionError: a workload has to"):
            worker.measure(1)
    assert "in _answer_requests" in capfd.readouterr().err


def test_a_failing_call_is_an_error_that_names_the_artifact(worker: Worker) -> None:
    with pytest.raises(ArtifactError, match="max-length"):
        worker.prepare(Workload("prefill", 1, 1000))


def test_only_the_artifact_counts_as_the_workers_memory(worker: Worker) -> None:
    """This process has torch and transformers loaded, the worker has not."""
    peak, own = worker.prepare(DECODE).peak_memory_bytes, peak_memory_bytes()
    if peak is None or own is None:
        pytest.skip("the system does not tell a process its peak memory")
    assert peak < own / 2


def test_peak_memory_begins_anew() -> None:
    if not reset_peak_memory() or peak_memory_bytes() is None:
        pytest.skip("the system does not let a process reset its peak memory")
    array = np.ones(1 << 25)
    high = peak_memory_bytes()
    del array
    reset_peak_memory()
    low = peak_memory_bytes()
    assert high is not None
    assert low is not None
    assert high - low > 1 << 27


# the report


def samples(*call_ms: float) -> tuple[Sample, ...]:
    return tuple(Sample(time, 100 + index) for index, time in enumerate(call_ms))


def latency() -> PhaseLatency:
    return phase_latency(DECODE, samples(8, 6, 7), samples(4, 3, 3.5), ideal=2.5, seed=0)


def test_numbers_of_a_phase() -> None:
    found = latency()
    assert (found.new_tokens, found.context_length, found.rounds) == (1, 5, 3)
    assert found.dense.median_ms == 7
    assert found.dense.interval_ms == (6, 8)
    assert found.pruned.tokens_per_s == pytest.approx(2 * 1000 / 3.5)
    assert found.pruned.peak_memory_bytes == 102
    assert found.speedup == 2
    assert found.speedup_interval == (2, 2)
    assert found.efficiency == pytest.approx(0.8)


def test_unknown_memory_is_none() -> None:
    unknown = tuple(Sample(1.0, None) for _ in range(3))
    assert phase_latency(DECODE, unknown, unknown, ideal=1.0, seed=0).dense.peak_memory_bytes is None


def test_the_report_covers_every_shape(report: LatencyReport) -> None:
    shapes = [(found.phase, found.batch_size, found.new_tokens, found.context_length) for found in report.phases]
    assert shapes == [
        ("prefill", 1, 4, 0),
        ("prefill", 1, 8, 0),
        ("prefill", 2, 4, 0),
        ("prefill", 2, 8, 0),
        ("decode", 1, 1, 8),
        ("decode", 2, 1, 8),
    ]
    assert all(found.rounds == 3 for found in report.phases)
    assert (report.backend, report.dtype, report.max_length) == ("onnxruntime", "float32", 32)
    assert report.machine.cores == this_machine().cores
    assert set(report.digests) == {"dense.artifact", "dense.weights", "pruned.artifact", "pruned.weights"}


def test_progress_is_told_by_phases_and_shapes(report: LatencyReport, told: list[tuple[str, int, int]]) -> None:
    assert told == [("measurements", done, len(report.phases)) for done in range(len(report.phases) + 1)]


def test_the_ideal_is_that_of_the_artifacts_shapes(report: LatencyReport, dense: Path, pruned: Path) -> None:
    from flap_export.artifact import load_artifact

    shapes = load_artifact(dense).shape, load_artifact(pruned).shape
    expected = ideal_speedup(*shapes, "decode", batch_size=2, length=8, bytes_per_weight=4)
    assert report.phases[-1].ideal_speedup == expected > 1


def test_the_report_survives_its_file(report: LatencyReport, tmp_path: Path) -> None:
    report.save(tmp_path / "latency.json")
    assert LatencyReport.load(tmp_path / "latency.json") == report
    written = json.loads((tmp_path / "latency.json").read_text())["phases"][0]
    assert {"median_ms", "interval_ms", "tokens_per_s", "peak_memory_bytes"} == set(written["dense"])
    assert {"speedup", "ideal_speedup", "efficiency", "dense", "pruned"} < set(written)


def test_a_gate_names_itself_and_what_was_too_slow(report: LatencyReport) -> None:
    slow = report.model_copy(update={"phases": (latency(),)})
    slow.raise_if_slower(2.0)
    slow.raise_if_slower(9.0, phase="prefill")
    with pytest.raises(GateBreachedError, match=r"decode, batch 2, context 5: 2\.00x") as caught:
        slow.raise_if_slower(2.01)
    assert caught.value.gate == "speedup"
    assert caught.value.exit_code == 1


def test_artifacts_of_different_cache_length_are_refused(
    checkpoints: dict[str, Path], dense: Path, tmp_path: Path
) -> None:
    export(checkpoints["pruned"], tmp_path / "longer", max_length=40)
    with pytest.raises(ArtifactError, match=r"same max_length.*--max-length 32"):
        bench(tmp_path / "longer", baseline=dense)


def test_artifacts_of_different_dtype_are_refused(pruned: Path, dense: Path, tmp_path: Path) -> None:
    half = json.loads((pruned / ARTIFACT_NAME).read_text()) | {"dtype": "float16"}
    for file in pruned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / ARTIFACT_NAME).write_text(json.dumps(half))
    write_manifest(tmp_path, digests={})
    with pytest.raises(ArtifactError, match=r"same dtype.*--dtype float32"):
        bench(tmp_path, baseline=dense)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"phases": ("training",)}, InputError, "prefill, decode, got training"),
        ({"phases": ()}, InputError, "nothing to measure"),
        ({"repeats": 2}, InputError, "at least 3"),
        ({"budget_s": 0.0}, InputError, "must be positive"),
        ({"batch_sizes": (0,)}, InputError, "must be positive"),
        ({"prompt_lengths": (33,)}, ArtifactError, "cache of 32 rows and needs 33"),
        ({"phases": ("decode",), "context_length": 32}, ArtifactError, "cache of 32 rows and needs 33"),
    ],
)
def test_requests_out_of_range(
    pruned: Path, dense: Path, request_: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bench(pruned, baseline=dense, **request_)  # type: ignore[arg-type]


# beside what was predicted


def test_the_prediction_for_a_named_gpu_stands_beside_the_measurement(dense: Path, pruned: Path) -> None:
    found = bench(pruned, baseline=dense, phases=("decode",), prompt_lengths=(4,), repeats=3, budget_s=0.1, gpu="h200")
    shapes = [load_artifact(path).shape for path in (dense, pruned)]
    expected = tuple(expected_ms(shape, "decode", 1, 4, gpu="h200", dtype="float32") for shape in shapes)
    assert found.phases[0].predicted_ms == pytest.approx(expected)
    assert expected[0] > expected[1]


def test_an_unknown_gpu_is_refused_before_anything_runs(dense: Path, pruned: Path) -> None:
    with pytest.raises(InputError, match="gpu must be one of"):
        bench(pruned, baseline=dense, gpu="abacus")
