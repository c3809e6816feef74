"""One denoising step as a Gaussian: the single function behind sampling and scoring."""

import functools
import math
from collections.abc import Callable
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
        logit_std: Standard deviation of the dimensions that are logits, `[D]`, zero for those that are denoised; None
            if all are.
    """

    velocity: Tensor
    std: Tensor | None = None
    logit_std: Tensor | None = None


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


@dataclass(frozen=True)
class Coefficients:
    """What of a denoising step depends on its times alone; everything broadcasts to `[B, H, D]`.

    Attributes:
        delta: Length of the step, `t - t'`.
        remaining: `1 - t`, how far the noise end is.
        drift: Share of the noise end that is taken off the Euler step; None if nothing is.
        std: Deviation of the step; where it is learned, the factor of the field's.
        learned: The field gives the deviation.
    """

    delta: Tensor
    remaining: Tensor
    drift: Tensor | None
    std: Tensor
    learned: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> "Coefficients":
        """The coefficients, each of them changed."""
        drift = None if self.drift is None else change(self.drift)
        return Coefficients(change(self.delta), change(self.remaining), drift, change(self.std), self.learned)


def coefficients(kind: StepKind, t: Tensor, t_next: Tensor, noise_level: float = 0.0) -> Coefficients:
    """Coefficients of the steps between given times, each of the times' own shape.

    Args:
        kind: `ode`, `flow_sde`, `flow_cps` or `flow_noise`.
        t: Times of the states, any shape.
        t_next: Times of the next states, same shape.
        noise_level: Scale of the noise for `flow_sde` and `flow_cps`.
    """
    if kind == "flow_noise":
        return Coefficients(t - t_next, 1 - t, None, torch.ones_like(t), learned=True)
    std = step_std(kind, t, t_next, noise_level)
    drift = None
    if kind == "flow_sde":
        drift = std**2 / (2 * t)
    elif kind == "flow_cps":
        drift = t_next * (1 - math.cos(math.pi / 2 * noise_level))
    return Coefficients(t - t_next, 1 - t, drift, std)


@functools.lru_cache(maxsize=16)
def _correlation_matrix(size: int, correlation: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        place = torch.arange(size, device=device)
        return correlation ** (place[:, None] - place).abs().to(dtype)


def correlate(x: Tensor, correlation: float) -> Tensor:
    """Multiplies by the correlation matrix `C_ij = correlation^|i - j|` along the chunk, `[..., H, D]`."""
    if correlation == 0:
        return x
    return _correlation_matrix(x.shape[-2], correlation, x.device, x.dtype) @ x


def transition(x_t: Tensor, field: FieldOutput, step: Coefficients, correlation: float = 0.0) -> Gaussian:
    """Distribution of `x_{t'}` given `x_t` (pi_RL, arXiv 2510.25889, eq. 7 and 8).

    The mean is `(1 - t') * a_hat + w * e_hat` with the action end `a_hat = x_t - t * v` and the noise end
    `e_hat = x_t + (1 - t) * v`. It is computed as the Euler step minus `(t' - w) * e_hat`, which is the same
    number and makes a step without noise equal the base policy's own Euler step to the bit.

    Flow-SDE's `(t' - w) * e_hat = std^2 / (2 t) * e_hat` is the drift that cancels what the noise adds. For noise
    with correlation matrix C along the chunk it is `std^2 / (2 t) * C e_hat`. Flow-CPS has
    `t' * (1 - cos(pi / 2 * noise_level))` in its place, Flow-Noise nothing.

    A dimension that is a logit is no part of the flow: nothing was mixed with noise, so no drift is due, and where the
    step has noise at all, its deviation is the logit's own.

    Args:
        x_t: State `[B, H, D]`.
        field: Velocity at `(x_t, t)`, the learned deviation for `flow_noise`, and that of logits.
        step: The step's coefficients, broadcastable to the state.
        correlation: AR(1) coefficient of the noise along the chunk that the drift is corrected for.

    Returns:
        Mean `[B, H, D]` and deviation (broadcastable to it).

    Raises:
        ValueError: If the deviation is learned and the field gives none.
    """
    mean = euler = x_t - step.delta * field.velocity
    if step.drift is not None:
        mean = mean - step.drift * correlate(x_t + step.remaining * field.velocity, correlation)
    std = step.std
    if step.learned:
        if field.std is None:
            raise ValueError("flow_noise needs a learned deviation: the field returned none")
        std = step.std * field.std
    if field.logit_std is None:
        return Gaussian(mean, std)
    logit = field.logit_std > 0
    return Gaussian(
        torch.where(logit, euler, mean), torch.where(logit, field.logit_std * (step.std > 0), std)
    )
