"""Observations of several tasks from two cameras, and folders of models, for the policies that pack what they read."""

import json
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn

from .conftest import CAMERA, PIXELS, STATE_DIM

WRIST = "observation.images.wrist"
# Of unequal length.
TASKS = ["pick the cube up", "pick the", "the cube up pick the cube"]


def raw_observations(height: int = PIXELS, width: int = PIXELS) -> dict[str, Any]:
    """Three of them, of all tasks; the size is that of the wrist camera's pictures."""
    generator = torch.Generator().manual_seed(3)
    return {
        CAMERA: torch.rand(3, 3, PIXELS, PIXELS, generator=generator),
        WRIST: torch.rand(3, 3, height, width, generator=generator),
        OBS_STATE: torch.randn(3, STATE_DIM, generator=generator),
        "task": TASKS,
    }


def some_of(raw: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some of raw observations."""
    return {
        key: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
        for key, value in raw.items()
    }


def from_one_camera(rows: list[int]) -> dict[str, Any]:
    """Some of the observations, without the wrist camera."""
    return some_of({key: value for key, value in raw_observations().items() if key != WRIST}, rows)


def unpadded(batch: dict[str, Any]) -> dict[str, Any]:
    """One preprocessed observation without the padding of its prompt, which is on the left."""
    length = int(batch["attention_mask"].sum())
    tokens = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return batch | {key: batch[key][:, -length:] for key in tokens if key in batch}


def change_config(folder: Path, **settings: Any) -> None:
    """Changes settings of a model in the hub's format."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def whole_state(policy: nn.Module) -> dict[str, Tensor]:
    """All weights and all buffers, those that are not saved, too."""
    return {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
