"""What a person has shown, step by step, and the chunks in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DemonstrationBatch:
    """N steps that a person took, in the order of time within each intervention.

    Attributes:
        observation: Seen before each action, in LeRobot's keys, before the policy's preprocessor, `[N, ...]`.
            State as float32, images as uint8.
        task: Task text of each step, N strings.
        action: What was executed, in the environment's units, `[N, A]`.
        last: The person let go, or the episode ended, after this step, `[N]` bool; true for the last row.
    """

    observation: dict[str, Tensor]
    task: list[str]
    action: Tensor
    last: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (*self.observation.values(), self.action, self.last))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.action)

    def split(self, size: int) -> list["DemonstrationBatch"]:
        """Parts of at most `size` rows; what a boundary cuts ends there and begins anew."""
        parts = []
        for rows in torch.arange(len(self)).split(size):
            last = self.last[rows].clone()
            last[-1] = True
            observation = {key: value[rows] for key, value in self.observation.items()}
            task = [self.task[row] for row in rows.tolist()]
            parts.append(DemonstrationBatch(observation, task, self.action[rows], last))
        return parts

    @staticmethod
    def concatenate(batches: Sequence["DemonstrationBatch"]) -> "DemonstrationBatch":
        """Joins at least one batch, all with the same observation keys and shapes."""
        keys = batches[0].observation.keys()
        return DemonstrationBatch(
            observation={key: torch.cat([batch.observation[key] for batch in batches]) for key in keys},
            task=[task for batch in batches for task in batch.task],
            action=torch.cat([batch.action for batch in batches]),
            last=torch.cat([batch.last for batch in batches]),
        )


def chunk_rows(last: Tensor, rows: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Where the chunks that begin at given steps find their actions.

    As in a LeRobotDataset, a chunk that reaches beyond the end repeats the last action, marked as padding.

    Args:
        last: As in `DemonstrationBatch`, `[N]`.
        rows: Steps at which chunks begin, `[R]` int64.
        horizon: Actions per chunk, H.

    Returns:
        Rows of the actions `[R, H]` int64, and which of them are padding `[R, H]` bool.
    """
    ends = last.nonzero()[:, 0]
    end = ends[torch.searchsorted(ends, rows)][:, None]
    wanted = rows[:, None] + torch.arange(horizon)
    return torch.minimum(wanted, end), wanted > end
