"""One rollout, prepared once and read in minibatches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .advantages import time_order, usable_rows
from .decisions import DecisionBatch

# Raw observation and task texts -> the batch the policy's base reads.
Preprocess = Callable[[dict[str, Tensor], list[str]], dict[str, Any]]


@dataclass(frozen=True)
class Rollout:
    """The decisions of one iteration in time order, with their preprocessed observations on the policy's device.

    Attributes:
        decisions: In `time_order`.
        usable: Rows that can be trained on, `[U]` int64; the others lost the decision that followed them.
        batch: Preprocessed observations, N rows.
        next_batch: Preprocessed `decisions.next_observation`, M rows; empty if M is 0.
    """

    decisions: DecisionBatch
    usable: Tensor
    batch: dict[str, Any]
    next_batch: dict[str, Any]


def prepare(decisions: DecisionBatch, preprocess: Preprocess) -> Rollout:
    """Orders decisions in time and preprocesses them once.

    Args:
        decisions: All decisions of an iteration, in any order.
        preprocess: The policy's preprocessor.

    Returns:
        The rollout.

    Raises:
        ValueError: If no usable decision is left.
    """
    ordered = decisions.select(time_order(decisions.env, decisions.index))
    usable = usable_rows(ordered).nonzero()[:, 0]
    if not len(usable):
        raise ValueError(f"none of the {len(decisions)} decisions of this iteration can be used")
    texts = [ordered.task[row] for row in ordered.next_row.tolist()]
    next_batch = preprocess(ordered.next_observation, texts) if texts else {}
    return Rollout(ordered, usable, preprocess(ordered.observation, ordered.task), next_batch)


def minibatches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every row exactly once, shuffled, in slices of nearly equal size.

    Equal slices keep a last, tiny minibatch from taking a full gradient step.

    Args:
        rows: Row numbers, `[U]`.
        size: Largest slice.
        generator: Source of randomness (on the CPU).

    Yields:
        Row numbers.
    """
    if not len(rows):
        return
    order = rows[torch.randperm(len(rows), generator=generator)]
    yield from order.tensor_split(max(1, -(-len(rows) // size)))
