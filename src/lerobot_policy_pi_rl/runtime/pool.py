"""Environments in this process, what a chunk does in them, and how their observations are written down."""

import contextlib
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig

from .seeds import recorded_start

Observation = dict[str, np.ndarray]

# Names under which environments report a success: LeRobot's; MetaWorld's and ManiSkill's; gym_hil's.
SUCCESS = ("is_success", "success", "succeed")
# What is kept of a list of names or of an error's text, in characters.
SHORT = 300


@dataclass(frozen=True)
class ChunkStep:
    """What one chunk did in each of N environments.

    Attributes:
        reward: Sum of the rewards of the executed steps, `[N]` float32.
        executed: Executed steps of the chunk, `[N]` int64, between 1 and H; 0 where a person took over at once, or the
            environment failed.
        terminated: The episode ended by the task's own rules, `[N]` bool.
        truncated: The episode was cut by the time limit or on demand, `[N]` bool.
        success: The task was solved in this chunk, `[N]` bool; not where a person has helped in the episode.
        final_observation: What was seen after the last executed step, before any reset, `[N, ...]`; with a lookahead,
            that many steps earlier (or at the episode's start), as the observation of a decision that would follow.
        observation: What to act on next, `[N, ...]`: the first observation of the next episode where one ended.
        taken_over: A person took over before the chunk was used up, `[N]` bool. They have let go since, or the episode
            has ended in their hands, which counts as truncated.
        delay: How many steps old `observation` is, `[N]` int64: the next chunk is executed from its action of that
            number on, because those before it belong to steps that have been taken.
        task: Task text of the episode that `observation` belongs to, `[N]` text.
        unjudged: Names in `info` where an episode ended and no step of it said whether the task was solved, `[N]` text;
            empty anywhere else.
        failure: Why the environment could not execute the chunk, `[N]` text; empty where it did. The running episode
            counts for nothing (it is marked as truncated), and `observation` begins the next one.
    """

    reward: np.ndarray
    executed: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    final_observation: Observation
    observation: Observation
    taken_over: np.ndarray
    delay: np.ndarray
    task: np.ndarray
    unjudged: np.ndarray
    failure: np.ndarray

    @property
    def failed(self) -> np.ndarray:
        """The environment could not execute the chunk, `[N]` bool."""
        return self.failure != ""

    @property
    def done(self) -> np.ndarray:
        """The episode ended in this chunk, `[N]` bool."""
        return self.terminated | self.truncated


def reported_success(info: Mapping[str, Any]) -> bool | None:
    """Whether a step solved the task, by its `info` or the `final_info` in it; None where neither says anything.

    Args:
        info: Of one step of one environment; vectors give arrays, with a mask under the same name and `_` before it.
    """
    final = info.get("final_info")
    finals = [final] if isinstance(final, Mapping) else final
    sources = [info, *(one for one in _rows(finals) if isinstance(one, Mapping))]
    said = [
        _truth(source[name], source.get(f"_{name}"))
        for source in sources
        for name in SUCCESS
        if name in source
    ]
    known = [solved for solved in said if solved is not None]
    return any(known) if known else None


def _rows(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) else []


def _truth(value: Any, mask: Any) -> bool | None:
    """A reported success as a truth value; None where it is no number."""
    # Tensors may be on a GPU.
    values = np.asarray(value.cpu() if hasattr(value, "cpu") else value).ravel()
    if mask is not None and np.size(mask) == values.size:
        values = values[np.asarray(mask, dtype=bool).ravel()]
    numbers = [float(one) for one in values if isinstance(one, bool | int | float | np.bool_ | np.number)]
    finite = [number for number in numbers if np.isfinite(number)]
    return any(number > 0.5 for number in finite) if finite else None


def shortened(text: str) -> str:
    """A text on one line of a bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= SHORT else f"{line[:SHORT]} ..."


def flatten(observation: Mapping[str, Any], prefix: str = "") -> Observation:
    """Arrays of an observation, nested keys joined by `/` and copied, because environments reuse their buffers."""
    result: Observation = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}/"))
        else:
            result[prefix + key] = np.array(value)
    return result


def nested(observation: Observation) -> dict[str, Any]:
    """Undoes the joined keys (`pixels/top` -> `{"pixels": {"top": ...}}`), as `preprocess_observation` expects."""
    result: dict[str, Any] = {}
    for key, value in observation.items():
        *parents, name = key.split("/")
        level = result
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = value
    return result


def stack(observations: list[Observation]) -> Observation:
    """Several environments' observations as one, `[n, ...]`."""
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}


def _one_of_each_task(env_cfg: EnvConfig) -> list[gym.Env]:
    """Makes one environment of every task, in LeRobot's order."""
    suites = env_cfg.create_envs(n_envs=1, use_async_envs=False)
    vectors = [vector for by_task in suites.values() for vector in by_task.values()]
    if not all(hasattr(vector, "envs") for vector in vectors):
        raise ValueError(
            f"environment {env_cfg.type!r} does not give a vector of environments in this process"
        )
    return [vector.envs[0] for vector in vectors]


class _Factory:
    """Makes environments of numbered tasks.

    LeRobot's own configurations give one environment of every task at a time. Those load their simulator at the first
    reset, so what is left over costs little.
    """

    def __init__(self, env_cfg: EnvConfig) -> None:
        self._env_cfg = env_cfg
        self._makes_one = hasattr(env_cfg, "make_env")
        self._left: list[list[gym.Env]] = []
        if not self._makes_one:
            self._left = [[env] for env in _one_of_each_task(env_cfg)]
        self.num_tasks = len(env_cfg.tasks) if self._makes_one else len(self._left)

    def make(self, number: int) -> gym.Env:
        """A new environment of a task, 0 to `num_tasks - 1`."""
        if self._makes_one:
            return self._env_cfg.make_env(self._env_cfg.tasks[number])
        if not self._left[number]:
            for left, env in zip(self._left, _one_of_each_task(self._env_cfg), strict=True):
                left.append(env)
        return self._left[number].pop()


def _attribute(env: gym.Env, *names: str) -> Any:
    """The first of these attributes that the environment or a wrapper has, or None."""
    for name in names:
        try:
            return env.get_wrapper_attr(name)
        except AttributeError:
            continue
    return None


@runtime_checkable
class ActsUnseen(Protocol):
    """An environment with the two halves of `step`, for whom an observation costs something, such as a picture.

    Within a chunk nobody looks, so it is observed once a chunk only; except with a lookahead.
    """

    def act(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Executes one action; reward, terminated, truncated and info, as `step` gives them."""

    def observe(self) -> Mapping[str, Any]:
        """What is seen at this moment."""


class _Halves(gym.Wrapper):
    """Makes an `ActsUnseen` of any environment, which is observed at every step all the same."""

    _seen: Mapping[str, Any]

    def act(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        self._seen, reward, terminated, truncated, info = self.env.step(action)
        return float(reward), terminated, truncated, info

    def observe(self) -> Mapping[str, Any]:
        return self._seen


@dataclass(frozen=True)
class _Executed:
    """What one chunk did in one environment; the names are those of `ChunkStep`."""

    reward: float
    executed: int
    terminated: bool
    truncated: bool
    success: bool
    unjudged: str
    failure: str
    final_observation: Observation
    observation: Observation
    task: str


class _Slot:
    """One environment and how it executes a chunk."""

    def __init__(
        self, make: Callable[[], gym.Env], time_limit: int | None, reward: str, lookahead: int
    ) -> None:
        """Makes the environment.

        Args:
            make: Makes it, as LeRobot does.
            time_limit: Steps after which the configuration wants an episode cut.
            reward: As in `ChunkedVectorEnv`.
            lookahead: As in `ChunkedVectorEnv`.
        """
        self._make, self._configured_limit = make, time_limit
        self._success_is_reward, self._lookahead, self._steps = reward == "success", lookahead, 0
        # Whether a step of the episode has said if the task is solved.
        self._judged = False
        # The newest observations of the episode, the newest last.
        self._seen: deque[Observation] = deque(maxlen=lookahead + 1)
        self._take(make())

    def _take(self, env: gym.Env) -> None:
        self._env = env if isinstance(env, ActsUnseen) else _Halves(env)
        # LIBERO's own limit is only a number: `lerobot-eval` reads it and stops by itself.
        limits = [self._configured_limit, _attribute(env, "_max_episode_steps")]
        self.time_limit = min((int(limit) for limit in limits if limit), default=0)
        self._low, self._high, self._dtype = _bounds(env.action_space)

    @property
    def task(self) -> str:
        """The task text of the running episode, or the task's name where there is no text, or nothing.

        LeRobot's evaluation asks for the same attributes; robocasa, vlabench and robotwin set them at each reset.
        """
        return str(_attribute(self._env, "task_description", "task") or "")

    @property
    def name(self) -> str:
        """A name of the task that stays the same over the episodes, as far as it is known before the first one."""
        return self.task or str(_attribute(self._env, "task") or "")

    def reset(self, seed: int) -> Observation:
        """Starts the episode of a seed."""
        self._steps = 0
        env = self._env.unwrapped
        if hasattr(env, "init_state_id"):
            # LIBERO takes the next of its recorded starts at every reset, whatever the seed.
            starts = getattr(env, "_init_states", None)
            env.init_state_id = int(seed) if starts is None else recorded_start(int(seed), len(starts))
        self._seen.clear()
        observation, info = self._env.reset(seed=int(seed))
        self._judged = reported_success(info) is not None
        self._seen.append(flatten(observation))
        return self._seen[0]

    def step(self, chunk: np.ndarray, reset_seed: int, cut: bool) -> _Executed:
        """Executes a chunk until its end or the episode's.

        Args:
            chunk: Actions, `[H, A]`; what is beyond the bounds of the action space is clipped to them.
            reset_seed: Seed of the next episode, used if this one ends.
            cut: End the episode after this chunk.
        """
        total, executed, success, terminated, truncated = 0.0, 0, False, False, False
        info: dict[str, Any] = {}
        for action in chunk:
            reward, terminated, truncated, info = self._env.act(self._bounded(action))
            reported = reported_success(info)
            self._judged = self._judged or reported is not None
            solved = bool(reported)
            total += float(solved) if self._success_is_reward else reward
            executed, self._steps = executed + 1, self._steps + 1
            success = success or solved
            if self._lookahead:
                # The episode may end at any step, and what was seen some steps before is wanted then.
                self._look()
            truncated = truncated or self._steps == self.time_limit
            if terminated or truncated:
                break
        ended = bool(terminated or truncated)
        if not self._lookahead:
            self._look()
        final, unjudged = self._seen[0], _names(info) if ended and not self._judged else ""
        following = self.reset(reset_seed) if ended or cut else final
        return _Executed(
            reward=total,
            executed=executed,
            terminated=bool(terminated),
            truncated=bool((truncated or cut) and not terminated),
            success=success,
            unjudged=unjudged,
            failure="",
            final_observation=final,
            observation=following,
            task=self.task,
        )

    def step_or_replace(self, chunk: np.ndarray, reset_seed: int, cut: bool) -> _Executed:
        """The same; an environment that raises makes way for a new one, in which the next episode begins."""
        try:
            return self.step(chunk, reset_seed, cut)
        except Exception as error:
            failure = shortened(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):
            self._env.close()
        self._take(self._make())
        observation = self.reset(reset_seed)
        return _Executed(0.0, 0, False, True, False, "", failure, observation, observation, self.task)

    def _bounded(self, action: np.ndarray) -> np.ndarray:
        """The action within the space's bounds: some environments raise beyond them, and noise has none."""
        if self._low is None or self._low.shape != action.shape:
            return action
        return np.clip(action.astype(self._dtype, copy=False), self._low, self._high)

    def _look(self) -> None:
        self._seen.append(flatten(self._env.observe()))

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()


def _bounds(space: gym.Space) -> tuple[np.ndarray | None, np.ndarray | None, Any]:
    """Bounds of a box of floats and its type; no bounds of any other space."""
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return space.low, space.high, space.dtype
    return None, None, None


def _names(info: Mapping[str, Any]) -> str:
    return shortened(", ".join(sorted(map(str, info)))) or "nothing"


@dataclass(frozen=True)
class EnvDescription:
    """What one environment of a vector is.

    Attributes:
        task: Name of its task, the same in every episode.
        number: Of its task, among those of the configuration.
        num_tasks: How many the configuration has.
        time_limit: Steps after which its episodes are truncated; 0 is never.
    """

    task: str
    number: int
    num_tasks: int
    time_limit: int


class Pool:
    """The environments of one process, served in order."""

    def __init__(self, env_cfg: EnvConfig, places: list[int], reward: str, lookahead: int) -> None:
        self._limit, self._reward = getattr(env_cfg, "episode_length", None), reward
        self._lookahead = lookahead
        self._factory = _Factory(env_cfg)
        self._slots: list[_Slot] = []
        # The task of each, and environments of tasks that they do not have at the moment.
        self._numbers: list[int] = []
        self._idle: defaultdict[int, list[_Slot]] = defaultdict(list)
        self.deal([place % self._factory.num_tasks for place in places])

    def deal(self, numbers: Sequence[int]) -> list[EnvDescription]:
        """Gives each environment a task by its number; what has loaded its simulator once is kept for later."""
        for number, slot in zip(self._numbers, self._slots, strict=True):
            self._idle[number].append(slot)
        self._numbers = [int(number) for number in numbers]
        # The newest first: a task that stays keeps the environment that it had.
        self._slots = [self._idle[n].pop() if self._idle[n] else self._make(n) for n in self._numbers]
        return self.described()

    def _make(self, number: int) -> _Slot:
        return _Slot(partial(self._factory.make, number), self._limit, self._reward, self._lookahead)

    def described(self) -> list[EnvDescription]:
        """What each environment is."""
        tasks = self._factory.num_tasks
        return [
            EnvDescription(slot.name, number, tasks, slot.time_limit)
            for slot, number in zip(self._slots, self._numbers, strict=True)
        ]

    def reset(self, seeds: np.ndarray) -> tuple[Observation, list[str]]:
        """Resets all, `[n]` seeds -> stacked observations and the task texts of the episodes."""
        observation = stack([slot.reset(seed) for slot, seed in zip(self._slots, seeds, strict=True)])
        return observation, [slot.task for slot in self._slots]

    def step(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray) -> ChunkStep:
        """Executes one chunk in each, `[n, H, A]`."""
        rows = zip(self._slots, chunks, reset_seeds, cut, strict=True)
        executed = [slot.step_or_replace(*row) for slot, *row in rows]
        done = np.array([one.terminated or one.truncated for one in executed])
        return ChunkStep(
            reward=np.array([one.reward for one in executed], dtype=np.float32),
            executed=np.array([one.executed for one in executed], dtype=np.int64),
            terminated=np.array([one.terminated for one in executed]),
            truncated=np.array([one.truncated for one in executed]),
            success=np.array([one.success for one in executed]),
            final_observation=stack([one.final_observation for one in executed]),
            observation=stack([one.observation for one in executed]),
            taken_over=np.zeros(len(executed), dtype=bool),
            delay=np.where(done, 0, self._lookahead),
            task=np.array([one.task for one in executed]),
            unjudged=np.array([one.unjudged for one in executed]),
            failure=np.array([one.failure for one in executed]),
        )

    def close(self) -> None:
        """Frees all environments."""
        for slot in itertools.chain(self._slots, *self._idle.values()):
            slot.close()


def failed_step(observation: Observation, tasks: list[str], failure: str) -> ChunkStep:
    """A chunk that no environment of a worker could execute.

    Args:
        observation: First observations of the next episodes, `[n, ...]`.
        tasks: Their task texts.
        failure: Why.
    """
    count = len(tasks)
    nowhere, everywhere = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    none = np.zeros(count, dtype=np.int64)
    return ChunkStep(
        reward=np.zeros(count, dtype=np.float32),
        executed=none,
        terminated=nowhere,
        truncated=everywhere,
        success=nowhere,
        final_observation=observation,
        observation=observation,
        taken_over=nowhere,
        delay=none,
        task=np.array(tasks),
        unjudged=np.full(count, ""),
        failure=np.full(count, shortened(failure)),
    )


def concatenate(steps: list[ChunkStep]) -> ChunkStep:
    """Joins what several workers did, in order."""
    joined: dict[str, Any] = {}
    for name in ChunkStep.__dataclass_fields__:
        values = [getattr(step, name) for step in steps]
        if isinstance(values[0], dict):
            joined[name] = concatenate_observations(values)
        else:
            joined[name] = np.concatenate(values)
    return ChunkStep(**joined)


def concatenate_observations(parts: list[Observation]) -> Observation:
    """Joins stacked observations, in order."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
