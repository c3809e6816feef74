"""Runs the stages that are missing: in parallel, under a lock each, one line per stage."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock
from typing import Any

from examples.metaworld_demo import BIN, ROOT

from .plan import Cell
from .stages import OUTPUT, PORT, Stage, reached_end, stages, success

PACKAGES = ("lerobot_policy_pi_rl", "lerobot", "torch", "numpy", "gymnasium", "metaworld", "mujoco")
# Seconds between looks at a process.
POLL_S = 0.2
# Seconds that a process gets to leave: a learner writes a checkpoint and then waits for its actors.
LEAVE_S = 90.0
TAIL_LINES = 15

# Runs a command: name and arguments, its log, and a file descriptor that it must keep open; returns its exit code.
RunCommand = Callable[[Sequence[str], Path, int], int]


class Stopped(Exception):
    """The user wants to stop."""


class StageFailed(Exception):
    """A stage failed; the text says how."""


def say_at_once(text: str) -> None:
    """Prints a line, also where the output is a file."""
    print(text, flush=True)


class Stop:
    """The user's wish to stop: once is to leave in order, twice is at once."""

    def __init__(self) -> None:
        """Nothing is wished yet."""
        self.wanted, self.at_once = Event(), Event()

    def listen(self) -> None:
        """Takes Ctrl-C and the signals that end a process; a hang-up stays ignored under nohup."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.wanted.is_set():
            self.at_once.set()
        self.wanted.set()


class Processes:
    """Runs commands as processes, each in a group of its own that ends with it."""

    def __init__(self, stop: Stop, jobs: int) -> None:
        """Keeps what all of them share.

        Args:
            stop: Ends them.
            jobs: How many run at a time.
        """
        self._stop = stop
        # The sources beside this runner, also from a second work tree that shares the first one's installation.
        own = [str(ROOT / "src"), str(ROOT / "benchmarks/small_environments")]
        paths = os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH")]))
        self._environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": paths}
        if jobs > 1:
            # Threads of several processes that wait for each other cost more than they bring.
            self._environment["OMP_NUM_THREADS"] = "1"

    def __call__(self, command: Sequence[str], log: Path, keep_open: int) -> int:
        """Runs one command; see `RunCommand`.

        Raises:
            Stopped: If the user stopped it.
        """
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
                pass_fds=(keep_open,),
            )
            while process.poll() is None and not self._stop.wanted.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
            stopped = process.poll() is None
            self._end(process)
        if stopped or self._stop.wanted.is_set():
            raise Stopped
        return process.returncode

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends what is left of a process and its group."""
        _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + LEAVE_S
        while process.poll() is None and time.monotonic() < deadline and not self._stop.at_once.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        if process.poll() is None:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The group is called after its first process; it is gone when all of it has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def locked(stage: Stage, stop: Stop, say: Callable[[str], None]) -> Iterator[int]:
    """Holds a stage, against other jobs, other runners, and commands that outlived a killed runner.

    Yields:
        A file descriptor; the lock holds until every process that has it open is gone.

    Raises:
        Stopped: If the user stopped the wait.
    """
    file = stage.folder.with_name(f".{stage.folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        waited = 0.0
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wanted.wait(POLL_S):
                    raise Stopped from None
                waited += POLL_S
                if waited - POLL_S < 30 <= waited:
                    say(f"waiting for {os.path.relpath(stage.folder, ROOT)}: another run makes it")
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Completes cells."""

    def __init__(
        self,
        run_command: RunCommand,
        stop: Stop,
        *,
        jobs: int = 1,
        output: Path = OUTPUT,
        supervised_only: bool = False,
        say: Callable[[str], None] = say_at_once,
    ) -> None:
        """Runs nothing yet.

        Args:
            run_command: Runs a command.
            stop: Ends everything.
            jobs: Cells at a time.
            output: Folder of all stages.
            supervised_only: Stop each cell at the evaluation of the supervised policy.
            say: Prints a line.
        """
        self._run_command, self._stop, self._say = run_command, stop, say
        self._jobs, self._output, self._supervised_only = jobs, output, supervised_only
        # Folders of stages that failed in this call, so that the cells which share one do not all try.
        self._failed: set[Path] = set()
        self._ports: set[int] = set()
        self._lock = Lock()

    def missing(self, cell: Cell) -> list[Stage]:
        """Stages of a cell that are not complete."""
        return [s for s in stages(cell, self._output).all(self._supervised_only) if not s.done]

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """Completes cells.

        Args:
            cells: In the order in which to begin them.

        Returns:
            Those that failed.

        Raises:
            Stopped: If the user stopped it; everything that was begun has ended then.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            ended = list(pool.map(self._complete_cell, cells))
        if self._stop.wanted.is_set():
            raise Stopped
        return [cell for cell, well in zip(cells, ended, strict=True) if not well]

    def _complete_cell(self, cell: Cell) -> bool:
        """Completes a cell; whether it could."""
        try:
            for stage in stages(cell, self._output).all(self._supervised_only):
                if stage.minutes_of is not None:
                    self._complete(cell, stage.minutes_of)
                self._complete(cell, stage)
        except Stopped:
            return False
        except StageFailed as error:
            self._say(f"{_now()}  {cell}  FAILED: {error}")
            return False
        except Exception as error:
            # Such as a full disk, or a result that is not there: the other cells go on.
            self._say(f"{_now()}  {cell}  FAILED: {type(error).__name__}: {error}")
            return False
        return True

    def _complete(self, cell: Cell, stage: Stage) -> None:
        if self._stop.wanted.is_set():
            raise Stopped
        if stage.done:
            return
        with locked(stage, self._stop, self._say) as descriptor:
            if stage.done:
                return
            if stage.folder in self._failed:
                raise StageFailed(f"{stage.title} failed for another cell")
            began = time.monotonic()
            try:
                self._make(stage, descriptor)
            except StageFailed:
                self._failed.add(stage.folder)
                raise
            outcome = f"   success {success(stage):.2f}" if stage.title.startswith("evaluation") else ""
            self._say(f"{_now()}  {cell}  {stage.title}: {_duration(time.monotonic() - began)}{outcome}")

    def _make(self, stage: Stage, descriptor: int) -> None:
        """Runs a stage, from the start or from its last checkpoint; what it would only repeat is taken over."""
        resumed = stage.can_resume
        if not resumed:
            shutil.rmtree(stage.folder, ignore_errors=True)
        if (same := stage.repeats) is not None:
            shutil.copytree(same.output, stage.output)
            stage.finish(same.result())
            return
        stage.folder.mkdir(parents=True, exist_ok=True)
        command = list(stage.full_command)
        if stage.learns:
            command.append(f"{PORT}={self._free_port()}")
        if resumed:
            command.append("--resume=true")
        made = _made_with(self._jobs)
        began = time.monotonic()
        try:
            code = self._run_command(command, stage.log, descriptor)
        finally:
            seconds = _add_seconds(stage, time.monotonic() - began)
        if code or (stage.learns and not reached_end(stage.output)):
            raise StageFailed(_describe_failure(stage, code))
        stage.finish({"command": " ".join(stage.full_command), "seconds": seconds, **made})

    def _free_port(self) -> int:
        """A port for a learner, another one for each."""
        with self._lock:
            while True:
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", 0))
                    port = int(listener.getsockname()[1])
                if port not in self._ports:
                    self._ports.add(port)
                    return port


def _add_seconds(stage: Stage, seconds: float) -> float:
    """Adds up the time of a stage that is stopped and resumed."""
    file = stage.folder / "seconds.txt"
    total = seconds + (float(file.read_text(encoding="utf-8")) if file.exists() else 0.0)
    file.write_text(f"{total:.1f}\n", encoding="utf-8")
    return round(total, 1)


def _describe_failure(stage: Stage, code: int) -> str:
    tail = (
        stage.log.read_text(errors="replace", encoding="utf-8").splitlines()[-TAIL_LINES:]
        if stage.log.exists()
        else []
    )
    how = f"exit code {code}" if code else "ended before its budget was used"
    again = "; remove the folder to start it over" if stage.can_resume else ""
    where = os.path.relpath(stage.log, ROOT)
    return "\n    ".join([f"{stage.title} ({how}{again}); the end of {where}:", *tail])


def _made_with(jobs: int) -> dict[str, Any]:
    """What a result depends on beside its command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source(),
        "jobs": jobs,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def source() -> str:
    """The commit, and a short hash of the sources and recipes as they lie there."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("recipes/*.json")]):
        digest.update(file.read_bytes())
    described = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"{described.stdout.strip() or 'unknown'}-{digest.hexdigest()[:8]}"


def _now() -> str:
    return f"{datetime.now():%H:%M:%S}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
