"""One denoising step as a Gaussian: the single function behind sampling and scoring."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StepKind = Literal["ode", "flow_sde", "flow_cps", "flow_noise"]

# Kinds whose standard deviation is a closed form of the time, the same for every component.
FIXED_STD_KINDS: tuple[StepKind, ...] = ("flow_sde", "flow_cps")


@dataclass(frozen=True)
class Gaussian:
    """The distribution of the next state, `x_{k+1} ~ N(mean, std^2)`.

    Attributes:
        mean: `[B, H, D]`.
        std: Broadcastable to `mean`; zero where the step is deterministic.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class FieldOutput:
    """What a velocity field says about one state.

    Attributes:
        velocity: `v(x_t, t) = noise - action`, `[B, H, D]`.
        std: Standard deviation of the step from a learned noise network, `[B, H, D]`; None without one.
    """

    velocity: Tensor
    std: Tensor | None = None


def step_std(kind: StepKind, t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
    """Standard deviation of a step whose noise is a closed form of the time.

    Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9): `sigma * sqrt(delta)` with `sigma = noise_level * sqrt(t / (1 - t))`.
    At `t = 1` the denominator takes the next grid point's time, so that the first step's deviation is exactly
    `noise_level`. Flow-CPS (coefficients-preserving sampling): `t' * sin(pi / 2 * noise_level)`.

    Args:
        kind: One of `ode`, `flow_sde`, `flow_cps`.
        t: Time of the state, any shape.
        t_next: Time of the next state, same shape.
        noise_level: Scale of the noise.

    Returns:
        Deviation, same shape as `t`.

    Raises:
        ValueError: If the kind has no closed form.
    """
    if kind == "ode":
        return torch.zeros_like(t)
    if kind == "flow_sde":
        distance = torch.where(t < 1, 1 - t, 1 - t_next)
        return noise_level * torch.sqrt(t / distance * (t - t_next))
    if kind == "flow_cps":
        return t_next * math.sin(math.pi / 2 * noise_level)
    raise ValueError(
        f"step kind {kind!r} has no closed-form deviation; choose one of ode, flow_sde, flow_cps"
    )


def correlate(x: Tensor, correlation: float) -> Tensor:
    """Multiplies by the correlation matrix `C_ij = correlation^|i - j|` along the chunk, `[..., H, D]`."""
    if correlation == 0:
        return x
    place = torch.arange(x.shape[-2], device=x.device)
    return (correlation ** (place[:, None] - place).abs().to(x.dtype)) @ x


def transition(
    kind: StepKind,
    x_t: Tensor,
    field: FieldOutput,
    t: Tensor,
    t_next: Tensor,
    noise_level: float = 0.0,
    correlation: float = 0.0,
) -> Gaussian:
    """Distribution of `x_{t'}` given `x_t` (pi_RL, arXiv 2510.25889, eq. 7 and 8).

    The mean is `(1 - t') * a_hat + w * e_hat` with the action end `a_hat = x_t - t * v` and the noise end
    `e_hat = x_t + (1 - t) * v`. It is computed as the Euler step plus `(w - t') * e_hat`, which is the same
    number and makes a step without noise equal the base policy's own Euler step to the bit.

    Flow-SDE's `(w - t') * e_hat = -std^2 / (2 t) * e_hat` is the drift that cancels what the noise adds. For noise
    with correlation matrix C along the chunk it is `-std^2 / (2 t) * C e_hat`.

    Args:
        kind: `ode`, `flow_sde`, `flow_cps` or `flow_noise`.
        x_t: State `[B, H, D]`.
        field: Velocity at `(x_t, t)`, and the learned deviation for `flow_noise`.
        t: Time of each row, `[B]`.
        t_next: Next time of each row, `[B]`.
        noise_level: Scale of the noise for `flow_sde` and `flow_cps`.
        correlation: AR(1) coefficient of the noise along the chunk; only `flow_sde` corrects its drift for it.

    Returns:
        Mean `[B, H, D]` and deviation (broadcastable to it).

    Raises:
        ValueError: If `flow_noise` is asked for and the field has no deviation.
    """
    now, after = t[:, None, None], t_next[:, None, None]
    euler = x_t - (now - after) * field.velocity
    if kind == "flow_noise":
        if field.std is None:
            raise ValueError("flow_noise needs a learned deviation: the field returned none")
        return Gaussian(euler, field.std)
    std = step_std(kind, now, after, noise_level)
    if kind == "ode":
        return Gaussian(euler, std)
    noise_end = x_t + (1 - now) * field.velocity
    if kind == "flow_sde":
        return Gaussian(euler - std**2 / (2 * now) * correlate(noise_end, correlation), std)
    return Gaussian(euler + after * (math.cos(math.pi / 2 * noise_level) - 1) * noise_end, std)
