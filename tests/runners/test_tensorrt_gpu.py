"""What only a GPU can show: the inspector's dump, the engine's answers, and the captured decode step.

Both flavours in one process have never been tried: `FLAVOUR=tensorrt pytest -m gpu` runs one of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ALL_FAMILIES, FAMILY_SIZES, tiny_checkpoint, tiny_pruned

from flap_export.building.flavours import MODULES
from flap_export.exporting import export
from flap_export.generation import generate
from flap_export.runners import open_runner
from flap_export.validation import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]
INSTALLED = [
    flavour
    for flavour, module in MODULES.items()
    if importlib.util.find_spec(module) and os.environ.get("FLAVOUR", flavour) == flavour
]
SIZES: dict[str, Any] = {"hidden_size": 128, "dtype": torch.float16}
HEAD_DIM = {family: {"head_dim": 32} for family, sizes in FAMILY_SIZES.items() if "head_dim" in sizes}


def built(folder: Path, family: str, flavour: Any, *, pruned: bool = False, dtype: Any = "float16") -> Path:
    make = tiny_pruned if pruned else tiny_checkpoint
    checkpoint = make(family, folder / "checkpoint", **SIZES, **HEAD_DIM.get(family, {}))
    export(checkpoint, folder / "onnx", dtype=dtype, max_length=32)
    build(folder, flavour, "engine", "--logits", "both")
    return checkpoint


def build(folder: Path, flavour: str, name: str, *options: str) -> None:
    """In a process of its own: Polygraphy serves one flavour per process."""
    command = [sys.executable, "-m", "flap_export", "build", str(folder / "onnx"), "-o", str(folder / name)]
    done = subprocess.run([*command, "--backend", flavour, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("flavour", INSTALLED)
def test_parity(flavour: str, family: str, pruned: bool, dtype: Any, tmp_path: Path) -> None:
    checkpoint = built(tmp_path, family, flavour, pruned=pruned, dtype=dtype)
    report = validate(tmp_path / "engine", reference=checkpoint, decode_steps=8, device="cuda")
    assert report.passed, report.worst


@pytest.mark.parametrize("flavour", INSTALLED)
def test_the_inspector_knows_the_layers(flavour: str, tmp_path: Path) -> None:
    built(tmp_path, "llama", flavour)
    dump = json.loads((tmp_path / "engine" / "inspection-last.json").read_text(encoding="utf-8"))
    assert dump["Layers"]


@pytest.mark.parametrize("flavour", INSTALLED)
def test_generation_repeats_and_agrees_with_the_host(flavour: str, tmp_path: Path) -> None:
    built(tmp_path, "llama", flavour)
    with open_runner(tmp_path / "engine", logits="last", device="cuda") as runner:
        first, again = (list(generate(runner, [1, 2, 3], max_new_tokens=16)) for _ in range(2))
        logits = runner.prefill([[1, 2, 3]])
        on_the_host = [int(logits[0].argmax())]
        while len(on_the_host) < 16:
            on_the_host.append(int(runner.decode(np.array(on_the_host[-1:]))[0].argmax()))
    assert first == again == on_the_host


@pytest.mark.skipif("tensorrt" not in INSTALLED, reason="needs the package tensorrt")
def test_the_decode_step_is_one_graph(tmp_path: Path) -> None:
    built(tmp_path, "llama", "tensorrt")
    with open_runner(tmp_path / "engine", logits="last", device="cuda") as runner:
        runner.prefill([[1, 2, 3]])
        runner.decode(np.array([4]))
        assert isinstance(runner._session._graph, torch.cuda.CUDAGraph)  # type: ignore[attr-defined]


@pytest.mark.parametrize("flavour", INSTALLED)
def test_engines_without_weights_are_refitted(flavour: Any, tmp_path: Path) -> None:
    checkpoint = built(tmp_path, "llama", flavour)
    build(tmp_path, flavour, "thin", "--weight-stripped")
    report = validate(tmp_path / "thin", reference=checkpoint, decode_steps=8, device="cuda")
    assert report.passed, report.worst
