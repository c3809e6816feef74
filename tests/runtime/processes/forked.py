"""Processes forked from one that has imported everything: a start takes tenths of a second instead of ten seconds."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "lerobot_policy_pi_rl.envs.metaworld_state",
        "lerobot_policy_pi_rl.scripts.actor",
        "lerobot_policy_pi_rl.scripts.learner",
    ]
)


class Forked:
    """One such process, with the part of `subprocess.Popen`'s interface that the tests use.

    It has a session, an environment and a console of its own. What a module read from the environment when it was
    imported is not read again.
    """

    def __init__(self, target: Callable[..., None], arguments: Sequence[Any], console: Path) -> None:
        self.args = (target.__name__, *arguments)
        console.touch()
        self._process = CONTEXT.Process(
            target=_live, args=(target, arguments, console, dict(os.environ), str(Path.cwd()))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, the negative number of a signal, or None while it runs."""
        return None if self._process.is_alive() else self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.args), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _live(
    target: Callable[..., None],
    arguments: Sequence[Any],
    console: Path,
    environment: dict[str, str],
    folder: str,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [
        place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path
    ]
    for file, flags, descriptors in ((os.devnull, os.O_RDONLY, [0]), (console, os.O_WRONLY, [1, 2])):
        opened = os.open(file, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    target(*arguments)


def run_with_few_files(files: int, name: str, *arguments: str) -> None:
    """The same as `run_installed` in a process that may have this many files open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files // 2, files))
    run_installed(name, *arguments)


def run_installed(name: str, *arguments: str) -> None:
    """What the installed program does, but for the five seconds in which its parser collects help texts."""
    from draccus.wrappers import docstring

    import lerobot_pi_rl_launcher as launcher

    docstring.get_attribute_docstring = lambda *_: docstring.AttributeDocString()
    sys.argv = [name, *arguments]
    getattr(launcher, name.rpartition("-")[2])()
