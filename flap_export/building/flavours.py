"""The two flavours of TensorRT: which package each is, and how Polygraphy is told which one to drive."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

from flap_export.errors import InputError, MissingRequirementError, check_choice

Flavour = Literal["tensorrt", "tensorrt-rtx"]

MODULES: Final[dict[Flavour, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_POLYGRAPHY_SWITCH: Final = "POLYGRAPHY_USE_TENSORRT_RTX"
_TARGET: Final = re.compile(r"sm(\d+)(\d)")


def import_tensorrt(flavour: Flavour) -> Any:
    """The flavour's Python module.

    Raises:
        InputError: there is no such flavour.
        MissingRequirementError: it is not installed.
    """
    check_choice("backend", flavour, MODULES)
    try:
        return importlib.import_module(MODULES[flavour])
    # A package whose libraries do not load raises what its loader raises.
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingRequirementError(
            f"the backend {flavour} needs the package {flavour} ({error})", f"pip install 'flap-export[{flavour}]'"
        ) from error


def import_polygraphy(flavour: Flavour) -> Any:
    """Polygraphy's TensorRT backend, driving `flavour`.

    Polygraphy decides for one flavour when it is first imported, and for the whole process.

    Raises:
        InputError: this process has used it for the other flavour.
        MissingRequirementError: it is not installed.
    """
    import_tensorrt(flavour)
    wants_rtx = flavour == "tensorrt-rtx"
    before = os.environ.get(_POLYGRAPHY_SWITCH)
    if "polygraphy.config" not in sys.modules:
        os.environ[_POLYGRAPHY_SWITCH] = "1" if wants_rtx else "0"
    try:
        from polygraphy import config
        from polygraphy.backend import trt as backend
    except ImportError as error:
        raise MissingRequirementError(
            f"building engines needs polygraphy ({error})", f"pip install 'flap-export[{flavour}]'"
        ) from error
    finally:
        _restore(before)
    if bool(config.USE_TENSORRT_RTX) != wants_rtx:
        raise InputError(
            f"Polygraphy serves one flavour of TensorRT per process, and this one has begun with the other; "
            f"build for {flavour} in a process of its own"
        )
    return backend


def _restore(switch: str | None) -> None:
    if switch is None:
        os.environ.pop(_POLYGRAPHY_SWITCH, None)
    else:
        os.environ[_POLYGRAPHY_SWITCH] = switch


def compute_capabilities(targets: Sequence[str], trt: Any) -> list[tuple[int, int]]:
    """Compute capabilities of targets such as `sm80`, which TensorRT-RTX must know.

    Raises:
        InputError: a target is spelled otherwise, or unknown to the installed version.
    """
    known = sorted(name.lower() for name in trt.ComputeCapability.__members__ if _TARGET.fullmatch(name.lower()))
    for target in targets:
        check_choice("target", target, known)
    return [(int(match[1]), int(match[2])) for target in targets if (match := _TARGET.fullmatch(target))]


def has_gpu() -> bool:
    """Whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


class _Errors(logging.Handler):
    """Keeps what is logged at ERROR and above."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


@contextmanager
def quiet_polygraphy() -> Iterator[list[str]]:
    """Keep Polygraphy off standard output: its log goes to `logging`; yields the errors as they come.

    It also calls what TensorRT has deprecated, about which nobody here can do anything.
    """
    from polygraphy.logger import G_LOGGER

    handler, logger = _Errors(), logging.getLogger("Polygraphy")
    before = G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate
    logger.addHandler(handler)
    # With colors it prints that it has no package for them.
    G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = True, False, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield handler.messages
    finally:
        G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = before
        logger.removeHandler(handler)
