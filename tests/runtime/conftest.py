"""Two environments whose every step can be recomputed by hand, small runs in them, and commands in real processes."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import draccus
import gymnasium as gym
import numpy as np
import psutil
import pytest
import yaml
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE

import lerobot_policy_pi_rl  # noqa: F401  registers policy, algorithm and environment
from lerobot_policy_pi_rl.runtime.actor import Actor
from lerobot_policy_pi_rl.runtime.collector import Collector, make_groups
from lerobot_policy_pi_rl.runtime.learner import Learner
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, make_player, parts

sys.path.insert(0, str(Path(__file__).parent / "processes"))

from forked import Forked, run_installed

SMALL = [
    "--policy.type=pi_rl",
    "--policy.device=cpu",
    "--policy.push_to_hub=false",
    "--policy.base.type=compact",
    "--policy.base.hidden_dim=32",
    "--policy.base.num_blocks=1",
    "--policy.base.time_dim=8",
    "--policy.base.task_dim=0",
    "--algorithm.type=pi_rl",
    "--algorithm.critic_hidden_dims=[32]",
    "--algorithm.collection.num_envs=4",
    "--algorithm.collection.num_workers=0",
    "--algorithm.collection.decisions=4",
    "--algorithm.collection.eval_envs=2",
    "--algorithm.epochs=2",
    "--algorithm.minibatch_size=8",
    "--algorithm.critic_warmup=1",
    "--env_eval_freq=0",
    "--save_freq=0",
    "--seed=3",
]
"""A run whose iterations take milliseconds; the environment is missing."""

REACH = ["--env.type=metaworld_state", "--env.task=reach-v3", "--env.episode_length=30", "--env.reward=dense"]
"""The environment of the runs in real processes: its episodes do not end where iterations do."""


LEROBOTS_OWN = ("--policy.path", "--config_path")
"""What LeRobot reads before draccus, which does not know it."""


@contextlib.contextmanager
def no_room(size: int = 0) -> Iterator[None]:
    """Lets no file grow beyond a size, in this process: an error of the same kind as that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes contexts in which nothing can be written to files."""
    return no_room


# Environments


class Line(gym.Env):
    """A point is moved along a line: solved beyond `GOAL`, cut after `limit` steps.

    The state is all there is, so a test can step it by hand from any observation.
    """

    GOAL = 0.3
    observation_space = spaces.Dict({"agent_pos": spaces.Box(-1e9, 1e9, (2,), np.float32)})
    action_space = spaces.Box(-1e9, 1e9, (2,), np.float32)
    task_description = "move right"
    # What LeRobot's evaluation and ours demand; the line's own limit comes first.
    _max_episode_steps = 10_000

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        start = np.random.default_rng(seed).uniform(-0.2, 0.2)
        self.state = np.array([start, 0], np.float32)
        return {"agent_pos": self.state}, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.state = line_step(self.state, action)
        solved = bool(self.state[0] > self.GOAL)
        return (
            {"agent_pos": self.state},
            float(self.state[0]),
            solved,
            bool(self.state[1] >= self.limit),
            {"is_success": solved},
        )


def line_step(state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """One step of `Line`."""
    return np.array([state[0] + np.float32(0.1) * action[0], state[1] + 1], np.float32)


class Fate(Line):
    """Whatever is done, a start of seed s ends after `2 + s % 7` steps, solved if s is odd."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.last, self.lucky = 2 + seed % 7, bool(seed % 2)
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation = super().step(action)[0]
        over = bool(self.state[1] >= self.last)
        return observation, 0.0, over and self.lucky, over, {"is_success": over and self.lucky}


@EnvConfig.register_subclass("test_line")
@dataclass
class LineConfig(EnvConfig):
    """Configuration of `Line`, or of `Fate`."""

    limit: int = 12
    fate: bool = False
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
        }
    )
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        kind = Fate if self.fate else Line
        return {"line": {0: gym.vector.SyncVectorEnv([lambda: kind(self.limit)] * n_envs)}}


# Runs in this process

MakeConfig = Callable[..., PIRLTrainConfig]
MakeCollector = Callable[..., Collector]


@pytest.fixture
def make_cfg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeConfig:
    """Makes and validates the configuration of a small run on `Line`; further arguments come last and win.

    LeRobot's parser takes a second for what this does in a millisecond; the commands' own tests use it.
    """

    def make(*arguments: str, validate: bool = True) -> PIRLTrainConfig:
        given = [*SMALL, "--env.type=test_line", f"--output_dir={tmp_path / 'run'}", *arguments]
        # LeRobot reads paths from the command line a second time.
        monkeypatch.setattr(sys, "argv", ["test", *given])
        cfg = draccus.decode(PIRLTrainConfig, nested(latest(given, LEROBOTS_OWN)))
        if validate:
            cfg.validate()
        return cfg

    return make


def latest(arguments: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """Each `--name=value` once, as it was given last, but for names that begin with one of `without`."""
    by_name = {argument.partition("=")[0]: argument for argument in arguments}
    return [argument for name, argument in by_name.items() if not name.startswith(tuple(without))]


def nested(arguments: Sequence[str]) -> dict[str, Any]:
    """The tree that `--dotted.name=value` arguments describe."""
    tree: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        *parents, leaf = name.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = yaml.safe_load(value)
    return tree


@pytest.fixture
def make_collector(make_cfg: MakeConfig) -> Iterator[MakeCollector]:
    """Makes a collector with environments of its own; the arguments are those of `make_cfg`."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: str) -> Collector:
            cfg = make_cfg(*arguments)
            _, algorithm, env = parts(cfg)
            groups = make_groups(env, algorithm.collection)
            collector = Collector(make_player(cfg), groups, algorithm.collection, cfg.seed or 0)
            stack.callback(collector.close)
            return collector

        yield make


Train = Callable[..., list[dict[str, Any]]]
SOON = 30.0


def run_actor(actor: Actor) -> None:
    try:
        actor.run()
    finally:
        actor.close()


@pytest.fixture
def train(make_cfg: MakeConfig, free_port: int, tmp_path: Path) -> Train:
    """Runs a learner and its actors to the end; the arguments are those of `make_cfg`. Returns the metrics."""

    def run(*arguments: str, actors: int = 1, folder: str = "run") -> list[dict[str, Any]]:
        output_dir = tmp_path / folder
        port = f"--policy.actor_learner_config.learner_port={free_port}"
        given = [
            port,
            f"--output_dir={output_dir}",
            *arguments,
            f"--algorithm.collection.num_actors={actors}",
        ]
        stop = Event()
        learner = Learner(make_cfg(*given), stop)
        # An actor reads the configuration as its own command would.
        makers = [
            lambda number=number: Actor(
                as_actor(make_cfg(*given, f"--algorithm.collection.actor_id={number}", validate=False)), stop
            )
            for number in range(actors)
        ]
        running = [make() for make in makers]
        with ThreadPoolExecutor(actors) as pool:
            futures = [pool.submit(run_actor, actor) for actor in running]
            try:
                learner.run()
            finally:
                stop.set()
            for future in futures:
                future.result(SOON)
        lines = (output_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def as_actor(cfg: PIRLTrainConfig) -> PIRLTrainConfig:
    cfg.is_actor = True
    cfg.validate()
    return cfg


@pytest.fixture
def simulate() -> Callable[..., dict[str, Any]]:
    """Steps `Line` by hand through one chunk: what a decision from this observation must record."""

    def run(state: np.ndarray, chunk: np.ndarray, limit: int = 12) -> dict[str, Any]:
        reward, executed, solved, cut = np.float64(0), 0, False, False
        for action in chunk:
            state = line_step(state, action)
            reward, executed = reward + float(state[0]), executed + 1
            solved, cut = bool(state[0] > Line.GOAL), bool(state[1] >= limit)
            if solved or cut:
                break
        return {
            "reward": float(np.float32(reward)),
            "executed": executed,
            "terminated": solved,
            "truncated": cut and not solved,
            "success": solved,
            "next": state,
        }

    return run


# Certificates

SECURITY_PAGE = Path(__file__).parents[2] / "docs/security.md"


def make_certificates(folder: Path) -> Path:
    """Runs the page's own commands in a folder, for a learner on loopback: authority, learner and actor."""
    blocks = re.findall(r"```bash\n(.*?)```", SECURITY_PAGE.read_text(), re.DOTALL)
    script = "\n".join(block for block in blocks if "openssl req" in block).replace("192.0.2.10", "127.0.0.1")
    folder.mkdir()
    subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `authority`, `learner` and `actor`, each a `.pem` and a `.key`."""
    return make_certificates(tmp_path_factory.mktemp("certificates") / "own")


@pytest.fixture(scope="session")
def strange_certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of an authority that nobody here knows."""
    return make_certificates(tmp_path_factory.mktemp("certificates") / "strange")


# Real processes


def unused_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def await_true(condition: Callable[[], Any], timeout: float, what: str) -> None:
    """Waits until something that nobody signals becomes true.

    Raises:
        TimeoutError: If it does not in time.
    """
    deadline = time.monotonic() + timeout
    never = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:.0f} s: {what}")
        never.wait(0.05)


def start_installed(name: str, arguments: Sequence[str], console: Path) -> subprocess.Popen[bytes]:
    """Starts one of the installed commands, as a user does."""
    with console.open("wb") as file:
        return subprocess.Popen(
            [Path(sys.executable).parent / name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Command:
    """A command in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes] | Forked", console: Path) -> None:
        self.process, self.console, self.expected_to_fail = process, console, False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def shown(self) -> list[str]:
        """Lines on the console so far."""
        return self.console.read_text(errors="replace").splitlines()

    def errors(self) -> list[str]:
        """Lines that report an error; a stack trace counts line by line."""
        return [line for line in self.shown if line.startswith(("error", "Traceback", "  File"))]

    def wait(self, timeout: float = 90) -> int:
        """Exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.process.args} still runs; it says {self.shown[-5:]}") from None

    def failure(self, timeout: float = 150) -> str:
        """The one line with which it ends, exit code 1; it then counts as expected."""
        assert self.wait(timeout) == 1, self.shown
        assert len(self.errors()) == 1, self.shown
        self.expected_to_fail = True
        return self.errors()[0]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kills it at once, as the kernel would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Leaves nothing of it, not even what it started."""
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Run:
    """A run in real processes: one output folder, one port, one set of arguments."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.output_dir = folder / "run"
        self.port = unused_port()
        self.arguments = [
            *SMALL,
            *REACH,
            f"--output_dir={self.output_dir}",
            f"--policy.actor_learner_config.learner_port={self.port}",
            *arguments,
        ]
        self._folder = folder
        self._commands: list[Command] = []

    def start(self, name: str, *arguments: str, without: Sequence[str] = (), alone: bool = False) -> Command:
        """Starts an installed command with the run's arguments and more, or `alone` with these only."""
        given = list(arguments) if alone else latest([*self.arguments, *arguments], without)
        return self._add(lambda console: start_installed(name, given, console))

    def learner(self, *arguments: str, without: Sequence[str] = ()) -> Command:
        return self._fork("lerobot-pi-rl-learner", *arguments, without=without)

    def actor(self, number: int = 0, *arguments: str, without: Sequence[str] = ()) -> Command:
        own = f"--algorithm.collection.actor_id={number}"
        return self._fork("lerobot-pi-rl-actor", own, *arguments, without=without)

    def train(self, *arguments: str, without: Sequence[str] = ()) -> Command:
        return self.start("lerobot-pi-rl-train", *arguments, without=without)

    def _fork(self, name: str, *arguments: str, without: Sequence[str] = ()) -> Command:
        """Starts what the installed command does, in a process that has imported everything."""
        given = [name, *latest([*self.arguments, *arguments], without)]
        return self._add(partial(Forked, run_installed, given))

    def _add(self, start: Callable[[Path], "subprocess.Popen[bytes] | Forked"]) -> Command:
        console = self._folder / f"console_{len(self._commands)}.txt"
        self._commands.append(Command(start(console), console))
        return self._commands[-1]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of iterations in `metrics.jsonl` so far, without those of evaluations."""
        return [row for row in self.all_rows() if "rollout/decisions" in row]

    def all_rows(self) -> list[dict[str, Any]]:
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, name: str) -> str:
        path = self.output_dir / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def await_rows(
        self, condition: Callable[[list[dict[str, Any]]], Any], what: str, timeout: float = 90
    ) -> None:
        """Waits until the rows fulfil a condition; fails at once when a command reports an unexpected error."""

        def fulfilled() -> bool:
            broken = [c.errors() for c in self._commands if c.errors() and not c.expected_to_fail]
            assert not broken, f"while waiting until {what}: {broken}"
            return bool(condition(self.rows()))

        await_true(fulfilled, timeout, what)

    def checkpoint(self, name: str = "last") -> Path:
        return self.output_dir / "checkpoints" / name

    def end(self) -> None:
        for command in self._commands:
            command.end()


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Makes runs; all their processes end with the module."""
    runs: list[Run] = []

    def make(*arguments: str) -> Run:
        runs.append(Run(tmp_path_factory.mktemp("run"), arguments))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
