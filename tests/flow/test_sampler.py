"""Sampling and scoring: one density, recorded and scored alike, and nothing that was not executed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.policies.common.flow_matching import euler_integrate
from torch import Tensor

from lerobot_policy_pi_rl.flow.sampler import (
    Field,
    Noise,
    Sample,
    executed_sum,
    sample_hybrid,
    sample_joint,
    sample_ode,
    score,
)
from lerobot_policy_pi_rl.flow.transition import FieldOutput

K, B, H, D = 4, 16, 5, 3
KINDS = ["flow_sde", "flow_cps", "flow_noise"]
SAMPLERS: dict[str, Callable[..., Sample]] = {"hybrid": sample_hybrid, "joint": sample_joint}


def make_field(seed: int = 0, dims: int = D, dtype: torch.dtype = torch.float32) -> Field:
    """A smooth nonlinear velocity field with a state- and time-dependent deviation in (.08, .16)."""
    generator = torch.Generator().manual_seed(seed)
    size = H * dims
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype) / size**0.5
    shift = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def field(x: Tensor, t: Tensor) -> FieldOutput:
        flat = x.flatten(1) @ weight + t[:, None].to(x) * shift
        return FieldOutput(flat.tanh().view_as(x), 0.08 + 0.08 * flat.sigmoid().view_as(x))

    return field


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 7, 10, 49])
def test_the_ode_is_lerobots_own_euler_loop_to_the_bit(num_steps: int) -> None:
    field, noise = make_field(), torch.randn(B, H, D)
    expected = euler_integrate(lambda x, t: field(x, t).velocity, noise, num_steps)
    assert torch.equal(sample_ode(field, noise, num_steps), expected)


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_as_long_as_a_stock_sampler_rounds_them(kind: str, recording: str) -> None:
    field, noise, how = make_field(), torch.randn(B, H, D), Noise(kind, 0.5)
    lengths = (0.4, 0.3, 0.2, 0.1)
    x = noise
    for k, length in enumerate(lengths):
        x = x - length * field(x, torch.full((B,), 1 - k / K)).velocity
    assert torch.equal(sample_ode(field, noise, K, lengths), x)
    sample = SAMPLERS[recording](field, noise, K, how, D, generator(), lengths)
    scored = score(field, sample.chain, sample.step, K, how, D, lengths)
    torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)
    other = score(field, sample.chain, sample.step, K, how, D)
    assert float((other.log_prob - sample.log_prob).abs().max()) > 0.01


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", ["flow_sde", "flow_cps"])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_zero_noise_is_the_ode_to_the_bit(kind: str, recording: str, correlation: float) -> None:
    field, noise = make_field(), torch.randn(B, H, D)
    how = Noise(kind, level=0.0, correlation=correlation)
    sample = SAMPLERS[recording](field, noise, K, how, D, generator())
    assert torch.equal(sample.x, sample_ode(field, noise, K))


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 10])
def test_scoring_a_sample_gives_its_own_log_probability(
    kind: str, recording: str, correlation: float, num_steps: int
) -> None:
    field, how = make_field(), Noise(kind, 0.5, correlation)
    sample = SAMPLERS[recording](field, torch.randn(B, H, D), num_steps, how, D, generator())
    scored = score(field, sample.chain, sample.step, num_steps, how, D)
    torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)
    assert torch.isfinite(scored.entropy).all()
    assert scored.steps.mean.shape == scored.steps.std.shape == sample.chain[:, 1:].shape


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64(kind: str, recording: str) -> None:
    how, noise = Noise(kind, 0.5, 0.5), torch.randn(B, H, D)
    sample = SAMPLERS[recording](make_field(), noise, K, how, D, generator())
    wide = score(make_field(dtype=torch.float64), sample.chain.double(), sample.step, K, how, D)
    assert wide.log_prob.dtype == torch.float64
    torch.testing.assert_close(sample.log_prob.double(), wide.log_prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_sample(kind: str, recording: str) -> None:
    noise = torch.randn(B, H, D)
    one, two = (SAMPLERS[recording](make_field(), noise, K, Noise(kind), D, generator(3)) for _ in range(2))
    assert torch.equal(one.chain, two.chain)
    assert torch.equal(one.log_prob, two.log_prob)


def test_a_joint_chain_starts_at_the_noise_and_ends_at_the_chunk() -> None:
    noise = torch.randn(B, H, D)
    sample = sample_joint(make_field(), noise, K, Noise("flow_sde"), D, generator())
    assert sample.chain.shape == (B, K + 1, H, D)
    assert torch.equal(sample.chain[:, 0], noise)
    assert torch.equal(sample.chain[:, -1], sample.x)
    assert sample.step.tolist() == [list(range(K))] * B


def test_flow_cps_records_no_last_step_because_it_has_no_noise() -> None:
    sample = sample_joint(make_field(), torch.randn(B, H, D), K, Noise("flow_cps"), D, generator())
    assert sample.chain.shape == (B, K, H, D)
    assert sample.step.max() == K - 2
    last = torch.full((B,), 1 / K)
    expected = sample.chain[:, -1] - last[:, None, None] * make_field()(sample.chain[:, -1], last).velocity
    assert torch.equal(sample.x, expected)


@pytest.mark.parametrize(("kind", "choices"), [("flow_sde", K), ("flow_noise", K), ("flow_cps", K - 1)])
def test_the_hybrid_step_is_drawn_for_each_row_and_covers_all_steps_with_noise(
    kind: str, choices: int
) -> None:
    rows = 4000
    sample = sample_hybrid(make_field(), torch.randn(rows, H, D), K, Noise(kind), D, generator())
    counts = sample.step[:, 0].bincount(minlength=K)
    assert sample.step.shape == (rows, 1)
    # Five standard errors of a binomial count around its mean.
    spread = 5 * (rows / choices * (1 - 1 / choices)) ** 0.5
    assert ((counts[:choices] - rows / choices).abs() < spread).all()
    assert not counts[choices:].any()


def test_a_hybrid_row_follows_the_ode_before_and_after_its_own_step() -> None:
    field, noise = make_field(), torch.randn(B, H, D)
    sample = sample_hybrid(field, noise, K, Noise("flow_sde"), D, generator())
    for row, k in enumerate(sample.step[:, 0].tolist()):
        x = noise[row : row + 1]
        for step in range(K):
            if step == k:
                torch.testing.assert_close(x, sample.chain[row : row + 1, 0])
                x = sample.chain[row : row + 1, 1]
            else:
                x = x - field(x, torch.full((1,), 1 - step / K)).velocity / K
        torch.testing.assert_close(x, sample.x[row : row + 1])


def test_noise_of_a_hybrid_step_has_the_asked_correlation() -> None:
    """Whitened residuals of many samples: unit variance, and `rho` between neighbours in the chunk."""
    field, how = make_field(), Noise("flow_sde", 0.5, 0.5)
    sample = sample_hybrid(field, torch.randn(8000, H, D), K, how, D, generator())
    steps = score(field, sample.chain, sample.step, K, how, D).steps
    residual = ((sample.chain[:, 1:] - steps.mean) / steps.std)[:, 0]
    correlation = (residual[:, 1:] * residual[:, :-1]).mean((0, 2))
    # Standard error of one entry is below 1 / sqrt(8000 * 3) < .0065.
    torch.testing.assert_close(residual.var(0).mean(), torch.tensor(1.0), atol=0.02, rtol=0)
    torch.testing.assert_close(correlation, torch.full((H - 1,), 0.5), atol=0.035, rtol=0)


@pytest.mark.parametrize("recording", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_padded_dimensions_do_not_count(kind: str, recording: str) -> None:
    """The chain carries them, because they enter the network; the density covers the first `real` only."""
    field, how, real = make_field(), Noise(kind, 0.5, 0.5), 2
    sample = SAMPLERS[recording](field, torch.randn(B, H, D), K, how, real, generator())
    assert sample.chain.shape[-1] == D
    moved = sample.chain.clone()
    moved[:, -1, :, real:] += 7.0
    scored, other = (score(field, chain, sample.step, K, how, real) for chain in (sample.chain, moved))
    assert torch.equal(scored.log_prob, other.log_prob)
    torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, H), st.sampled_from([0.0, 0.5]), st.sampled_from(KINDS))
def test_unexecuted_steps_change_nothing(executed: int, correlation: float, kind: str) -> None:
    """Where the reached state differs only in steps that were not executed, the log-probability does not."""
    field, how = make_field(), Noise(kind, 0.5, correlation)
    sample = sample_hybrid(field, torch.randn(B, H, D), K, how, D, generator())
    moved = sample.chain.clone()
    moved[:, 1, executed:] += 3.0
    count = torch.full((B,), executed)
    totals = [
        executed_sum(score(field, chain, sample.step, K, how, D).log_prob, count)
        for chain in (sample.chain, moved)
    ]
    assert torch.equal(*totals)


def test_executed_sum_ignores_even_infinities_beyond_the_executed_steps() -> None:
    per_step = torch.tensor([[1.0, 2.0, 4.0], [1.0, float("inf"), float("nan")], [1.0, 2.0, float("-inf")]])
    assert executed_sum(per_step, torch.tensor([3, 1, 2])).tolist() == [7.0, 1.0, 3.0]


def test_joint_log_probability_and_entropy_are_sums_over_the_steps() -> None:
    field, how = make_field(), Noise("flow_noise")
    sample = sample_joint(field, torch.randn(B, H, D), K, how, D, generator())
    whole = score(field, sample.chain, sample.step, K, how, D)
    parts = [score(field, sample.chain[:, s : s + 2], sample.step[:, s : s + 1], K, how, D) for s in range(K)]
    torch.testing.assert_close(whole.log_prob, sum(part.log_prob for part in parts))
    torch.testing.assert_close(whole.entropy, sum(part.entropy for part in parts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_gradients_of_the_log_probability_match_finite_differences(kind: str, correlation: float) -> None:
    """With respect to the velocity and, for Flow-Noise, the deviation."""
    how, step = Noise(kind, 0.5, correlation), torch.tensor([[0], [2]])
    chain = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    velocity = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    std = (torch.rand(2, 3, 2, dtype=torch.float64) + 0.2).requires_grad_(kind == "flow_noise")

    def log_prob_of(velocity: Tensor, std: Tensor) -> Tensor:
        return score(lambda x, t: FieldOutput(velocity, std), chain, step, K, how, 2).log_prob

    assert torch.autograd.gradcheck(log_prob_of, (velocity, std))


def test_gradient_of_the_log_probability_of_an_ode_like_mean() -> None:
    """`d log p / d v` of a Flow-Noise step is `-delta * (x' - mean) / std^2`."""
    chain = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    velocity = torch.tensor([[[0.3]]], dtype=torch.float64, requires_grad=True)
    std = torch.full((1, 1, 1), 0.4, dtype=torch.float64)
    scored = score(
        lambda x, t: FieldOutput(velocity, std), chain, torch.tensor([[1]]), K, Noise("flow_noise"), 1
    )
    (gradient,) = torch.autograd.grad(scored.log_prob.sum(), velocity)
    residual = chain[0, 1] - (chain[0, 0] - velocity[0].detach() / K)
    torch.testing.assert_close(gradient[0], -residual / K / 0.4**2)


def credit(sampler: Callable[..., Sample], num_steps: int, rows: int) -> tuple[float, float]:
    """Gradients of a linear reward by the velocity, which is one constant: the scored steps', and that of the sampler.

    The reward leaves the initial noise out, of which it could say nothing.
    """
    velocity = torch.zeros((), dtype=torch.float64, requires_grad=True)
    how, noise = Noise("flow_sde", 0.5), torch.randn(rows, 1, 1, generator=generator(1), dtype=torch.float64)

    def field(x: Tensor, t: Tensor) -> FieldOutput:
        return FieldOutput(velocity.expand_as(x))

    sample = sampler(field, noise, num_steps, how, 1, generator())
    reward = (sample.x - noise).flatten()
    (exploring,) = torch.autograd.grad(reward.mean(), velocity)
    chain, reward = sample.chain.detach(), reward.detach()
    log_prob = score(field, chain, sample.step, num_steps, how, 1).log_prob.flatten()
    (scored,) = torch.autograd.grad((reward - reward.mean()) @ log_prob / rows, velocity)
    return float(scored), float(exploring)


@pytest.mark.parametrize("num_steps", [2, 3, 8])
def test_hybrid_recording_credits_one_step_of_k(num_steps: int) -> None:
    """The chunk moves by -1 with the velocity: K steps of 1 / K, whose drift is that of the noise end, a constant here.

    The mean of the scored step, from a given state, moves by `-(1 / K + drift * (1 - t))`. Of the other K - 1 steps,
    which the velocity enters as well, nothing is scored.
    """
    times = [1 - k / num_steps for k in range(num_steps)]
    # std^2 / (2 t) with std^2 = .25 * t / (1 - t) / K, where 1 - t is that of the next step at t = 1.
    drift = [0.25 / num_steps / (2 * max(1 - t, 1 / num_steps)) * (1 - t) for t in times]
    drift = sum(drift) / num_steps
    scored, exploring = credit(sample_hybrid, num_steps, 200_000)
    assert exploring == pytest.approx(-1)
    assert scored == pytest.approx(-(1 / num_steps + drift), rel=0.03)


def test_joint_recording_credits_every_step() -> None:
    scored, exploring = credit(sample_joint, 3, 200_000)
    assert exploring == pytest.approx(-1)
    assert scored == pytest.approx(exploring, rel=0.03)
