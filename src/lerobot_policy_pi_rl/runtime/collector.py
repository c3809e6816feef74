"""Turns weights into decisions: a policy that explores in a vector of environments."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
from lerobot.envs import EnvConfig
from lerobot.envs.configs import HILSerlRobotEnvConfig
from lerobot.utils.constants import ACTION
from torch import Tensor

from ..algorithm.configuration_pi_rl_algorithm import CollectionConfig
from ..algorithm.decisions import DecisionBatch
from ..algorithm.demonstrations import DemonstrationBatch
from ..errors import config_error
from ..flow.sampler import Sample
from .control import ControlStatistics
from .environments import ChunkedVectorEnv, Vector, first_ready
from .pipeline import Player
from .pool import ChunkStep, Observation
from .robots import RobotVector, is_robot
from .seeds import TRAINING_SEEDS, stream, torch_seed
from .tasks import count_by_task, deal
from .workers import EnvironmentFailed

logger = logging.getLogger(__name__)

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2

T = TypeVar("T")


@dataclass(frozen=True)
class EpisodeStatistics:
    """What the episodes were like whose time limit has passed during one collection, however long they took.

    Counted when they end, the short ones would come first after a restart, and those are mostly solved. An episode that
    is cut on demand does not count, nor does one whose environment failed. Without a time limit one counts at its end.

    Attributes:
        ended: How many episodes ended, counted or not.
        episodes: How many count.
        judged: Of how many of these it is known whether they were solved: of all, or of none.
        successes: How many of them were solved.
        return_sum: Sum of the returns of those that count.
        length_sum: Sum of their lengths, in environment steps.
        env_steps: Environment steps executed, of ended and running episodes.
        seconds: How long the collection took.
    """

    ended: int
    episodes: int
    judged: int
    successes: int
    return_sum: float
    length_sum: int
    env_steps: int
    seconds: float


class Interrupted(Exception):
    """The actor was asked to leave while it collected."""


@dataclass(frozen=True)
class Collected:
    """One actor's quota of one iteration.

    Attributes:
        decisions: The policy's.
        statistics: Of the episodes.
        by_task: Episodes and successes of each task, as `count_by_task` counts them.
        control: How a robot was controlled; None in plain simulation.
        demonstrations: What people did since the quota before, validation included; None if they did nothing.
    """

    decisions: DecisionBatch
    statistics: EpisodeStatistics
    by_task: dict[str, int]
    control: ControlStatistics | None
    demonstrations: DemonstrationBatch | None


@dataclass(frozen=True)
class _Episode:
    """An episode that has ended.

    Attributes:
        total: Its return.
        length: In environment steps.
        solved: Whether it was a success.
        name: Of its task.
        due: Decision of its environment, counted since the restart, by which it must have ended.
    """

    total: float
    length: int
    solved: bool
    name: str
    due: int


@dataclass(frozen=True)
class _Step:
    """One decision of every environment of a group, before the rows are joined.

    Attributes:
        tasks: Task text of each environment when it decided.
        ended: How many episodes ended in it by themselves.
        counted: Episodes that count from now on.
    """

    observation: dict[str, Tensor]
    sample: Sample
    action: Tensor
    delay: np.ndarray
    tasks: list[str]
    outcome: ChunkStep
    ended: int
    counted: list[_Episode]

    def cut(self) -> "_Step":
        """The same, but with what came after it in a person's hands."""
        return replace(self, outcome=replace(self.outcome, taken_over=~self.outcome.done))


class SuccessReports:
    """Whether the environments of an actor say which episodes were solved.

    One report is enough to take silence for a failure: some environments only say where a task was solved. Silence in
    as many episodes as there are environments is taken for silence for ever.

    Attributes:
        known: Whether there was a report.
    """

    def __init__(self, collection: CollectionConfig) -> None:
        """Nothing was said yet.

        Args:
            collection: How many environments there are, and which settings read success.
        """
        self.known = False
        self._silent, self._patience = 0, collection.num_envs
        self._needed_by = [
            name
            for name, needed in (
                ("algorithm.collection.reward=success", collection.reward == "success"),
                (f"algorithm.collection.task_focus={collection.task_focus:g}", collection.task_focus > 0),
            )
            if needed
        ]

    def take(self, outcome: ChunkStep) -> None:
        """Looks at what environments did.

        Raises:
            EnvironmentFailed: There is no success, and a setting reads it.
        """
        if self.known:
            return
        judged = outcome.done & ~outcome.failed & (outcome.unjudged == "")
        # A chunk that a person has ended says nothing.
        self.known = bool((outcome.success | (judged & ~outcome.taken_over)).any())
        silent = outcome.unjudged[outcome.unjudged != ""]
        before, self._silent = self._silent, self._silent + len(silent)
        if self.known or not before < self._patience <= self._silent:
            return
        found = (
            f"{self._silent} episodes ended and none said whether its task was solved (info['is_success'], ['success'] "
            f"or ['succeed'], also in ['final_info']); the last info had: {silent[-1]}"
        )
        if self._needed_by:
            raise EnvironmentFailed(
                f"{found}; {' and '.join(self._needed_by)} cannot work without: add info['is_success'] in a wrapper, "
                "or train on the environment's reward (algorithm.collection.reward=environment, task_focus=0)"
            )
        logger.warning(
            "%s; training goes on by the environment's reward, without success, validation and a best checkpoint: "
            "add info['is_success'] in a wrapper to have them",
            found,
        )


class Group:
    """Some of the environments, stepped together by their own workers.

    While the worker of one group executes a chunk, the policy thinks for another.
    """

    def __init__(
        self,
        env_cfg: EnvConfig,
        collection: CollectionConfig,
        number: int,
        first: int,
        num_envs: int,
        num_workers: int,
        same_start: int,
        reports: SuccessReports,
        device: str = "cpu",
        stop: Event | None = None,
    ) -> None:
        """Starts the environments.

        Args:
            env_cfg: Which environments.
            collection: What their steps are worth, and how far ahead is looked.
            number: Number of the group.
            first: Number of the first one among those of all actors.
            num_envs: How many.
            num_workers: Processes for them.
            same_start: How many neighbouring environments begin their episodes from the same starts.
            reports: Whether the actor's environments tell success.
            device: Where a robot's reward classifier computes.
            stop: Set from outside to end a robot's chunk at the next step.
        """
        self.number, self.first, self._same_start, self.reports = number, first, same_start, reports
        self._starts: list[np.random.Generator] = []
        # Seed of each environment's next episode.
        self.next_start = np.zeros(num_envs, dtype=np.int64)
        self.envs: Vector
        if isinstance(env_cfg, HILSerlRobotEnvConfig):
            self.envs = RobotVector(env_cfg, device, collection.lookahead_steps, stop)
        else:
            self.envs = ChunkedVectorEnv(
                env_cfg,
                num_envs,
                num_workers,
                first=first,
                per_task=same_start,
                reward=collection.reward,
                lookahead=collection.lookahead_steps,
            )
        # Decisions after which a running episode is cut on demand, counted down; 0 is never.
        self._cut_after = np.zeros(num_envs, dtype=np.int64)
        # Decisions since the restart, the one at which each running episode began, and the most that it can take; 0 is
        # without a limit.
        self._decision = 0
        self._began, self._longest = np.zeros((2, num_envs), dtype=np.int64)
        # Episodes that have ended before they must.
        self._ended: list[_Episode] = []
        # What to act on next, and how many steps old that is.
        self.raw: Observation = {}
        self.delay = np.zeros(num_envs, dtype=np.int64)
        self.episode_return = np.zeros(num_envs)
        # As LeRobot's evaluation counts it: an environment may report success and go on.
        self.episode_success = np.zeros(num_envs, dtype=bool)
        self.episode_length = np.zeros(num_envs, dtype=np.int64)

    def reset(self, *key: int, steps: int) -> None:
        """Begins a fresh episode everywhere.

        All episodes would run in step from then on, so that an iteration sees only a part of the task. So the first
        episode of each environment is cut after another part of the time limit; except with groups of episodes from
        the same start, which are compared whole.

        Args:
            key: Decides from which starts, now and later.
            steps: Environment steps per decision.
        """
        numbers = range(self.first, self.first + self.envs.num_envs)
        self._starts = [stream(*key, number // self._same_start) for number in numbers]
        everywhere = np.ones(self.envs.num_envs, dtype=bool)
        self._draw_starts(everywhere)
        self.begin(self.next_start)
        self._draw_starts(everywhere)
        self._cut_after[:] = 0
        if self._same_start == 1:
            # Multiples of the golden ratio, modulo 1, are spread evenly, however many there are.
            parts = np.array(numbers) * GOLDEN_RATIO % 1
            self._cut_after[:] = parts * (self.envs.time_limits // steps)
        self.episode_return[:] = 0
        self.episode_success[:] = False
        self.episode_length[:] = 0
        self._decision, self._began[:] = 0, 0
        self._longest = -(-self.envs.time_limits // steps)
        self._ended.clear()

    def begin(self, seeds: np.ndarray) -> None:
        """Begins the episodes of seeds `[E]`."""
        self.raw = self.envs.reset(seeds)
        self.delay = np.zeros(self.envs.num_envs, dtype=np.int64)

    def deal(self, numbers: np.ndarray) -> None:
        """Gives each environment the task of a number, `[E]`; `reset` must follow."""
        assert isinstance(self.envs, ChunkedVectorEnv)
        self.envs.deal(numbers)

    def choose(self, think: Callable[[Observation], T]) -> T:
        """What `think` says of what is to be acted on, from a robot's other thread where it was asked ahead."""
        thought: T | None = self.envs.thought() if isinstance(self.envs, RobotVector) else None
        return think(self.raw) if thought is None else thought

    def send(self, chunks: np.ndarray) -> None:
        """Hands the parts `[E, n, A]` of chunks that are to be executed to the workers."""
        self.envs.send(chunks, self.next_start, self._cut_after == 1)

    def due(self, chunks: np.ndarray, steps: int) -> np.ndarray:
        """The actions of chunks `[E, H, A]` to execute now, `[E, steps, A]`: not those of steps taken meanwhile."""
        return np.stack(
            [chunk[first : first + steps] for chunk, first in zip(chunks, self.delay, strict=True)]
        )

    def receive(self, think: Callable[[Observation], Any] | None) -> ChunkStep:
        """Waits for what the chunks did.

        Args:
            think: What will be given to `choose` next; None where nothing will be chosen before a pause. A robot with
                a lookahead calls it in a thread while it moves.
        """
        outcome = self.envs.receive(think) if isinstance(self.envs, RobotVector) else self.envs.receive()
        self.raw, self.delay = outcome.observation, outcome.delay
        self.reports.take(outcome)
        return outcome

    def _draw_starts(self, where: np.ndarray) -> None:
        for place in where.nonzero()[0]:
            self.next_start[place] = self._starts[place].integers(*TRAINING_SEEDS)

    def account(self, outcome: ChunkStep) -> tuple[int, list[_Episode]]:
        """Adds a chunk to the running episodes.

        Returns:
            How many ended by themselves, and those that count from now on, since their time limit has passed.
        """
        self._decision += 1
        self.episode_return += outcome.reward
        self.episode_success |= outcome.success
        self.episode_length += outcome.executed
        done = outcome.done
        ended = done & ~outcome.failed & ~((self._cut_after == 1) & outcome.truncated)
        # An episode that will be cut counts only if it is short, so it does not count at all.
        for place in (ended & (self._cut_after == 0)).nonzero()[0]:
            self._ended.append(
                _Episode(
                    float(self.episode_return[place]),
                    int(self.episode_length[place]),
                    bool(self.episode_success[place]),
                    self.envs.names[place],
                    int(self._began[place] + self._longest[place]),
                )
            )
        counted = [episode for episode in self._ended if episode.due <= self._decision]
        self._ended = [episode for episode in self._ended if episode.due > self._decision]
        self.episode_return[done] = 0
        self.episode_success[done] = False
        self.episode_length[done] = 0
        self._began[done] = self._decision
        self._cut_after[:] = np.where(done, 0, np.maximum(self._cut_after - 1, 0))
        self._draw_starts(done)
        return int(ended.sum()), counted


def make_groups(
    env_cfg: EnvConfig, collection: CollectionConfig, device: str = "cpu", stop: Event | None = None
) -> list[Group]:
    """Splits the environments into one group for each worker, or one for all without workers.

    It forks processes: call it before gRPC starts.

    Args:
        env_cfg: Which environments.
        collection: How many, and how they are spread.
        device: Where a robot's reward classifier computes.
        stop: Set from outside to end a robot's chunk, or what a person does, at the next step.

    Raises:
        ConfigError: If they are too few for the tasks to be dealt by their success.
    """
    groups = _split(env_cfg, collection, collection.num_envs, collection.group_size, device, stop)
    tasks, places = groups[0].envs.num_tasks, collection.num_envs // collection.group_size
    if collection.task_focus > 0 and places < tasks:
        for group in groups:
            group.envs.close()
        raise config_error(
            "algorithm.collection.task_focus",
            f"deals environments to {tasks} tasks, each needs one: set collection.num_envs to at least "
            f"{tasks * collection.group_size}, or the focus to 0",
        )
    return groups


def make_eval_groups(
    env_cfg: EnvConfig, collection: CollectionConfig, reports: SuccessReports | None = None
) -> list[Group]:
    """The same for the environments of validation alone; none if there are none.

    Args:
        env_cfg: Which environments.
        collection: How many, and how they are spread.
        reports: What the actor's other environments have told of success.
    """
    return (
        _split(env_cfg, collection, collection.eval_envs, 1, reports=reports) if collection.eval_envs else []
    )


def _split(
    env_cfg: EnvConfig,
    collection: CollectionConfig,
    num_envs: int,
    same_start: int,
    device: str = "cpu",
    stop: Event | None = None,
    reports: SuccessReports | None = None,
) -> list[Group]:
    reports = reports or SuccessReports(collection)
    first = collection.actor_id * num_envs
    count = max(1, min(collection.num_workers, num_envs))
    bounds = np.linspace(0, num_envs, count + 1).astype(int).tolist()
    workers = min(collection.num_workers, 1)
    groups = [
        Group(
            env_cfg,
            collection,
            number,
            first + start,
            end - start,
            workers,
            same_start,
            reports,
            device,
            stop,
        )
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    if not is_robot(env_cfg):
        _check_time_limits(env_cfg, groups)
    return groups


def _check_time_limits(env_cfg: EnvConfig, groups: list[Group]) -> None:
    """Checks that every episode ends: one that is never solved would keep validation waiting for ever.

    Raises:
        ConfigError: If one may not; the environments are closed.
    """
    limits = [
        limit for group in groups for limit in zip(group.envs.names, group.envs.time_limits, strict=True)
    ]
    endless = sorted({task for task, limit in limits if not limit})
    if not endless:
        return
    for group in groups:
        group.envs.close()
    if hasattr(env_cfg, "episode_length"):
        name, fix = "env.episode_length", "set it to the steps after which an episode is cut"
    else:
        name = "env.type"
        fix = "register the environment with max_episode_steps, or give its configuration a field episode_length"
    raise config_error(
        name,
        f"{env_cfg.type!r} has no time limit (task {endless[0]!r}), so validation might never end; {fix}",
    )


class Collector:
    """Collects the quota of one actor.

    What it collects is a function of the weights, the run's seed, the actor's number, the version at which the
    episodes were last restarted and the quotas since, and of nothing else: that is what makes a resumed run continue
    exactly.
    """

    def __init__(
        self,
        player: Player,
        groups: list[Group],
        collection: CollectionConfig,
        seed: int,
        stop: Event | None = None,
    ) -> None:
        """Prepares the collection; `restart` begins it.

        Args:
            player: The policy, whose weights are changed from outside.
            groups: The environments.
            collection: The quota.
            seed: Seed of the run.
            stop: Set from outside to stop between two decisions: a robot should not go on to the end of a quota.
        """
        self._stop = stop or Event()
        self._player, self._groups, self._collection, self._seed = player, groups, collection, seed
        self._actions = player.policy.config.n_action_steps
        # Each group has its own randomness, so that it does not matter which one is ready first.
        self._generators = [torch.Generator(device=str(player.policy.config.device)) for _ in groups]
        self._index = 0
        # Names of the tasks by number; all of them are there before the environments are dealt anew.
        names = {
            n: name for group in groups for n, name in zip(group.envs.numbers, group.envs.names, strict=True)
        }
        self._tasks = [names[number] for number in sorted(names)]

    @property
    def actor(self) -> int:
        """Number of the actor."""
        return self._collection.actor_id

    def focus(self, shares: Mapping[str, float]) -> None:
        """Deals the environments to the tasks anew; `restart` must follow.

        Args:
            shares: How large a part of all actors' environments each task gets, by its name.
        """
        collection = self._collection
        units = collection.num_envs // collection.group_size
        # None of a task's episodes has ended yet: it is as hard as the hardest.
        wanted = np.array([shares.get(task, max(shares.values())) for task in self._tasks])
        numbers = deal(wanted / wanted.sum(), units * collection.num_actors)
        # An actor beyond the configured number takes its part from the beginning again.
        mine = np.roll(numbers, -collection.actor_id * units)[:units].repeat(collection.group_size)
        first = 0
        for group in self._groups:
            group.deal(mine[first : first + group.envs.num_envs])
            first += group.envs.num_envs

    def restart(self, version: int, part: int = 0) -> None:
        """Abandons all episodes and begins fresh ones, as every actor does at this version.

        Args:
            version: Of the weights.
            part: As in `collect`.
        """
        for group in self._groups:
            group.reset(self._seed, self.actor, version, *([part] if part else []), steps=self._actions)

    def collect(self, version: int, part: int = 0) -> Collected:
        """Collects a quota of decisions with the current weights.

        Args:
            version: Of the weights.
            part: How many quotas were collected with this version before.

        Returns:
            The decisions, environment by environment within each step, and the episodes that ended.

        Raises:
            Interrupted: If it was asked to stop.
        """
        began = time.perf_counter()
        for number, generator in enumerate(self._generators):
            generator.manual_seed(
                torch_seed(self._seed, self.actor, version, number + part * len(self._groups))
            )
        steps: list[list[_Step]] = [[] for _ in self._groups]
        ended, counted = 0, list[_Episode]()
        for number, step in self._steps():
            ended, counted = ended + step.ended, counted + step.counted
            if step.outcome.executed.any() or step.outcome.failed.any():
                steps[number].append(step)
            elif steps[number]:
                # A person took over before anything of the decision was executed: it never happened.
                steps[number][-1] = steps[number][-1].cut()
        decisions = DecisionBatch.concatenate(
            [self._join(group, part, version) for group, part in zip(self._groups, steps, strict=True)]
        )
        self._index += max(len(part) for part in steps)
        known = self._groups[0].reports.known
        returns = [episode.total for episode in counted]
        statistics = EpisodeStatistics(
            ended=ended,
            episodes=len(counted),
            judged=len(counted) if known else 0,
            successes=sum(episode.solved for episode in counted),
            # One that is not finite would not cross the wire; the learner drops and counts its decision.
            return_sum=float(sum(total for total in returns if math.isfinite(total))),
            length_sum=sum(episode.length for episode in counted),
            env_steps=decisions.steps,
            seconds=time.perf_counter() - began,
        )
        solved = np.array([episode.solved for episode in counted], dtype=bool)
        names = [episode.name for episode in counted]
        # The learner knows tasks by the texts of decisions; where each episode has its own, nothing is told by task.
        tells = known and set(names) <= set(decisions.task)
        by_task = count_by_task(names, solved) if tells else {}
        # A robot is the only environment of its actor.
        envs = self._groups[0].envs
        if not isinstance(envs, RobotVector):
            return Collected(decisions, statistics, by_task, None, None)
        return Collected(decisions, statistics, by_task, envs.take_statistics(), self.take_demonstrations())

    @property
    def failures(self) -> int:
        """Episodes that were dropped since their environment failed."""
        return sum(group.envs.failures for group in self._groups)

    @property
    def unkept_steps(self) -> int:
        """Steps that people took on a robot and that are not kept, since it was connected."""
        return sum(group.envs.unkept_steps for group in self._groups if isinstance(group.envs, RobotVector))

    def take_demonstrations(self) -> DemonstrationBatch | None:
        """What people did since the last time, as it crosses the wire; None if they did nothing, or without a robot."""
        robot = self._groups[0].envs
        if not isinstance(robot, RobotVector):
            return None
        path, parts = self._player.path, []
        for intervention in robot.take_interventions():
            count = len(intervention.action)
            last, tasks = torch.zeros(count, dtype=torch.bool), robot.tasks * count
            last[-1] = True
            observation = path.pack(path.from_environment(intervention.observation, tasks))
            parts.append(DemonstrationBatch(observation, tasks, torch.from_numpy(intervention.action), last))
        return DemonstrationBatch.concatenate(parts) if parts else None

    def _steps(self) -> Iterator[tuple[int, _Step]]:
        """Yields every decision of every group, thinking for one while the other ones' workers act."""
        pending = [self._decide(group) for group in self._groups]
        left = [self._collection.decisions] * len(self._groups)
        while any(left):
            acting = [number for number, count in enumerate(left) if count]
            number = acting[first_ready([self._groups[one].envs for one in acting])]
            group, decided = self._groups[number], pending[number]
            # The weights change after a quota, and with them the policy: nothing is chosen ahead then.
            outcome = group.receive(partial(self._think, group) if left[number] > 1 else None)
            ended, counted = group.account(outcome)
            if self._stop.is_set():
                raise Interrupted
            left[number] -= int(outcome.executed.any())
            if left[number]:
                pending[number] = self._decide(group)
            yield number, _Step(*decided, outcome, ended, counted)

    def _decide(self, group: Group) -> tuple[dict[str, Tensor], Sample, Tensor, np.ndarray, list[str]]:
        """Explores for one group and hands its chunks to the workers."""
        observation, sample, action = group.choose(partial(self._think, group))
        delay, tasks = group.delay, list(group.envs.tasks)
        group.send(group.due(action.numpy(), self._actions))
        return observation, sample, action, delay, tasks

    def _think(self, group: Group, raw: Observation) -> tuple[dict[str, Tensor], Sample, Tensor]:
        """Explores for what one group has seen: the packed observation, what was recorded, and the chunks."""
        player, tasks = self._player, group.envs.tasks
        observation = player.path.from_environment(raw, tasks)
        sample = player.policy.explore(player.preprocess(observation, tasks), self._generators[group.number])
        return player.path.pack(observation), sample, self.to_environment(sample.x)

    def to_environment(self, x: Tensor) -> Tensor:
        """Actions in the environment's units `[N, H, A]` from a normalised chunk `[N, H, D]`."""
        player = self._player
        action = player.postprocessor(player.policy.base.actions(x))
        return player.path.env_postprocessor({ACTION: action})[ACTION].float().cpu()

    def _join(self, group: Group, steps: list[_Step], version: int) -> DecisionBatch:
        """Joins T steps of E environments to T * E rows, without those whose environment failed.

        A row that is missing keeps its index, so the one before it is known to have lost what followed.
        """
        envs, count = group.envs.num_envs, len(steps) * group.envs.num_envs
        rows = torch.arange(count)
        outcome = {
            name: torch.from_numpy(np.concatenate([getattr(step.outcome, name) for step in steps]))
            for name in ("reward", "executed", "terminated", "truncated", "success", "taken_over")
        }
        outcome["truncated"] |= outcome.pop("taken_over")
        own_next = outcome["truncated"] | ((rows >= count - envs) & ~outcome["terminated"])
        joined = DecisionBatch(
            observation=_cat([step.observation for step in steps]),
            task=[task for step in steps for task in step.tasks],
            chain=torch.cat([step.sample.chain for step in steps]).float().cpu(),
            step=torch.cat([step.sample.step for step in steps]).cpu(),
            log_prob=torch.cat([step.sample.log_prob for step in steps]).float().cpu(),
            action=torch.cat([step.action for step in steps]),
            delay=torch.from_numpy(np.concatenate([step.delay for step in steps])),
            version=torch.full((count,), version),
            env=group.first + rows % envs,
            index=self._index + rows // envs,
            next_row=own_next.nonzero()[:, 0],
            next_observation=self._next_observations(steps, own_next),
            **outcome,
        )
        executed = joined.executed > 0
        return joined if bool(executed.all()) else joined.select(executed.nonzero()[:, 0])

    def _next_observations(self, steps: list[_Step], own_next: Tensor) -> dict[str, Tensor]:
        """Packed true last observations of the rows that carry their own."""
        finals = [step.outcome.final_observation for step in steps]
        raw = {key: np.concatenate([final[key] for final in finals]) for key in finals[0]}
        keep = own_next.numpy()
        texts = (task for step in steps for task in step.tasks)
        tasks = [task for task, kept in zip(texts, keep, strict=True) if kept]
        path = self._player.path
        return path.pack(path.from_environment({key: value[keep] for key, value in raw.items()}, tasks))

    def close(self) -> None:
        """Ends the environments."""
        for group in self._groups:
            group.envs.close()


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
