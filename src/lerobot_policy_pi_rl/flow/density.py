"""Densities of Gaussian denoising steps whose noise may be correlated along the chunk.

With correlation `rho` the noise of neighbouring chunk steps follows a stationary AR(1) process: unit variance,
`corr(i, j) = rho^|i - j|`. Every density is factorised in the order of the chunk, `p(e_0) p(e_1 | e_0) ...`, so the sum
over the first n steps is the exact marginal density of the n executed steps: what was not executed contributes nothing.
"""

import functools
import math

import torch
from torch import Tensor

from .transition import Gaussian


def colour(noise: Tensor, correlation: float) -> Tensor:
    """Turns independent standard normal noise into noise correlated along the chunk.

    Args:
        noise: Independent standard normal, `[..., H, D]`.
        correlation: `rho` in `[0, 1)`.

    Returns:
        Unit-variance noise with `corr(i, j) = rho^|i - j|` along H.
    """
    if correlation == 0:
        return noise
    return _colouring(noise.shape[-2], correlation, noise.device, noise.dtype) @ noise


@functools.lru_cache(maxsize=16)
def _colouring(size: int, correlation: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Lower triangular L with `L L^T = C`: `L_ij = sqrt(1 - rho^2) rho^(i - j)`, without the root for `j = 0`."""
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        place = torch.arange(size, device=device)
        power = (correlation ** (place[:, None] - place).clamp(min=0).to(dtype)).tril()
        power[:, 1:] *= math.sqrt(1 - correlation**2)
        return power


def whiten(noise: Tensor, correlation: float) -> Tensor:
    """Inverse of `colour`: the innovations of the AR(1) process, `[..., H, D]`."""
    if correlation == 0:
        return noise
    innovation = (noise[..., 1:, :] - correlation * noise[..., :-1, :]) / math.sqrt(1 - correlation**2)
    return torch.cat([noise[..., :1, :], innovation], dim=-2)


def log_innovation_scale(chunk: int, correlation: float, like: Tensor) -> Tensor:
    """Log of the conditional deviation of each chunk step's unit noise, `[H, 1]`."""
    scale = torch.full((chunk, 1), 0.5 * math.log1p(-(correlation**2)), dtype=like.dtype, device=like.device)
    scale[0] = 0.0
    return scale


def log_prob(x_next: Tensor, step: Gaussian, real_dims: int, correlation: float = 0.0) -> Tensor:
    """Log-density of a denoising step per chunk step, over the real action dimensions, `[..., H]`; see below."""
    return log_prob_terms(x_next, step, real_dims, correlation).sum(-1)


def log_prob_terms(x_next: Tensor, step: Gaussian, real_dims: int, correlation: float = 0.0) -> Tensor:
    """Log-density of a denoising step per chunk step and real action dimension.

    Args:
        x_next: The state that was reached, `[..., H, D]`.
        step: Distribution it was drawn from; the deviation must be positive.
        real_dims: Number of action dimensions that are not padding.
        correlation: AR(1) coefficient of the noise along the chunk.

    Returns:
        `log p` of each component given those of earlier chunk steps, `[..., H, real_dims]`.
    """
    std = step.std.expand_as(x_next)[..., :real_dims]
    noise = (x_next[..., :real_dims] - step.mean[..., :real_dims]) / std
    innovation = whiten(noise, correlation)
    scale = std.log() + log_innovation_scale(x_next.shape[-2], correlation, std)
    return -0.5 * innovation**2 - scale - 0.5 * math.log(2 * math.pi)


def entropy(step: Gaussian, real_dims: int, correlation: float = 0.0) -> Tensor:
    """Differential entropy of a denoising step per chunk step, `[..., H]`, in nats."""
    std = step.std.expand_as(step.mean)[..., :real_dims]
    scale = std.log() + log_innovation_scale(std.shape[-2], correlation, std)
    return (scale + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def kl_divergence(step: Gaussian, reference: Gaussian, real_dims: int, correlation: float = 0.0) -> Tensor:
    """KL divergence `KL(step || reference)` per chunk step, in closed form.

    For equal deviations it is `||mean - mean_ref||^2 / (2 std^2)` in the whitened noise.

    Args:
        step: The current policy's step.
        reference: The other policy's step from the same state.
        real_dims: Number of action dimensions that are not padding.
        correlation: AR(1) coefficient of both; must be 0 where the deviations differ.

    Returns:
        `[..., H]`, in nats; the sum over the first n chunk steps is the divergence of their marginals.
    """
    std, std_ref = (g.std.expand_as(g.mean)[..., :real_dims] for g in (step, reference))
    offset = whiten((step.mean - reference.mean)[..., :real_dims] / std_ref, correlation)
    ratio = std / std_ref
    return (0.5 * (ratio**2 - 1 + offset**2) - ratio.log()).sum(-1)
