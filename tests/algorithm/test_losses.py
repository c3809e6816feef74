"""The objective against numbers worked out by hand."""

import math

import pytest
import torch

from lerobot_policy_pi_rl.algorithm.losses import approximate_kl, explained_variance, policy_loss, value_loss

RATIO = torch.tensor([0.5, 0.9, 1.1, 2.0])


def test_clipped_objective_for_gains() -> None:
    """min(r A, clip(r, .8, 1.2) A) with A = 1: .5, .9, 1.1, 1.2."""
    result = policy_loss(RATIO.log(), torch.ones(4), 0.2)
    assert result.loss.item() == pytest.approx(-(0.5 + 0.9 + 1.1 + 1.2) / 4)
    assert result.clip_fraction.item() == 0.5


def test_clipped_objective_for_losses() -> None:
    """With A = -2: min(-1, -1.6), min(-1.8, -1.8), min(-2.2, -2.2), min(-4, -2.4)."""
    result = policy_loss(RATIO.log(), torch.full((4,), -2.0), 0.2)
    assert result.loss.item() == pytest.approx((1.6 + 1.8 + 2.2 + 4.0) / 4)


def test_dual_clip_bounds_losses_and_leaves_gains_alone() -> None:
    """A ratio of 10: the objective -10 is held at 3 * -1; a gain at that ratio is 1.2 either way."""
    log_ratio = torch.full((2,), math.log(10))
    result = policy_loss(log_ratio, torch.tensor([-1.0, 1.0]), 0.2, dual_clip=3.0)
    assert result.loss.item() == pytest.approx(-(-3.0 + 1.2) / 2)
    plain = policy_loss(log_ratio, torch.tensor([-1.0, 1.0]), 0.2)
    assert plain.loss.item() == pytest.approx(-(-10.0 + 1.2) / 2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.0, 1.0, True), (1.5, 1.0, False), (0.5, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True)],
)
def test_gradient_stops_only_where_the_ratio_left_the_range_on_the_good_side(
    ratio: float, advantage: float, flows: bool
) -> None:
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    policy_loss(log_ratio, torch.tensor([advantage]), 0.2).loss.backward()
    expected = -ratio * advantage if flows else 0.0
    assert log_ratio.grad.item() == pytest.approx(expected)


def test_dual_clip_stops_the_gradient_of_a_huge_ratio() -> None:
    log_ratio = torch.tensor([math.log(10.0)], requires_grad=True)
    policy_loss(log_ratio, torch.tensor([-1.0]), 0.2, dual_clip=3.0).loss.backward()
    assert log_ratio.grad.item() == 0


def test_diagnostics_carry_no_gradient() -> None:
    result = policy_loss(RATIO.log().requires_grad_(), torch.ones(4), 0.2)
    assert result.loss.requires_grad
    assert not result.clip_fraction.requires_grad


def test_k3_estimator_by_hand() -> None:
    """r - 1 - log r at r = 1, 2 and .5: 0, 1 - log 2, log 2 - .5."""
    log_ratio = torch.tensor([1.0, 2.0, 0.5]).log()
    assert approximate_kl(log_ratio).item() == pytest.approx(0.5 / 3)


def test_k3_estimator_is_unbiased_and_keeps_small_divergences() -> None:
    """Of two Gaussians a distance .1 apart, whose divergence is .005; and of ratios within float32's rounding of 1."""
    x = torch.randn(200_000, dtype=torch.float64)
    log_ratio = 0.1 * x - 0.005
    assert approximate_kl(log_ratio).item() == pytest.approx(0.005, rel=0.05)
    tiny = torch.full((4,), 1e-4)
    assert approximate_kl(tiny).item() == pytest.approx(5e-9, rel=0.5)


def test_huber_value_loss_by_hand() -> None:
    """Residuals .5 and 3 with delta 1: .125 and 1 * (3 - .5)."""
    loss = value_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), torch.zeros(2), None, 1.0)
    assert loss.item() == pytest.approx((0.125 + 2.5) / 2)


def test_value_clip_takes_the_worse_of_the_clipped_and_the_plain_value() -> None:
    """From 0 the value moved to .5 with .2 allowed, target 1: clipped residual .8 -> .32, plain .5 -> .125."""
    loss = value_loss(torch.tensor([0.5]), torch.tensor([1.0]), torch.zeros(1), 0.2, 1.0)
    assert loss.item() == pytest.approx(0.32)
    # Past the target the plain residual is the worse: value 1.9 -> .405, clipped .2 -> .32.
    loss = value_loss(torch.tensor([1.9]), torch.tensor([1.0]), torch.zeros(1), 0.2, 1.0)
    assert loss.item() == pytest.approx(0.405)


def test_value_clip_stops_the_gradient_of_a_value_that_moved_far_enough() -> None:
    value = torch.tensor([0.5], requires_grad=True)
    value_loss(value, torch.tensor([1.0]), torch.zeros(1), 0.2, 1.0).backward()
    assert value.grad.item() == 0


def test_explained_variance() -> None:
    target = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(target, target).item() == 1.0
    assert explained_variance(torch.full((4,), 1.5), target).item() == 0.0
    assert explained_variance(-target, target).item() == pytest.approx(-3.0)
    # Residuals 0, .5, 1, 1.5 have a quarter of the target's variance.
    assert explained_variance(target / 2, target).item() == pytest.approx(0.75)


def test_the_variance_of_one_return_is_nothing_to_explain() -> None:
    assert explained_variance(torch.ones(1), torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("far", [100.0, -200.0, float("inf")])
def test_a_log_ratio_out_of_all_bounds_leaves_the_gradients_of_the_others_alone(
    far: float, advantage: float, dual_clip: float | None
) -> None:
    """With A = 1 and ratios 1 and .9 the gradients are -1/3 and -.9/3; without the bound they would be lost."""
    log_ratio = torch.tensor([0.0, math.log(0.9), far], requires_grad=True)
    loss = policy_loss(
        log_ratio, torch.tensor([1.0, 1.0, advantage]), 0.2, dual_clip, torch.ones(3), log_ratio_bound=5.0
    ).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert log_ratio.grad.tolist() == pytest.approx([-1 / 3, -0.9 / 3, 0.0])


def test_a_log_ratio_within_the_bound_is_left_alone() -> None:
    log_ratio = torch.tensor([-4.9, 0.1, 4.9], requires_grad=True)
    advantage = torch.tensor([-1.0, 1.0, -1.0])
    found = [policy_loss(log_ratio, advantage, 0.2, log_ratio_bound=bound).loss for bound in (5.0, None)]
    gradients = [torch.autograd.grad(loss, log_ratio)[0] for loss in found]
    assert found[0] == found[1]
    assert torch.equal(*gradients)


def test_the_clip_range_may_reach_higher_than_deep() -> None:
    """With A = 1, .2 below and .28 above: .5, .9, 1.1 and 1.28; with A = -1: .8, .9, 1.1 and 2."""
    gains = policy_loss(RATIO.log(), torch.ones(4), 0.2, clip_ratio_high=0.28)
    assert gains.loss.item() == pytest.approx(-(0.5 + 0.9 + 1.1 + 1.28) / 4)
    losses = policy_loss(RATIO.log(), -torch.ones(4), 0.2, clip_ratio_high=0.28)
    assert losses.loss.item() == pytest.approx((0.8 + 0.9 + 1.1 + 2.0) / 4)
    assert (
        policy_loss(torch.tensor([1.25]).log(), torch.ones(1), 0.2, clip_ratio_high=0.28).clip_fraction == 0
    )


def test_parts_of_a_decision_are_clipped_one_by_one_and_averaged() -> None:
    """A = 1: (.5 + 1.1) / 2, as the third part does not count; A = -2, weighted by 3: -2 * (.9 + 1.1 + 2) / 3."""
    log_ratio = torch.tensor([[0.5, 1.1, 9.0], [0.9, 1.1, 2.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage, weight = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])
    result = policy_loss(log_ratio, advantage, 0.2, weight=weight, mask=mask)
    assert result.loss.item() == pytest.approx(-(1.6 / 2 + 3 * -2 * (0.9 + 1.1 + 2.0) / 3) / 2)
    assert result.clip_fraction.item() == pytest.approx((1 / 2 + 1 / 3) / 2)
