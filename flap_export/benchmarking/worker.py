"""A process of its own for each artifact: memory is counted per artifact, and neither disturbs the other.

The parent speaks to it over a pipe: first a path and how to open it, then a `Workload` to prepare and numbers of
calls to time; the end of the pipe ends it. Whatever goes wrong in the worker comes back as an answer; if the process
itself dies, its pipe ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final

from flap_export.benchmarking.machine import peak_memory_bytes, reset_peak_memory
from flap_export.benchmarking.workload import Call, Workload, prepared_call, timed_ms
from flap_export.devices import keep_to_quota
from flap_export.errors import FlapExportError

WARMUP_CALLS: Final = 2
if TYPE_CHECKING:
    from flap_export.runners import Backend

_CLOSE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker opens its artifact and draws its tokens."""

    device: str
    threads: int | None
    seed: int
    backend: Backend = "auto"
    dtype: str | None = None
    """Of a checkpoint; an artifact has its own."""
    max_length: int | None = None
    """Of a checkpoint's cache; an artifact has its own."""


@dataclass(frozen=True)
class Sample:
    """What a worker answers."""

    call_ms: float
    """Mean over the calls of the sample."""
    peak_memory_bytes: int | None
    """Of the process, since the workload was prepared."""
    device_memory_bytes: int | None = None
    """In use on its GPU, by anybody, beyond what was when the worker started; None on a CPU."""


@dataclass(frozen=True)
class _Failure:
    """A flap_export error on its way through the pipe; those with a constructor of their own cannot be pickled."""

    kind: type[FlapExportError]
    message: str
    state: dict[str, Any]

    def as_error(self) -> FlapExportError:
        error = self.kind.__new__(self.kind, self.message)
        error.__dict__.update(self.state)
        return error


@final
class Worker:
    """The parent's end: one artifact open in a process of its own; used in a `with` statement.

    Every method raises FlapExportError: whatever kept the worker from doing what it was asked, or that its process
    died.
    """

    def __init__(self, path: Path, options: WorkerOptions) -> None:
        self.path = path
        self._connection, far_end = multiprocessing.Pipe()
        # Not multiprocessing.Process, which imports the parent's main script again: that would count what the script
        # imports as the artifact's memory, and run scripts that have no `if __name__ == "__main__"` twice.
        with far_end:
            self._process = _start_python(f"from {__name__} import serve; serve({far_end.fileno()})", far_end.fileno())
        # The pipe ends with the worker, because only the worker holds the far end now.
        self._connection.send((path, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._exit_code(_CLOSE_SECONDS if kind is None else 0)

    @property
    def process_id(self) -> int:
        """Of the worker."""
        return self._process.pid

    def backend(self) -> str:
        """Wait until the artifact is open; the name of the backend it runs on. To be called first, and once."""
        name = self._receive()
        assert isinstance(name, str), name
        return name

    def prepare(self, workload: Workload) -> Sample:
        """Allocate, fill the cache, warm up; the sample is of one warm call."""
        return self._ask(workload)

    def measure(self, calls: int) -> Sample:
        """Time `calls` calls of the prepared workload, after one that is not timed."""
        return self._ask(calls)

    def _ask(self, request: Workload | int) -> Sample:
        try:
            self._connection.send(request)
        except OSError as error:
            raise FlapExportError(self._obituary()) from error
        sample = self._receive()
        assert isinstance(sample, Sample), sample
        return sample

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise FlapExportError(self._obituary()) from error
        if isinstance(answer, _Failure):
            raise answer.as_error()
        return answer

    def _exit_code(self, patience_s: float) -> int:
        """Wait for the process to end, and end it when `patience_s` seconds were not enough."""
        try:
            return self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _obituary(self) -> str:
        code = self._exit_code(_CLOSE_SECONDS)
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        remedy = (
            "processes are killed when memory runs out: free some, or lower the batch size or the lengths"
            if code == -signal.SIGKILL
            else "it may have said why on standard error"
        )
        return f"the process that measures '{self.path}' must live until the last sample, but it {end}; {remedy}"


def _start_python(code: str, inherited: int) -> subprocess.Popen[bytes]:
    """A Python process with this one's module path and one inherited file descriptor.

    Standard output and interrupts from the keyboard stay with the parent.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        pass_fds=(inherited,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def serve(descriptor: int) -> None:
    """The worker's side of the pipe at file descriptor `descriptor`: answer until it ends."""
    keep_to_quota()
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        path, options = connection.recv()
        try:
            _answer_requests(connection, path, options)
        except (EOFError, ConnectionError):
            raise
        except FlapExportError as error:
            connection.send(_Failure(type(error), str(error), dict(error.__dict__)))
        # What nobody foresaw has to reach the parent too: it would only learn that the process ended. Where it came
        # from is said here, for that cannot travel.
        except Exception as error:
            traceback.print_exc()
            message = f"measuring '{path}' failed with {type(error).__name__}: {error}"
            connection.send(_Failure(FlapExportError, message, {}))


def _answer_requests(connection: Connection, path: Path, options: WorkerOptions) -> None:
    from flap_export.runners import open_runner

    call: Call | None = None
    device_bytes = partial(_device_bytes, options.device)
    idle_bytes = device_bytes()
    with open_runner(
        path,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        logits="last",
        max_length=options.max_length,
        # Whoever started the worker has looked at the files.
        check=False,
    ) as runner:
        connection.send(runner.name)
        while True:
            request = connection.recv()
            if isinstance(request, Workload):
                call = prepared_call(runner, request, options.seed)
                sample = _warm_sample(call)
                used = device_bytes()
                taken = None if used is None or idle_bytes is None else used - idle_bytes
                connection.send(replace(sample, device_memory_bytes=taken))
            else:
                assert call is not None, "a workload has to be prepared first"
                call()
                connection.send(Sample(timed_ms(call, request), peak_memory_bytes()))


def _device_bytes(device: str) -> int | None:
    """Memory in use on a GPU, by whomever; None for a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    # What opens the model says better what is missing.
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total - free


def _warm_sample(call: Call) -> Sample:
    for _ in range(WARMUP_CALLS):
        call()
    reset_peak_memory()
    return Sample(timed_ms(call, 1), peak_memory_bytes())
