"""A vector of environments that execute whole chunks in worker processes: one round trip per decision.

The policy decides once per chunk, so that is how often the parent and its workers talk. A worker executes the chunk
until it is used up or the episode ends, and resets in the same trip.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig

Observation = dict[str, np.ndarray]

# Seconds. Loading a simulator on a busy machine takes tens of seconds; a chunk takes milliseconds, except with
# software rendering.
START_TIMEOUT = 300.0
STEP_TIMEOUT = 300.0
CLOSE_TIMEOUT = 5.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# What environments call a success: LeRobot's own, and gym_hil's.
SUCCESS = ("is_success", "succeed")
# prctl(PR_SET_PDEATHSIG, signal): Linux sends it to a process when its parent dies.
PR_SET_PDEATHSIG = 1


class EnvironmentFailed(RuntimeError):
    """A worker failed, died or did not answer; the text is one line."""


@dataclass(frozen=True)
class ChunkStep:
    """What one chunk did in each of N environments.

    Attributes:
        reward: Sum of the rewards of the executed steps, `[N]` float32.
        executed: Executed steps of the chunk, `[N]` int64, between 1 and H; 0 where a person took over at once.
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

    @property
    def done(self) -> np.ndarray:
        """The episode ended in this chunk, `[N]` bool."""
        return self.terminated | self.truncated


def _flat(observation: Mapping[str, Any], prefix: str = "") -> Observation:
    """Arrays of an observation, nested keys joined by `/` and copied, because environments reuse their buffers."""
    result: Observation = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}/"))
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


def _stack(observations: list[Observation]) -> Observation:
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


class _Slot:
    """One environment and how it executes a chunk."""

    def __init__(self, env: gym.Env, time_limit: int | None, reward: str, lookahead: int) -> None:
        """Takes an environment over.

        Args:
            env: As LeRobot makes it.
            time_limit: Steps after which the configuration wants an episode cut.
            reward: As in `ChunkedVectorEnv`.
            lookahead: As in `ChunkedVectorEnv`.
        """
        self._env = env if isinstance(env, ActsUnseen) else _Halves(env)
        self._success_is_reward, self._lookahead, self._steps = reward == "success", lookahead, 0
        # The newest observations of the episode, the newest last.
        self._seen: deque[Observation] = deque(maxlen=lookahead + 1)
        # LIBERO's own limit is only a number: `lerobot-eval` reads it and stops by itself.
        limits = [time_limit, _attribute(env, "_max_episode_steps")]
        self.time_limit = min((int(limit) for limit in limits if limit), default=0)

    @property
    def task(self) -> str:
        """The task text, or the task's name where there is no text, or nothing."""
        return str(_attribute(self._env, "task_description", "task") or "")

    def reset(self, seed: int) -> Observation:
        """Starts the episode of a seed."""
        self._steps = 0
        if hasattr(self._env.unwrapped, "init_state_id"):
            # LIBERO takes the next of its recorded starts at every reset, whatever the seed.
            self._env.unwrapped.init_state_id = int(seed)
        self._seen.clear()
        self._seen.append(_flat(self._env.reset(seed=int(seed))[0]))
        return self._seen[0]

    def step(
        self, chunk: np.ndarray, reset_seed: int, cut: bool
    ) -> tuple[list[float], Observation, Observation]:
        """Executes a chunk until its end or the episode's.

        Args:
            chunk: Actions, `[H, A]`.
            reset_seed: Seed of the next episode, used if this one ends.
            cut: End the episode after this chunk.

        Returns:
            `[reward, executed, terminated, truncated, success]`, the final observation and the next one.
        """
        total, executed, success = 0.0, 0, False
        for action in chunk:
            reward, terminated, truncated, info = self._env.act(action)
            solved = any(bool(info.get(name, False)) for name in SUCCESS)
            total += float(solved) if self._success_is_reward else reward
            executed, self._steps = executed + 1, self._steps + 1
            success = success or solved
            if self._lookahead:
                # The episode may end at any step, and what was seen some steps before is wanted then.
                self._look()
            truncated = truncated or self._steps == self.time_limit
            if terminated or truncated:
                break
        truncated = truncated or cut
        if not self._lookahead:
            self._look()
        final = self._seen[0]
        following = self.reset(reset_seed) if terminated or truncated else final
        return [total, executed, terminated, truncated and not terminated, success], final, following

    def _look(self) -> None:
        self._seen.append(_flat(self._env.observe()))

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()


@dataclass(frozen=True)
class EnvDescription:
    """What one environment of a vector is.

    Attributes:
        task: Task text.
        number: Of its task, among those of the configuration.
        num_tasks: How many the configuration has.
        time_limit: Steps after which its episodes are truncated; 0 is never.
    """

    task: str
    number: int
    num_tasks: int
    time_limit: int


class _Pool:
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
        return _Slot(self._factory.make(number), self._limit, self._reward, self._lookahead)

    def described(self) -> list[EnvDescription]:
        """What each environment is."""
        tasks = self._factory.num_tasks
        return [
            EnvDescription(slot.task, number, tasks, slot.time_limit)
            for slot, number in zip(self._slots, self._numbers, strict=True)
        ]

    def reset(self, seeds: np.ndarray) -> Observation:
        """Resets all, `[n]` seeds -> stacked observations."""
        return _stack([slot.reset(seed) for slot, seed in zip(self._slots, seeds, strict=True)])

    def step(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray) -> ChunkStep:
        """Executes one chunk in each, `[n, H, A]`."""
        rows = zip(self._slots, chunks, reset_seeds, cut, strict=True)
        numbers, finals, following = zip(*(slot.step(*row) for slot, *row in rows), strict=True)
        reward, executed, terminated, truncated, success = np.array(numbers, dtype=np.float64).T
        return ChunkStep(
            reward=reward.astype(np.float32),
            executed=executed.astype(np.int64),
            terminated=terminated.astype(bool),
            truncated=truncated.astype(bool),
            success=success.astype(bool),
            final_observation=_stack(list(finals)),
            observation=_stack(list(following)),
            taken_over=np.zeros(len(finals), dtype=bool),
            delay=np.where((terminated > 0) | (truncated > 0), 0, self._lookahead),
        )

    def close(self) -> None:
        """Frees all environments."""
        for slot in itertools.chain(self._slots, *self._idle.values()):
            slot.close()


def _concatenate(steps: list[ChunkStep]) -> ChunkStep:
    """Joins what several workers did, in order."""
    joined: dict[str, Any] = {}
    for name in ChunkStep.__dataclass_fields__:
        values = [getattr(step, name) for step in steps]
        if isinstance(values[0], dict):
            joined[name] = _concatenate_observations(values)
        else:
            joined[name] = np.concatenate(values)
    return ChunkStep(**joined)


def _concatenate_observations(parts: list[Observation]) -> Observation:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


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


def _worker(pipe: Connection, others: list[Connection], *made_of: Any) -> None:
    """A worker's life: answer every request with `(result, None)` or `(None, message)` until the pipe closes.

    Args:
        pipe: This worker's end.
        others: Ends that a fork copied and that must not keep other pipes open.
        made_of: Arguments of its `_Pool`.
    """
    for other in others:
        other.close()
    _become_worker()
    pool: _Pool | None = None
    try:
        while True:
            name, arguments = pipe.recv()
            if name == "close":
                break
            try:
                pool = pool or _Pool(*made_of)
                pipe.send((getattr(pool, name)(*arguments), None))
            except Exception as error:
                pipe.send((None, f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):
        return  # The parent is gone; there is nobody to tell.
    finally:
        if pool is not None:
            pool.close()


@dataclass(frozen=True)
class _Worker:
    """The parent's hold on a worker process and the environments it owns."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    rows: slice

    def ask(self, name: str, *arguments: Any) -> None:
        """Sends a request."""
        try:
            self.pipe.send((name, arguments))
        except OSError as error:
            raise EnvironmentFailed(self._death()) from error

    def answer(self, deadline: float) -> Any:
        """Waits for the answer to the request sent before.

        Args:
            deadline: `time.monotonic()` at which waiting ends.
        """
        try:
            if not self.pipe.poll(max(deadline - time.monotonic(), 0.0)):
                raise EnvironmentFailed(
                    f"environment worker {self._name} did not answer in time; see docs/environments.md"
                )
            result, message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise EnvironmentFailed(self._death()) from error
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


class Vector(Protocol):
    """N environments that execute whole chunks, wherever they live."""

    num_envs: int
    num_tasks: int
    numbers: np.ndarray
    tasks: list[str]
    time_limits: np.ndarray

    def reset(self, seeds: np.ndarray) -> Observation:
        """Starts the episodes of N seeds; see `ChunkedVectorEnv`, also for the other methods."""

    def send(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray | None = None) -> None:
        """Hands chunks out, `[N, H, A]`."""

    def receive(self) -> ChunkStep:
        """Waits for what they did."""

    @property
    def answers(self) -> list[Connection]:
        """What to wait for before `receive`; nothing where it does the work itself."""

    def close(self) -> None:
        """Frees the environments."""


class ChunkedVectorEnv:
    """N environments in W worker processes, or in this process when W is 0.

    Environments of a configuration with several tasks get them dealt in turn, until `deal`. Create it before starting
    threads (gRPC, torch), because on Linux the workers are forked, which costs no imports; and in a thread that stays,
    because Linux ends them with the thread that made them.

    Args:
        env_cfg: Any LeRobot environment configuration.
        num_envs: How many environments, N.
        num_workers: How many processes they are spread over, W; at most N are started.
        step_timeout: Seconds a chunk may take before the worker counts as stuck.
        first: Number of the first environment where several vectors share the tasks: they are dealt from there on.
        per_task: How many neighbouring environments get the same task.
        reward: `environment`, or `success`: 1 for a step that reports success, else 0.
        lookahead: Steps before the end of a chunk at which what to act on next is seen, as on a robot that moves while
            its policy thinks; at most the chunk's length.

    Attributes:
        tasks: Task text of each environment.
        numbers: Number of the task of each among those of the configuration, `[N]`.
        num_tasks: How many tasks the configuration has.
        time_limits: Steps after which its episodes are truncated, `[N]` int64: the smaller one of the configuration's
            (`episode_length`) and the environment's own; 0 is never.

    Raises:
        ValueError: N < 1 or W < 0.
        EnvironmentFailed: A worker failed, died or did not answer; the vector is closed.
    """

    def __init__(
        self,
        env_cfg: EnvConfig,
        num_envs: int,
        num_workers: int,
        step_timeout: float = STEP_TIMEOUT,
        first: int = 0,
        per_task: int = 1,
        reward: str = "environment",
        lookahead: int = 0,
    ) -> None:
        if num_envs < 1 or num_workers < 0:
            raise ValueError(
                f"environments must be at least 1 and workers at least 0; got {num_envs} and {num_workers}"
            )
        self.num_envs = num_envs
        self._step_timeout = step_timeout
        self._workers: list[_Worker] = []
        self._local: _Pool | None = None
        self._pending: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        places = [number // per_task for number in range(first, first + num_envs)]
        if num_workers == 0:
            self._local = _Pool(env_cfg, places, reward, lookahead)
            self._describe(self._local.described())
        else:
            self._start(min(num_workers, num_envs), env_cfg, places, reward, lookahead)
            self._describe(itertools.chain(*self._gather("described", START_TIMEOUT)))

    def _describe(self, described: Iterable[EnvDescription]) -> None:
        known = list(described)
        self.num_tasks = known[0].num_tasks
        self.numbers = np.array([one.number for one in known])
        self.tasks = [one.task for one in known]
        self.time_limits = np.array([one.time_limit for one in known], dtype=np.int64)

    def deal(self, numbers: np.ndarray) -> None:
        """Gives the environments other tasks; all of them must be reset after that.

        Args:
            numbers: Task of each, `[N]`, 0 to `num_tasks - 1`.
        """
        numbers = self._checked(numbers, "numbers")
        if self._local is not None:
            self._describe(self._local.deal(numbers.tolist()))
        else:
            self._describe(itertools.chain(*self._gather("deal", START_TIMEOUT, numbers)))

    def _start(
        self, num_workers: int, env_cfg: EnvConfig, places: list[int], reward: str, lookahead: int
    ) -> None:
        forks = sys.platform == "linux"
        context = multiprocessing.get_context("fork") if forks else multiprocessing.get_context("spawn")
        bounds = np.linspace(0, self.num_envs, num_workers + 1).astype(int)
        for start, stop in itertools.pairwise(bounds):
            here, there = context.Pipe()
            inherited = [here, *(worker.pipe for worker in self._workers)] if forks else []
            process = context.Process(
                target=_worker,
                args=(there, inherited, env_cfg, places[start:stop], reward, lookahead),
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append(_Worker(process, here, slice(int(start), int(stop))))

    def _gather(self, name: str, timeout: float, *arguments: np.ndarray) -> list[Any]:
        """Asks every worker for its rows of the arguments, then collects the answers in order."""
        self._ask(name, *arguments)
        return self._answers(timeout)

    def _ask(self, name: str, *arguments: np.ndarray) -> None:
        try:
            for worker in self._workers:
                worker.ask(name, *(argument[worker.rows] for argument in arguments))
        except EnvironmentFailed:
            self.close()
            raise

    def _answers(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        try:
            return [worker.answer(deadline) for worker in self._workers]
        except BaseException:
            # Answers still on their way would be taken for those to the next request.
            self.close()
            raise

    def reset(self, seeds: np.ndarray) -> Observation:
        """Starts the episodes of N seeds.

        Args:
            seeds: `[N]` integers.

        Returns:
            Raw observations in the environment's own keys, `[N, ...]`; nested keys are joined by `/` (see `nested`).
        """
        seeds = self._checked(seeds, "seeds")
        if self._local is not None:
            return self._local.reset(seeds)
        return _concatenate_observations(self._gather("reset", START_TIMEOUT, seeds))

    def step(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray | None = None) -> ChunkStep:
        """Executes one chunk in every environment.

        Args:
            chunks: Actions in the environment's units, `[N, H, A]`; all H are executed unless the episode ends.
            reset_seeds: Seeds of the next episodes, `[N]`, used where one ends.
            cut: Environments whose episode ends after this chunk in any case, `[N]` bool; None is no one's.
        """
        self.send(chunks, reset_seeds, cut)
        return self.receive()

    def send(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray | None = None) -> None:
        """First half of `step`: hands the chunks out and returns at once (with workers)."""
        chunks = self._checked(chunks, "chunks")
        if chunks.ndim != 3 or chunks.shape[1] < 1:
            raise ValueError(
                f"chunks must have shape [N, H, A] with H of at least 1; got {list(chunks.shape)}"
            )
        if self._pending is not None:
            raise RuntimeError("send was called twice: receive the first result before sending again")
        reset_seeds = self._checked(reset_seeds, "reset_seeds")
        cut = self._checked(np.zeros(self.num_envs, dtype=bool) if cut is None else cut, "cut")
        if self._local is None:
            self._ask("step", chunks, reset_seeds, cut)
        self._pending = (chunks, reset_seeds, cut)

    def receive(self) -> ChunkStep:
        """Second half of `step`: waits for the results."""
        if self._pending is None:
            raise RuntimeError("nothing to receive: call send first")
        sent, self._pending = self._pending, None
        if self._local is not None:
            return self._local.step(*sent)
        return _concatenate(self._answers(self._step_timeout))

    @property
    def answers(self) -> list[Connection]:
        """Pipes of the workers, for `multiprocessing.connection.wait`: ready with an answer, or with a death."""
        return [worker.pipe for worker in self._workers]

    def _checked(self, rows: np.ndarray, name: str) -> np.ndarray:
        if not self._workers and self._local is None:
            raise RuntimeError("the environments are closed")
        rows = np.asarray(rows)
        if rows.shape[:1] != (self.num_envs,):
            raise ValueError(
                f"{name} must have {self.num_envs} rows, one per environment; got {list(rows.shape)}"
            )
        return rows

    def close(self) -> None:
        """Ends the workers and frees the environments; may be called twice."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.ask_to_end()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for worker in workers:
            worker.end(deadline)
        if self._local is not None:
            self._local.close()
            self._local = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def first_ready(vectors: Sequence[Vector], timeout: float = STEP_TIMEOUT) -> int:
    """Number of a vector whose answer to `send` has begun to come; one without workers always has.

    Args:
        vectors: Vectors that were sent chunks, at least one.
        timeout: Seconds after which the first one is named: its `receive` will say what is wrong.
    """
    owners = {pipe: number for number, vector in enumerate(vectors) for pipe in vector.answers}
    if len({*owners.values()}) < len(vectors):
        return next(number for number, vector in enumerate(vectors) if not vector.answers)
    ready = wait(list(owners), timeout)
    return min((owners[pipe] for pipe in ready), default=0)  # type: ignore[index]  # only connections were given
