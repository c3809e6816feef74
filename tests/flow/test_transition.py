"""One denoising step: the fixed points of its mean and deviation, for every kind of noise."""

import math

import pytest
import torch
from torch import Tensor

from lerobot_policy_pi_rl.flow.grid import time_grid
from lerobot_policy_pi_rl.flow.transition import (
    FIXED_STD_KINDS,
    FieldOutput,
    Gaussian,
    StepKind,
    coefficients,
    step_std,
    transition,
)

# Deviation of each Flow-SDE step for (K, noise level), worked out by hand from `level * sqrt(t / (1 - t) / K)`.
SDE_DEVIATIONS = {
    (4, 0.5): [0.500, 0.433, 0.250, 0.144],
    (3, 0.5): [0.500, 0.408, 0.204],
    (5, 0.5): [0.500, 0.447, 0.274, 0.183, 0.112],
    (5, 0.3): [0.300, 0.268, 0.164, 0.110, 0.067],
}


def step_between(
    kind: StepKind, x: Tensor, field: FieldOutput, t: Tensor, t_next: Tensor, level: float = 0.0
) -> Gaussian:
    """The step of each row from its time `[B]` to its next one."""
    return transition(x, field, coefficients(kind, t[:, None, None], t_next[:, None, None], level))


def step_at(kind: str, k: int, num_steps: int, x: float, velocity: float, level: float) -> Gaussian:
    """Distribution of step k from a state whose every component is `x`, in float64."""
    grid = time_grid(num_steps, dtype=torch.float64)
    state = torch.full((1, 2, 3), x, dtype=torch.float64)
    field = FieldOutput(torch.full_like(state, velocity), std=torch.full_like(state, level))
    return step_between(kind, state, field, grid[k : k + 1], grid[k + 1 : k + 2], level)


def noise_end_weight(kind: str, k: int, num_steps: int, level: float) -> float:
    """The weight `w` in `mean = (1 - t') a_hat + w e_hat`, read off states with a chosen noise end.

    A velocity of `x / t` puts the action end at 0 and the noise end at `x / t`, so the mean is `w * x / t`.
    """
    t, x = 1 - k / num_steps, 0.8
    return float(step_at(kind, k, num_steps, x, x / t, level).mean[0, 0, 0]) / (x / t)


def action_end_weight(kind: str, k: int, num_steps: int, level: float) -> float:
    """The weight of `a_hat`: a velocity that puts the noise end at 0 and the action end at 0.8."""
    t, action = 1 - k / num_steps, 0.8
    x = (1 - t) * action
    return float(step_at(kind, k, num_steps, x, -action, level).mean[0, 0, 0]) / action


@pytest.mark.parametrize("num_steps", [1, 3, 4, 10])
def test_grid_runs_from_noise_to_action_in_equal_steps(num_steps: int) -> None:
    grid = time_grid(num_steps, dtype=torch.float64)
    assert grid[0] == 1
    assert grid[-1] == 0
    torch.testing.assert_close(
        grid[:-1] - grid[1:], torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
    )


@pytest.mark.parametrize(("num_steps", "level"), SDE_DEVIATIONS)
def test_flow_sde_deviations(num_steps: int, level: float) -> None:
    steps = [step_at("flow_sde", k, num_steps, 0.3, 0.7, level) for k in range(num_steps)]
    deviations = [float(step.std.flatten()[0]) for step in steps]
    assert deviations == pytest.approx(SDE_DEVIATIONS[num_steps, level], abs=5e-4)


@pytest.mark.parametrize("level", [0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 10])
def test_first_flow_sde_deviation_is_exactly_the_noise_level(num_steps: int, level: float) -> None:
    grid = time_grid(num_steps)
    assert step_std("flow_sde", grid[:1], grid[1:2], level) == torch.tensor([level])


def test_flow_sde_weights_of_the_noise_end() -> None:
    weights = [noise_end_weight("flow_sde", k, 4, 0.5) for k in range(4)]
    assert weights == pytest.approx([0.625, 0.375, 0.1875, -1 / 24], abs=1e-12)


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_flow_cps_is_a_rotation_of_the_noise_end(level: float) -> None:
    """Weight and deviation are `t' cos` and `t' sin` of one angle: the noise keeps its share `t'`."""
    for k, t_next in enumerate([0.75, 0.5, 0.25, 0.0]):
        weight = noise_end_weight("flow_cps", k, 4, level)
        std = float(step_at("flow_cps", k, 4, 0.3, 0.7, level).std.flatten()[0])
        assert weight == pytest.approx(t_next * math.cos(math.pi / 2 * level), abs=1e-12)
        assert math.hypot(weight, std) == pytest.approx(t_next, abs=1e-12)


@pytest.mark.parametrize("kind", ["ode", "flow_noise"])
def test_kinds_that_keep_the_euler_mean(kind: str) -> None:
    weights = [noise_end_weight(kind, k, 4, 0.1) for k in range(4)]
    assert weights == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=1e-12)


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "flow_cps", "flow_noise"])
def test_weight_of_the_action_end_is_the_same_for_all_kinds(kind: str) -> None:
    # The first step is left out: at t = 1 the state holds nothing of the action.
    weights = [action_end_weight(kind, k, 4, 0.5) for k in range(1, 4)]
    assert weights == pytest.approx([0.5, 0.75, 1.0], abs=1e-12)


@pytest.mark.parametrize("kind", FIXED_STD_KINDS)
def test_a_step_without_noise_is_the_euler_step_to_the_bit(kind: str) -> None:
    x, velocity = torch.randn(64, 5, 4), torch.randn(64, 5, 4)
    for num_steps in (1, 3, 4, 7):
        grid = time_grid(num_steps)
        for k in range(num_steps):
            t, t_next = grid[k].expand(64), grid[k + 1].expand(64)
            step = step_between(kind, x, FieldOutput(velocity), t, t_next, 0.0)
            assert torch.equal(step.mean, x - (t - t_next)[:, None, None] * velocity)
            assert not step.std.any()


def test_rows_may_be_at_different_times() -> None:
    grid, k = time_grid(4), torch.tensor([3, 0, 2])
    x, velocity = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    together = step_between("flow_sde", x, FieldOutput(velocity), grid[k], grid[k + 1], 0.5)
    for row in range(3):
        here = slice(row, row + 1)
        t, t_next = grid[k[here]], grid[k[here] + 1]
        alone = step_between("flow_sde", x[here], FieldOutput(velocity[here]), t, t_next, 0.5)
        assert torch.equal(together.mean[here], alone.mean)
        assert torch.equal(together.std[here], alone.std)


def test_flow_noise_takes_the_field_s_deviation() -> None:
    std = torch.rand(1, 2, 3) + 0.1
    zero = torch.zeros(1, 2, 3)
    step = step_between("flow_noise", zero, FieldOutput(zero, std), torch.ones(1), torch.full((1,), 0.75))
    assert torch.equal(step.std, std)
    with pytest.raises(ValueError, match="needs a learned deviation"):
        step_between("flow_noise", zero, FieldOutput(zero), torch.ones(1), torch.full((1,), 0.75))


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "flow_noise"])
def test_a_logit_has_its_own_deviation_and_no_drift(kind: str) -> None:
    x, velocity, std = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.rand(2, 5, 3) + 0.1
    t, t_next = torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.25])
    without = step_between(kind, x, FieldOutput(velocity, std), t, t_next, 0.5)
    logits = FieldOutput(velocity, std, torch.tensor([0.0, 1.7, 0.0]))
    step = step_between(kind, x, logits, t, t_next, 0.5)
    euler = x - 0.25 * velocity
    assert torch.equal(step.mean[..., 1], euler[..., 1])
    # Where the step has no noise, a logit has none either.
    assert (step.std.expand_as(x)[..., 1] == (0.0 if kind == "ode" else 1.7)).all()
    assert torch.equal(step.mean[..., ::2], without.mean[..., ::2])
    assert torch.equal(step.std.expand_as(x)[..., ::2], without.std.expand_as(x)[..., ::2])


def test_a_learned_deviation_has_no_closed_form() -> None:
    with pytest.raises(ValueError, match="'flow_noise' has no closed-form deviation; choose one of"):
        step_std("flow_noise", torch.ones(1), torch.zeros(1), 0.5)
