"""Hand-made decisions, a small policy, and rollouts of it in a one-decision task."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout, prepare
from lerobot_policy_pi_rl.bases.configuration import CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.flow.sampler import Sample, executed_sum
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

STATE_DIM, ACTION_DIM, CHUNK = 4, 2, 3
STATE = "observation.state"

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]


def build_decisions(**columns: Any) -> DecisionBatch:
    """Decisions with the given columns; the others are plain. `next_row` names rows with their own next state."""
    count = len(columns["env"])
    own = torch.tensor(columns.pop("next_row", []), dtype=torch.int64)
    given = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in columns.items()}
    flags = torch.zeros(count, dtype=torch.bool)
    defaults = {
        "observation": {STATE: torch.arange(float(count))[:, None].expand(count, STATE_DIM).clone()},
        "task": [f"task {row}" for row in range(count)],
        "chain": torch.zeros(count, 2, CHUNK, ACTION_DIM),
        "step": torch.zeros(count, 1, dtype=torch.int64),
        "log_prob": torch.zeros(count, CHUNK),
        "action": torch.zeros(count, CHUNK, ACTION_DIM),
        "reward": torch.zeros(count),
        "delay": torch.zeros(count, dtype=torch.int64),
        "executed": torch.full((count,), CHUNK),
        "terminated": flags,
        "truncated": flags,
        "success": given.get("terminated", flags),
        "version": torch.zeros(count, dtype=torch.int64),
        "index": torch.arange(count),
        "next_row": own,
        "next_observation": {STATE: 100.0 + own[:, None].expand(len(own), STATE_DIM)},
    }
    return DecisionBatch(**defaults | given)


@pytest.fixture
def make_decisions() -> Callable[..., DecisionBatch]:
    return build_decisions


@pytest.fixture
def make_algorithm() -> MakeAlgorithm:
    """Makes an algorithm around a small policy with seeded weights: settings of the algorithm by keyword."""

    def make(explorer: dict[str, Any] | None = None, **settings: Any) -> PIRLAlgorithm:
        torch.manual_seed(1)
        config = PIRLConfig(
            device="cpu",
            push_to_hub=False,
            base=CompactConfig(hidden_dim=32, num_blocks=1, time_dim=8, task_dim=0),
            explorer=ExplorerConfig(**explorer or {}),
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
            input_features={STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        )
        defaults = {"critic_warmup": 0, "critic_hidden_dims": [32], "minibatch_size": 64, "epochs": 4}
        algorithm_config = PIRLAlgorithmConfig(**defaults | settings, policy_config=config)
        algorithm = PIRLAlgorithm(PIRLPolicy(config), algorithm_config)
        algorithm.make_optimizers_and_scheduler()
        return algorithm

    return make


def reward_near_the_goal(state: Tensor, chunk: Tensor) -> Tensor:
    """1 where the mean action of the chunk is within .6 of the state's first two components."""
    return ((chunk.mean(1) - state[:, :ACTION_DIM]).norm(dim=1) < 0.6).float()


def one_decision_each(
    algorithm: PIRLAlgorithm, observation: dict[str, Tensor], sample: Sample, reward: Tensor
) -> DecisionBatch:
    """The algorithm's own decisions of N environments, each of which ends by it."""
    count = len(reward)
    return build_decisions(
        observation=observation,
        chain=sample.chain,
        step=sample.step,
        log_prob=sample.log_prob,
        action=sample.x,
        executed=torch.full((count,), sample.x.shape[1]),
        reward=reward,
        terminated=torch.ones(count, dtype=torch.bool),
        version=torch.full((count,), algorithm.optimization_step),
        env=torch.arange(count),
        index=torch.zeros(count, dtype=torch.int64),
    )


@pytest.fixture
def collect() -> Collect:
    """Collects one decision of each of N environments with the algorithm's own policy; all end by termination."""

    def run(algorithm: PIRLAlgorithm, count: int = 256, seed: int = 0) -> Rollout:
        generator = torch.Generator().manual_seed(seed)
        state = torch.rand(count, STATE_DIM, generator=generator) * 2 - 1
        sample = algorithm.policy.explore({STATE: state}, generator)
        reward = reward_near_the_goal(state, sample.x)
        decisions = one_decision_each(algorithm, {STATE: state}, sample, reward)
        return prepare(decisions, lambda observation, task: observation)

    return run


@pytest.fixture
def log_ratio() -> Callable[[PIRLAlgorithm, Rollout], Tensor]:
    """Log-ratio of a rollout's decisions under the algorithm's present policy, `[N]`."""

    @torch.no_grad()
    def compute(algorithm: PIRLAlgorithm, rollout: Rollout) -> Tensor:
        decisions, policy = rollout.decisions, algorithm.policy
        seen = rollout.observations.rows(torch.arange(len(decisions)), policy.base.take)
        score = policy.score(policy.encode(seen), decisions.chain, decisions.step)
        return executed_sum(score.log_prob - decisions.log_prob, decisions.executed)

    return compute
