"""Learning through a camera: to point at a spot in a picture, after supervised training on inaccurate pointing."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Generator, Tensor

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout, prepare
from lerobot_policy_pi_rl.bases.configuration import CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

from .conftest import one_decision_each

CAMERA = "observation.images.front"
PIXELS, CHUNK = 16, 2
NEAR = 0.2
"""How far from the spot a chunk may point on average; the picture is 2 wide."""
INACCURACY = 0.3
"""Standard deviation of where the demonstrations point."""


def scenes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Pictures with a bright spot each, `[N, 3, 16, 16]` uint8, and where it is, `[N, 2]`."""
    where = torch.rand(count, 2, generator=generator) * 1.4 - 0.7
    place = torch.linspace(-1, 1, PIXELS)
    squared = (place[:, None] - where[:, 0, None, None]) ** 2 + (place - where[:, 1, None, None]) ** 2
    spot = (torch.exp(-squared / 0.05) * 255).to(torch.uint8)
    return spot[:, None].expand(-1, 3, -1, -1).contiguous(), where


def seen(pictures: Tensor) -> dict[str, Tensor]:
    """As a policy's processors give them."""
    return {CAMERA: pictures.float() / 255}


def hits(chunk: Tensor, where: Tensor) -> Tensor:
    """1 where a chunk points at the spot, `[N]`."""
    return ((chunk.mean(1) - where).norm(dim=1) < NEAR).float()


def supervise(policy: PIRLPolicy, steps: int, generator: Generator) -> None:
    """Flow matching on demonstrations that point somewhere near the spot."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    policy.train()
    for _ in range(steps):
        pictures, where = scenes(64, generator)
        shown = where + INACCURACY * torch.randn(where.shape, generator=generator)
        loss, _ = policy.forward({**seen(pictures), "action": shown[:, None].expand(-1, CHUNK, -1)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()


@torch.no_grad()
def accuracy(policy: PIRLPolicy) -> float:
    """Success of the ODE on scenes that are used for nothing else."""
    pictures, where = scenes(512, Generator().manual_seed(999))
    return float(hits(policy.predict_action_chunk(seen(pictures)), where).mean())


def collect(algorithm: PIRLAlgorithm, generator: Generator, count: int = 512) -> Rollout:
    """One decision of each of N environments, all of which end by it."""
    pictures, where = scenes(count, generator)
    sample = algorithm.policy.explore(seen(pictures), generator)
    decisions = one_decision_each(algorithm, {CAMERA: pictures}, sample, hits(sample.x, where))
    return prepare(decisions, lambda observation, task: seen(observation[CAMERA]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_success_rises_through_a_camera(seed: int) -> None:
    """The pictures stay bytes in the rollout, the encoder is trained with the rest, and the ODE is what is judged."""
    torch.manual_seed(seed)
    config = PIRLConfig(
        device="cpu",
        push_to_hub=False,
        base=CompactConfig(hidden_dim=64, num_blocks=1, time_dim=16, task_dim=0, image_dim=32),
        explorer=ExplorerConfig(noise_level=0.5),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        input_features={CAMERA: PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    policy, generator = PIRLPolicy(config), Generator().manual_seed(seed)
    supervise(policy, 100, generator)
    before = accuracy(policy)
    algorithm = PIRLAlgorithm(
        policy,
        PIRLAlgorithmConfig(
            policy_config=config,
            lr=5e-4,
            critic_warmup=1,
            critic_hidden_dims=[32],
            minibatch_size=128,
            epochs=2,
        ),
    )
    algorithm.make_optimizers_and_scheduler()
    algorithm.seed = seed
    for _ in range(10):
        algorithm.update(iter([collect(algorithm, generator)]))
    assert 0.15 < before < 0.55
    assert accuracy(policy) > before + 0.3
