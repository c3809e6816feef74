"""What every test runs under: no network, no user folders, one thread, fixed seeds, no process left."""

import functools
import gc
import json
import os
import random
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

# Set before anything imports LeRobot, which reads them once, and inherited by every process a test starts.
SESSION = uuid.uuid4().hex
HOME = Path(tempfile.mkdtemp(prefix="pi_rl_tests_"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(HOME / "huggingface"),
    HF_LEROBOT_HOME=str(HOME / "lerobot"),
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    PI_RL_TEST_SESSION=SESSION,
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# Python's own helpers; they end with the interpreter that started them.
PYTHON_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
GRACE_S = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the fast tests first; the order is otherwise that of the files."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection_finish() -> None:
    """Leaves two million objects of imported libraries out of every later collection of garbage, half a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Removes the session's folder."""
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_configure() -> None:
    """Has the help texts of settings looked up once: LeRobot's parser reads all of them anew, seconds each time."""
    from draccus.wrappers import field_wrapper

    field_wrapper.docstring.get_attribute_docstring = functools.cache(
        field_wrapper.docstring.get_attribute_docstring
    )


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Starts every test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what code under test might read
    torch.manual_seed(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def run_both() -> Callable[[Callable[[bool], Any]], list[dict[str, Any]]]:
    """Runs a learner and an actor over loopback to the end; returns the metrics.

    It is given what makes the configuration of the actor (true) or of the learner (false).
    """
    from lerobot_policy_pi_rl.runtime.actor import Actor
    from lerobot_policy_pi_rl.runtime.learner import Learner

    def run(configure: Callable[[bool], Any]) -> list[dict[str, Any]]:
        stop, cfg = Event(), configure(False)
        # The actor first: it forks its environments' workers, which must happen before the learner's threads start.
        actor, learner = Actor(configure(True), stop), Learner(cfg, stop)
        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(actor.run)
            try:
                learner.run()
            finally:
                stop.set()
            acting.result(60)
        actor.close()
        return [json.loads(line) for line in (cfg.output_dir / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(autouse=True, scope="session")
def _no_process_left() -> Iterator[None]:
    """Fails the session when tests leave processes running, and ends those."""
    yield
    _, left = psutil.wait_procs(_started_processes(), timeout=GRACE_S)
    names = [_describe(process) for process in left]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    assert not left, f"tests left {len(left)} processes running: {names}"


def _started_processes() -> list[psutil.Process]:
    """Every live process that this session started, also those whose parent has ended since."""
    children = psutil.Process().children(recursive=True)
    found = {process.pid: process for process in children}
    found.update((process.pid, process) for process in psutil.process_iter() if _is_marked(process))
    found.pop(os.getpid(), None)
    return [process for process in found.values() if not _is_helper(process)]


def _is_marked(process: psutil.Process) -> bool:
    """Whether the process inherited this session's environment."""
    try:
        return process.environ().get("PI_RL_TEST_SESSION") == SESSION
    except (psutil.Error, OSError):
        return False


def _is_helper(process: psutil.Process) -> bool:
    """Whether it is one of Python's, or has ended; what was forked from a helper has the same command line."""
    command, parent = _describe(process), process.parent()
    forked = parent is not None and _describe(parent) == command
    return not command or (any(name in command for name in PYTHON_HELPERS) and not forked)


def _describe(process: psutil.Process) -> str:
    """The command line; empty for a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
