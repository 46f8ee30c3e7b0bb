"""A GPU that is not there: tensors that say they are on `cuda:0` and are computed by the CPU.

What mixes devices fails as it would on a GPU, so that a tensor that was not moved is found on any machine. Streams only
pretend, graphs replay nothing, and there are no gradients.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
COMPILER = shutil.which("c++")
MEMORY_BYTES = 1 << 33
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
"""
_MOVING = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")


class Imitated(Tensor):
    """A tensor of the imitated GPU, around the one that is computed with."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Imitated:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Any = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What makes tensors out of nothing; a mode holds in its own thread only."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


def _computed(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = operator.name(), [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name not in _MOVING:
        _check_devices(name, tensors)
    wanted = kwargs.get("device")
    if wanted is None:
        is_imitated = any(isinstance(tensor, Imitated) for tensor in (tensors[:1] if name in _MOVING else tensors))
    else:
        is_imitated = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = tree_map_only(Imitated, lambda tensor: tensor.held, (args, kwargs))
    result = operator(*held_args, **held_kwargs)
    # What was changed in place is the same tensor as before.
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Imitated)}

    def wrapped(tensor: Tensor) -> Tensor:
        return known[id(tensor)] if id(tensor) in known else Imitated(tensor)

    return tree_map_only(Tensor, wrapped, result) if is_imitated else result


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    """As on a GPU, numbers may come from anywhere, and so may the indices into one of its tensors."""
    if name in _INDEXING and isinstance(tensors[0], Imitated):
        return
    devices = {tensor.device.type for tensor in tensors if tensor.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {sorted(devices)}")


class _Stream:
    def wait_stream(self, other: _Stream) -> None: ...


class _Graph:
    def replay(self) -> None: ...


@cache
def _load_guard() -> None:
    """Let a CPU build of torch switch to the device, which does nothing."""
    home = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        libraries = [f"-L{home / 'lib'}", "-lc10"]
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{home / 'include'}", *libraries]
        subprocess.run([str(COMPILER), source, *options, "-o", library], check=True, capture_output=True)
        ctypes.CDLL(str(library))


@contextmanager
def imitated_gpu() -> Iterator[None]:
    """Let `cuda:0` be there."""
    _load_guard()
    tensor, submit = torch.tensor, ThreadPoolExecutor.submit

    def made_from(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    def submitted(pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        def called() -> Any:
            with _Factories():
                return call(*args, **kwargs)

        return submit(pool, called)

    pretended = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda _=None: (MEMORY_BYTES, MEMORY_BYTES),
        "current_stream": lambda _=None: _Stream(),
        "Stream": lambda _=None: _Stream(),
        "CUDAGraph": _Graph,
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "graph": lambda _, **__: nullcontext(),
    }
    with pytest.MonkeyPatch.context() as patched, _Factories():
        for name, stands_in in pretended.items():
            patched.setattr(torch.cuda, name, stands_in)
        # Both go by what a mode sees.
        patched.setattr(torch, "tensor", made_from)
        patched.setattr(ThreadPoolExecutor, "submit", submitted)
        # Under it operators are taken apart before a mode sees them.
        patched.setattr(torch, "inference_mode", torch.no_grad)
        yield
