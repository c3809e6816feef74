"""The objective: pure functions of log-probabilities, advantages and values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective and what to log of it, all scalars on the device.

    Attributes:
        loss: To be minimised.
        clip_fraction: Share of ratios that left the clip range.
    """

    loss: Tensor
    clip_fraction: Tensor


def policy_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_ratio: float,
    dual_clip: float | None = None,
    weight: Tensor | None = None,
    log_ratio_bound: float | None = None,
    clip_ratio_high: float | None = None,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate objective (PPO, arXiv 1707.06347, eq. 7), optionally with a dual clip.

    The clip range is around the proximal policy, that before the update. Decisions that older weights made are weighted
    by its probability ratio to those (decoupled objective, arXiv 2110.00641, eq. 2).

    The dual clip (arXiv 1912.09729, eq. 5) bounds the objective of a decision with a negative advantage by
    `dual_clip * advantage`, so that a huge ratio cannot dominate the step.

    The log-ratio is held within its bound before anything else is made of it: the exponential of a larger one would
    outweigh all other decisions, and from 89 on it is infinite in float32, which spoils the gradient of all of them.

    Args:
        log_ratio: `log p_new - log p_proximal` per decision, `[B]`, or of T parts of each, `[B, T]`.
        advantage: `[B]`.
        clip_ratio: Half-width of the clip range.
        dual_clip: Factor above 1, or None.
        weight: `p_proximal / p_behaviour`, `[B]`; None where both are the same policy.
        log_ratio_bound: Largest absolute log-ratio, or None.
        clip_ratio_high: Upper half-width of the clip range, if it is another one.
        mask: Parts that count, `[B, T]` bool; a decision's objective is their mean. None if there is one part.

    Returns:
        The loss and its diagnostics.
    """
    if log_ratio_bound is not None:
        log_ratio = log_ratio.clamp(-log_ratio_bound, log_ratio_bound)
    ratio = log_ratio.exp()
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    clipped = ratio.clamp(1 - clip_ratio, 1 + high)
    if mask is not None:
        advantage = advantage[:, None]
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip is not None:
        floor = torch.maximum(objective, dual_clip * advantage)
        objective = torch.where(advantage < 0, floor, objective)
    with torch.no_grad():
        outside = ((ratio < 1 - clip_ratio) | (ratio > 1 + high)).to(ratio.dtype)
    if mask is not None:
        objective, outside = (
            torch.where(mask, one, 0.0).sum(1) / mask.sum(1) for one in (objective, outside)
        )
    if weight is not None:
        objective = weight * objective
    return PolicyLoss(-objective.mean(), outside.mean())


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """The k3 estimator `mean(ratio - 1 - log ratio)`: unbiased, never negative (Schulman, 2020)."""
    return (torch.expm1(log_ratio) - log_ratio).mean()


def value_loss(
    value: Tensor, target: Tensor, old_value: Tensor, value_clip: float | None, huber_delta: float
) -> Tensor:
    """Huber loss of the value, with the value's move in one iteration clipped.

    Args:
        value: Current value, `[B]`.
        target: Return to fit, `[B]`.
        old_value: Value at collection, `[B]`.
        value_clip: Half-width of the allowed move, or None.
        huber_delta: Residual at which the loss turns linear.

    Returns:
        Scalar mean.
    """
    loss = torch.nn.functional.huber_loss(value, target, reduction="none", delta=huber_delta)
    if value_clip is not None:
        near = old_value + (value - old_value).clamp(-value_clip, value_clip)
        clipped = torch.nn.functional.huber_loss(near, target, reduction="none", delta=huber_delta)
        loss = torch.maximum(loss, clipped)
    return loss.mean()


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """Share of the return's variance that the value explains: 1 is perfect, 0 no better than the mean."""
    if len(target) < 2:
        return target.new_zeros(())
    return 1 - (target - value).var() / target.var().clamp(min=1e-8)
