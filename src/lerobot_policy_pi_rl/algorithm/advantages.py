"""Advantages of decisions: generalised advantage estimation, or a comparison within groups of episodes."""

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


def _of_first(batch: DecisionBatch, value: Tensor) -> Tensor:
    """For each decision, what the first one of its environment has of `[N]` values."""
    first = torch.ones(len(batch), dtype=torch.bool)
    first[1:] = batch.env[1:] != batch.env[:-1]
    return value[first][first.long().cumsum(0) - 1]


def episode_numbers(batch: DecisionBatch) -> Tensor:
    """Which episode of its environment each decision belongs to, counted from 0 within the batch, `[N]` int64.

    Args:
        batch: Decisions in `time_order`.
    """
    ended = (batch.terminated | batch.truncated).long()
    before = ended.cumsum(0) - ended
    # Without the episodes that had ended when the environment's first decision was made.
    return before - _of_first(batch, before)


def follows_a_loss(batch: DecisionBatch, group_size: int) -> Tensor:
    """Whether a decision of the same environment was lost before this one, so that its episode is uncertain, `[N]`.

    Args:
        batch: Decisions in `time_order`.
        group_size: Environments per group; they belong to one actor and count their decisions alike.
    """
    gap = torch.zeros(len(batch), dtype=torch.bool)
    same = batch.env[1:] == batch.env[:-1]
    gap[1:] = same & (batch.index[1:] != batch.index[:-1] + 1)
    losses = gap.long().cumsum(0)
    # Where the first one is lost, no gap shows it, but the environments beside this one began earlier.
    begun, group = _of_first(batch, batch.index), batch.env // group_size
    _, group = torch.unique(group, return_inverse=True)
    earliest = begun.new_zeros(int(group.max()) + 1).scatter_reduce(
        0, group, begun, "amin", include_self=False
    )
    return (losses > _of_first(batch, losses)) | (begun > earliest[group])


@dataclass(frozen=True)
class GroupTargets:
    """Advantages of decisions whose episodes are compared with others from the same start.

    Attributes:
        advantage: One number for all decisions of an episode, `[N]`; zero where it says nothing.
        informative: The episode's group is complete and its returns differ, `[N]` bool.
    """

    advantage: Tensor
    informative: Tensor


def group_advantages(
    batch: DecisionBatch, group_size: int, bounds: tuple[float, float] | None = None
) -> GroupTargets:
    """Advantages without a critic (GRPO, arXiv 2402.03300, eq. in section 4.1.2).

    `group_size` neighbouring environments begin their n-th episodes from the same start. An episode's advantage is its
    return's distance from the mean of its group, in standard deviations of the group. A group with an episode that did
    not end in this batch is left out, because long episodes would be missing; so is one whose returns are all alike,
    because it says nothing about what was better.

    Args:
        batch: Decisions in `time_order`, from the first one of every environment's fresh episode on.
        group_size: Environments per group, at least 2; numbers of one group are `g * group_size` and the following.
        bounds: Groups whose mean return is below the first or above the second one are left out, too.

    Returns:
        Advantages, on the CPU.
    """
    number = episode_numbers(batch)
    over = (batch.terminated | batch.truncated) & ~follows_a_loss(batch, group_size)
    span = int(number.max()) + 1
    _, episode = torch.unique(batch.env * span + number, return_inverse=True)
    count = int(episode.max()) + 1
    total = torch.zeros(count).index_add_(0, episode, batch.reward.float())
    ended = torch.zeros(count).index_add_(0, episode, over.float())
    # The group of each episode: the same for every one of its decisions.
    owner = torch.zeros(count, dtype=torch.int64)
    owner[episode] = (batch.env // group_size) * span + number
    _, group = torch.unique(owner, return_inverse=True)
    finished = torch.zeros(int(group.max()) + 1).index_add_(0, group, ended)
    mean = torch.zeros_like(finished).index_add_(0, group, total) / group_size
    spread = torch.zeros_like(finished).index_add_(0, group, (total - mean[group]) ** 2) / (group_size - 1)
    std = spread.sqrt()
    differs = (finished == group_size) & (std > 1e-6)
    if bounds is not None:
        differs &= (mean >= bounds[0]) & (mean <= bounds[1])
    informative = differs[group]
    advantage = torch.where(informative, (total - mean[group]) / (std[group] + 1e-8), torch.zeros_like(total))
    return GroupTargets(advantage[episode], informative[episode])


# Fewer rows than this have no deviation worth dividing by.
FEWEST_NORMALISED = 8
# Advantages are divided by at least this share of the returns' deviation: below it they are rounding, not a difference.
LEAST_DEVIATION = 0.01


def normalise(advantage: Tensor, value_target: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Zero mean and unit deviation over the whole rollout, `[N]`.

    Args:
        advantage: Of the decisions that are trained on, `[N]`.
        value_target: Their returns, `[N]`.
        scale: Scale of returns, by which the advantages of a handful of rows are divided instead.
    """
    if len(advantage) < FEWEST_NORMALISED:
        return advantage / scale
    deviation = torch.maximum(advantage.std(), LEAST_DEVIATION * value_target.std())
    return (advantage - advantage.mean()) / (deviation + 1e-8 * scale)


def says_nothing(reward: Tensor, executed: Tensor, terminated: Tensor) -> bool:
    """Whether the rewards of a rollout tell no decision from another: a constant value explains all of them.

    That is so if no decision was rewarded, if every executed step was worth the same and no episode terminated, and if
    every decision ended its episode with the same reward. What is left in the advantages then is the critic's own
    error. Where only some episodes terminated, a constant reward other than 0 says how long each of them lasted.

    Args:
        reward: Of each decision, `[N]`.
        executed: Steps that each of them executed, `[N]`.
        terminated: Whether it ended its episode by the task's own rules, `[N]` bool.
    """
    if not len(reward):
        return True
    worth = reward if bool(terminated.all()) else reward / executed.clamp(min=1)
    if not bool(torch.isfinite(worth).all()):
        # The guards against such numbers come later.
        return False
    low, high = worth.min(), worth.max()
    alike = bool(high - low <= 1e-6 * torch.maximum(high.abs(), low.abs()))
    ends_differ = bool(terminated.any()) and not bool(terminated.all())
    return alike and not (ends_differ and bool(high.abs() > 0))
