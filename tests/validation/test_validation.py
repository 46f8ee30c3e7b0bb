from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import parity_models
import pytest
from tiny import ALL_FAMILIES, tiny_checkpoint

from flap_export.artifact import ARTIFACT_NAME, Artifact
from flap_export.errors import ArtifactError, GateBreachedError, InputError, MissingRequirementError
from flap_export.exporting import export
from flap_export.runners import open_runner
from flap_export.validation import ParityReport, stage, validate
from flap_export.validation import cases as cases_module
from flap_export.validation.cases import KEPT_POSITIONS, Case, build_cases, run_case
from flap_export.validation.report import Comparison, compared
from flap_export.validation.tolerance import FLOOR_ULPS, SAFETY_FACTOR, tolerance_from

MAX_LENGTH, VOCABULARY = parity_models.MAX_LENGTH, parity_models.VOCABULARY
CASES = ("single", "chunked", "ragged", "last")
BLANK = Comparison(reference="torch", candidate="onnxruntime", phase="prefill", case="single", passed=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity_models.save_dense(tmp_path_factory.mktemp("dense") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "onnx"
    export(checkpoint, path, max_length=MAX_LENGTH)
    return path


@pytest.fixture
def damaged(artifact: Path, tmp_path: Path) -> Path:
    """Without a manifest, which would tell the damage before what these tests are about is reached."""
    return Path(shutil.copytree(artifact, tmp_path / "damaged", ignore=shutil.ignore_patterns("manifest.json")))


def verdicts(report: ParityReport) -> dict[tuple[str, str], bool | None]:
    return {(comparison.phase, comparison.case): comparison.passed for comparison in report.comparisons}


def edit_weights(artifact: Path, edit: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change the float32 weights of an artifact in place."""
    weights = np.fromfile(artifact / "model.onnx.data", np.float32)
    edit(weights)
    weights.tofile(artifact / "model.onnx.data")


def edit_graph(graph_file: Path, edit: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(graph_file, load_external_data=False)
    edit(model.graph)
    graph_file.write_bytes(model.SerializeToString())


def swap_key_caches(graph: onnx.GraphProto) -> None:
    """Layers 0 and 1 read each other's past keys."""
    swapped = {"past_key_values.0.key": "past_key_values.1.key", "past_key_values.1.key": "past_key_values.0.key"}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = swapped.get(name, name)


# --- faithful artifacts


def test_a_faithful_artifact_passes_everywhere(artifact: Path, checkpoint: Path) -> None:
    report = validate(artifact, reference=checkpoint, threads=1)
    assert verdicts(report) == {(phase, case): True for phase in ("prefill", "decode") for case in CASES}
    assert report.passed
    report.raise_if_breached()
    for comparison in report.comparisons:
        assert comparison.reason is None
        assert comparison.max_abs is not None
        # Float32 against float64: neither exact nor far off.
        assert 1e-7 < comparison.max_abs < 1e-3


@pytest.mark.parametrize("kind", ["uneven", "sliding", "float16"])
def test_every_kind_of_artifact_passes(kind: str, tmp_path: Path) -> None:
    save = {
        "sliding": partial(parity_models.save_sliding, window=5),
        "uneven": parity_models.save_uneven,
        "float16": parity_models.save_dense,
    }
    reference = save[kind](tmp_path / "checkpoint")
    export(reference, tmp_path / "onnx", max_length=48, dtype="float16" if kind == "float16" else "float32")
    report = validate(tmp_path / "onnx", reference=reference, threads=1)
    report.raise_if_breached()
    assert report.settings["reference_dtype"] == ("float32" if kind == "float16" else "float64")


def test_report_is_the_documented_json(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = validate(artifact, reference=checkpoint, decode_steps=4, prompt_length=9, seed=3, threads=1)
    report.save(tmp_path / "parity.json")
    assert ParityReport.load(tmp_path / "parity.json") == report
    written = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert {"schema_version", "passed", "comparisons", "first_divergence", "digests"} <= set(written)
    assert written["first_divergence"] is None
    documented = {"reference", "candidate", "phase", "max_abs", "max_rel", "kl", "top1_agreement", "passed"}
    assert all(documented <= set(comparison) for comparison in written["comparisons"])
    assert {comparison["positions"] for comparison in written["comparisons"] if comparison["case"] == "ragged"} == {
        1 + 3 + 6 + 9,
        4 * 4,
    }
    assert written["settings"]["seed"] == 3
    assert written["settings"]["prompt_lengths"] == "1 3 6 9"


def test_digests_follow_the_files(damaged: Path, checkpoint: Path) -> None:
    options: dict[str, Any] = {"reference": checkpoint, "decode_steps": 1, "prompt_length": 2, "batch_size": 2}
    first = validate(damaged, **options)
    (damaged / "report.json").write_text("{}")
    assert validate(damaged, **options).digests == first.digests
    edit_weights(damaged, lambda weights: weights.__setitem__(0, weights[0] + 1e-7))
    assert validate(damaged, **options).digests["artifact"] != first.digests["artifact"]


def test_paths_may_be_text(artifact: Path, checkpoint: Path) -> None:
    assert validate(str(artifact), reference=str(checkpoint), decode_steps=2, prompt_length=4).passed


def test_given_prompts_are_used(artifact: Path, checkpoint: Path) -> None:
    report = validate(artifact, reference=checkpoint, prompts=[[1, 2, 3], [4]], decode_steps=2, threads=1)
    assert report.passed
    assert report.settings["prompt_lengths"] == "3 1"
    assert report.settings["seed"] is None


def test_everyone_is_fed_the_references_greedy_tokens(
    artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, Any]] = []

    def spied(runner: Any, case: Case, **options: Any) -> Any:
        trace = run_case(runner, case, **options)
        calls.append((case.name, options["forced"], trace.tokens))
        return trace

    monkeypatch.setattr("flap_export.validation.stage.run_case", spied)
    validate(artifact, reference=checkpoint, decode_steps=3, threads=1)
    own = {name: tokens for name, forced, tokens in calls if forced is None}
    assert set(own) == {"single", "chunked", "ragged"}
    assert [forced is None for _, forced, _ in calls] == [True] * 3 + [False] * 6
    for name, _, tokens in calls:
        np.testing.assert_array_equal(tokens, own[name])


# --- broken artifacts


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_one_changed_weight_is_found(position: float, damaged: Path, checkpoint: Path) -> None:
    edit_weights(damaged, lambda weights: weights.__setitem__(int(position * len(weights)), 1.0))
    report = validate(damaged, reference=checkpoint, threads=1)
    assert not report.passed
    with pytest.raises(GateBreachedError, match=r"parity: onnxruntime against torch, .* exceeds .* 8 times") as caught:
        report.raise_if_breached()
    assert caught.value.exit_code == 1
    worst = report.worst
    assert worst is not None
    assert worst.where in str(caught.value)
    assert worst.severity == max(comparison.severity for comparison in report.comparisons)


def test_a_cache_read_wrongly_is_found_where_it_is_read(damaged: Path, checkpoint: Path) -> None:
    edit_graph(damaged / "model.onnx", swap_key_caches)
    found = verdicts(validate(damaged, reference=checkpoint, threads=1))
    # The first prefill reads nothing from the cache, and the graph of the last logits is still whole.
    assert found == {
        ("prefill", "single"): True,
        ("decode", "single"): False,
        ("prefill", "chunked"): False,
        ("decode", "chunked"): False,
        ("prefill", "ragged"): True,
        ("decode", "ragged"): False,
        ("prefill", "last"): True,
        ("decode", "last"): True,
    }


def test_the_graph_of_the_last_logits_is_checked_too(damaged: Path, checkpoint: Path) -> None:
    edit_graph(damaged / "model-last.onnx", swap_key_caches)
    found = verdicts(validate(damaged, reference=checkpoint, threads=1))
    assert {key for key, passed in found.items() if not passed} == {("prefill", "last"), ("decode", "last")}


def test_the_end_of_the_cache_is_checked(artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the last cache row only must show in the case that fills the cache, and nowhere else."""
    from flap_export.runners.onnxruntime_runner import OnnxRuntimeRunner

    real = OnnxRuntimeRunner._forward

    def faulty(self: Any, input_ids: Any, write_indices: Any) -> Any:
        logits = real(self, input_ids, write_indices)
        return logits + (write_indices[0] + input_ids.shape[1] == MAX_LENGTH) * np.linspace(0, 1, VOCABULARY)

    monkeypatch.setattr(OnnxRuntimeRunner, "_forward", faulty)
    found = verdicts(validate(artifact, reference=checkpoint, decode_steps=8, prompt_length=20, threads=1))
    assert {key for key, passed in found.items() if not passed} == {("decode", "chunked")}


def test_nan_fails_and_stays_out_of_the_json(damaged: Path, checkpoint: Path, tmp_path: Path) -> None:
    edit_weights(damaged, lambda weights: weights.__setitem__(len(weights) // 2, np.nan))
    report = validate(damaged, reference=checkpoint, decode_steps=2, threads=1)
    assert set(verdicts(report).values()) == {False}
    with pytest.raises(GateBreachedError, match="of its logits are NaN or infinite"):
        report.raise_if_breached()
    report.save(tmp_path / "parity.json")
    json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)


def test_what_cannot_run_here_is_neither_passed_nor_failed(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", dtype="bfloat16", max_length=16)
    report = validate(tmp_path / "onnx", reference=checkpoint, decode_steps=2, threads=1)
    assert set(verdicts(report).values()) == {None}
    assert len(report.comparisons) == 8
    assert not report.passed
    with pytest.raises(MissingRequirementError, match=r"parity not run: .* bfloat16; to mend it: run .* --device cuda"):
        report.raise_if_breached()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends were opened and closed, in order."""
    events: list[str] = []
    real = stage.open_runner

    def noting(path: Path, **options: Any) -> Any:
        runner = real(path, **options)
        events.append(f"open {runner.name}")
        close = runner.close

        def closing() -> None:
            events.append(f"close {runner.name}")
            close()

        monkeypatch.setattr(runner, "close", closing)
        return runner

    monkeypatch.setattr(stage, "open_runner", noting)
    return events


def test_candidates_are_opened_and_closed_before_the_reference(
    artifact: Path, checkpoint: Path, opened: list[str]
) -> None:
    assert validate(artifact, reference=checkpoint, decode_steps=2, threads=1).passed
    before = opened[: opened.index("open torch")]
    assert before == ["open onnxruntime", "close onnxruntime"] * 2
    assert opened[1::2] == [event.replace("open", "close") for event in opened[::2]], "two models at once"


def test_a_damaged_graph_is_known_before_the_reference_runs(damaged: Path, checkpoint: Path, opened: list[str]) -> None:
    whole = (damaged / "model-last.onnx").read_bytes()
    (damaged / "model-last.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"model-last\.onnx"):
        validate(damaged, reference=checkpoint)
    assert "open torch" not in opened


def test_nothing_is_computed_where_no_candidate_runs(checkpoint: Path, tmp_path: Path, opened: list[str]) -> None:
    export(checkpoint, tmp_path / "onnx", dtype="bfloat16", max_length=16)
    assert len(validate(tmp_path / "onnx", reference=checkpoint, decode_steps=2).comparisons) == 8
    assert opened == []


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(1025, "batch_size must be at most 1024"), (1000, r"1000 sequences .* smaller batch_size")],
)
def test_a_batch_that_no_machine_holds_is_refused(
    batch_size: int, message: str, artifact: Path, checkpoint: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases_module, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(InputError, match=message):
        validate(artifact, reference=checkpoint, batch_size=batch_size)
    assert opened == []


def test_a_cache_that_no_machine_holds_is_refused(damaged: Path, checkpoint: Path) -> None:
    record = json.loads((damaged / ARTIFACT_NAME).read_text())
    (damaged / ARTIFACT_NAME).write_text(json.dumps({**record, "max_length": 10**12}))
    with pytest.raises(InputError, match="1 sequences of 1000000000000 tokens"):
        validate(damaged, reference=checkpoint)


def test_another_checkpoint_is_refused(artifact: Path, tmp_path: Path) -> None:
    wider = parity_models.save_dense(tmp_path / "wider", vocab_size=VOCABULARY + 1)
    with pytest.raises(ArtifactError, match="vocabulary_size is 96 in the artifact and 97 in the checkpoint"):
        validate(artifact, reference=wider)
    shallower = parity_models.save_dense(tmp_path / "shallower", num_hidden_layers=2)
    with pytest.raises(ArtifactError, match="the artifact has 3 layers and the checkpoint 2"):
        validate(artifact, reference=shallower)
    pruned = parity_models.save_uneven(tmp_path / "pruned")
    with pytest.raises(ArtifactError, match=r"layer 0 is \(query_heads=4 .* and \(query_heads=0 .*exported from"):
        validate(artifact, reference=pruned)


@pytest.mark.skipif("mixtral" not in ALL_FAMILIES, reason="transformers is too old")
def test_an_artifact_that_does_not_say_how_many_experts_are_chosen_is_of_its_checkpoint(tmp_path: Path) -> None:
    """Artifacts of earlier versions do not; one that says another number is another model's."""
    mixture = tiny_checkpoint("mixtral", tmp_path / "mixtral")
    export(mixture, tmp_path / "onnx", max_length=40)
    (tmp_path / "onnx" / "manifest.json").unlink()
    description = json.loads((tmp_path / "onnx" / ARTIFACT_NAME).read_text())
    del description["shape"]["experts_per_token"]
    (tmp_path / "onnx" / ARTIFACT_NAME).write_text(json.dumps(description))
    assert validate(tmp_path / "onnx", reference=mixture, decode_steps=2, threads=1).passed
    description["shape"]["experts_per_token"] = 1
    (tmp_path / "onnx" / ARTIFACT_NAME).write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match="experts_per_token is 1 in the artifact and 2 in the checkpoint"):
        validate(tmp_path / "onnx", reference=mixture)


def test_an_artifact_without_the_last_graph_is_compared_without_it(damaged: Path, checkpoint: Path) -> None:
    description = Artifact.load(damaged / ARTIFACT_NAME)
    description.model_copy(update={"graphs": {"all": "model.onnx"}}).save(damaged / ARTIFACT_NAME)
    report = validate(damaged, reference=checkpoint, decode_steps=2, threads=1)
    assert report.passed
    assert {comparison.case for comparison in report.comparisons} == {"single", "chunked", "ragged"}


# --- the rule


def logits_with(error: float, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Reference [50, 20] of scale 4, and the same with one logit of each position off by `error`."""
    reference = np.random.default_rng(seed).uniform(-4, 4, (50, 20))
    reference[0, 0] = 4.0
    other = reference.copy()
    other[:, 1] += error
    return reference, other


def test_bound_is_a_multiple_of_the_yardsticks_error() -> None:
    reference, yardstick = logits_with(1e-3)
    tolerance = tolerance_from(reference, yardstick, "float32")
    assert tolerance.max_abs == pytest.approx(SAFETY_FACTOR * 1e-3)
    kl = compared(BLANK, reference, yardstick, yardstick, "float32").kl
    assert kl is not None
    assert tolerance.kl == pytest.approx(SAFETY_FACTOR * kl)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_perfect_yardstick_leaves_a_floor(dtype: Any) -> None:
    reference, _ = logits_with(0.0)
    epsilon = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    floor = tolerance_from(reference, reference, dtype)
    assert floor.max_abs == pytest.approx(FLOOR_ULPS * epsilon * 4.0)
    assert floor.kl == pytest.approx(floor.max_abs**2 / 2)
    good, bad = (compared(BLANK, reference, reference, logits_with(f * floor.max_abs)[1], dtype) for f in (0.9, 1.1))
    assert (good.passed, bad.passed) == (True, False)


def test_largest_error_beyond_the_bound_fails() -> None:
    reference, yardstick = logits_with(1e-3)
    candidate = reference.copy()
    candidate[7, 3] += 9e-3
    found = compared(BLANK, reference, yardstick, candidate, "float32")
    assert found.passed is False
    assert found.reason is not None
    assert found.reason.startswith("largest error 0.009 exceeds 0.008")
    candidate[7, 3] = reference[7, 3] + 7e-3
    assert compared(BLANK, reference, yardstick, candidate, "float32").passed is True


def test_divergence_beyond_the_bound_fails_alone() -> None:
    reference, yardstick = logits_with(1e-3)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], reference.shape)
    found = compared(BLANK, reference, yardstick, reference + 7e-3 * signs, "float32")
    assert found.passed is False
    assert found.reason is not None
    assert found.reason.startswith("KL divergence")


def test_another_top_token_is_allowed_only_between_near_equals() -> None:
    reference, yardstick = np.zeros((1, 4)), np.zeros((1, 4))
    reference[0] = [10.0, 9.99, 0.0, 0.0]
    yardstick[0] = [10.0, 9.99, 0.0, 2e-3]
    found = compared(BLANK, reference, yardstick, np.array([[9.994, 9.996, 0.0, 0.0]]), "float32")
    assert (found.top1_agreement, found.top1_gap) == (0.0, pytest.approx(0.01))
    assert found.reason is None or "most likely token" not in found.reason
    reference[0, 1] = yardstick[0, 1] = 9.97
    found = compared(BLANK, reference, yardstick, np.array([[9.9845, 9.9855, 0.0, 0.0]]), "float32")
    assert found.reason is not None
    assert "gap to another most likely token 0.03 exceeds" in found.reason


def test_a_yardstick_that_overflowed_says_so() -> None:
    reference, yardstick = logits_with(1e-3)
    yardstick[0, 0] = np.inf
    found = compared(BLANK, reference, yardstick, reference, "float16")
    assert found.passed is False
    assert found.reason is not None
    assert "1 of PyTorch's own logits in float16 are NaN or infinite" in found.reason


def test_report_needs_something_that_passed() -> None:
    passed, failed, not_run = (BLANK.model_copy(update={"passed": verdict}) for verdict in (True, False, None))
    assert ParityReport.of((passed, not_run), {}, {}).passed
    assert not ParityReport.of((passed, failed, not_run), {}, {}).passed
    assert not ParityReport.of((not_run,), {}, {}).passed
    assert not ParityReport.of((), {}, {}).passed
    with pytest.raises(MissingRequirementError, match="no backend was named"):
        ParityReport.of((), {}, {}).raise_if_breached()


# --- the cases


def cases(**changes: Any) -> tuple[Case, Case, Case]:
    options = {
        "max_length": 64,
        "vocabulary_size": VOCABULARY,
        "decode_steps": 32,
        "prompt_length": None,
        "batch_size": 4,
        "seed": 0,
        "prompts": None,
    }
    return build_cases(**{**options, **changes})


def test_cases_cover_the_cache_and_are_seeded() -> None:
    single, chunked, ragged = cases()
    assert [len(prompt) for prompt in ragged.prompts] == [1, 11, 21, 32]
    assert single.prompts == (ragged.prompts[-1],)
    assert len(chunked.prompts[0]) == sum(chunked.chunk_sizes) == 64 - 32
    assert len(set(chunked.chunk_sizes)) == 3
    assert cases() == (single, chunked, ragged)
    assert cases(seed=1) != (single, chunked, ragged)
    assert [len(prompt) for prompt in cases(max_length=1000)[2].prompts] == [1, 22, 43, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_steps": 63}, r"decode_steps must lie in 1\.\.62 for a cache of 64 rows, got 63"),
        ({"decode_steps": 0}, r"decode_steps must lie in 1\.\."),
        ({"prompt_length": 33}, "must leave room for the decode steps, 32 tokens, got 33"),
        ({"batch_size": -1}, r"different lengths.*got lengths \[\]"),
        ({"batch_size": 1}, r"different lengths.*got lengths \[1\]"),
        ({"prompts": [[1, 2], [3, 4]]}, r"different lengths.*got lengths \[2, 2\]"),
        ({"prompts": [[1, 2], []]}, "none of them empty"),
        ({"prompts": []}, r"got lengths \[\]"),
    ],
)
def test_cases_that_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cases(**changes)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"seed must lie in 0\..* got -1"):
        cases(seed=-1)


def test_a_trace_holds_every_real_position_once(checkpoint: Path) -> None:
    """Chunked and ragged traces against one prompt at a time."""
    prompts = ((1, 2, 3, 4, 5), (6, 7))
    with open_runner(checkpoint, dtype="float64", threads=1) as runner:
        ragged = run_case(runner, Case("ragged", prompts, (3, 2)), decode_steps=3, forced=None)
        alone = [
            run_case(runner, Case("single", (prompt,), (len(prompt),)), decode_steps=3, forced=None)
            for prompt in prompts
        ]
    assert ragged.prefill.shape == (7, VOCABULARY)
    expected = np.concatenate([trace.prefill for trace in alone])
    for position in expected:
        assert np.isclose(ragged.prefill, position, rtol=0, atol=1e-12).all(-1).sum() == 1
    np.testing.assert_allclose(ragged.last, np.concatenate([trace.last for trace in alone]), rtol=0, atol=1e-12)
    assert ragged.tokens.tolist() == np.concatenate([trace.tokens for trace in alone], axis=1).tolist()
    decoded = ragged.decode.reshape(3, 2, VOCABULARY)
    for row, trace in enumerate(alone):
        np.testing.assert_allclose(decoded[:, row], trace.decode, rtol=0, atol=1e-12)


def test_long_passes_are_thinned_evenly() -> None:
    from flap_export.validation.cases import _thinned

    short, long = np.arange(10.0)[:, None], np.arange(5000.0)[:, None]
    assert _thinned(short) is short
    kept = _thinned(long)[:, 0]
    assert (len(kept), kept[0], kept[-1]) == (KEPT_POSITIONS, 0, 4999)
    assert set(np.diff(kept)) == {9, 10}
