"""Episodes from given starts: by the ODE, as the policy is deployed, or however else chunks are to be chosen."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from .collector import Group, Interrupted
from .pipeline import Player
from .pool import ChunkStep, Observation
from .seeds import torch_seed

# Chooses normalised chunks `[E, H, A]` for the preprocessed observations of E environments.
Choose = Callable[[dict[str, Tensor], torch.Generator], Tensor]

# An environment that has no start left idles in some episode.
IDLE = -1


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a set of starts, in the order of their seeds.

    Attributes:
        success: Whether each start was solved, `[n]` bool.
        length: Environment steps of each episode, `[n]` int64.
        tasks: Name of the task of each.
        known: Whether the environments say what is a success; `success` is all false where they do not.
    """

    success: np.ndarray
    length: np.ndarray
    tasks: list[str]
    known: bool = True

    @property
    def env_steps(self) -> int:
        """Environment steps executed for all of them."""
        return int(self.length.sum())


@dataclass(frozen=True)
class Turn:
    """One decision of each of E environments, and what came of it.

    Attributes:
        action: What was to be executed of the chunks, in the environment's units, `[E, n, A]`.
        outcome: What they did.
        counted: Environments that run one of the given starts, `[E]` bool; the others have none left.
        policy_seconds: From the observations to the chunks' being handed out.
        env_seconds: From there to the outcome; with several groups, it may hold the thinking for other ones.
    """

    action: np.ndarray
    outcome: ChunkStep
    counted: np.ndarray
    policy_seconds: float
    env_seconds: float


class _Share:
    """The starts of one group: environment e runs starts e, e + E, e + 2E, ... of its share, one after another.

    A start in which the environment failed is run again as its last one.
    """

    def __init__(
        self, player: Player, group: Group, seeds: np.ndarray, choose: Choose, noise: tuple[int, ...]
    ) -> None:
        self.success = np.zeros(len(seeds), dtype=bool)
        self.length = np.zeros(len(seeds), dtype=np.int64)
        self._player, self._group, self._seeds, self._choose = player, group, seeds, choose
        self._generator = torch.Generator(device=str(player.policy.config.device))
        self._generator.manual_seed(torch_seed(*map(int, seeds[:4]), len(seeds), *noise))
        envs = group.envs.num_envs
        self._left = [deque(range(first, len(seeds), envs)) for first in range(envs)]
        self._running = self._following()
        group.begin(self._start(self._running))
        self._begin(np.ones(envs, dtype=bool), self._running)
        self._next = self._running
        self._action = np.zeros(0)
        self._asked = self._sent = 0.0

    @property
    def unfinished(self) -> bool:
        """Whether a start is still running."""
        return bool((self._running != IDLE).any()) or any(self._left)

    def send(self) -> None:
        """Decides and hands the chunks to the workers."""
        self._asked = time.perf_counter()
        group = self._group
        chunks = group.choose(self._think)
        self._action = group.due(chunks, self._player.policy.config.n_action_steps)
        self._next = self._following()
        # Whoever idles ends that episode for a start that must be run again.
        waits = (self._running == IDLE) & (self._next != IDLE)
        group.envs.send(self._action, self._start(self._next), waits)
        self._sent = time.perf_counter()

    def receive(self) -> Turn:
        """Takes in what the chunks did."""
        outcome = self._group.receive(self._think)
        env_seconds = time.perf_counter() - self._sent
        counted = self._running != IDLE
        self.length[self._running[counted]] += outcome.executed[counted]
        # At any step, as LeRobot's evaluation counts it.
        self.success[self._running[counted]] |= outcome.success[counted]
        for place in (counted & outcome.failed).nonzero()[0]:
            start = self._running[place]
            self.length[start], self.success[start] = 0, False
            self._left[place].append(int(start))
        self._begin(outcome.done, self._next)
        return Turn(self._action, outcome, counted, self._sent - self._asked, env_seconds)

    def _following(self) -> np.ndarray:
        """Number of the start that each environment begins next, `[E]`."""
        return np.array([left[0] if left else IDLE for left in self._left])

    def _begin(self, where: np.ndarray, numbers: np.ndarray) -> None:
        """Notes that some environments have begun numbered starts, `[E]` each."""
        self._running = np.where(where, numbers, self._running)
        for place in (where & (numbers != IDLE)).nonzero()[0]:
            self._left[place].popleft()

    def _start(self, numbers: np.ndarray) -> np.ndarray:
        """Seeds of numbered starts; an environment that has none left idles in one of the others'."""
        return self._seeds[np.where(numbers == IDLE, 0, numbers)]

    def _think(self, raw: Observation) -> np.ndarray:
        """Chunks in the environment's units, `[E, H, A]`."""
        player, tasks = self._player, self._group.envs.tasks
        batch = player.preprocess(player.path.from_environment(raw, tasks), tasks)
        chunk = self._choose(batch, self._generator)
        action = player.path.env_postprocessor({ACTION: player.postprocessor(chunk)})[ACTION]
        return action.float().cpu().numpy()


def by_ode(player: Player) -> Choose:
    """Chooses as the policy is deployed, without exploration."""
    policy = player.policy

    def choose(batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        noise = policy.base.initial_noise(policy.base.rows(batch), generator.device, generator)
        return policy.predict_action_chunk(batch, noise=noise)

    return choose


def by_exploring(player: Player) -> Choose:
    """Chooses as an actor does, with noise."""
    policy = player.policy

    def choose(batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return policy.base.actions(policy.explore(batch, generator).x)

    return choose


def evaluate(player: Player, groups: list[Group], seeds: np.ndarray, stop: Event | None = None) -> Evaluation:
    """Runs one episode from each start, by the ODE.

    The environments are left in the middle of episodes; the caller restarts them.

    Args:
        player: The policy.
        groups: The environments; each takes its share of the starts.
        seeds: Seeds of the starts, `[n]`.
        stop: Set from outside to stop between two decisions.

    Returns:
        The outcome of each start.

    Raises:
        Interrupted: If it was asked to stop.
    """
    return play(player, groups, seeds, by_ode(player), stop=stop)


def play(
    player: Player,
    groups: list[Group],
    seeds: np.ndarray,
    choose: Choose,
    *,
    noise: tuple[int, ...] = (),
    watch: Callable[[Turn], None] = lambda turn: None,
    stop: Event | None = None,
) -> Evaluation:
    """Runs one episode from each start.

    Start i always runs in the same environment, however many starts follow, so that it has the same task.

    Args:
        player: The policy.
        groups: The environments; each takes its share of the starts.
        seeds: Seeds of the starts, `[n]`.
        choose: Chooses the chunks.
        noise: Names the noise: other numbers give other noise from the same starts.
        watch: Called with every decision of every group.
        stop: Set from outside to stop between two decisions.

    Returns:
        The outcome of each start.

    Raises:
        Interrupted: If it was asked to stop.
    """
    places = [np.arange(number, len(seeds), len(groups)) for number in range(len(groups))]
    shares = {
        number: _Share(player, groups[number], seeds[place], choose, noise)
        for number, place in enumerate(places)
        if len(place)
    }
    while any(share.unfinished for share in shares.values()):
        if stop is not None and stop.is_set():
            raise Interrupted
        working = [share for share in shares.values() if share.unfinished]
        for share in working:
            share.send()
        for share in working:
            watch(share.receive())
    success, length = np.zeros(len(seeds), dtype=bool), np.zeros(len(seeds), dtype=np.int64)
    for number, share in shares.items():
        success[places[number]], length[places[number]] = share.success, share.length
    tasks = [_task(groups, start) for start in range(len(seeds))]
    return Evaluation(success, length, tasks, groups[0].reports.known)


def _task(groups: list[Group], start: int) -> str:
    """Name of the task of a numbered start: the groups take starts in turn, and so do the environments of each."""
    place, number = divmod(start, len(groups))
    names = groups[number].envs.names
    return names[place % len(names)]
