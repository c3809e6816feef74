"""Turns weights into decisions: a policy that explores in a vector of environments."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lerobot.envs import EnvConfig
from lerobot.utils.constants import ACTION
from torch import Tensor

from ..algorithm.configuration_pi_rl_algorithm import CollectionConfig
from ..algorithm.decisions import DecisionBatch
from ..flow.sampler import Sample
from .environments import ChunkedVectorEnv, ChunkStep, Observation, first_ready
from .pipeline import Player
from .seeds import TRAINING_SEEDS, stream, torch_seed


@dataclass(frozen=True)
class EpisodeStatistics:
    """What the episodes that ended during one collection were like.

    Attributes:
        episodes: How many ended.
        successes: How many of them were solved.
        return_sum: Sum of their returns.
        length_sum: Sum of their lengths, in environment steps.
        env_steps: Environment steps executed, of ended and running episodes.
        seconds: How long the collection took.
    """

    episodes: int
    successes: int
    return_sum: float
    length_sum: int
    env_steps: int
    seconds: float


@dataclass(frozen=True)
class Collected:
    """One actor's quota of one iteration."""

    decisions: DecisionBatch
    statistics: EpisodeStatistics


@dataclass(frozen=True)
class _Step:
    """One decision of every environment of a group, before the rows are joined, and the episodes that it ended."""

    observation: dict[str, Tensor]
    sample: Sample
    action: Tensor
    outcome: ChunkStep
    returns: np.ndarray
    lengths: np.ndarray


class Group:
    """Some of the environments, stepped together by their own workers.

    While the worker of one group executes a chunk, the policy thinks for another.
    """

    def __init__(
        self, env_cfg: EnvConfig, number: int, first: int, num_envs: int, num_workers: int, same_start: int
    ) -> None:
        """Starts the environments.

        Args:
            env_cfg: Which environments.
            number: Number of the group.
            first: Number of the first one among those of all actors.
            num_envs: How many.
            num_workers: Processes for them.
            same_start: How many neighbouring environments begin their episodes from the same starts.
        """
        self.number, self.first, self._same_start = number, first, same_start
        self._starts: list[np.random.Generator] = []
        # Seed of each environment's next episode.
        self.next_start = np.zeros(num_envs, dtype=np.int64)
        self.envs = ChunkedVectorEnv(env_cfg, num_envs, num_workers, first=first, per_task=same_start)
        self.raw: Observation = {}
        self.episode_return = np.zeros(num_envs)
        self.episode_length = np.zeros(num_envs, dtype=np.int64)

    def reset(self, *key: int) -> None:
        """Begins a fresh episode everywhere; the key decides from which starts, now and later."""
        numbers = range(self.first, self.first + self.envs.num_envs)
        self._starts = [stream(*key, number // self._same_start) for number in numbers]
        everywhere = np.ones(self.envs.num_envs, dtype=bool)
        self._draw_starts(everywhere)
        self.raw = self.envs.reset(self.next_start)
        self._draw_starts(everywhere)
        self.episode_return[:] = 0
        self.episode_length[:] = 0

    def _draw_starts(self, where: np.ndarray) -> None:
        for place in where.nonzero()[0]:
            self.next_start[place] = self._starts[place].integers(*TRAINING_SEEDS)

    def account(self, outcome: ChunkStep) -> tuple[np.ndarray, np.ndarray]:
        """Adds a chunk to the running episodes; returns and lengths of those that ended."""
        self.episode_return += outcome.reward
        self.episode_length += outcome.executed
        ended = outcome.done
        returns, lengths = self.episode_return[ended].copy(), self.episode_length[ended].copy()
        self.episode_return[ended] = 0
        self.episode_length[ended] = 0
        self._draw_starts(ended)
        return returns, lengths


def make_groups(env_cfg: EnvConfig, collection: CollectionConfig) -> list[Group]:
    """Splits the environments into one group for each worker, or one for all without workers.

    It forks processes: call it before gRPC starts.
    """
    first = collection.actor_id * collection.num_envs
    count = max(1, min(collection.num_workers, collection.num_envs))
    bounds = np.linspace(0, collection.num_envs, count + 1).astype(int).tolist()
    workers = min(collection.num_workers, 1)
    return [
        Group(env_cfg, number, first + start, stop - start, workers, collection.group_size)
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


class Collector:
    """Collects the quota of one actor.

    What it collects is a function of the weights, the run's seed, the actor's number and the version at which the
    episodes were last restarted, and of nothing else: that is what makes a resumed run continue exactly.
    """

    def __init__(self, player: Player, groups: list[Group], collection: CollectionConfig, seed: int) -> None:
        """Prepares the collection; `restart` begins it.

        Args:
            player: The policy, whose weights are changed from outside.
            groups: The environments.
            collection: The quota.
            seed: Seed of the run.
        """
        self._player, self._groups, self._collection, self._seed = player, groups, collection, seed
        self._actions = player.policy.config.n_action_steps
        # Each group has its own randomness, so that it does not matter which one is ready first.
        self._generators = [torch.Generator(device=str(player.policy.config.device)) for _ in groups]
        self._index = 0

    @property
    def actor(self) -> int:
        """Number of the actor."""
        return self._collection.actor_id

    def restart(self, version: int) -> None:
        """Abandons all episodes and begins fresh ones, as every actor does at this version."""
        for group in self._groups:
            group.reset(self._seed, self.actor, version)

    def collect(self, version: int) -> Collected:
        """Collects the quota of decisions with the current weights.

        Args:
            version: Of the weights.

        Returns:
            The decisions, environment by environment within each step, and the episodes that ended.
        """
        began = time.perf_counter()
        for number, generator in enumerate(self._generators):
            generator.manual_seed(torch_seed(self._seed, self.actor, version, number))
        steps: list[list[_Step]] = [[] for _ in self._groups]
        for number, step in self._steps():
            steps[number].append(step)
        decisions = DecisionBatch.concatenate(
            [self._join(group, part, version) for group, part in zip(self._groups, steps, strict=True)]
        )
        self._index += self._collection.decisions
        statistics = EpisodeStatistics(
            episodes=sum(len(step.returns) for step in itertools.chain(*steps)),
            successes=int((decisions.success & (decisions.terminated | decisions.truncated)).sum()),
            return_sum=float(sum(step.returns.sum() for step in itertools.chain(*steps))),
            length_sum=int(sum(step.lengths.sum() for step in itertools.chain(*steps))),
            env_steps=decisions.steps,
            seconds=time.perf_counter() - began,
        )
        return Collected(decisions, statistics)

    def _steps(self) -> Iterator[tuple[int, _Step]]:
        """Yields every decision of every group, thinking for one while the other ones' workers act."""
        pending = [self._decide(group) for group in self._groups]
        left = [self._collection.decisions] * len(self._groups)
        while any(left):
            acting = [number for number, count in enumerate(left) if count]
            number = acting[first_ready([self._groups[one].envs for one in acting])]
            group, decided = self._groups[number], pending[number]
            outcome = group.envs.receive()
            group.raw = outcome.observation
            ended = group.account(outcome)
            left[number] -= 1
            if left[number]:
                pending[number] = self._decide(group)
            yield number, _Step(*decided, outcome, *ended)

    def _decide(self, group: Group) -> tuple[dict[str, Tensor], Sample, Tensor]:
        """Explores for one group and hands its chunks to the workers."""
        player, tasks = self._player, group.envs.tasks
        observation = player.path.from_environment(group.raw, tasks)
        sample = player.policy.explore(player.preprocess(observation, tasks), self._generators[group.number])
        action = self.to_environment(sample.x)
        group.envs.send(action[:, : self._actions].numpy(), group.next_start)
        return player.path.pack(observation), sample, action

    def to_environment(self, x: Tensor) -> Tensor:
        """Actions in the environment's units `[N, H, A]` from a normalised chunk `[N, H, D]`."""
        player = self._player
        action = player.postprocessor(x[..., : player.policy.base.real_action_dim])
        return player.path.env_postprocessor({ACTION: action})[ACTION].float().cpu()

    def _join(self, group: Group, steps: list[_Step], version: int) -> DecisionBatch:
        """Joins T steps of E environments to T * E rows."""
        envs, count = group.envs.num_envs, len(steps) * group.envs.num_envs
        rows = torch.arange(count)
        outcome = {
            name: torch.from_numpy(np.concatenate([getattr(step.outcome, name) for step in steps]))
            for name in ("reward", "executed", "terminated", "truncated", "success")
        }
        own_next = outcome["truncated"] | ((rows >= count - envs) & ~outcome["terminated"])
        return DecisionBatch(
            observation=_cat([step.observation for step in steps]),
            task=list(group.envs.tasks) * len(steps),
            chain=torch.cat([step.sample.chain for step in steps]).float().cpu(),
            step=torch.cat([step.sample.step for step in steps]).cpu(),
            log_prob=torch.cat([step.sample.log_prob for step in steps]).float().cpu(),
            action=torch.cat([step.action for step in steps]),
            version=torch.full((count,), version),
            env=group.first + rows % envs,
            index=self._index + rows // envs,
            next_row=own_next.nonzero()[:, 0],
            next_observation=self._next_observations(group, steps, own_next),
            **outcome,
        )

    def _next_observations(self, group: Group, steps: list[_Step], own_next: Tensor) -> dict[str, Tensor]:
        """Packed true last observations of the rows that carry their own."""
        finals = [step.outcome.final_observation for step in steps]
        raw = {key: np.concatenate([final[key] for final in finals]) for key in finals[0]}
        keep = own_next.numpy()
        tasks = [task for task, kept in zip(list(group.envs.tasks) * len(steps), keep, strict=True) if kept]
        path = self._player.path
        return path.pack(path.from_environment({key: value[keep] for key, value in raw.items()}, tasks))

    def close(self) -> None:
        """Ends the environments."""
        for group in self._groups:
            group.envs.close()


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
