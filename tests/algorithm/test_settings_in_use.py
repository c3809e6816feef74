"""Each setting of the algorithm arrives where it works: numbers worked out by hand, and none of them the default."""

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lerobot_policy_pi_rl.algorithm import pi_rl
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.pi_rl import Averages, PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout, prepare

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]
MakeDecisions = Callable[..., DecisionBatch]


def move(algorithm: PIRLAlgorithm, distance: float) -> None:
    """Changes the policy."""
    with torch.no_grad():
        algorithm.policy.base.leave.bias.add_(distance)


# Advantages


def test_discount_and_lambda_each_have_their_own_place(
    make_algorithm: MakeAlgorithm, make_decisions: MakeDecisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors from the end: 1 + .9 * 3 - 4 = -.3, 0 + .9 * 4 - 2 = 1.6 and .5 + .9 * 2 - 1 = 1.3; .9 * .8 = .72."""
    algorithm = make_algorithm(gamma=0.9, gae_lambda=0.8)
    decisions = make_decisions(
        env=[0, 0, 0], reward=[0.5, 0.0, 1.0], truncated=[False, False, True], next_row=[2]
    )
    values = {3: [1.0, 2.0, 4.0], 1: [3.0]}
    monkeypatch.setattr(algorithm.critic, "value", lambda features: torch.tensor(values[len(features)]))
    material = algorithm.evaluate(prepare(decisions, lambda observation, task: observation))
    advantage = [1.3 + 0.72 * 1.384, 1.6 + 0.72 * -0.3, -0.3]
    assert material.critic.target.tolist() == pytest.approx([3.29648, 3.384, 3.7])
    mean, deviation = statistics.mean(advantage), statistics.stdev(advantage)
    expected = [(one - mean) / deviation for one in advantage]
    assert material.batch.advantage.tolist() == pytest.approx(expected, abs=1e-5)
