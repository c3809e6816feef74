"""One decision is one record: an observation, a chunk, and what happened."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecisionBatch:
    """N decisions of one or more environments; every tensor has N rows unless noted.

    A decision ends after its chunk, or earlier when the episode ends inside the chunk or a person takes over. The
    observation that follows it is the next decision's own observation, so it is carried here only for the rows that
    have no successor in the rollout (the last decision of an environment) or whose successor belongs to
    another episode (a truncation, whose value bootstraps from its true last observation).

    Attributes:
        observation: Raw observation in LeRobot's keys, before the policy's preprocessor, `[N, ...]`.
            State as float32, images as uint8.
        task: Task text of each decision, N strings.
        chain: Recorded denoising states `[N, S + 1, H, D]`: `S = 1` for hybrid, `S = K` for joint recording.
        step: Denoising step index of each recorded transition, `[N, S]` int64.
        log_prob: Log-probability under the behaviour policy per chunk step, `[N, H]`, summed over the real
            action dimensions and the recorded denoising steps.
        action: The chunk handed to the environment, in its own units, `[N, H, A]`.
        reward: Sum of the rewards of the executed steps, `[N]`.
        delay: How many steps old the observation was when the chunk began to be executed, `[N]` int64. As many actions
            at its beginning were left out: the chunk before was executed meanwhile.
        executed: How many steps of the chunk were executed after these, `[N]` int64; `delay + executed` is at most H.
        terminated: The episode ended in this decision by the task's own rules (success), `[N]` bool.
        truncated: The episode was cut by the time limit in this decision, or a person took over, `[N]` bool.
        success: The task was solved in this decision, `[N]` bool.
        version: Version of the weights that made the decision, `[N]` int64.
        env: Identifier of the environment, unique over all actors, `[N]` int64.
        index: Decision counter, strictly increasing per environment, `[N]` int64.
        next_row: Rows that carry their own next observation, `[M]` int64.
        next_observation: Those observations, `[M, ...]`, same keys as `observation`.
    """

    observation: dict[str, Tensor]
    task: list[str]
    chain: Tensor
    step: Tensor
    log_prob: Tensor
    action: Tensor
    reward: Tensor
    delay: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    version: Tensor
    env: Tensor
    index: Tensor
    next_row: Tensor
    next_observation: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of decisions."""
        return self.reward.shape[0]

    @property
    def steps(self) -> int:
        """Number of environment steps these decisions executed."""
        return int(self.executed.sum())

    @property
    def scored(self) -> Tensor:
        """Steps at the beginning of each chunk that its log-probability covers, `[N]` int64.

        What was left out is covered, too: the density of the first steps of a chunk is exact, that of a part from its
        middle is not (`flow.density`).
        """
        return self.delay + self.executed

    def select(self, rows: Tensor) -> "DecisionBatch":
        """Keeps the given rows, in the given order.

        Args:
            rows: Row numbers, `[R]` int64, each at most once.

        Returns:
            The R decisions, with the next observations that belong to them.
        """
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[rows] = torch.arange(len(rows))
        kept = place[self.next_row] >= 0
        values = {name: getattr(self, name)[rows] for name in ROW_TENSORS}
        return DecisionBatch(
            observation={key: value[rows] for key, value in self.observation.items()},
            task=[self.task[row] for row in rows.tolist()],
            next_row=place[self.next_row[kept]],
            next_observation={key: value[kept] for key, value in self.next_observation.items()},
            **values,
        )

    @staticmethod
    def concatenate(batches: Sequence["DecisionBatch"]) -> "DecisionBatch":
        """Joins batches row after row.

        Args:
            batches: At least one batch; all with the same observation keys and shapes.

        Returns:
            One batch with the rows of all.
        """
        offsets = torch.tensor([0] + [len(batch) for batch in batches[:-1]]).cumsum(0).tolist()
        keys = batches[0].observation.keys()
        return DecisionBatch(
            observation={key: torch.cat([batch.observation[key] for batch in batches]) for key in keys},
            task=[task for batch in batches for task in batch.task],
            next_row=torch.cat(
                [batch.next_row + offset for batch, offset in zip(batches, offsets, strict=True)]
            ),
            next_observation={
                key: torch.cat([batch.next_observation[key] for batch in batches]) for key in keys
            },
            **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in ROW_TENSORS},
        )


ROW_TENSORS = tuple(
    field.name
    for field in fields(DecisionBatch)
    if field.name not in ("observation", "task", "next_row", "next_observation")
)
