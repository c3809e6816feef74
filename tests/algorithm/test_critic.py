"""The critics: one on features, one with eyes of its own."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.critic import SeparateCritic
from lerobot_policy_pi_rl.errors import ConfigError

STATE, TOP, WRIST = "observation.state", "observation.images.top", "observation.images.wrist"
FEATURES = {
    WRIST: PolicyFeature(FeatureType.VISUAL, (1, 24, 40)),
    STATE: PolicyFeature(FeatureType.STATE, (5,)),
    TOP: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
}


@pytest.fixture
def critic() -> SeparateCritic:
    torch.manual_seed(0)
    return SeparateCritic(FEATURES, [32])


@pytest.fixture
def seen() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shade = torch.rand(64, 1, 1, 1, generator=generator)
    return {
        STATE: torch.randn(64, 5, generator=generator),
        TOP: torch.rand(64, 3, 96, 96, generator=generator),
        WRIST: shade.expand(64, 1, 24, 40),
    }


def test_it_learns_a_value_that_one_picture_tells(critic: SeparateCritic, seen: dict[str, Tensor]) -> None:
    read, value = critic.read(seen), seen[WRIST].mean((1, 2, 3))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(60):
        loss = (critic(read) - value).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert critic.value(read).sub(value).var() < 0.2 * value.var()


def test_it_reads_each_row_by_itself_and_in_the_order_of_the_names(
    critic: SeparateCritic, seen: dict[str, Tensor]
) -> None:
    read = critic.read(seen)
    assert read.shape == (64, 4 * 64 * 64 + 5)
    assert not read.requires_grad
    assert torch.equal(critic.read(dict(reversed(seen.items()))), read)
    torch.testing.assert_close(critic.value(read[10:20]), critic.value(read)[10:20])
    assert critic.value(read[:0]).shape == (0,)


def test_far_out_states_are_clipped(critic: SeparateCritic, seen: dict[str, Tensor]) -> None:
    far, further = (critic.read(seen | {STATE: torch.full((64, 5), value)}) for value in (8.0, 800.0))
    assert torch.equal(far, further)


def test_an_observation_that_lacks_a_picture_is_one_line(
    critic: SeparateCritic, seen: dict[str, Tensor]
) -> None:
    del seen[TOP]
    with pytest.raises(ConfigError, match=r"algorithm.critic_features.*images.top.*choose another"):
        critic.read(seen)
