"""What all methods share: the task, its demonstrations, and how success is measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, DONE, OBS_STATE, REWARD

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv
from lerobot_policy_pi_rl.runtime.seeds import EVALUATION_SEED, VALIDATION_SEED

from .curves import CurveWriter, HeldOut, Point

# As many as the recipe of PI-RL has, and as the demo reports.
NUM_VALIDATION, NUM_HELD_OUT = 64, 100
# Environments of an evaluation, and processes that step them.
EVALUATION_ENVS, EVALUATION_WORKERS = 32, 2
REPO_ID = "pi_rl/demo"

# What the policy would do without exploration: states `[N, S]` -> actions `[N, A]`.
Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations as arrays of T steps.

    Attributes:
        state: What the policy sees before each action, `[T, S]` float32.
        action: The expert's action, `[T, A]` float32.
        reward: Reward of each step, `[T]` float32.
        done: The last step of an episode, `[T]` bool.
    """

    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    done: np.ndarray


def open_demonstrations(root: Path, state_size: int) -> LeRobotDataset:
    """Opens a dataset that `lerobot-pi-rl-demos` wrote.

    Args:
        root: Its folder.
        state_size: Length of the environment's state.

    Raises:
        FileNotFoundError: There is no dataset.
        ValueError: It was made for another environment, or has no rewards.
    """
    if not (root / "meta" / "info.json").exists():
        raise FileNotFoundError(f"no dataset in {root}: make one with lerobot-pi-rl-demos --root={root}")
    dataset = LeRobotDataset(REPO_ID, root=root, video_backend="pyav")
    missing = {OBS_STATE, ACTION, REWARD, DONE} - set(dataset.features)
    if missing:
        raise ValueError(
            f"the dataset in {root} lacks {', '.join(sorted(missing))}: make one with lerobot-pi-rl-demos"
        )
    found = dataset.features[OBS_STATE]["shape"][0]
    if found != state_size:
        raise ValueError(f"the states in {root} have {found} numbers; the environment gives {state_size}")
    return dataset


def as_arrays(dataset: LeRobotDataset) -> Demonstrations:
    """All steps of a dataset in memory."""
    table = dataset.hf_dataset.with_format("numpy")
    return Demonstrations(
        state=np.asarray(table[OBS_STATE], dtype=np.float32),
        action=np.asarray(table[ACTION], dtype=np.float32),
        reward=np.asarray(table[REWARD], dtype=np.float32).reshape(-1),
        done=np.asarray(table[DONE], dtype=bool).reshape(-1),
    )


def success_rate(act: Act, envs: ChunkedVectorEnv, seeds: np.ndarray) -> float:
    """Runs one episode from each start.

    Args:
        act: The policy.
        envs: N environments; environment e takes the starts e, e + N, e + 2N, ...
        seeds: Seeds of the starts, `[n]`.
    """
    success = np.zeros(len(seeds), dtype=bool)
    running = np.arange(envs.num_envs)
    state = envs.reset(seeds[running % len(seeds)])["agent_pos"]
    while (running < len(seeds)).any():
        step = envs.step(act(state)[:, None], seeds[(running + envs.num_envs) % len(seeds)])
        ended = step.done & (running < len(seeds))
        success[running[ended]] = step.success[ended]
        running[step.done] += envs.num_envs
        state = step.observation["agent_pos"]
    return float(success.mean())


@dataclass(frozen=True)
class Budget:
    """When a run is evaluated and when it ends."""

    # Environment steps of training.
    env_steps: int
    # Minutes of training, without evaluations; None is no limit.
    minutes: float | None
    # Environment steps between two evaluations.
    eval_every: int


@dataclass(frozen=True)
class Job:
    """One policy to train, and what that takes."""

    # The environment.
    env_cfg: MetaworldStateEnv
    # The demonstrations.
    dataset: LeRobotDataset
    # Environments for evaluation.
    envs: ChunkedVectorEnv
    # When to evaluate and when to end.
    budget: Budget
    # Where the curve goes.
    writer: CurveWriter
    # Of everything.
    seed: int


class Course:
    """Clock, evaluations and record of one run.

    The clock runs from the first evaluation on and stops during evaluations.

    Args:
        writer: Where the curve goes.
        envs: Environments for evaluation.
        budget: When to evaluate and when to end.
        save: Gives a copy of the policy's weights.
        load: Takes such a copy.
    """

    def __init__(
        self,
        writer: CurveWriter,
        envs: ChunkedVectorEnv,
        budget: Budget,
        save: Callable[[], Any],
        load: Callable[[Any], None],
    ) -> None:
        self._writer, self._envs, self._budget = writer, envs, budget
        self._save, self._load = save, load
        self._validation = VALIDATION_SEED + np.arange(NUM_VALIDATION)
        self._held_out = EVALUATION_SEED + np.arange(NUM_HELD_OUT)
        self._seconds = 0.0
        self._running_since: float | None = None
        self._next, self._best = 0, -1.0
        self._best_weights: Any = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        since = self._running_since
        return self._seconds + (0.0 if since is None else time.perf_counter() - since)

    def over(self, env_steps: int) -> bool:
        """The budget is used up."""
        minutes = self._budget.minutes
        return env_steps >= self._budget.env_steps or (minutes is not None and self.seconds >= 60 * minutes)

    def visit(self, env_steps: int, act: Act) -> None:
        """Evaluates if it is time to, and remembers the best weights.

        Args:
            env_steps: Environment steps of training so far.
            act: The policy without exploration.
        """
        if env_steps < self._next and not self.over(env_steps):
            return
        self._pause()
        success = success_rate(act, self._envs, self._validation)
        self._writer.add(Point(env_steps, round(self._seconds, 2), success, NUM_VALIDATION))
        print(f"{env_steps:>9,} steps {self._seconds / 60:7.2f} min  success {success:.2f}", flush=True)
        if success > self._best:
            self._best, self._best_weights = success, self._save()
        self._next = (env_steps // self._budget.eval_every + 1) * self._budget.eval_every
        self._running_since = time.perf_counter()

    def finish(self, env_steps: int, act: Act, imitation_minutes: float | None = None) -> None:
        """Measures the last and the best weights on the held-out starts; the best ones stay loaded.

        Args:
            env_steps: Environment steps of the whole training.
            act: The policy without exploration.
            imitation_minutes: What was spent on imitation before.
        """
        self._pause()
        last = success_rate(act, self._envs, self._held_out)
        self._load(self._best_weights)
        best = success_rate(act, self._envs, self._held_out)
        seconds = round(self._seconds, 2)
        self._writer.finish(HeldOut(best, NUM_HELD_OUT, last, env_steps, seconds, imitation_minutes))
        print(f"held-out starts: {best:.2f} (best weights), {last:.2f} (last weights)", flush=True)

    def _pause(self) -> None:
        self._seconds, self._running_since = self.seconds, None
