"""Success of the policy as it is deployed: the ODE, without exploration."""

from dataclasses import dataclass

import numpy as np
import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from .collector import Group
from .pipeline import Player
from .seeds import torch_seed


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a set of starts.

    Attributes:
        success: Whether each start was solved, in the order of the seeds, `[n]` bool.
        env_steps: Environment steps executed for them.
    """

    success: np.ndarray
    env_steps: int


class _Share:
    """The starts of one group: environment e runs starts e, e + E, e + 2E, ... of its share, one after another."""

    def __init__(self, player: Player, group: Group, seeds: np.ndarray) -> None:
        self.success = np.zeros(len(seeds), dtype=bool)
        self.env_steps = 0
        self._player, self._envs, self._seeds = player, group.envs, seeds
        self._generator = torch.Generator(device=str(player.policy.config.device))
        self._generator.manual_seed(torch_seed(*map(int, seeds[:4]), len(seeds)))
        self._running = np.arange(group.envs.num_envs)
        self._raw = group.envs.reset(self._start(self._running))

    @property
    def unfinished(self) -> bool:
        """Whether a start is still running."""
        return bool((self._running < len(self._seeds)).any())

    def send(self) -> None:
        """Decides and hands the chunks to the workers."""
        tasks = self._envs.tasks
        observation = self._player.path.from_environment(self._raw, tasks)
        chunks = self._chunks(self._player.preprocess(observation, tasks))
        self._envs.send(chunks, self._start(self._running + self._envs.num_envs))

    def receive(self) -> None:
        """Takes in what the chunks did."""
        outcome = self._envs.receive()
        counted = self._running < len(self._seeds)
        self.env_steps += int(outcome.executed[counted].sum())
        ended = outcome.done & counted
        self.success[self._running[ended]] = outcome.success[ended]
        self._running[outcome.done] += self._envs.num_envs
        self._raw = outcome.observation

    def _start(self, numbers: np.ndarray) -> np.ndarray:
        """Seeds of numbered starts; an environment that has none left idles in one of the others'."""
        return self._seeds[numbers % len(self._seeds)]

    def _chunks(self, batch: dict[str, Tensor]) -> np.ndarray:
        policy, path = self._player.policy, self._player.path
        shape = (self._envs.num_envs, policy.base.chunk_size, policy.base.action_dim)
        noise = torch.randn(shape, generator=self._generator, device=self._generator.device)
        chunk = policy.predict_action_chunk(batch, noise=noise)[:, : policy.config.n_action_steps]
        action = path.env_postprocessor({ACTION: self._player.postprocessor(chunk)})[ACTION]
        return action.float().cpu().numpy()


def evaluate(player: Player, groups: list[Group], seeds: np.ndarray) -> Evaluation:
    """Runs one episode from each start, by the ODE.

    The environments are left in the middle of episodes; the caller restarts them.

    Args:
        player: The policy.
        groups: The environments; each takes its share of the starts.
        seeds: Seeds of the starts, `[n]`.

    Returns:
        The outcome of each start.
    """
    places = [np.arange(number, len(seeds), len(groups)) for number in range(len(groups))]
    shares = {
        number: _Share(player, groups[number], seeds[place])
        for number, place in enumerate(places)
        if len(place)
    }
    while any(share.unfinished for share in shares.values()):
        working = [share for share in shares.values() if share.unfinished]
        for share in working:
            share.send()
        for share in working:
            share.receive()
    success = np.zeros(len(seeds), dtype=bool)
    for number, share in shares.items():
        success[places[number]] = share.success
    return Evaluation(success, sum(share.env_steps for share in shares.values()))
