"""Where to compute: `cpu`, `cuda` or `cuda:N`."""

from __future__ import annotations

import re

from flap_export.errors import InputError, MissingRequirementError


def parsed_device(device: str) -> tuple[str, int]:
    """Kind and index; the first device of its kind where none is named.

    Raises:
        InputError: there is no such kind of device.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise InputError(f"device must be cpu, cuda or cuda:N, got '{device}'")
    kind, _, index = device.partition(":")
    return kind, int(index or 0)


def check_device(device: str) -> None:
    """Whether PyTorch can compute on `device`.

    Raises:
        InputError: there is no such kind of device, or no such number of it.
        MissingRequirementError: there is none on this machine.
    """
    kind, index = parsed_device(device)
    if kind == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"device '{device}' was asked for and PyTorch sees no CUDA device",
            "install a CUDA build of torch on a machine with a GPU, or use --device cpu",
        )
    if (count := torch.cuda.device_count()) <= index:
        raise InputError(f"device '{device}' was asked for and PyTorch sees {count}; name one, from cuda:0 on")
