"""Learning: a task of one decision, whose reward depends on the chunk, is learned from an untrained policy."""

from collections.abc import Callable

import pytest

from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]

ITERATIONS = 20


def learn(algorithm: PIRLAlgorithm, collect: Collect, seed: int) -> list[float]:
    """Success of exploration in each of the iterations, the last one after all updates."""
    algorithm.seed, success = seed, []
    for number in range(ITERATIONS + 1):
        rollout = collect(algorithm, count=512, seed=1000 * seed + number)
        success.append(float(rollout.decisions.reward.mean()))
        if number < ITERATIONS:
            algorithm.update(iter([rollout]))
    return success


@pytest.mark.parametrize("seed", range(3))
def test_success_rises_with_flow_sde(make_algorithm: MakeAlgorithm, collect: Collect, seed: int) -> None:
    success = learn(make_algorithm({"noise_level": 0.5}, lr=1e-3, critic_warmup=2), collect, seed)
    assert success[0] < 0.3
    assert success[-1] > 0.85


def test_success_rises_with_flow_noise(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    """Slower: the learned deviation is smaller than Flow-SDE's first steps'."""
    algorithm = make_algorithm({"kind": "flow_noise", "noise_std_max": 0.3}, lr=1e-3, critic_warmup=2)
    success = learn(algorithm, collect, seed=0)
    assert success[0] < 0.3
    assert success[-1] > 0.45
