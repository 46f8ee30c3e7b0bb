"""What `build` writes, what it refuses, and how: everything that needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny import tiny_checkpoint

from flap_export.artifact import Artifact, load_artifact
from flap_export.building import BuildOptions, build, flavours, load_engine
from flap_export.building.network import check_network, parsed_network
from flap_export.building.profiles import input_shapes, profiles_of
from flap_export.errors import ArtifactError, FlapExportError, InputError, MissingRequirementError
from flap_export.exporting import export
from flap_export.families import FAMILIES
from flap_export.manifest import verify

trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'flap-export[tensorrt-rtx]'")
pytestmark = pytest.mark.tensorrt

MAX_LENGTH = 32
SM80: dict[str, Any] = {"backend": "tensorrt-rtx", "targets": ["sm80"]}


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 128, "dtype": torch.float16}
    checkpoint = tiny_checkpoint("llama", folder / "checkpoint", **sizes)
    (checkpoint / "tokenizer.json").write_text("{}")
    export(checkpoint, folder / "onnx", dtype="float16", max_length=MAX_LENGTH)
    return folder / "onnx"


@pytest.fixture
def artifact(onnx_folder: Path) -> Artifact:
    return load_artifact(onnx_folder)


@pytest.fixture
def copy(onnx_folder: Path, tmp_path: Path) -> Path:
    """Without a manifest, which would tell a change before TensorRT sees it."""
    return Path(shutil.copytree(onnx_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json")))


# --- what is written


def test_the_directory_of_both_engines(onnx_folder: Path, tmp_path: Path) -> None:
    record = build(onnx_folder, tmp_path / "engine", **SM80, logits="both", max_batch=8, max_prompt=16)
    assert load_engine(tmp_path / "engine") == record
    verify(tmp_path / "engine")
    names = {file.name for file in (tmp_path / "engine").iterdir()}
    expected = {"engine.json", "manifest.json", "model.engine", "model-last.engine", "tokenizer.json"}
    assert names - {"generation_config.json"} == expected
    assert (record.targets, record.flavour, record.dtype) == (("sm80",), "tensorrt-rtx", "float16")
    assert [profile.new_tokens for profile in record.profiles] == [(1, 1, 1), (1, 16, 16)]
    assert {profile.batch_sizes for profile in record.profiles} == {(1, 1, 8)}
    assert record.digests["weights"] == load_artifact(onnx_folder).digests["weights"]


def test_a_larger_model_is_a_larger_engine(onnx_folder: Path, tmp_path: Path) -> None:
    """By its weights, byte for byte: what else an engine holds depends on kernels, not on widths."""
    wide = tiny_checkpoint("llama", tmp_path / "wide", hidden_size=128, intermediate_size=4096, dtype=torch.float16)
    export(wide, tmp_path / "onnx", dtype="float16", max_length=MAX_LENGTH)
    small = build(onnx_folder, tmp_path / "small", **SM80).engines["last"]
    large = build(tmp_path / "onnx", tmp_path / "large", **SM80).engines["last"]
    added = large.weights_bytes - small.weights_bytes
    assert added == 2 * 2 * 3 * 128 * (4096 - 40)
    assert large.size_bytes - small.size_bytes == pytest.approx(added, rel=0.1)


def test_float32_is_decomposed_and_without_tf32(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", hidden_size=128)
    export(checkpoint, tmp_path / "onnx", max_length=16)
    network = build(tmp_path / "onnx", tmp_path / "engine", **SM80).engines["last"].network
    assert network.decomposable_attentions == network.attentions == 2
    assert set(network.types) == {"FLOAT", "INT64", "INT32", "BOOL"}


@pytest.mark.parametrize("level", [0, 5])
def test_options_reach_the_builder(level: int, onnx_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    real = trt.Builder.build_serialized_network

    def spy(self: Any, network: Any, config: Any) -> Any:
        seen.update(
            level=config.builder_optimization_level,
            tf32=config.get_flag(trt.BuilderFlag.TF32),
            targets=[config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)],
            profiles=config.num_optimization_profiles,
            lengths=[a.key_value_lengths is not None for a in attentions(network)],
        )
        return real(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", spy)
    options = BuildOptions(optimization_level=level, tf32=level == 5, limit_keys=level == 5)
    build(onnx_folder, tmp_path / "engine", backend="tensorrt-rtx", targets=["sm80", "sm89"], options=options)
    assert seen == {
        "level": level,
        "tf32": level == 5,
        "targets": ["SM80", "SM89"],
        "profiles": 2,
        "lengths": [level == 5] * 2,
    }


def attentions(network: Any) -> list[Any]:
    from flap_export.building.network import attentions_of

    return list(attentions_of(network, trt))


def test_profiles_cover_every_input(artifact: Artifact) -> None:
    decode, prefill = profiles_of(artifact.max_length, batch_size=2, max_batch=4, prompt=8, max_prompt=None)
    assert input_shapes(decode, artifact)["input_ids"] == ((1, 1), (2, 1), (4, 1))
    shapes = input_shapes(prefill, artifact)
    assert shapes["input_ids"] == ((1, 1), (2, 8), (4, 32))
    assert shapes["write_indices"] == ((1,), (2,), (4,))
    assert shapes["past_key_values.1.value"] == ((1, 2, 32, 32), (2, 2, 32, 32), (4, 2, 32, 32))
    assert len(shapes) == 6


# --- what the parser would get wrong without a word


def test_the_exported_graph_itself_is_refused(onnx_folder: Path, artifact: Artifact) -> None:
    """Its causality ends up anchored at the cache's first row: a decode step would see that row and no other."""
    polygraphy = flavours.import_polygraphy("tensorrt-rtx")
    _, network, _ = parsed_network(onnx_folder / "model-last.onnx", polygraphy)
    assert all(attention.key_value_lengths is None for attention in attentions(network))
    assert {attention.causal_kind.name for attention in attentions(network)} == {"UPPER_LEFT"}
    with pytest.raises(ArtifactError, match="must be masked, and not causal"):
        check_network(network, artifact, trt)


@pytest.mark.parametrize("family", ["ernie4_5", "helium", "llama"])
def test_tensorrt_reads_which_channels_turn_together(family: str, tmp_path: Path) -> None:
    export(tiny_checkpoint(family, tmp_path / "checkpoint"), tmp_path / "onnx", max_length=MAX_LENGTH)
    polygraphy = flavours.import_polygraphy("tensorrt-rtx")
    _, network, _ = parsed_network(tmp_path / "onnx" / "model-last.onnx", polygraphy)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    rotaries = [layer for layer in layers if layer.type == trt.LayerType.ROTARY_EMBEDDING]
    assert rotaries
    for layer in rotaries:
        layer.__class__ = trt.IRotaryEmbeddingLayer
        assert layer.interleaved == FAMILIES[family].rotary.interleaved


def test_a_float32_projection_in_a_half_graph_is_refused(copy: Path, tmp_path: Path) -> None:
    def widen(model: Any) -> None:
        index, product = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "MatMul")
        left, right, out = *product.input, product.output[0]
        casts = [onnx.helper.make_node("Cast", [name], [f"{name}.wide"], to=1) for name in (left, right)]
        product.input[:], product.output[:] = [f"{left}.wide", f"{right}.wide"], [f"{out}.wide"]
        narrow = onnx.helper.make_node("Cast", [f"{out}.wide"], [out], to=10)
        for offset, node in enumerate(casts):
            model.graph.node.insert(index + offset, node)
        model.graph.node.insert(index + 3, narrow)

    edited(copy, widen)
    with pytest.raises(ArtifactError, match="must compute in HALF, found FLOAT"):
        build(copy, tmp_path / "engine", **SM80)


def test_a_cache_that_is_not_updated_is_refused(copy: Path, tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        scatter = next(node for node in model.graph.node if "present.1.key" in node.output)
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["renamed" if name == "present.1.key" else name for name in names]
        assert scatter.output[0] == "renamed"
        next(output for output in model.graph.output if output.name == "present.1.key").name = "renamed"

    edited(copy, rename)
    with pytest.raises(ArtifactError, match=r"present\.1\.key is missing; renamed is not one of its inputs"):
        build(copy, tmp_path / "engine", **SM80)


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "model-last.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


# --- what is refused, and how


def test_a_graph_tensorrt_does_not_know_is_refused_with_its_reason(copy: Path, tmp_path: Path) -> None:
    def cap(model: Any) -> None:
        attention = next(node for node in model.graph.node if node.op_type == "Attention")
        attention.attribute.append(onnx.helper.make_attribute("softcap", 30.0))

    edited(copy, cap)
    with pytest.raises(ArtifactError, match=r"TensorRT refuses the graph 'model-last.onnx': .*softcap") as raised:
        build(copy, tmp_path / "engine", **SM80)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "engine").exists()


def test_damaged_weights_leave_nothing_behind(copy: Path, tmp_path: Path) -> None:
    (copy / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="TensorRT refuses the graph"):
        build(copy, tmp_path / "engine", **SM80)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["a100"]}, "target must be one of sm120, .* got 'a100'"),
        ({"targets": ["sm10"]}, "target must be one of"),
        ({"logits": "first"}, "logits must be one of last, all, both, got 'first'"),
        ({"backend": "tvm"}, "backend must be one of tensorrt, tensorrt-rtx, got 'tvm'"),
        ({"batch_size": 5}, r"usual batch must lie in 1\.\.4 .*got 5"),
        ({"max_prompt": 33}, r"max_prompt must lie in 1\.\.32, got 33"),
        ({"prompt": 9, "max_prompt": 8}, r"usual prompt must lie in 1\.\.8"),
        ({"options": BuildOptions(optimization_level=6)}, r"level must lie in 0\.\.5, got 6"),
        ({"options": BuildOptions(timing_cache=Path("cache"))}, "has no timing cache"),
    ],
)
def test_bad_options(options: Any, message: str, onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        build(onnx_folder, tmp_path / "engine", **{**SM80, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "PyTorch sees none; to mend it: name a GPU to build for, such as --target sm80"),
        ({"options": BuildOptions(weight_stripped=True)}, "engines without weights on a GPU, and PyTorch sees none"),
    ],
)
def test_a_missing_gpu(options: Any, message: str, onnx_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match=message):
        build(onnx_folder, tmp_path / "engine", **{**SM80, **options})


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_package(flavour: Any, onnx_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, flavours.MODULES[flavour], None)
    with pytest.raises(MissingRequirementError, match=rf"pip install 'flap-export\[{flavour}\]'"):
        build(onnx_folder, tmp_path / "engine", backend=flavour, targets=["sm80"])


def test_one_flavour_per_process(monkeypatch: Any) -> None:
    flavours.import_polygraphy("tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx"])
    with pytest.raises(InputError, match="build for tensorrt in a process of its own"):
        flavours.import_polygraphy("tensorrt")
    assert "POLYGRAPHY_USE_TENSORRT_RTX" not in os.environ


def test_something_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no exported artifact"):
        build(tmp_path, tmp_path / "engine", **SM80)
    with pytest.raises(ArtifactError, match="holds no engine"):
        load_engine(tmp_path)


def test_a_directory_that_lost_its_engine(onnx_folder: Path, tmp_path: Path) -> None:
    build(onnx_folder, tmp_path / "engine", **SM80)
    (tmp_path / "engine" / "model-last.engine").unlink()
    with pytest.raises(FlapExportError, match=r"lacks model-last\.engine; build it again"):
        load_engine(tmp_path / "engine")


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flap_export", *arguments], capture_output=True, text=True)


def test_the_command_prints_one_json_object(onnx_folder: Path, tmp_path: Path) -> None:
    engine = str(tmp_path / "engine")
    done = command("build", str(onnx_folder), "-o", engine, "--target", "sm80", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engines"]["last"]["network"]["cache_updates"] == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_exits_3_without_a_gpu(onnx_folder: Path, tmp_path: Path) -> None:
    done = command("build", str(onnx_folder), "-o", str(tmp_path / "engine"), "--backend", "tensorrt-rtx")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_gpu_at_hand_is_inspected(onnx_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its target is the current one, and the dump lies beside the engine; the GPU is a stand-in."""
    seen: list[str] = []
    real = trt.Builder.build_serialized_network

    def for_an_a100(self: Any, network: Any, config: Any) -> Any:
        seen.append(config.get_compute_capability(0).name)
        config.set_compute_capability(trt.ComputeCapability.SM80, 0)
        return real(self, network, config)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trt.Builder, "build_serialized_network", for_an_a100)
    monkeypatch.setattr("flap_export.building.stage.inspected", lambda file, module: f'{{"of": "{file.name}"}}')
    record = build(onnx_folder, tmp_path / "engine", backend="tensorrt-rtx")
    assert (seen, record.targets) == (["CURRENT"], ())
    dump = (tmp_path / "engine" / "inspection-last.json").read_text(encoding="utf-8")
    assert json.loads(dump) == {"of": "model-last.engine"}
    assert "inspection-last.json" in verify(tmp_path / "engine").files
