"""Experts that checkpoints hold together, seen one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, keep_all_plan, tiny_checkpoint
from torch import Tensor

from flap_export.errors import ModelError
from flap_export.families import EVERY_EXPERT, FAMILIES, Stack
from flap_export.models.loading import load_model
from flap_export.models.opening import open_checkpoint
from flap_export.models.weights import Weights
from flap_export.rewriting.cutting import rewrite
from flap_export.rewriting.restoring import cut_only
from flap_export.rewriting.stock import write_stock_checkpoint

STACKED = [family for family in ALL_FAMILIES if FAMILIES[family].stored.stacks]
PATH = "layers.1.experts.*"
STACKS = (
    Stack("both", (f"{PATH}.gate", f"{PATH}.up")),
    Stack("turns", (f"{PATH}.first", f"{PATH}.second"), alternating=True, transposed=True),
    Stack("bias", (f"{PATH}.a", f"{PATH}.b"), alternating=True),
    Stack("down", (f"{PATH}.down",), transposed=True),
)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    """Three experts, [4, 5] and [4] what each has of a part."""
    shapes = {"m.both": (3, 8, 5), "m.turns": (3, 5, 8), "m.bias": (3, 8), "m.down": (3, 4, 5), "m.other": (2, 3)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_every_part_of_every_expert_has_a_name(stored: dict[str, Tensor], tmp_path: Path) -> None:
    weights = Weights(tmp_path, stacks=STACKS)
    expected = {"m.other": stored["m.other"]}
    for expert in range(3):
        both, turns, bias, down = (stored[f"m.{stack.name}"][expert] for stack in STACKS)
        parts = [both[:4], both[4:], turns[:, ::2].T, turns[:, 1::2].T, bias[::2], bias[1::2], down.T]
        names = [path for stack in STACKS for path in stack.parts]
        own = {f"m.{name.replace(EVERY_EXPERT, str(expert))}": part for name, part in zip(names, parts, strict=True)}
        expected |= own
    assert sorted(weights) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == "F32"
    assert weights.parameters == sum(tensor.numel() for tensor in stored.values())


def test_nothing_of_other_experts_is_read(
    stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    class Slice:
        def __init__(self, whole: Any) -> None:
            self.whole, self.get_shape, self.get_dtype = whole, whole.get_shape, whole.get_dtype

        def __getitem__(self, index: Any) -> Tensor:
            read.append(index)
            return self.whole[index]

    class File:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.file = safe_open(*arguments, **named)

        def __enter__(self) -> File:
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.__exit__(*_)

        def keys(self) -> list[str]:
            return self.opened.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self.opened.get_slice(name))

    monkeypatch.setattr("flap_export.models.weights.safe_open", File)
    weights = Weights(tmp_path, stacks=STACKS)
    for name in weights:
        weights.shape(name)
    assert not read
    found = weights["m.layers.1.experts.2.up"]
    assert read == [2]
    assert torch.equal(found, stored["m.both"][2, 4:])
    assert found.untyped_storage().nbytes() == found.nbytes, "the gate's half is held too"


@pytest.mark.parametrize("family", STACKED)
def test_a_dense_plan_writes_the_same_stacks(family: str, tmp_path: Path) -> None:
    """In the family's own layout, bit for bit and under the same names."""
    dense = open_checkpoint(tiny_checkpoint(family, tmp_path / "dense", dtype=torch.bfloat16))
    plan = keep_all_plan(dense)
    (tmp_path / "stock").mkdir()
    write_stock_checkpoint(tmp_path / "stock", dense, plan, dense.shape, rewrite(dense, plan, cut_only))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "dense"))
    assert found.keys() == expected.keys()
    assert any(name.endswith(FAMILIES[family].stored.stacks[0].name) for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", STACKED)
def test_stacks_of_another_size_are_refused(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(family, tmp_path / "dense")
    tensors, stack = load_file(dense / "model.safetensors"), FAMILIES[family].stored.stacks[0]
    name = next(name for name in tensors if name.endswith(stack.name))
    whole, axis = tensors[name], 2 if stack.transposed else 1
    for wrong, message in (
        (whole[:-1], "lack 'model"),
        (whole[0, 0, 0], "lack 'model"),
        (torch.cat([whole, whole[:1]]), "which a .* has no place for"),
        (whole.narrow(axis, 0, whole.shape[axis] - 1), r"has shape \[39, 32\], the configuration asks for \[40, 32\]"),
        (whole.narrow(3 - axis, 0, 31), r"has shape \[40, 31\], the configuration asks for \[40, 32\]"),
    ):
        save_file({**tensors, name: wrong.contiguous()}, dense / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_model(dense, dtype=torch.float32)
