"""What bases share whose batches come from a Qwen processor, which packs the patches of all pictures."""

from typing import Any

import torch
from torch import Tensor

from .adapter import take
from .stock import StockBase

# Tensors of a preprocessed batch that have no row for each observation: the patches of all its pictures, one after
# the other, and the grid of patches of each picture.
PATCHES, GRIDS = "pixel_values", "image_grid_thw"


class QwenBase(StockBase):
    """Adapter of a policy whose prompts a Qwen processor writes, with equally many pictures for each observation."""

    def rows(self, batch: dict[str, Any]) -> int:
        """Number of observations of a preprocessed batch."""
        return len(batch["input_ids"])

    def take(self, batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The given observations (int64) of a preprocessed batch, with their pictures."""
        part = take({key: value for key, value in batch.items() if key not in (PATCHES, GRIDS)}, rows)
        grids = batch[GRIDS].unflatten(0, (self.rows(batch), -1))
        patches = batch[PATCHES].split(grids.prod(-1).sum(-1).tolist())
        return part | {
            PATCHES: torch.cat([patches[row] for row in rows.tolist()]),
            GRIDS: grids[rows.to(grids.device)].flatten(0, 1),
        }
