"""Environment steps per second of the whole training loop over those of the bare environments.

The loop is the real one: `lerobot-pi-rl-train` with `recipes/metaworld.json` and an untrained policy, so learner and
actor are processes that talk gRPC. The bare environments are the same number, spread over the same number of worker
processes in the same way, and driven by random chunks.

Both take turns of whole episodes on the same machine: while one runs, every process of the other is stopped. Left out
are start-up, checkpoints and evaluations: how much they weigh is for the user to choose (`save_freq`, `env_eval_freq`).
"""

import contextlib
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from lerobot.envs import EnvConfig
from untrained import save_untrained

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.collector import Group, make_groups
from lerobot_policy_pi_rl.runtime.metrics import FILE_NAME, read

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/metaworld.json"
TARGET = 0.6
# Turns of each side. A turn is two whole episodes of every environment, which no untrained policy solves.
ROUNDS = 10
EPISODES = 2
# Iterations before the first turn: processes start, and the first ones train the critic only.
WARM_UP = 4
START_S = 300.0
POLL_S = 0.002


@dataclass(frozen=True)
class Turn:
    """What one turn of the loop took, in seconds.

    Attributes:
        steps: Environment steps.
        wall: From the end of one iteration to the end of another.
        collect: Collecting, as the actor measures it.
        wait: The learner waiting for decisions: pushing, collecting, sending and decoding.
        update: Preparing the rollout and improving the policy.
        critic: Training the critic, while the actor collects.
    """

    steps: int
    wall: float
    collect: float
    wait: float
    update: float
    critic: float


class Bare:
    """Environments without a policy, in the groups and worker processes that an actor gives them."""

    def __init__(self, env_cfg: EnvConfig, collection: CollectionConfig, decisions: int, length: int) -> None:
        self._groups = make_groups(env_cfg, collection)
        self._decisions, self._length = decisions, length
        self._random = np.random.default_rng(0)
        for group in self._groups:
            group.envs.reset(self._seeds(group))

    def steps_per_second(self) -> float:
        """Runs one turn."""
        start, steps = time.perf_counter(), 0
        for group in self._groups:
            self._send(group)
        for left in reversed(range(self._decisions)):
            for group in self._groups:
                steps += int(group.envs.receive().executed.sum())
                if left:
                    self._send(group)
        return steps / (time.perf_counter() - start)

    def _send(self, group: Group) -> None:
        chunks = self._random.uniform(-1, 1, (group.envs.num_envs, self._length, 4)).astype(np.float32)
        group.envs.send(chunks, self._seeds(group))

    def _seeds(self, group: Group) -> np.ndarray:
        return self._random.integers(2**31, size=group.envs.num_envs)

    def close(self) -> None:
        """Ends the workers."""
        for group in self._groups:
            group.envs.close()


class Loop:
    """A training run that is stopped whenever it is not its turn."""

    def __init__(self, output: Path, policy: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "lerobot_pi_rl_launcher", "train", f"--config_path={RECIPE}"]
        command += [f"--policy.path={policy}", f"--output_dir={output}", "--steps=1000000"]
        command += ["--policy.online_steps=1000000000", "--env_eval_freq=0", "--save_freq=0"]
        command += [f"--policy.actor_learner_config.learner_port={port}"]
        self._metrics, self._log = (
            output / FILE_NAME,
            (output.parent / "loop.log").open("w", encoding="utf-8"),
        )
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)

    def warm_up(self) -> None:
        """Lets it start and do its first iterations."""
        self._wait_for(WARM_UP)
        self.pause()

    def pause(self) -> None:
        """Stops every process of the run."""
        for process in self._family():
            process.suspend()

    def turn(self, iterations: int) -> Turn:
        """Lets the run continue for some whole iterations; the one that was interrupted is not counted."""
        for process in self._family():
            process.resume()
        first = self._wait_for(len(read(self._metrics)) + 1)
        start = time.perf_counter()
        last = self._wait_for(first + iterations)
        wall = time.perf_counter() - start
        self.pause()
        rows = read(self._metrics)[first - 1 : last]
        steps = rows[-1]["progress/env_steps"] - rows[0]["progress/env_steps"]
        parts = (
            sum(row[f"speed/{name}_seconds"] for row in rows[1:])
            for name in ("collect", "wait", "update", "critic")
        )
        return Turn(steps, wall, *parts)

    def _wait_for(self, lines: int) -> int:
        """Waits until the metrics have this many lines; returns how many there are."""
        deadline = time.monotonic() + START_S
        while (count := self._lines()) < lines:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the training run does not go on; the end of its log:\n{self._tail()}")
            time.sleep(POLL_S)
        return count

    def _lines(self) -> int:
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0

    def _tail(self) -> str:
        return "\n".join(Path(self._log.name).read_text(encoding="utf-8").splitlines()[-15:])

    def _family(self) -> list[psutil.Process]:
        launcher = psutil.Process(self._process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def close(self) -> None:
        """Ends the run."""
        if self._process.poll() is None:
            for process in self._family():
                process.resume()
            self._process.terminate()
            self._process.wait()
        self._log.close()


class OtherLoad:
    """How many cores programs other than this one and its children keep busy, from now on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), self._others()

    @staticmethod
    def _others() -> float:
        everything = psutil.cpu_times()
        own = [p.cpu_times() for p in (psutil.Process(), *psutil.Process().children(recursive=True))]
        return (
            sum(everything)
            - everything.idle
            - getattr(everything, "iowait", 0.0)
            - sum(times.user + times.system for times in own)
        )

    def cores(self) -> float:
        """Mean since the start."""
        start, others = self._start
        return max(0.0, (self._others() - others) / (time.perf_counter() - start))


@contextlib.contextmanager
def contestants(
    env_cfg: EnvConfig, collection: CollectionConfig, decisions: int
) -> Iterator[tuple[Bare, Loop]]:
    """Starts both sides.

    A run that is stopped does not end when it is told to, so this process makes sure to let it go on when it is ended.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    length = PIRLConfig(push_to_hub=False).n_action_steps
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # First of all, because it forks.
        bare = Bare(env_cfg, collection, decisions, length)
        stack.callback(bare.close)
        policy = save_untrained(Path(folder) / "policy", env_cfg)
        loop = Loop(Path(folder) / "run", policy)
        stack.callback(loop.close)
        loop.warm_up()
        yield bare, loop


def run(quick: bool = False) -> list[dict]:
    """Rows of the benchmark table.

    Args:
        quick: Few rounds.
    """
    env_cfg = MetaworldStateEnv(task=json.loads(RECIPE.read_text(encoding="utf-8"))["env"]["task"])
    collection = CollectionConfig()
    chunk = PIRLConfig(push_to_hub=False).n_action_steps
    decisions = EPISODES * env_cfg.episode_length // chunk
    with contestants(env_cfg, collection, decisions) as (bare, loop):
        bare.steps_per_second()
        load, speeds, turns = OtherLoad(), [bare.steps_per_second()], []
        for _ in range(3 if quick else ROUNDS):
            turns.append(loop.turn(decisions // collection.decisions))
            speeds.append(bare.steps_per_second())
        return rows(speeds, turns, load.cores())


def rows(speeds: list[float], turns: list[Turn], load: float) -> list[dict]:
    """The ratio, and what the loop's time is made of.

    Args:
        speeds: Bare steps per second around the turns, one more than turns.
        turns: Of the loop.
        load: Cores that other programs kept busy meanwhile.
    """
    around = [statistics.mean(pair) for pair in itertools.pairwise(speeds)]
    ratios = [turn.steps / turn.wall / bare for turn, bare in zip(turns, around, strict=True)]
    speed = statistics.median(turn.steps / turn.wall for turn in turns)
    detail = (
        f"{speed:,.0f} against {statistics.median(speeds):,.0f} steps/s, {len(turns)} rounds "
        f"({min(ratios):.2f} to {max(ratios):.2f}); other programs kept {load:.1f} cores busy"
    )
    ratio = statistics.median(ratios)
    collect, update = (
        statistics.median(getattr(turn, name) / turn.wall for turn in turns) for name in ("collect", "update")
    )
    wire = statistics.median((turn.wait + turn.critic - turn.collect) / turn.wall for turn in turns)
    rest = statistics.median(
        (turn.wall - turn.wait - turn.update - turn.critic) / turn.wall for turn in turns
    )
    shares = [
        ("environments", ratio, "what bare environments need for the same steps"),
        (
            "actor beyond that",
            collect - ratio,
            "inference, processors, records and the critic's update beside them",
        ),
        (
            "wire",
            wire,
            "learner waiting while nobody collects: weights and decisions on their way, (de)coding",
        ),
        ("update", update, "learner preparing the rollout and improving the policy, while the actor waits"),
        ("rest", rest, "publishing and logging"),
    ]
    return [
        {
            "name": "training loop over bare environments",
            "value": ratio,
            "unit": "x",
            "target": TARGET,
            "detail": detail,
        },
        *(
            {"name": f"share of the loop's time: {name}", "value": 100 * share, "unit": "%", "detail": text}
            for name, share, text in shares
        ),
    ]
