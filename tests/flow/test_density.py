"""Densities against torch.distributions: correlated noise, log-probability, entropy and divergence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.distributions import kl_divergence as torch_kl

from lerobot_policy_pi_rl.flow.density import colour, entropy, kl_divergence, log_prob, whiten
from lerobot_policy_pi_rl.flow.transition import Gaussian

CORRELATIONS = [0.0, 0.5, 0.9]
H, D = 5, 3


def gaussian(seed: int, like: Tensor | None = None) -> Gaussian:
    """A step with a random mean and, unless taken from another, a random deviation; `[2, H, D]` float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, H, D, dtype=torch.float64, generator=generator)
    std = torch.rand(2, H, D, dtype=torch.float64, generator=generator) + 0.1
    return Gaussian(mean, std if like is None else like)


def ar1(correlation: float, size: int) -> Tensor:
    """Correlation matrix `rho^|i - j|`."""
    lag = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    return correlation ** lag.to(torch.float64)


def first_steps(step: Gaussian, correlation: float, n: int) -> Independent:
    """Joint distribution of the first n chunk steps, one correlated Gaussian per action dimension; events `[D, n]`."""
    std = step.std[:, :n].transpose(1, 2)
    covariance = std[..., :, None] * ar1(correlation, n) * std[..., None, :]
    return Independent(MultivariateNormal(step.mean[:, :n].transpose(1, 2), covariance), 1)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_whiten_undoes_colour(correlation: float) -> None:
    noise = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(whiten(colour(noise, correlation), correlation), noise)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_coloured_noise_has_unit_variance_and_ar1_correlation(correlation: float) -> None:
    """`colour` is linear: applied to the unit vectors it gives the factor L, and the covariance is L L^T."""
    factor = colour(torch.eye(6, dtype=torch.float64)[..., None], correlation)[..., 0].T
    torch.testing.assert_close(factor @ factor.T, ar1(correlation, 6))


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("n", range(1, H + 1))
def test_sum_over_the_first_n_steps_is_their_exact_marginal_density(n: int, correlation: float) -> None:
    step = gaussian(0)
    x = step.mean + step.std * torch.randn(2, H, D, dtype=torch.float64)
    ours = log_prob(x, step, D, correlation)[:, :n].sum(1)
    torch.testing.assert_close(ours, first_steps(step, correlation, n).log_prob(x[:, :n].transpose(1, 2)))


def test_log_prob_without_correlation_is_the_normal_density_of_each_step() -> None:
    step = gaussian(1)
    x = torch.randn(2, H, D, dtype=torch.float64)
    torch.testing.assert_close(log_prob(x, step, D), Normal(step.mean, step.std).log_prob(x).sum(-1))


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("n", [1, 3, H])
def test_entropy_of_the_first_n_steps(n: int, correlation: float) -> None:
    step = gaussian(2)
    ours = entropy(step, D, correlation)[:, :n].sum(1)
    torch.testing.assert_close(ours, first_steps(step, correlation, n).entropy())


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("n", [1, 3, H])
def test_divergence_of_the_first_n_steps_for_equal_deviations(n: int, correlation: float) -> None:
    step = gaussian(3)
    reference = gaussian(4, like=step.std)
    ours = kl_divergence(step, reference, D, correlation)[:, :n].sum(1)
    expected = torch_kl(first_steps(step, correlation, n), first_steps(reference, correlation, n))
    torch.testing.assert_close(ours, expected)


def test_divergence_for_different_deviations() -> None:
    step, reference = gaussian(5), gaussian(6)
    expected = torch_kl(Normal(step.mean, step.std), Normal(reference.mean, reference.std)).sum(-1)
    torch.testing.assert_close(kl_divergence(step, reference, D), expected)


def test_divergence_for_equal_deviations_is_the_scaled_distance_of_the_means() -> None:
    step = gaussian(7)
    reference = gaussian(8, like=step.std)
    expected = ((step.mean - reference.mean) ** 2 / (2 * step.std**2)).sum(-1)
    torch.testing.assert_close(kl_divergence(step, reference, D), expected)


values = st.floats(-5, 5, allow_nan=False)
deviations = st.floats(0.02, 3)


@settings(deadline=None)
@given(st.tuples(values, deviations), st.tuples(values, deviations))
def test_divergence_is_never_negative_and_zero_at_equality(
    one: tuple[float, float], two: tuple[float, float]
) -> None:
    p, q = (Gaussian(*(torch.full((1, 2, 2), v, dtype=torch.float64) for v in pair)) for pair in (one, two))
    assert (kl_divergence(p, q, 2) >= -1e-12).all()
    assert not kl_divergence(p, p, 2).any()
    assert not kl_divergence(p, p, 2, correlation=0.5).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from(CORRELATIONS), st.integers(1, D))
def test_padded_dimensions_change_nothing(seed: int, correlation: float, real: int) -> None:
    step, reference, other = gaussian(seed), gaussian(seed + 1), gaussian(seed + 2)
    x = torch.randn(2, H, D, dtype=torch.float64)
    # The real dimensions stay as they are; those beyond hold nonsense.
    far = torch.cat([x[..., :real], 100 * x[..., real:]], -1)
    mean = torch.cat([step.mean[..., :real], other.mean[..., real:]], -1)
    changed = Gaussian(mean, torch.cat([step.std[..., :real], 1e-9 * other.std[..., real:]], -1))
    assert torch.equal(log_prob(far, changed, real, correlation), log_prob(x, step, real, correlation))
    assert torch.equal(entropy(changed, real, correlation), entropy(step, real, correlation))
    assert torch.equal(
        kl_divergence(changed, reference, real, correlation),
        kl_divergence(step, reference, real, correlation),
    )


def test_a_deviation_may_be_one_number_for_all_components() -> None:
    step = gaussian(9)
    scalar = torch.full((2, 1, 1), 0.3, dtype=torch.float64)
    narrow, wide = Gaussian(step.mean, scalar), Gaussian(step.mean, scalar.expand(2, H, D))
    x = torch.randn(2, H, D, dtype=torch.float64)
    torch.testing.assert_close(log_prob(x, narrow, D, 0.5), log_prob(x, wide, D, 0.5))
    torch.testing.assert_close(entropy(narrow, D, 0.5), entropy(wide, D, 0.5))


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_float32_agrees_with_float64(correlation: float) -> None:
    step = gaussian(10)
    x = step.mean + step.std * torch.randn(2, H, D, dtype=torch.float64)
    narrow = Gaussian(step.mean.float(), step.std.float())
    torch.testing.assert_close(
        log_prob(x.float(), narrow, D, correlation).double(),
        log_prob(x, step, D, correlation),
        atol=1e-4,
        rtol=1e-4,
    )
