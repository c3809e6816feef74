"""The control of the learning grids: what it keeps of its own episodes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.utils.constants import ACTION

from lerobot_policy_pi_rl.bases.adapter import take

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import self_imitation


@pytest.fixture
def episodes(monkeypatch: pytest.MonkeyPatch) -> self_imitation.Episodes:
    """Whose policy acts by repeating what it sees."""
    monkeypatch.setattr(
        self_imitation, "by_ode", lambda player: lambda batch, generator: batch["state"].clone()
    )
    base = SimpleNamespace(take=take)
    return self_imitation.Episodes(SimpleNamespace(policy=SimpleNamespace(base=base)))


def turn(success: list[int], done: list[int], counted: tuple[int, ...] = (1, 1)) -> SimpleNamespace:
    outcome = SimpleNamespace(success=np.array(success, bool), done=np.array(done, bool))
    return SimpleNamespace(counted=np.array(counted, bool), outcome=outcome)


def test_only_solved_episodes_are_kept_whole(episodes: self_imitation.Episodes) -> None:
    generator = torch.Generator()
    # Environment 0: solved in its second decision, which does not end it; the third does. Environment 1: never.
    for number, (success, done) in enumerate([([0, 0], [0, 0]), ([1, 0], [0, 0]), ([0, 0], [1, 1])]):
        state = torch.tensor([[float(number)], [float(10 + number)]])
        episodes.choose({"state": state, "task": ["a", "b"]}, generator)
        episodes.watch(turn(success, done))
    assert episodes.successes is not None
    assert episodes.successes[ACTION].flatten().tolist() == [0.0, 1.0, 2.0]
    assert episodes.successes["state"].flatten().tolist() == [0.0, 1.0, 2.0]
    assert episodes.successes["task"] == ["a", "a", "a"]


def test_the_next_episode_of_an_environment_begins_unsolved(episodes: self_imitation.Episodes) -> None:
    generator = torch.Generator()
    for success, done in (([1, 0], [1, 0]), ([0, 0], [1, 0])):
        episodes.choose({"state": torch.tensor([[1.0], [2.0]])}, generator)
        episodes.watch(turn(success, done))
    assert episodes.successes is not None
    assert len(episodes.successes[ACTION]) == 1


def test_groups_are_told_apart_and_idle_environments_left_out(episodes: self_imitation.Episodes) -> None:
    first, second = torch.Generator(), torch.Generator()
    episodes.choose({"state": torch.tensor([[1.0], [2.0]])}, first)
    episodes.choose({"state": torch.tensor([[3.0], [4.0]])}, second)
    episodes.watch(turn([0, 1], [1, 1], counted=(1, 0)))
    episodes.watch(turn([1, 0], [1, 1]))
    assert episodes.successes is not None
    assert episodes.successes[ACTION].flatten().tolist() == [3.0]
