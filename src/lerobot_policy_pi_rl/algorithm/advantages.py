"""Generalised advantage estimation over decisions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .decisions import DecisionBatch


@dataclass(frozen=True)
class Targets:
    """What the objective needs of a rollout beside the decisions, one row each.

    Attributes:
        advantage: `[N]`, not normalised.
        value_target: Return that the critic fits, `[N]`.
    """

    advantage: Tensor
    value_target: Tensor


def time_order(env: Tensor, index: Tensor) -> Tensor:
    """Rows in the order of their environment and, within it, of time, `[N]` int64."""
    by_time = torch.argsort(index, stable=True)
    return by_time[torch.argsort(env[by_time], stable=True)]


def has_successor(batch: DecisionBatch) -> Tensor:
    """Whether the next row is the same environment's next decision in the same episode, `[N]` bool.

    Args:
        batch: Decisions in `time_order`.
    """
    follows = torch.zeros(len(batch), dtype=torch.bool)
    follows[:-1] = (batch.env[1:] == batch.env[:-1]) & (batch.index[1:] == batch.index[:-1] + 1)
    return follows & ~(batch.terminated | batch.truncated)


def usable_rows(batch: DecisionBatch) -> Tensor:
    """Rows whose next value is known: the episode ended by success, a successor follows, or it carries its own.

    Args:
        batch: Decisions in `time_order`.

    Returns:
        `[N]` bool; a False row lost its successor (dropped as invalid on the way) and cannot be bootstrapped.
    """
    carries = torch.zeros(len(batch), dtype=torch.bool)
    carries[batch.next_row] = True
    return batch.terminated | has_successor(batch) | carries


def next_values(batch: DecisionBatch, value: Tensor, own_next_value: Tensor) -> Tensor:
    """Value of the observation after each decision.

    A success has none. A truncation bootstraps from its own last observation, never from the next episode's first.

    Args:
        batch: Decisions in `time_order`.
        value: Value of each decision's observation, `[N]`.
        own_next_value: Value of `batch.next_observation`, `[M]`.

    Returns:
        `[N]`; meaningless in rows that are not `usable_rows`.
    """
    after = torch.zeros_like(value)
    after[:-1] = torch.where(has_successor(batch)[:-1].to(value.device), value[1:], after[:-1])
    after[batch.next_row] = own_next_value
    return torch.where(batch.terminated.to(value.device), torch.zeros_like(after), after)


def advantages(
    batch: DecisionBatch, value: Tensor, own_next_value: Tensor, gamma: float, gae_lambda: float
) -> Targets:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438) over decisions.

    A row that cannot be bootstrapped has no advantage of its own, and cuts the estimate of the row before it to one
    step: its observation still tells that row's next value.

    Args:
        batch: Decisions in `time_order`.
        value: Value of each decision's observation, `[N]`.
        own_next_value: Value of `batch.next_observation`, `[M]`.
        gamma: Discount per decision.
        gae_lambda: Weight of longer returns.

    Returns:
        Advantages and value targets.
    """
    usable = usable_rows(batch).to(value.device)
    error = batch.reward.to(value) + gamma * next_values(batch, value, own_next_value) - value
    error = torch.where(usable, error, torch.zeros_like(error))
    carry = (gamma * gae_lambda * has_successor(batch)).tolist()
    running, backwards = 0.0, []
    for step, weight in zip(reversed(error.tolist()), reversed(carry), strict=True):
        running = step + weight * running
        backwards.append(running)
    advantage = torch.tensor(backwards[::-1], dtype=value.dtype, device=value.device)
    return Targets(advantage, advantage + value)


def normalise(advantage: Tensor) -> Tensor:
    """Zero mean and unit deviation over the whole rollout, `[N]`."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
