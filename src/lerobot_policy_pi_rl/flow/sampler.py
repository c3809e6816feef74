"""Sampling a chunk by the ODE or with recorded noise, and scoring what was recorded."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .density import colour, entropy, log_prob, log_prob_terms
from .grid import time_grid
from .transition import Coefficients, FieldOutput, Gaussian, StepKind, coefficients, transition

# (x_t [B, H, D], t [B]) -> velocity and, with a noise network, the deviation.
Field = Callable[[Tensor, Tensor], FieldOutput]


@dataclass(frozen=True)
class Noise:
    """How a denoising step is made stochastic.

    Attributes:
        kind: `flow_sde`, `flow_cps` or `flow_noise`.
        level: Scale of the noise for the kinds with a closed form.
        correlation: AR(1) coefficient of the noise along the chunk, in `[0, 1)`.
    """

    kind: StepKind
    level: float = 0.5
    correlation: float = 0.0

    def stochastic_steps(self, num_steps: int) -> int:
        """How many of the K steps have noise, counted from the first: Flow-CPS ends without any."""
        return num_steps - 1 if self.kind == "flow_cps" else num_steps


@dataclass(frozen=True)
class Sample:
    """A chunk and what scoring it needs.

    Attributes:
        x: The chunk `x_0` in the policy's normalised space, `[B, H, D]`.
        chain: Recorded states `[B, S + 1, H, D]`.
        step: Step index of each recorded transition, `[B, S]` int64.
        log_prob: `[B, H]`, summed over recorded steps and real dimensions.
    """

    x: Tensor
    chain: Tensor
    step: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Score:
    """The density of recorded transitions under a policy.

    Attributes:
        log_prob: `[B, H]`, summed over recorded steps and real dimensions.
        terms: The same of every real dimension by itself, `[B, H, A]`.
        entropy: `[B, H]`, summed like the log-probability.
        steps: The S Gaussians, mean and deviation `[B, S, H, D]`.
    """

    log_prob: Tensor
    terms: Tensor
    entropy: Tensor
    steps: Gaussian


@dataclass(frozen=True)
class Schedule:
    """The K denoising steps of a sampler: times `[K]`, and the coefficients of every step, `[K]`."""

    times: Tensor
    steps: Coefficients


@functools.lru_cache(maxsize=16)
def schedule(
    kind: StepKind,
    level: float,
    num_steps: int,
    device: torch.device,
    lengths: tuple[float, ...] | None = None,
) -> Schedule:
    """The schedule of K steps of one kind on a device, computed once; it is not to be written to.

    All steps are equally long. The difference of two rounded times is not quite, so the length is `1 / K` unless a
    stock sampler rounds it otherwise: then its K `lengths` are given.
    """
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        grid = time_grid(num_steps, device)
        steps = coefficients(kind, grid[:-1], grid[1:], level)
        delta = steps.delta.new_tensor(lengths or [1 / num_steps] * num_steps)
        return Schedule(grid[:-1], replace(steps, delta=delta))


def at(steps: Coefficients, k: int) -> Coefficients:
    """Coefficients of step k, from those of all steps along the first axis."""
    return steps.map(lambda values: values[k])


def sample_ode(
    field: Field, noise: Tensor, num_steps: int, lengths: tuple[float, ...] | None = None
) -> Tensor:
    """Integrates the ODE from noise to a chunk.

    Args:
        field: Velocity field.
        noise: `x` at `t = 1`, `[B, H, D]`.
        num_steps: Number of Euler steps K.
        lengths: Their lengths, see `schedule`.

    Returns:
        The chunk `[B, H, D]`.
    """
    x, batch = noise, noise.shape[0]
    plan = schedule("ode", 0.0, num_steps, noise.device, lengths)
    for k in range(num_steps):
        x = transition(x, field(x, plan.times[k].expand(batch)), at(plan.steps, k)).mean
    return x


def sample_hybrid(
    field: Field,
    noise: Tensor,
    num_steps: int,
    how: Noise,
    real_dims: int,
    generator: torch.Generator | None = None,
    lengths: tuple[float, ...] | None = None,
) -> Sample:
    """Samples a chunk with one stochastic step per row; the other steps follow the ODE.

    The stochastic step is drawn for each row, so that one batch explores every noise scale.

    Args:
        field: Velocity field.
        noise: `x` at `t = 1`, `[B, H, D]`.
        num_steps: Number of denoising steps K.
        how: The noise.
        real_dims: Number of action dimensions that are not padding.
        generator: Source of randomness.
        lengths: Lengths of the steps, see `schedule`.

    Returns:
        The sample, with `S = 1` recorded transition per row.
    """
    batch = noise.shape[0]
    chosen = _randint(how.stochastic_steps(num_steps), batch, noise, generator)
    push = colour(_randn_like(noise, generator), how.correlation)
    plan = schedule(how.kind, how.level, num_steps, noise.device, lengths)
    # Drift and deviation of every step and row, `[K, B, 1, 1]`: zero but at the row's own step, which leaves the ODE.
    here = (torch.arange(num_steps, device=noise.device)[:, None] == chosen)[..., None, None]
    steps = plan.steps
    drift = None if steps.drift is None else steps.drift[:, None, None, None] * here
    steps = replace(steps, drift=drift, std=steps.std[:, None, None, None] * here)
    states, means, stds = [noise], [], []
    for k in range(num_steps):
        x = states[k]
        step = transition(x, field(x, plan.times[k].expand(batch)), at(steps, k), how.correlation)
        states.append(step.mean + step.std * push)
        means.append(step.mean)
        stds.append(step.std)
    # The density is evaluated once, for all rows together, at the step that each row recorded.
    rows, chain = torch.arange(batch, device=noise.device), torch.stack(states)
    own = Gaussian(torch.stack(means)[chosen, rows], torch.stack(stds)[chosen, rows])
    before, after = chain[chosen, rows], chain[chosen + 1, rows]
    log_p = log_prob(after, own, real_dims, how.correlation)
    return Sample(states[-1], torch.stack([before, after], 1), chosen[:, None], log_p)


def sample_joint(
    field: Field,
    noise: Tensor,
    num_steps: int,
    how: Noise,
    real_dims: int,
    generator: torch.Generator | None = None,
    lengths: tuple[float, ...] | None = None,
) -> Sample:
    """Samples a chunk with noise in every step and records the whole chain.

    Args:
        field: Velocity field.
        noise: `x` at `t = 1`, `[B, H, D]`.
        num_steps: Number of denoising steps K.
        how: The noise.
        real_dims: Number of action dimensions that are not padding.
        generator: Source of randomness.
        lengths: Lengths of the steps, see `schedule`.

    Returns:
        The sample; S is the number of stochastic steps (K, or K - 1 for Flow-CPS).
    """
    batch, recorded = noise.shape[0], how.stochastic_steps(num_steps)
    plan = schedule(how.kind, how.level, num_steps, noise.device, lengths)
    chain, log_p, x = [noise], noise.new_zeros(noise.shape[:2]), noise
    for k in range(num_steps):
        step = transition(x, field(x, plan.times[k].expand(batch)), at(plan.steps, k), how.correlation)
        if k >= recorded:
            # The last step of Flow-CPS has neither noise nor drift.
            x = step.mean
            continue
        x = step.mean + step.std * colour(_randn_like(noise, generator), how.correlation)
        log_p = log_p + log_prob(x, step, real_dims, how.correlation)
        chain.append(x)
    steps = torch.arange(recorded, device=noise.device).expand(batch, recorded)
    return Sample(x, torch.stack(chain, 1), steps, log_p)


def score(
    field: Field,
    chain: Tensor,
    step: Tensor,
    num_steps: int,
    how: Noise,
    real_dims: int,
    lengths: tuple[float, ...] | None = None,
) -> Score:
    """Density of recorded transitions: the same `transition` that sampled them.

    Args:
        field: Velocity field of the policy that scores.
        chain: Recorded states `[B, S + 1, H, D]`.
        step: Step indices `[B, S]`.
        num_steps: Number of denoising steps K.
        how: The noise that was used.
        real_dims: Number of action dimensions that are not padding.
        lengths: Lengths of the steps, see `schedule`.

    Returns:
        Log-probability, entropy and the Gaussians of the recorded transitions.
    """
    plan = schedule(how.kind, how.level, num_steps, chain.device, lengths)
    log_p, terms, spread, gaussians = [], [], [], []
    for s in range(step.shape[1]):
        k = step[:, s]
        own = plan.steps.map(lambda values, k=k: values[k][:, None, None])  # type: ignore[misc]
        gaussian = transition(chain[:, s], field(chain[:, s], plan.times[k]), own, how.correlation)
        terms.append(log_prob_terms(chain[:, s + 1], gaussian, real_dims, how.correlation))
        log_p.append(terms[-1].sum(-1))
        spread.append(entropy(gaussian, real_dims, how.correlation))
        gaussians.append(Gaussian(gaussian.mean, gaussian.std.expand_as(gaussian.mean)))
    steps = Gaussian(torch.stack([g.mean for g in gaussians], 1), torch.stack([g.std for g in gaussians], 1))
    return Score(torch.stack(log_p).sum(0), torch.stack(terms).sum(0), torch.stack(spread).sum(0), steps)


def executed_sum(per_step: Tensor, executed: Tensor) -> Tensor:
    """Sums a quantity per chunk step over the first steps only, up to the last one that was executed.

    Args:
        per_step: `[B, H]`.
        executed: Number of these steps of each row, `[B]`.

    Returns:
        `[B]`.
    """
    mask = torch.arange(per_step.shape[1], device=per_step.device) < executed[:, None]
    return torch.where(mask, per_step, torch.zeros_like(per_step)).sum(1)


def _randn_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _randint(high: int, size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, high, (size,), device=like.device, generator=generator)
