"""A vector of environments that execute whole chunks in worker processes: one round trip per decision.

The policy decides once per chunk, so that is how often the parent and its workers talk. A worker executes the chunk
until it is used up or the episode ends, and resets in the same trip.
"""

import contextlib
import itertools
import logging
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from lerobot.envs.configs import EnvConfig

from .pool import (
    ChunkStep,
    EnvDescription,
    Observation,
    Pool,
    concatenate,
    concatenate_observations,
    failed_step,
)
from .tasks import check_text
from .workers import CLOSE_TIMEOUT, EnvironmentFailed, Worker, WorkerLost, work

logger = logging.getLogger(__name__)

# Seconds. Loading a simulator on a busy machine takes tens of seconds; a chunk takes milliseconds, except with
# software rendering.
START_TIMEOUT = 300.0
STEP_TIMEOUT = 300.0
# Failures of environments and workers within `FAILURE_SECONDS` that are mended; the next one ends the actor.
MAX_FAILURES, FAILURE_SECONDS = 10, 3600.0
# Failure of environments whose worker was replaced.
REPLACED = "the worker was lost"


class Vector(Protocol):
    """N environments that execute whole chunks, wherever they live."""

    num_envs: int
    num_tasks: int
    numbers: np.ndarray
    names: list[str]
    tasks: list[str]
    time_limits: np.ndarray
    failures: int

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

    An environment that raises, and a worker that dies or is stuck, is replaced: the running episodes are dropped and
    the next ones begin, see `ChunkStep.failure`. A worker that replaces another one is spawned: threads of gRPC may
    be running by then.

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
        names: Name of each environment's task, the same in every episode.
        tasks: Task text of the episode that each environment is in; known after a reset.
        numbers: Number of the task of each among those of the configuration, `[N]`.
        num_tasks: How many tasks the configuration has.
        time_limits: Steps after which its episodes are truncated, `[N]` int64: the smaller one of the configuration's
            (`episode_length`) and the environment's own; 0 is never.
        failures: Episodes that were dropped, since the environment or its worker failed.

    Raises:
        ValueError: N < 1 or W < 0.
        EnvironmentFailed: An environment cannot be made or reset, or failures are too frequent; the vector is closed.
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
        self.num_envs, self._first = num_envs, first
        self._step_timeout = step_timeout
        self._workers: list[Worker] = []
        self._local: Pool | None = None
        self._pending: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.failures = 0
        # When something failed and was replaced, by the monotonic clock.
        self._replaced_at: deque[float] = deque(maxlen=MAX_FAILURES + 1)
        self._places = [number // per_task for number in range(first, first + num_envs)]
        self._made_of = (env_cfg, reward, lookahead)
        if num_workers == 0:
            self._local = Pool(env_cfg, self._places, reward, lookahead)
            self._describe(self._local.described())
        else:
            self._start(min(num_workers, num_envs))
            self._ask("described")
            self._describe(itertools.chain(*self._answers(START_TIMEOUT)))
        self.tasks = self.names

    def _describe(self, described: Iterable[EnvDescription]) -> None:
        known = list(described)
        self.num_tasks = known[0].num_tasks
        self.numbers = np.array([one.number for one in known])
        self.names = [one.task for one in known]
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
            self._describe(itertools.chain(*self._gather("deal", numbers)))
        self.tasks = self.names

    def _start(self, num_workers: int) -> None:
        bounds = np.linspace(0, self.num_envs, num_workers + 1).astype(int)
        for start, stop in itertools.pairwise(bounds):
            self._workers.append(self._launch(slice(int(start), int(stop)), forks=sys.platform == "linux"))

    def _launch(self, rows: slice, forks: bool) -> Worker:
        """Starts a worker for some of the environments."""
        context = multiprocessing.get_context("fork") if forks else multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        inherited = [here, *(worker.pipe for worker in self._workers)] if forks else []
        env_cfg, *others = self._made_of
        process = context.Process(
            target=work, args=(there, inherited, env_cfg, self._places[rows], *others), daemon=True
        )
        process.start()
        there.close()
        return Worker(process, here, rows)

    def _ask(self, name: str, *arguments: np.ndarray) -> None:
        """Asks every worker about its rows of the arguments; of one that is lost, `_answers` learns it as well."""
        for worker in self._workers:
            with contextlib.suppress(WorkerLost):
                worker.ask(name, *(argument[worker.rows] for argument in arguments))

    def _answers(self, timeout: float, instead: Callable[[int, WorkerLost], Any] | None = None) -> list[Any]:
        """Collects the answers in order.

        Args:
            timeout: Seconds that the workers get.
            instead: Gives the answer of a worker, by its number, that is lost; None where that is an error.
        """
        deadline = time.monotonic() + timeout
        answers = []
        try:
            for number, worker in enumerate(self._workers):
                try:
                    answers.append(worker.answer(deadline))
                except WorkerLost as lost:
                    if instead is None:
                        raise
                    answers.append(instead(number, lost))
        except BaseException:
            # Answers still on their way would be taken for those to the next request.
            self.close()
            raise
        return answers

    def _gather(self, name: str, *arguments: np.ndarray) -> list[Any]:
        """Asks every worker about its rows of the arguments, and one that takes the place of a lost worker again."""

        def again(number: int, lost: WorkerLost) -> Any:
            worker = self._replace(number, lost)
            worker.ask(name, *(argument[worker.rows] for argument in arguments))
            return worker.answer(time.monotonic() + START_TIMEOUT)

        self._ask(name, *arguments)
        return self._answers(START_TIMEOUT, again)

    def _replace(self, number: int, lost: WorkerLost) -> Worker:
        """Starts another worker in the place of one that is lost, with the same environments."""
        before = self._workers[number]
        self._note_failure(str(lost), before.rows.stop - before.rows.start)
        before.process.kill()
        self._workers[number] = worker = self._launch(before.rows, forks=False)
        before.end(time.monotonic() + CLOSE_TIMEOUT)
        worker.ask("deal", self.numbers[before.rows])
        worker.answer(time.monotonic() + START_TIMEOUT)
        return worker

    def _note_failure(self, failure: str, episodes: int) -> None:
        """Counts something that is replaced.

        Raises:
            EnvironmentFailed: It happens too often.
        """
        self.failures += episodes
        self._replaced_at.append(time.monotonic())
        recent = sum(self._replaced_at[-1] - at < FAILURE_SECONDS for at in self._replaced_at)
        if recent > MAX_FAILURES:
            self.close()
            raise EnvironmentFailed(
                f"environments failed {recent} times within an hour, the last time: {failure}; what fails "
                f"{MAX_FAILURES} times is not replaced any more: find out why it fails"
            )
        logger.warning(
            "%s; %d running episode(s) dropped, environment(s) made anew (%d of at most %d times an hour)",
            failure,
            episodes,
            recent,
            MAX_FAILURES,
        )

    def reset(self, seeds: np.ndarray) -> Observation:
        """Starts the episodes of N seeds.

        Args:
            seeds: `[N]` integers.

        Returns:
            Raw observations in the environment's own keys, `[N, ...]`; nested keys are joined by `/` (see `nested`).
        """
        seeds = self._checked(seeds, "seeds")
        parts = [self._local.reset(seeds)] if self._local is not None else self._gather("reset", seeds)
        self._take_tasks([task for _, tasks in parts for task in tasks])
        return concatenate_observations([observation for observation, _ in parts])

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
            step = self._local.step(*sent)
        else:
            step = concatenate(self._answers(self._step_timeout, partial(self._begin_anew, sent[1])))
        for number in (step.failed & (step.failure != REPLACED)).nonzero()[0]:
            self._note_failure(f"environment {self._first + number} failed: {step.failure[number]}", 1)
        self._take_tasks(step.task.tolist())
        return step

    def _begin_anew(self, reset_seeds: np.ndarray, number: int, lost: WorkerLost) -> ChunkStep:
        """What a lost worker's environments have done: their next episodes begin in another one's."""
        worker = self._replace(number, lost)
        worker.ask("reset", reset_seeds[worker.rows])
        observation, tasks = worker.answer(time.monotonic() + START_TIMEOUT)
        return failed_step(observation, tasks, REPLACED)

    def _take_tasks(self, tasks: list[str]) -> None:
        """Notes the task texts of the running episodes.

        Raises:
            EnvironmentFailed: One is too long to reach the learner.
        """
        try:
            for task in tasks:
                check_text(task)
        except EnvironmentFailed:
            self.close()
            raise
        self.tasks = tasks

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
