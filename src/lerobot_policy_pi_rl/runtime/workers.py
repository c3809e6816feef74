"""A process that owns environments, and its parent's hold on it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .pool import Pool

# Seconds.
CLOSE_TIMEOUT = 5.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# prctl(PR_SET_PDEATHSIG, signal): Linux sends it to a process when its parent dies.
PR_SET_PDEATHSIG = 1


class EnvironmentFailed(RuntimeError):
    """Environments cannot go on; the text is one line."""


class WorkerLost(EnvironmentFailed):
    """A worker died or did not answer; another one can take its place."""


def _become_worker() -> None:
    """Leaves Ctrl-C to the parent, dies with it, and keeps to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def work(pipe: Connection, others: list[Connection], *made_of: Any) -> None:
    """A worker's life: answer every request with `(result, None)` or `(None, message)` until the pipe closes.

    Args:
        pipe: This worker's end.
        others: Ends that a fork copied and that must not keep other pipes open.
        made_of: Arguments of its `Pool`.
    """
    for other in others:
        other.close()
    _become_worker()
    pool: Pool | None = None
    try:
        while True:
            name, arguments = pipe.recv()
            if name == "close":
                break
            try:
                pool = pool or Pool(*made_of)
                pipe.send((getattr(pool, name)(*arguments), None))
            except Exception as error:
                pipe.send((None, f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):
        return  # The parent is gone; there is nobody to tell.
    finally:
        if pool is not None:
            pool.close()


@dataclass(frozen=True)
class Worker:
    """The parent's hold on a worker process and the environments it owns."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    rows: slice

    def ask(self, name: str, *arguments: Any) -> None:
        """Sends a request."""
        try:
            self.pipe.send((name, arguments))
        except OSError as error:
            raise WorkerLost(self._death()) from error

    def answer(self, deadline: float) -> Any:
        """Waits for the answer to the request sent before.

        Args:
            deadline: `time.monotonic()` at which waiting ends.
        """
        try:
            if not self.pipe.poll(max(deadline - time.monotonic(), 0.0)):
                raise WorkerLost(
                    f"environment worker {self._name} did not answer in time; see docs/environments.md"
                )
            result, message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost(self._death()) from error
        if message is not None:
            raise EnvironmentFailed(f"environment worker {self._name} failed: {message}")
        return result

    @property
    def _name(self) -> str:
        return f"for environments {self.rows.start} to {self.rows.stop - 1} (process {self.process.pid})"

    def _death(self) -> str:
        self.process.join(CLOSE_TIMEOUT)
        code = self.process.exitcode
        reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"environment worker {self._name} died ({reason}); out of memory or killed from outside?"

    def ask_to_end(self) -> None:
        """Sends the last request, if there is anyone to hear it."""
        with contextlib.suppress(OSError):
            self.pipe.send(("close", ()))

    def end(self, deadline: float) -> None:
        """Waits until the process has ended, and kills it when that takes too long.

        Args:
            deadline: `time.monotonic()` at which waiting ends.
        """
        self.process.join(max(deadline - time.monotonic(), 0.0))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        self.process.close()
