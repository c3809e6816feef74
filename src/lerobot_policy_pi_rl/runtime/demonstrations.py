"""Demonstrations for supervised co-training, in the batches that the base's own loss reads."""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.factory import make_dataset
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import config_error
from .pipeline import PIRLTrainConfig, Player


class DemonstrationSource:
    """Random chunks of a LeRobotDataset, preprocessed as `lerobot-train` does.

    Rows are drawn from torch's global generator, whose state is in every checkpoint. A data set without cameras is
    small: it is preprocessed once and kept in memory.
    """

    def __init__(self, cfg: PIRLTrainConfig, player: Player) -> None:
        """Opens the data set.

        Args:
            cfg: Its `dataset`.
            player: The policy, which says what it reads, and the preprocessor.

        Raises:
            ConfigError: If the data set lacks something that the policy reads.
        """
        self._dataset: Any = make_dataset(cfg)
        self._preprocess, self._base = player.preprocessor, player.policy.base
        features = {
            **(player.policy.config.input_features or {}),
            **(player.policy.config.output_features or {}),
        }
        assert cfg.dataset is not None
        _check_features(cfg.dataset.repo_id, self._dataset.meta.features, features)
        self._cameras = self._dataset.meta.camera_keys
        self._all: dict[str, Any] | None = None
        if not self._cameras:
            self._all = self._rows(range(len(self._dataset)))

    def __call__(self, count: int) -> dict[str, Any]:
        """A batch of `count` chunks, drawn with replacement."""
        rows = torch.randint(len(self._dataset), (count,))
        if self._all is None:
            return self._rows(rows.tolist())
        return self._base.take(self._all, rows)

    def _rows(self, rows: Any) -> dict[str, Any]:
        batch = default_collate([self._dataset[row] for row in rows])
        for key in self._cameras:
            if batch[key].dtype == torch.uint8:
                batch[key] = batch[key].float() / 255
        return for_loss(self._preprocess(batch))


def _check_features(name: str, given: Mapping[str, Any], read: Mapping[str, PolicyFeature]) -> None:
    """Checks that a data set has what a policy reads, in the same sizes; pictures may have any.

    Args:
        name: Of the data set.
        given: Its features.
        read: Those of the policy.

    Raises:
        ConfigError: If it has not.
    """
    missing = sorted(read.keys() - given.keys())
    if missing:
        raise config_error("dataset.repo_id", f"{name!r} has no {missing}, which the policy reads")
    for key, feature in read.items():
        stored, wanted = tuple(given[key]["shape"]), tuple(feature.shape)
        if feature.type is not FeatureType.VISUAL and stored != wanted:
            raise config_error(
                "dataset.repo_id",
                f"{name!r} has {key!r} with shape {stored}, but the policy was trained with {wanted}; take "
                "demonstrations of the same robot and environment",
            )


def for_loss(prepared: dict[str, Any]) -> dict[str, Any]:
    """What of a preprocessed batch a base's loss may read: rows, texts too, and numbers that hold for all."""
    return {
        key: value
        for key, value in prepared.items()
        if isinstance(value, (list, int)) or (isinstance(value, Tensor) and value.ndim)
    }
