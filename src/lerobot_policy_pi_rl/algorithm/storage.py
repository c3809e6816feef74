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
# A preprocessed batch and rows of it -> those rows.
Take = Callable[[dict[str, Any], Tensor], dict[str, Any]]


class Observations:
    """Observations as the policy's base reads them, N rows.

    Pictures stay bytes, and where they are, until some of them are read: as floats, all of a rollout would take four
    times the memory, and on the policy's device. Without pictures, all rows are preprocessed once.
    """

    def __init__(self, packed: dict[str, Tensor], task: list[str], preprocess: Preprocess) -> None:
        """Preprocesses what need not wait.

        Args:
            packed: Observations as they cross the wire, N rows.
            task: Text of each.
            preprocess: The policy's preprocessor.
        """
        self._packed, self._task, self._preprocess = packed, task, preprocess
        waits = any(value.dtype == torch.uint8 for value in packed.values())
        self._whole = None if waits or not task else preprocess(packed, task)

    def __len__(self) -> int:
        """N."""
        return len(self._task)

    def rows(self, rows: Tensor, take: Take) -> dict[str, Any]:
        """The given rows (on the CPU), preprocessed.

        Args:
            rows: Row numbers, int64.
            take: Cuts rows out of a batch: that of the base which reads them.
        """
        if self._whole is not None:
            return take(self._whole, rows)
        packed = {key: value[rows] for key, value in self._packed.items()}
        return self._preprocess(packed, [self._task[row] for row in rows.tolist()])


@dataclass(frozen=True)
class Rollout:
    """The decisions of one iteration in time order.

    Attributes:
        decisions: In `time_order`.
        usable: Rows that can be trained on, `[U]` int64; the others lost the decision that followed them.
        observations: What was seen, N rows.
        next_observations: What came after the M decisions that have `decisions.next_observation`.
    """

    decisions: DecisionBatch
    usable: Tensor
    observations: Observations
    next_observations: Observations


def prepare(decisions: DecisionBatch, preprocess: Preprocess) -> Rollout:
    """Orders decisions in time.

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
    return Rollout(
        ordered,
        usable,
        Observations(ordered.observation, ordered.task, preprocess),
        Observations(ordered.next_observation, texts, preprocess),
    )


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
