"""Engines behind the runner interface, on a stand-in for the device; on a real one where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parity_models
import pytest
import torch
from fake_tensorrt import FakeTorch, fake_tensorrt

from flap_export.building import ENGINE_NAME, EngineRecord, build, flavours, load_engine
from flap_export.errors import ArtifactError, InputError, MissingRequirementError
from flap_export.exporting import export
from flap_export.generation import generate
from flap_export.manifest import write_manifest
from flap_export.runners import open_runner, tensorrt_session
from flap_export.runners.sampling import Sampling, sampled
from flap_export.validation import validate

pytest.importorskip("tensorrt_rtx", reason="pip install 'flap-export[tensorrt-rtx]'")
pytestmark = pytest.mark.tensorrt

MAX_LENGTH, VOCABULARY = parity_models.MAX_LENGTH, parity_models.VOCABULARY
RAGGED = ((5, 6, 7), (11,), (21, 22, 23, 24, 25, 26, 27), (31, 32, 33))


class Built:
    """A checkpoint, its artifact and its engines, which take prompts of 16 tokens at most."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = parity_models.save_uneven(folder / "checkpoint")
        self.artifact, self.engine = folder / "onnx", folder / "engine"
        export(self.checkpoint, self.artifact, max_length=MAX_LENGTH)
        self.record = build(
            self.artifact, self.engine, backend="tensorrt-rtx", targets=["sm80"], logits="both", max_prompt=16
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("built"))


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def device(request: Any, built: Built, monkeypatch: Any) -> Any:
    """The stand-in, as either flavour."""
    flavour: Any = request.param
    faked = FakeTorch()
    trt = fake_tensorrt(built.record, built.artifact, faked.cuda)
    monkeypatch.setattr(tensorrt_session, "import_tensorrt", lambda wanted: trt)
    monkeypatch.setattr(tensorrt_session, "_torch_with_gpu", lambda device: faked)
    record = built.record.model_copy(update={"flavour": flavour})
    rewrite(built, record)
    trt.flavour, trt.cuda = flavour, faked.cuda
    return trt


def rewrite(built: Built, record: EngineRecord) -> None:
    """Have engines described otherwise, as if they had been built so."""
    record.save(built.engine / ENGINE_NAME)
    write_manifest(built.engine, digests={})


def open_engine(built: Built, **options: Any) -> Any:
    return open_runner(built.engine, **options)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("prompts", [RAGGED, RAGGED[:1], (RAGGED[0], RAGGED[3])])
def test_it_agrees_with_torch(logits: Any, prompts: Any, built: Built, device: Any) -> None:
    tokens = [np.arange(len(prompts)) + step for step in range(4)]
    with open_runner(built.checkpoint, dtype="float64", threads=1) as reference:
        expected = [reference.prefill(prompts), *(reference.decode(step) for step in tokens)]
    with open_engine(built, logits=logits) as runner:
        assert runner.name == device.flavour
        found = [runner.prefill(prompts), *(runner.decode(step) for step in tokens)]
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("logits", ["all", "last"])
def test_long_prompts_are_fed_in_pieces(logits: Any, built: Built, device: Any) -> None:
    """41 tokens of one prefill of 16 at most: two whole pieces and one of nine."""
    prompts = [[*range(1, 42)], [*range(41, 0, -1)]]
    with open_runner(built.artifact, logits=logits, threads=1) as reference:
        expected = reference.prefill(prompts)
    with open_engine(built, logits=logits) as runner:
        np.testing.assert_allclose(runner.prefill(prompts), expected, rtol=0, atol=1e-4)
        assert device.opened[-1].runs == 3
        whole = runner.forward(np.array(prompts), np.zeros(2, np.int64))
        assert whole.shape == (2, 41 if logits == "all" else 1, VOCABULARY)


def test_a_decode_step_is_captured_once_and_replayed(built: Built, device: Any) -> None:
    with open_engine(built, logits="last") as runner:
        for _ in range(2):
            runner.prefill(RAGGED[:2])
            for step in range(4):
                runner.decode(np.array([step, step]))
    # The ragged prefill ends with a decode step of its own.
    replays = 0 if device.flavour == "tensorrt-rtx" else 2 * 4
    assert device.cuda.replays == replays
    decode, prefill = device.opened[-1].contexts
    assert (decode.profile, prefill.profile) == (0, 1)
    if device.flavour == "tensorrt-rtx":
        assert vars(decode.config) == {
            "dynamic_shapes_kernel_specialization_strategy": "eager",
            "cuda_graph_strategy": "capture",
        }
        assert prefill.config.cuda_graph_strategy == "disabled"


def test_caches_are_bound_in_place_in_both_contexts(built: Built, device: Any) -> None:
    with open_engine(built, logits="last") as runner:
        runner.prefill([[1, 2, 3]])
        runner.decode(np.array([4]))
        decode, prefill = device.opened[-1].contexts
        caches = {name: address for name, address in decode.addresses.items() if "." in name}
        assert len(set(caches.values())) == len(caches) / 2 == 2 * len(built.record.artifact.cache_layers)
        for name, address in caches.items():
            assert address == caches[name.replace("past_key_values", "present")] == prefill.addresses[name]


def test_a_new_batch_does_not_see_the_last_one(built: Built, device: Any) -> None:
    with open_engine(built) as runner:
        first = runner.prefill([[1, 2, 3]])
        runner.prefill([[9] * 30, [8] * 30])
        np.testing.assert_array_equal(runner.prefill([[1, 2, 3]]), first)


def test_generation_chooses_on_the_device(built: Built, device: Any) -> None:
    """Greedily the same tokens as the host; sampled ones repeat with their seed."""
    with open_runner(built.artifact, logits="last", threads=1) as runner:
        expected = list(generate(runner, [1, 2, 3], max_new_tokens=12))
    with open_engine(built, logits="last") as runner:
        fetched: list[Any] = []
        real = runner._session.run  # type: ignore[union-attr]
        runner._session.run = lambda *call: fetched.append(call) or real(*call)  # type: ignore[union-attr]
        assert list(generate(runner, [1, 2, 3], max_new_tokens=12)) == expected
        assert len(fetched) == 1
        first, again, other = (
            list(generate(runner, [1, 2], max_new_tokens=12, temperature=2.0, seed=seed)) for seed in (3, 3, 4)
        )
    assert first == again != other


def test_validate_holds_engines_beside_the_artifact(built: Built, device: Any) -> None:
    report = validate(built.artifact, reference=built.checkpoint, engine=built.engine, decode_steps=4)
    assert report.passed
    verdicts = {(found.candidate, found.case): found.passed for found in report.comparisons}
    cases = ("single", "chunked", "ragged", "last")
    assert verdicts == {(name, case): True for name in ("onnxruntime", device.flavour) for case in cases}


def test_validate_sees_an_engine_that_computes_something_else(built: Built, device: Any, monkeypatch: Any) -> None:
    """Causality as TensorRT's parser would have had it: the last row of the mask is what the first may see."""
    real = tensorrt_session.TensorRTSession.run

    def shifted(self: Any, profile: int, ids: Any, starts: Any) -> Any:
        return real(self, profile, ids, np.maximum(starts - 1, 0))

    monkeypatch.setattr(tensorrt_session.TensorRTSession, "run", shifted)
    report = validate(built.engine, reference=built.checkpoint, decode_steps=4)
    assert not report.passed
    assert report.worst is not None
    assert report.worst.phase == "decode"


def test_an_engine_with_the_last_logits_only_is_put_to_the_last_case(built: Built, device: Any) -> None:
    record = load_engine(built.engine)
    rewrite(built, record.model_copy(update={"engines": {"last": record.engines["last"]}}))
    report = validate(built.engine, reference=built.checkpoint, decode_steps=4)
    assert report.passed
    assert {found.case for found in report.comparisons} == {"last"}
    with pytest.raises(ArtifactError, match="no engine for logits 'all'; build it with --logits all, or both"):
        open_engine(built, logits="all")


# --- what is refused, and how


def test_batches_beyond_the_profiles(built: Built, device: Any) -> None:
    with (
        open_engine(built) as runner,
        pytest.raises(ArtifactError, match=r"batches of 1\.\.4 .* got a batch of 5"),
    ):
        runner.prefill([[1]] * 5)


def test_an_engine_of_another_gpu_or_version(built: Built, device: Any, monkeypatch: Any) -> None:
    engine = built.engine / "model.engine"
    content = engine.read_bytes()
    try:
        engine.write_bytes(content[:-1])
        write_manifest(built.engine, digests={})
        with pytest.raises(ArtifactError, match=r"cannot be opened here: it was built for sm80 .* Fake GPU"):
            open_engine(built)
    finally:
        engine.write_bytes(content)
        write_manifest(built.engine, digests={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "computes in float32; export and build it again for float16"),
        ({"max_length": 32}, "has 64 rows; export and build it again for 32"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_options_the_engine_does_not_have(options: Any, message: str, built: Built, device: Any) -> None:
    with pytest.raises(InputError, match=message):
        open_engine(built, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(built: Built) -> None:
    rewrite(built, built.record)
    with pytest.raises(MissingRequirementError, match=r"runs on an NVIDIA GPU, .*PyTorch sees 0"):
        open_engine(built)
    report = validate(built.engine, reference=built.checkpoint, decode_steps=2)
    assert {found.passed for found in report.comparisons} == {None}
    with pytest.raises(MissingRequirementError):
        report.raise_if_breached()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "ENGINE", "--prompt", "a"],
        ["validate", "ENGINE", "--reference", "CHECKPOINT", "--decode-steps", "2"],
        ["validate", "ARTIFACT", "--reference", "CHECKPOINT", "--engine", "ENGINE", "--decode-steps", "2"],
        ["bench", "ENGINE", "--baseline", "ENGINE", "--prompt-length", "4"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[1]}",
)
def test_commands_exit_3_without_a_gpu(arguments: list[str], built: Built) -> None:
    rewrite(built, built.record)
    places = {"ENGINE": str(built.engine), "ARTIFACT": str(built.artifact), "CHECKPOINT": str(built.checkpoint)}
    command = [sys.executable, "-m", "flap_export", *(places.get(word, word) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "NVIDIA GPU" in done.stderr
    assert arguments[0] != "validate" or "tensorrt-rtx not run: an engine runs on an NVIDIA GPU" in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_describes_engines(options: list[str], built: Built) -> None:
    rewrite(built, built.record)
    command = [sys.executable, "-m", "flap_export", "inspect", str(built.engine), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tensorrt-rtx engine" in done.stdout
    assert "sm80" in done.stdout


def test_without_the_package(built: Built, monkeypatch: Any) -> None:
    rewrite(built, built.record)
    monkeypatch.setitem(sys.modules, flavours.MODULES["tensorrt-rtx"], None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'flap-export\[tensorrt-rtx\]'"):
        open_engine(built)


# --- choosing tokens


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**options: Any) -> list[float]:
        tokens = sampled(logits, Sampling(**{"temperature": 1.0, **options}), generator)
        return (torch.bincount(tokens, minlength=4) / len(tokens)).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sampling_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        sampled(torch.tensor([[0.0, bad]]), Sampling(), torch.Generator())


def test_the_record_keeps_its_profiles(built: Built) -> None:
    record = EngineRecord.load(built.engine / ENGINE_NAME)
    assert record.profile_for(4, 1) == 0
    assert record.profile_for(1, 2) == 1
    assert record.largest_step == 16
    with pytest.raises(ArtifactError, match="got a batch of 1 with 17 new tokens"):
        record.profile_for(1, 17)
