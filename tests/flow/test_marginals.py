"""The distribution of the chunk where the velocity is known: actions from N(m, s^2), component by component.

`x_t = t e + (1 - t) a` is then N((1 - t) m, V) with `V = t^2 + (1 - t)^2 s^2`, and the velocity is the regression of
`e - a` on `x_t`: `v = -m + (t - (1 - t) s^2) / V * (x_t - (1 - t) m)`.
"""

import pytest
import torch
from torch import Tensor

from lerobot_policy_pi_rl.flow.grid import time_grid
from lerobot_policy_pi_rl.flow.sampler import Noise, sample_joint, sample_ode
from lerobot_policy_pi_rl.flow.transition import FieldOutput, coefficients, transition

# Mean and deviation of the actions of a chunk of 2 steps and 2 dimensions.
MEAN = torch.tensor([[0.7, -0.3], [0.0, 1.0]])
STD = torch.tensor([[0.4, 0.2], [1.0, 0.6]])


def field(x: Tensor, t: Tensor) -> FieldOutput:
    """The exact velocity."""
    t = t[:, None, None].to(x)
    mean, variance = MEAN.to(x), STD.to(x) ** 2
    slope = (t - (1 - t) * variance) / (t**2 + (1 - t) ** 2 * variance)
    return FieldOutput(-mean + slope * (x - (1 - t) * mean))


def final_moments(kind: str, num_steps: int, level: float) -> tuple[Tensor, Tensor]:
    """Exact mean and deviation of the chunk: every step is affine in the state, so its moments propagate.

    The slope and offset of each step are read off `transition` itself, at the states 0 and 1.
    """
    grid = time_grid(num_steps, dtype=torch.float64)
    states = torch.stack([torch.zeros_like(MEAN), torch.ones_like(MEAN)]).double()
    mean, variance = torch.zeros_like(MEAN).double(), torch.ones_like(MEAN).double()
    for k in range(num_steps):
        there = coefficients(kind, grid[k], grid[k + 1], level)
        step = transition(states, field(states, grid[k].expand(2)), there)
        offset, slope = step.mean[0], step.mean[1] - step.mean[0]
        mean, variance = slope * mean + offset, slope**2 * variance + step.std**2
    return mean, variance.sqrt()


def gap(num_steps: int, level: float) -> float:
    """Largest relative difference between the deviations of Flow-SDE and of the ODE."""
    ode, sde = (final_moments(kind, num_steps, level)[1] for kind in ("ode", "flow_sde"))
    return float((sde / ode - 1).abs().max())


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "flow_cps"])
def test_every_kind_keeps_the_mean(kind: str) -> None:
    for num_steps in (2, 4, 64):
        mean, _ = final_moments(kind, num_steps, 0.5)
        torch.testing.assert_close(mean, MEAN.double())


def test_the_ode_reaches_the_actions_as_the_steps_grow() -> None:
    errors = [
        float((final_moments("ode", steps, 0.0)[1] / STD - 1).abs().max()) for steps in (4, 16, 64, 256)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03


@pytest.mark.parametrize("level", [0.3, 0.5, 0.8])
def test_marginals_of_flow_sde_approach_those_of_the_ode(level: float) -> None:
    gaps = [gap(num_steps, level) for num_steps in (4, 16, 64, 256)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[2] < gaps[0] / 5
    assert gaps[-1] < 0.03


@pytest.mark.parametrize("num_steps", [4, 64])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_samples_have_the_exact_moments(num_steps: int, correlation: float) -> None:
    """Of `sample_joint` itself, within five standard errors; noise correlated along the chunk changes neither."""
    samples = 20_000
    noise = torch.randn(samples, 2, 2)
    sample = sample_joint(field, noise, num_steps, Noise("flow_sde", 0.5, correlation), 2)
    mean, std = final_moments("flow_sde", num_steps, 0.5)
    assert ((sample.x.mean(0) - mean).abs() < 5 * std / samples**0.5).all()
    assert ((sample.x.std(0) / std - 1).abs() < 5 / (2 * samples) ** 0.5).all()


def test_samples_of_flow_sde_approach_those_of_the_ode() -> None:
    """Mean and covariance; the tolerance at K = 64 is the known gap of the moments and five standard errors."""
    samples = 20_000

    def errors(num_steps: int) -> tuple[float, float]:
        ode = sample_ode(field, torch.randn(samples, 2, 2), num_steps).flatten(1)
        sde = sample_joint(field, torch.randn(samples, 2, 2), num_steps, Noise("flow_sde", 0.5), 2).x.flatten(
            1
        )
        scale = ode.std(0)
        mean = ((sde.mean(0) - ode.mean(0)) / scale).abs().max()
        covariance = ((sde.T.cov() - ode.T.cov()) / (scale[:, None] * scale)).abs().max()
        return float(mean), float(covariance)

    coarse, fine = errors(4), errors(64)
    noise_floor = 5 * (2 / samples) ** 0.5
    assert fine[0] < noise_floor
    assert fine[1] < (1 + gap(64, 0.5)) ** 2 - 1 + 2 * noise_floor
    assert fine[1] < coarse[1] / 3


def leftover_correlation(num_steps: int) -> float:
    """Largest correlation that correlated noise leaves between the two steps of a chunk of independent actions."""
    x = sample_joint(field, torch.randn(20_000, 2, 2), num_steps, Noise("flow_sde", 0.5, 0.5), 2).x
    return max(abs(float(torch.corrcoef(x[..., dim].T)[0, 1])) for dim in range(2))


def test_correlated_noise_leaves_no_correlation_behind() -> None:
    """The drift cancels what the noise adds, in the limit of many steps: also between the steps of a chunk."""
    coarse, fine = leftover_correlation(4), leftover_correlation(64)
    assert fine < coarse
    # A correlation of 20,000 samples has a standard error of 0.007; without the correction it is about 0.4.
    assert fine < 0.04
