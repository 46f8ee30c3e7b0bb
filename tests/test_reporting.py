from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flap_export.artifact import ARTIFACT_NAME, Artifact
from flap_export.benchmarking import LatencyReport, Measurement, PhaseLatency
from flap_export.benchmarking.machine import Machine
from flap_export.errors import InputError, PlanError
from flap_export.evaluation import QualityReport, SourceQuality
from flap_export.ideal import Phase, ideal_speedup
from flap_export.manifest import FileEntry, Manifest, note
from flap_export.plan import LayerPlan, PruningPlan, Ratio
from flap_export.precision import DtypeName
from flap_export.reporting import REPORT_NAME, formats, report
from flap_export.reporting.layers import MAXIMUM_TICKS, layer_chart
from flap_export.reporting.page import Page, page_from
from flap_export.reporting.records import altered_records, read_run
from flap_export.shapes import DecoderShape, LayerShape
from flap_export.storage import Record, digest_of_bytes, digest_of_file
from flap_export.validation import Comparison, ParityReport

DENSE_WEIGHTS, PRUNED_WEIGHTS = digest_of_bytes(b"dense"), digest_of_bytes(b"pruned")
GATES = {"maximum_perplexity_ratio": 1.25, "minimum_decode_speedup": 1.1, "minimum_prefill_speedup": 1.05}
DEMO = DecoderShape(
    hidden_size=256,
    head_dim=32,
    vocabulary_size=4096,
    ffn_matrices=3,
    tied_embeddings=True,
    layers=(LayerShape(query_heads=8, kv_heads=4, ffn_channels=704),) * 10,
)
LARGE = DecoderShape(
    hidden_size=8192,
    head_dim=128,
    vocabulary_size=128256,
    ffn_matrices=3,
    tied_embeddings=False,
    layers=(LayerShape(query_heads=64, kv_heads=8, ffn_channels=28672),) * 80,
)


def plan_of(shape: DecoderShape, *, model: str = "demo/model", reason: str | None = None) -> PruningPlan:
    """Cuts most in the last third, nothing in the first layer, and all attention of one late layer."""
    layers, count = [], len(shape.layers)
    for index, full in enumerate(shape.layers):
        depth = index / (count - 1)
        share = 0.45 * depth**1.5 * (1 + 0.25 * math.sin(5 * index))
        groups = 0 if index == count - 2 else max(1, round(full.kv_heads * (1 - share)))
        channels = round(full.ffn_channels * (1 - 0.9 * share))
        size = full.query_heads // full.kv_heads
        layers.append(
            LayerPlan(
                layer=index,
                kv_heads=tuple(range(groups)),
                query_heads=tuple(range(groups * size)),
                ffn_channels=tuple(range(channels)),
            )
        )
    draft = PruningPlan(
        model=model, family="llama", ratio=Ratio(requested=0.2, achieved=0.2), layers=tuple(layers), digests={}
    )
    achieved = 1 - draft.pruned_shape(shape, compensated=True).decoder_parameters / shape.decoder_parameters
    return draft.model_copy(
        update={
            "ratio": Ratio(requested=round(achieved, 2), achieved=achieved, reason=reason),
            "method": {
                "method": "flap",
                "metric": "wifv",
                "structure": "al-am",
                "compensation": "bias",
                "calibration": "pipelines/demo/calibration.txt.xz",
                "samples": 128,
                "sequence_length": 128,
                "seed": None,
            },
            "digests": {"weights": DENSE_WEIGHTS, "calibration": digest_of_bytes(b"calibration")},
        }
    )


def write_artifact(directory: Path, model: str, shape: DecoderShape, weights: str, dtype: DtypeName) -> str:
    directory.mkdir(parents=True)
    Artifact(
        model=model,
        family="llama",
        dtype=dtype,
        max_length=2048,
        shape=shape,
        graphs={"all": "model.onnx", "last": "model-last.onnx"},
        opset=24,
        digests={"weights": weights},
        versions={"torch": "2.13.0", "transformers": "5.23.0", "onnx": "1.23.0", "flap-export": "0.1.0"},
    ).save(directory / ARTIFACT_NAME)
    return digest_of_file(directory / ARTIFACT_NAME)


def comparison(phase: str, case: str, **fields: Any) -> Comparison:
    values = {
        "positions": 48,
        "max_abs": 3.1e-6,
        "max_rel": 2.2e-7,
        "kl": 4.4e-13,
        "top1_agreement": 1.0,
        "top1_gap": 0.0,
        "tolerance_max_abs": 2.9e-5,
        "tolerance_kl": 4.1e-10,
        "passed": True,
    }
    return Comparison(reference="torch", candidate="onnxruntime", phase=phase, case=case, **{**values, **fields})


def comparisons() -> tuple[Comparison, ...]:
    cases = ("single", "chunked", "ragged", "last")
    return tuple(comparison(phase, case) for case in cases for phase in ("prefill", "decode"))


def parity_of(found: Sequence[Comparison], reference: str = PRUNED_WEIGHTS) -> ParityReport:
    settings = {"dtype": "float32", "reference_dtype": "float64", "safety_factor": 8.0, "floor_ulps": 4.0, "seed": 0}
    return ParityReport.of(tuple(found), settings, {"reference": reference, "artifact": digest_of_bytes(b"files")})


def failed(**fields: Any) -> Comparison:
    reason = "largest error 0.0041 exceeds 2.9e-05, 8 times PyTorch's own in this precision"
    return comparison("decode", "ragged", **{"max_abs": 0.0041, "passed": False, "reason": reason, **fields})


def measurement(median_ms: float, tokens: int) -> Measurement:
    return Measurement(
        median_ms=median_ms,
        interval_ms=(median_ms * 0.98, median_ms * 1.03),
        tokens_per_s=tokens * 1000 / median_ms,
        peak_memory_bytes=412_000_000,
    )


def latency_row(phase: Phase, batch_size: int, dense_ms: float, speedup: float, ideal: float) -> PhaseLatency:
    tokens = 128 if phase == "prefill" else 1
    return PhaseLatency(
        phase=phase,
        batch_size=batch_size,
        new_tokens=tokens,
        context_length=0 if phase == "prefill" else 128,
        rounds=15,
        dense=measurement(dense_ms, tokens * batch_size),
        pruned=measurement(dense_ms / speedup, tokens * batch_size),
        speedup=speedup,
        speedup_interval=(speedup * 0.97, speedup * 1.02),
        ideal_speedup=ideal,
        efficiency=speedup / ideal,
    )


def latency_of(phases: Sequence[PhaseLatency], digests: Mapping[str, str]) -> LatencyReport:
    return LatencyReport(
        artifact="run/onnx/pruned",
        baseline="run/onnx/dense",
        backend="onnxruntime",
        device="cpu",
        dtype="float32",
        max_length=2048,
        phases=tuple(phases),
        machine=Machine(
            cpu="AMD EPYC 7B13", cores=2, system="Linux-6.1.0-x86_64-with-glibc2.36", load_average=(0.31, 0.5, 0.42)
        ),
        versions={"python": "3.12.4", "onnxruntime": "1.31.0", "numpy": "2.3.0"},
        settings={"repeats": 15, "budget_s": 120.0, "threads": None, "seed": 0, "sample_ms": 25.0},
        digests=dict(digests),
    )


def quality_of(*sources: SourceQuality) -> QualityReport:
    return QualityReport(
        model="run/onnx/pruned", sources=sources, digests={"text:heldout.txt.xz": digest_of_bytes(b"heldout")}
    )


HELD_OUT = SourceQuality(
    source="heldout.txt.xz", perplexity=35.31, dense_perplexity=31.24, tokens=65_024, contaminated=False
)
CALIBRATED_ON = SourceQuality(
    source="calibration.txt.xz", perplexity=30.02, dense_perplexity=28.7, tokens=16_256, contaminated=True
)


def fake_run(
    directory: Path, shape: DecoderShape = DEMO, *, model: str = "demo/model", dtype: DtypeName = "float32"
) -> Path:
    """A whole run that passes every gate, built from the real records; small files stand for the weights."""
    plan = plan_of(shape, model=model)
    pruned = plan.pruned_shape(shape, compensated=True)
    plan.save(directory / "plan.json")
    digests = {
        "dense.artifact": write_artifact(directory / "onnx/dense", model, shape, DENSE_WEIGHTS, dtype),
        "pruned.artifact": write_artifact(directory / "onnx/pruned", "checkpoint", pruned, PRUNED_WEIGHTS, dtype),
    }
    ideals = {
        (phase, size): ideal_speedup(shape, pruned, phase, batch_size=size, length=128, bytes_per_weight=4)
        for phase in ("prefill", "decode")
        for size in (1, 8)
    }
    slowness = shape.decoder_parameters / 8e6
    phases = [
        latency_row("prefill", 1, 14.2 * slowness, 0.93 * ideals["prefill", 1], ideals["prefill", 1]),
        latency_row("prefill", 8, 118.0 * slowness, 0.95 * ideals["prefill", 8], ideals["prefill", 8]),
        latency_row("decode", 1, 1.61 * slowness, 0.97 * ideals["decode", 1], ideals["decode", 1]),
        latency_row("decode", 8, 4.02 * slowness, 0.91 * ideals["decode", 8], ideals["decode", 8]),
    ]
    parity_of(comparisons()).save(directory / "parity.json")
    quality_of(HELD_OUT, CALIBRATED_ON).save(directory / "quality.json")
    latency_of(phases, digests).save(directory / "latency.json")
    write_manifest(directory, shape, pruned, gates=GATES)
    return directory


def write_manifest(
    directory: Path, dense: DecoderShape, pruned: DecoderShape, *, gates: Mapping[str, float | None]
) -> None:
    sizes = {"onnx/dense/model.onnx.data": dense, "onnx/pruned/model.onnx.data": pruned}
    files = {
        name: FileEntry(size_bytes=4 * (shape.decoder_parameters + shape.head_parameters), sha256="0" * 64)
        for name, shape in sizes.items()
    }
    recipe = {"model": "demo/model", "prune": {"ratio": 0.2}, "gates": dict(gates)}
    Manifest(files=files, versions={"python": "3.12.4", "torch": "2.13.0"}, recipe=recipe).save(
        directory / "manifest.json"
    )


def save_with_constants(record: Record, path: Path) -> None:
    """NaN and infinity as such, in nested values too."""
    path.write_text(json.dumps(record.model_dump()))


def page_at(directory: Path) -> Page:
    return page_from(read_run(directory, None))


class Reader(HTMLParser):
    """Collects tags, attributes and visible text, and checks that tags close in order."""

    VOID = frozenset(("meta", "br", "link", "img", "input", "circle", "path", "rect", "line"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace(formats.SPACE, " ").split())


def read_report(directory: Path) -> Reader:
    return Reader(report(directory).read_text(encoding="utf-8"))


def test_whole_run(tmp_path: Path) -> None:
    fake_run(tmp_path)
    path = report(tmp_path)
    text = Reader(path.read_text(encoding="utf-8")).text
    assert path == tmp_path / REPORT_NAME
    for heading in ("Speedup", "Perplexity", "What was pruned", "Parity", "Latency", "Provenance", "The recipe"):
        assert heading in text
    assert "Passed: parity, quality and speedup." in text
    assert "8 of 8 comparisons within tolerance." in text
    assert "31.24 → 35.31" in text
    assert "+13.0 %" in text
    assert "not run" not in text.lower()
    assert "AMD EPYC 7B13" in text
    assert DENSE_WEIGHTS[:12] in text


def test_ratio_with_its_reason(tmp_path: Path) -> None:
    fake_run(tmp_path)
    plan = plan_of(DEMO, reason="no FFN channels are left to make up for whole KV groups")
    plan = plan.model_copy(update={"ratio": plan.ratio.model_copy(update={"requested": 0.2, "achieved": 0.17125})})
    plan.save(tmp_path / "plan.json")
    text = read_report(tmp_path).text
    assert "17.12 % 20.0 % requested: no FFN channels are left" in text


@pytest.mark.parametrize(
    ("file", "headline", "command"),
    [
        ("parity.json", "The artifact was not compared with its checkpoint.", "flap-export validate"),
        ("quality.json", "Perplexity was not measured.", "flap-export run"),
        ("latency.json", "Latency was not measured.", "flap-export bench"),
    ],
)
def test_missing_part_is_not_run(tmp_path: Path, file: str, headline: str, command: str) -> None:
    fake_run(tmp_path)
    (tmp_path / file).unlink()
    text = read_report(tmp_path).text
    assert "Not known yet" in text
    assert headline in text
    assert command in text
    assert page_at(tmp_path).overall.status == "not run"


def test_nothing_but_plan_and_artifacts(tmp_path: Path) -> None:
    fake_run(tmp_path)
    for file in ("parity.json", "quality.json", "latency.json", "manifest.json"):
        (tmp_path / file).unlink()
    reader = read_report(tmp_path)
    assert "Not known yet: parity, quality and speedup not run." in reader.text
    assert reader.text.lower().count("passed") == 0
    assert "unknown → unknown" in reader.text


def test_command_quotes_the_directory(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a run; rm")
    (run / "parity.json").unlink()
    command = page_at(run).parity.command
    assert command is not None
    assert f"'{run}/onnx/pruned' --reference '{run}/checkpoint'" in command


def test_directory_name_that_is_no_text(tmp_path: Path) -> None:
    run = fake_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")))
    (run / "parity.json").unlink()
    assert "run-�" in read_report(run).text


@pytest.mark.parametrize("file", ["plan.json", "onnx/dense/artifact.json", "onnx/pruned/artifact.json"])
def test_no_run_directory(tmp_path: Path, file: str) -> None:
    fake_run(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=f"must hold {file}"):
        report(tmp_path)
    assert not (tmp_path / REPORT_NAME).exists()


def test_damaged_record_is_an_error(tmp_path: Path) -> None:
    fake_run(tmp_path)
    (tmp_path / "parity.json").write_text("{}")
    with pytest.raises(InputError, match="not a valid parity report"):
        report(tmp_path)


def test_artifact_of_another_plan(tmp_path: Path) -> None:
    fake_run(tmp_path)
    pruned = Artifact.load(tmp_path / "onnx/pruned" / ARTIFACT_NAME)
    pruned.model_copy(update={"shape": DEMO}).save(tmp_path / "onnx/pruned" / ARTIFACT_NAME)
    with pytest.raises(PlanError, match="different run"):
        report(tmp_path)


def test_parity_breach_is_visible(tmp_path: Path) -> None:
    fake_run(tmp_path)
    parity_of([*comparisons()[1:], failed()]).save(tmp_path / "parity.json")
    text = read_report(tmp_path).text
    assert "Gate breached: parity." in text
    assert "1 of 8 comparisons beyond tolerance." in text
    assert "Worst: onnxruntime against torch, decode of case 'ragged'." in text
    assert "largest error 0.0041 exceeds 2.9e-05" in text


def test_records_that_were_edited_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake_run(tmp_path)
    names = ("plan.json", "parity.json", "quality.json", "latency.json")
    artifacts = ("onnx/dense/artifact.json", "onnx/pruned/artifact.json")
    manifest = Manifest.load(tmp_path / "manifest.json")
    files = {name: FileEntry.of(tmp_path / name) for name in (*names, *artifacts)}
    manifest.model_copy(update={"files": {**manifest.files, **files}}).save(tmp_path / "manifest.json")
    assert page_at(tmp_path).altered is None
    assert 'class="altered"' not in report(tmp_path).read_text(encoding="utf-8")

    latency = (tmp_path / "latency.json").read_text()
    speedup = json.loads(latency)["phases"][0]["speedup"]
    (tmp_path / "latency.json").write_text(latency.replace(f'"speedup": {speedup}', '"speedup": 99.0', 1))
    text = read_report(tmp_path).text
    assert "99" in text
    assert "latency.json is not what was written with the rest" in text
    assert "latency.json is not what was written with the rest" in caplog.text
    # What a stage writes there is known to be its own.
    note(tmp_path / "latency.json")
    assert page_at(tmp_path).altered is None

    (tmp_path / "search").mkdir()
    (tmp_path / "alignment.json").write_text("{}")
    assert altered_records(tmp_path, ("alignment.json", "parity.json"), Manifest.load(tmp_path / "manifest.json")) == (
        "alignment.json",
    )
    assert altered_records(tmp_path, ("alignment.json",), None) == ()


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ({"passed": True}, "False and True, and are True and True"),
        ({"complete": False}, "False and True, and are False and False"),
    ],
)
def test_a_verdict_that_its_comparisons_do_not_bear_out_is_refused(
    edits: dict[str, bool], found: str, tmp_path: Path
) -> None:
    fake_run(tmp_path)
    path = tmp_path / "parity.json"
    parity_of([*comparisons()[1:], failed()]).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    with pytest.raises(InputError, match=rf"passed and complete must be what its comparisons come to, {found}"):
        report(tmp_path)
    # The remedy works: it may be replaced.
    ParityReport.check_output(path)


def test_a_report_says_whether_all_ran(tmp_path: Path) -> None:
    fake_run(tmp_path)
    path = tmp_path / "parity.json"
    skipped = comparison("prefill", "single", passed=None, reason="not run: no TensorRT")
    for found, passed, complete in (
        (comparisons(), True, True),
        ([failed()], False, True),
        ([skipped, comparison("decode", "single")], True, False),
        ([skipped], False, False),
        ([], False, False),
    ):
        parity_of(found).save(path)
        values = json.loads(path.read_text())
        assert (values["passed"], values["complete"]) == (passed, complete)
        # Files of before say it by their comparisons.
        del values["complete"]
        path.write_text(json.dumps(values))
        assert ParityReport.load(path) == parity_of(found)
    parity_of([skipped, comparison("decode", "single")]).save(path)
    assert "The check is not complete." in page_at(tmp_path).parity.notes


def test_parity_that_could_not_run(tmp_path: Path) -> None:
    fake_run(tmp_path)
    blank = {"max_abs": None, "max_rel": None, "kl": None, "top1_agreement": None, "top1_gap": None, "positions": 0}
    skipped = comparison(
        "prefill", "single", **blank, passed=None, reason="not run: no TensorRT", remedy="pip install tensorrt"
    )
    parity_of([skipped]).save(tmp_path / "parity.json")
    assert page_at(tmp_path).parity.status == "not run"
    assert "pip install tensorrt" in read_report(tmp_path).text
    parity_of([skipped, comparison("decode", "single")]).save(tmp_path / "parity.json")
    verdict = page_at(tmp_path).parity
    assert verdict.status == "passed"
    assert "1 of 2 comparisons did not run here." in verdict.notes


@pytest.mark.parametrize(
    ("gates", "name", "headline"),
    [
        ({"maximum_perplexity_ratio": 1.1}, "quality", "Perplexity +13.0 % at worst, allowed +10.0 %."),
        ({"minimum_decode_speedup": 2.0}, "speedup", "(asked 2.00×)"),
        ({"minimum_prefill_speedup": 2.0}, "speedup", "(asked 2.00×)"),
    ],
)
def test_breached_gate_is_visible(tmp_path: Path, gates: dict[str, float], name: str, headline: str) -> None:
    fake_run(tmp_path)
    write_manifest(tmp_path, DEMO, plan_of(DEMO).pruned_shape(DEMO, compensated=True), gates=gates)
    text = read_report(tmp_path).text
    assert f"Gate breached: {name}." in text
    assert headline in text


def test_gates_of_the_recipe_passed_in(tmp_path: Path) -> None:
    fake_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    without = page_at(tmp_path)
    assert (without.parity.status, without.quality.status, without.speedup.status) == ("passed", "no gate", "no gate")
    assert without.overall.text == "Passed: parity. No gate set for quality and speedup."
    given = page_from(read_run(tmp_path, {"gates": {"minimum_decode_speedup": 9.0}}))
    assert given.speedup.status == "breached"
    with pytest.raises(InputError, match=r"gates\.minimum_speed: "):
        report(tmp_path, recipe={"gates": {"minimum_speed": 9.0}})


def test_gate_on_a_phase_that_was_not_measured(tmp_path: Path) -> None:
    fake_run(tmp_path)
    latency = LatencyReport.load(tmp_path / "latency.json")
    latency.model_copy(update={"phases": latency.phases[:2]}).save(tmp_path / "latency.json")
    verdict = page_at(tmp_path).speedup
    assert verdict.status == "not run"
    assert verdict.headline.endswith("; decode not measured.")


def test_contamination_is_marked(tmp_path: Path) -> None:
    fake_run(tmp_path)
    page, text = page_at(tmp_path), read_report(tmp_path).text
    assert [row.contaminated for row in page.quality_rows] == [False, True]
    assert text.count("contaminated: also calibrated on") == 1
    quality_of(CALIBRATED_ON).save(tmp_path / "quality.json")
    assert "Contaminated: every source was also calibrated on." in page_at(tmp_path).quality.notes


def test_quality_without_the_dense_model(tmp_path: Path) -> None:
    fake_run(tmp_path)
    quality_of(HELD_OUT.model_copy(update={"dense_perplexity": None})).save(tmp_path / "quality.json")
    assert page_at(tmp_path).quality.status == "not run"
    assert "not measured → 35.31" in read_report(tmp_path).text


@pytest.mark.parametrize("file", ["parity.json", "latency.json", "quality.json"])
def test_measurements_of_another_model_do_not_count(tmp_path: Path, file: str) -> None:
    fake_run(tmp_path)
    kinds = {"parity.json": ParityReport, "latency.json": LatencyReport, "quality.json": QualityReport}
    record = kinds[file].load(tmp_path / file)
    keys = {"parity.json": "reference", "latency.json": "pruned.artifact", "quality.json": "artifact"}
    digests = {**record.digests, keys[file]: digest_of_bytes(b"another")}
    record.model_copy(update={"digests": digests}).save(tmp_path / file)
    page = page_at(tmp_path)
    assert page.overall.status == "not run"
    assert "another model" in read_report(tmp_path).text


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(tmp_path: Path, broken: float) -> None:
    fake_run(tmp_path)
    save_with_constants(quality_of(HELD_OUT.model_copy(update={"perplexity": broken})), tmp_path / "quality.json")
    save_with_constants(parity_of([failed(max_abs=broken, kl=broken), *comparisons()]), tmp_path / "parity.json")
    latency = LatencyReport.load(tmp_path / "latency.json")
    fields = {"speedup": broken, "speedup_interval": (broken, broken), "ideal_speedup": broken, "efficiency": broken}
    rows = [row.model_copy(update={**fields, "dense": measurement(broken, 1)}) for row in latency.phases]
    latency = latency.model_copy(update={"phases": (*rows[:2], *latency.phases[2:])})
    save_with_constants(latency, tmp_path / "latency.json")
    page, reader = page_at(tmp_path), read_report(tmp_path)
    assert {page.quality.status, page.parity.status, page.speedup.status} == {"breached"}
    assert {math.inf: "∞", -math.inf: "−∞"}.get(broken, "NaN") in reader.text
    for name, value in reader.attributes:
        if name in ("x", "x1", "x2", "y", "y1", "y2", "width", "height"):
            assert math.isfinite(float(value.removesuffix("%"))), (name, value)


def test_nothing_to_draw(tmp_path: Path) -> None:
    fake_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    nothing = {"speedup": math.nan, "speedup_interval": (math.nan, math.nan), "ideal_speedup": 0.0, "efficiency": 0.0}
    latency = LatencyReport.load(tmp_path / "latency.json")
    row = latency.phases[0].model_copy(update=nothing)
    save_with_constants(latency.model_copy(update={"phases": (row,)}), tmp_path / "latency.json")
    page = page_at(tmp_path)
    assert page.speed_rows[0].bar.value is None
    assert page.speed_rows[0].efficiency_interval == "NaN to NaN"
    assert page.speedup.status == "breached"
    assert "batch 1, prompt 128: no faster than dense" in read_report(tmp_path).text


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
    fake_run(tmp_path, model=attack)
    parity_of([failed(reason=attack, remedy=attack)]).save(tmp_path / "parity.json")
    quality_of(HELD_OUT.model_copy(update={"source": attack})).save(tmp_path / "quality.json")
    plan = plan_of(DEMO, model=attack, reason=attack)
    plan.model_copy(update={"method": {attack: attack}, "digests": {attack: attack}}).save(tmp_path / "plan.json")
    html = report(tmp_path, recipe={"model": attack}).read_text(encoding="utf-8")
    reader = Reader(html)
    assert "<script" not in html
    assert "<img" not in html
    assert not {"script", "img"} & reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert attack in reader.text


@pytest.mark.parametrize("shape", [DEMO, LARGE], ids=["demo", "large"])
def test_self_contained(tmp_path: Path, shape: DecoderShape) -> None:
    fake_run(tmp_path, shape)
    html = report(tmp_path).read_text(encoding="utf-8")
    reader = Reader(html)
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script|javascript:", html, re.IGNORECASE)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & reader.tags
    assert not {"src", "href", "srcset", "action", "data"} & {name for name, _ in reader.attributes}


def test_large_model(tmp_path: Path) -> None:
    fake_run(tmp_path, LARGE)
    page, reader = page_at(tmp_path), read_report(tmp_path)
    groups, channels = page.charts
    assert groups.title == "KV groups, a KV head and 8 query heads each"
    assert len(groups.columns) == len(channels.columns) == len(page.layer_rows) == 80
    assert groups.emptied == "No KV groups left in layer 78."
    assert page.figures[0].dense == f"70.6{formats.SPACE}B"
    assert "Layer 79: " in reader.text


def test_chart_geometry() -> None:
    chart = layer_chart("FFN channels", "FFN channels", [704, 352, 0], [704, 704, 704])
    assert [column.kept_px / column.dense_px for column in chart.columns] == [1.0, 0.5, 0.0]
    assert [column.is_emptied for column in chart.columns] == [False, False, True]
    ends = [column.x_percent + column.width_percent for column in chart.columns]
    assert all(end <= 100 for end in ends)
    assert [a < b.x_percent for a, b in zip(ends, chart.columns[1:], strict=False)] == [True, True]
    assert chart.summary == f"50.0{formats.SPACE}% kept: 1,056 of 2,112, 0–704 per layer"


@pytest.mark.parametrize("layers", [1, 2, 10, 11, 32, 80, 126, 1000])
def test_ticks_stay_few(layers: int) -> None:
    ticks = layer_chart("Heads", "heads", [1] * layers, [1] * layers).ticks
    assert 1 <= len(ticks) <= MAXIMUM_TICKS
    assert ticks[0].label == "0"
    assert all(0 < tick.x_percent < 100 for tick in ticks)


def test_query_heads_cut_inside_groups_have_their_own_plot(tmp_path: Path) -> None:
    fake_run(tmp_path)
    plan = plan_of(DEMO)
    first = plan.layers[0].model_copy(update={"query_heads": (0, 2, 4, 6)})
    plan = plan.model_copy(update={"layers": (first, *plan.layers[1:])})
    plan.save(tmp_path / "plan.json")
    pruned = Artifact.load(tmp_path / "onnx/pruned" / ARTIFACT_NAME)
    shape = plan.pruned_shape(DEMO, compensated=True)
    pruned.model_copy(update={"shape": shape}).save(tmp_path / "onnx/pruned" / ARTIFACT_NAME)
    assert [chart.title for chart in page_at(tmp_path).charts] == ["KV heads", "Query heads", "FFN channels"]


def test_files_on_disk_count_before_the_manifest(tmp_path: Path) -> None:
    fake_run(tmp_path)
    for name, size in (("dense", 2000), ("pruned", 1500)):
        (tmp_path / "onnx" / name / "model.onnx.data").write_bytes(b"0" * size)
        (tmp_path / "onnx" / name / "model.onnx").write_bytes(b"0" * 500)
        (tmp_path / "onnx" / name / "tokenizer.json").write_bytes(b"0" * 9999)
    files = page_at(tmp_path).figures[2]
    assert (files.dense, files.pruned) == (f"2.50{formats.SPACE}kB", f"2.00{formats.SPACE}kB")
    assert files.change == f"−20.0{formats.SPACE}%"


def test_agreement_is_never_rounded_up_to_all(tmp_path: Path) -> None:
    fake_run(tmp_path)
    parity_of([comparison("decode", "single", top1_agreement=0.99999)]).save(tmp_path / "parity.json")
    assert page_at(tmp_path).parity_rows[0].top1_agreement == f"under 100.00{formats.SPACE}%"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    fake_run(tmp_path)
    assert report(tmp_path).read_bytes() == report(tmp_path).read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (5.04, "5.04"),
        (0.00123, "0.00123"),
        (3.1e-6, "3.10 × 10⁻⁶"),
        (9.996, "10.0"),
        (-2.5, "−2.50"),
        (-3e-9, "−3.00 × 10⁻⁹"),
        (2e7, "2.00 × 10⁷"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert formats.number(value).replace(formats.SPACE, " ") == text


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (formats.byte_size(999), "999 B"),
        (formats.byte_size(999_600), "1.00 MB"),
        (formats.byte_size(41_234_567), "41.2 MB"),
        (formats.compact(70_553_706_496), "70.6 B"),
        (formats.compact(512), "512"),
        (formats.milliseconds(12_345.0), "12.3 s"),
        (formats.milliseconds(0.1234), "0.123 ms"),
        (formats.milliseconds(math.nan), "NaN ms"),
        (formats.change(2.0, 2.0), "±0.0 %"),
        (formats.change(0.0, 2.0), "NaN"),
        (formats.change(10.0, 8.0), "−20.0 %"),
        (formats.percent(0.17125, 2), "17.12 %"),
        (formats.times(1.196), "1.20×"),
        (formats.short_digest("a" * 64), "aaaaaaaaaaaa…"),
    ],
)
def test_units(formatted: str, text: str) -> None:
    assert formatted.replace(formats.SPACE, " ") == text
