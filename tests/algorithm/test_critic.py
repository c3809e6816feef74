"""The critics: one on features, one with eyes of its own."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.critic import Critic, SeparateCritic
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


# The scale of returns


def test_returns_of_a_sparse_reward_are_left_as_they_are() -> None:
    """Mean 1/2 and deviation 1/2: the root of their mean square is below 1."""
    critic = Critic(3, [16])
    weights = {name: value.clone() for name, value in critic.named_parameters()}
    for _ in range(5):
        critic.follow(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert (critic.offset.item(), critic.scale.item()) == (0.0, 1.0)
    assert all(torch.equal(value, weights[name]) for name, value in critic.named_parameters())


def test_larger_returns_are_centred_and_divided_by_their_running_deviation() -> None:
    """Mean 30 and deviation 10, ten times 130 and 10: the variance is .9 * (100 + .1 * 100^2) + .1 * 100 = 1000."""
    critic = Critic(3, [16])
    critic.follow(torch.tensor([20.0, 40.0]))
    assert (critic.offset.item(), critic.scale.item()) == (30.0, 10.0)
    critic.follow(torch.tensor([20.0, 40.0]))
    assert critic.scale.item() == pytest.approx(10.0)
    for _ in range(8):
        critic.follow(torch.tensor([20.0, 40.0]))
    critic.follow(torch.tensor([120.0, 140.0]))
    assert critic.offset.item() == pytest.approx(40.0)
    assert critic.scale.item() == pytest.approx(1000.0**0.5)


def test_nearly_equal_large_returns_are_not_blown_up() -> None:
    critic = Critic(3, [16])
    critic.follow(torch.tensor([-100.001, -99.999]))
    assert (critic.offset.item(), critic.scale.item()) == (-100.0, 1.0)


def test_values_stay_what_they_are_while_the_scale_changes() -> None:
    torch.manual_seed(0)
    critic, features = Critic(3, [16]), torch.randn(64, 3)
    critic.follow(torch.zeros(1))
    for target in (torch.tensor([-400.0, 900.0]), torch.tensor([0.0, 0.1]), torch.tensor([5.0, 7.0])):
        before = critic.value(features)
        critic.follow(target)
        torch.testing.assert_close(critic.value(features), before, rtol=1e-4, atol=1e-3)


def test_a_cold_critic_begins_at_the_mean_return() -> None:
    torch.manual_seed(0)
    critic = Critic(3, [16])
    critic.follow(torch.tensor([-510.0, -490.0]))
    assert critic.value(torch.randn(64, 3)).sub(-500).abs().max() < 10


@pytest.mark.parametrize("target", [[], [1.0, float("nan")], [float("inf"), 2.0]])
def test_returns_that_are_missing_or_broken_change_no_scale(target: list[float]) -> None:
    critic = Critic(3, [16])
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    critic.follow(torch.tensor(target))
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
