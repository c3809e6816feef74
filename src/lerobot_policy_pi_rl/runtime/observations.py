"""Observations on their way from an environment to the policy, the wire and the storage."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.envs import (
    EnvConfig,
    env_to_policy_features,
    make_env_pre_post_processors,
    preprocess_observation,
)
from lerobot.utils.constants import OBS_STATE, OBS_STR
from torch import Tensor

from ..errors import config_error
from .pool import Observation, nested
from .robots import is_robot
from .wire import TensorField

Processor = Callable[[dict[str, Any]], dict[str, Any]]


def offered_features(
    env_cfg: EnvConfig, policy_cfg: Any, renamed: Mapping[str, str]
) -> dict[str, PolicyFeature]:
    """What an environment gives and takes, behind its own processors, under the policy's names.

    Args:
        env_cfg: The environment.
        policy_cfg: The policy's configuration, by which LeRobot chooses the processors.
        renamed: The policy's names of the environment's features, where they differ.
    """
    own = env_to_policy_features(env_cfg)
    action = {key: feature for key, feature in own.items() if feature.type is FeatureType.ACTION}
    kinds = {
        PipelineFeatureType.ACTION: action,
        PipelineFeatureType.OBSERVATION: {k: f for k, f in own.items() if k not in action},
    }
    preprocessor, _ = make_env_pre_post_processors(env_cfg, policy_cfg)
    # LIBERO's step files the state under a kind of its own, so all kinds are taken.
    processed = {k: f for kind in preprocessor.transform_features(kinds).values() for k, f in kind.items()}
    if OBS_STATE in processed:
        # It also leaves the parts there that it has joined to that state.
        processed = {k: f for k, f in processed.items() if not k.startswith(f"{OBS_STATE}.")}
    return {renamed.get(key, key): feature for key, feature in processed.items()}


class ObservationPath:
    """The path of an observation, the same for actor and learner.

    Raw observations become LeRobot's keys exactly as in `lerobot-eval`; images are packed to uint8 for the wire and
    unpacked to the same floats on the other side. A robot's environment gives LeRobot's keys by itself, packed already.
    """

    def __init__(
        self,
        features: dict[str, PolicyFeature],
        env_cfg: EnvConfig,
        policy_cfg: Any,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """Prepares the path.

        Args:
            features: The policy's input features; nothing else is kept.
            env_cfg: The environment, for its own processors.
            policy_cfg: The policy's configuration, for the same.
            renamed: The policy's names of the environment's features, where they differ.
        """
        self._features, self._renamed = features, renamed or {}
        self._offered = offered_features(env_cfg, policy_cfg, self._renamed)
        self._env_preprocessor, self.env_postprocessor = make_env_pre_post_processors(env_cfg, policy_cfg)
        self._packed = is_robot(env_cfg)
        self._shapes = {key: field.shape for key, field in self.wire_fields().items()}

    def from_environment(self, raw: Observation, tasks: list[str]) -> dict[str, Tensor]:
        """Converts raw observations of N environments to LeRobot's keys, floats, `[N, ...]`.

        Text is left out, as LeRobot's evaluation does.

        Raises:
            ConfigError: If the environment lacks one of the policy's input features, or gives pictures or numbers of
                another kind or size than its configuration says.
        """
        observation: dict[str, Any]
        if self._packed:
            observation = {key: torch.from_numpy(value) for key, value in raw.items()}
        else:
            numbers = {key: _as_rows(value) for key, value in raw.items() if value.dtype.kind in "biuf"}
            _check_raw_pictures(numbers)
            observation = preprocess_observation(nested(numbers))
            observation = self._env_preprocessor(observation | {"task": tasks})
        observation = {self._renamed.get(key, key): value for key, value in observation.items()}
        missing = sorted(self._features.keys() - observation.keys())
        if missing:
            raise config_error(
                "env.features",
                f"the environment gives {sorted(key for key in observation if key.startswith(OBS_STR))}, but not "
                f"{missing}, which the policy reads; set features and features_map to what it gives",
            )
        found = {key: observation[key] for key in self._features}
        if self._packed:
            return self.unpack(found)
        self._check_shapes(found)
        return found

    def _check_shapes(self, found: dict[str, Tensor]) -> None:
        """Compares what the environment gives with its configuration, which is all that the learner knows of it."""
        for key, stated in self._shapes.items():
            given = tuple(found[key].shape[1:])
            if given != stated:
                sizes = "env.observation_height and env.observation_width, or " if self._is_image(key) else ""
                raise config_error(
                    "env.features",
                    f"says {key!r} is {stated}, but the environment gives {given}; set {sizes}env.features to what it "
                    "gives",
                )

    def pack(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images `[0, 1]` to uint8, everything else to float32, on the CPU."""
        return {
            key: (value * 255).round().to(torch.uint8) if self._is_image(key) else value.float()
            for key, value in observation.items()
        }

    def unpack(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undoes `pack`, to the bit for images that came from uint8."""
        return {
            key: value.float() / 255 if self._is_image(key) else value for key, value in observation.items()
        }

    def wire_fields(self) -> dict[str, TensorField]:
        """Type and shape of one packed observation per key; pictures have the environment's size."""
        fields = {}
        for key, feature in self._features.items():
            if self._is_image(key):
                fields[key] = TensorField(torch.uint8, tuple(self._offered.get(key, feature).shape))
            else:
                fields[key] = TensorField(torch.float32, tuple(feature.shape))
        return fields

    def _is_image(self, key: str) -> bool:
        return self._features[key].type is FeatureType.VISUAL


def _as_rows(value: np.ndarray) -> np.ndarray:
    """A number of each environment as a row of one: LeRobot would take `[N]` for the one row of one environment."""
    return value[:, None] if value.ndim == 1 else value


def _check_raw_pictures(raw: Observation) -> None:
    """Checks pictures for what LeRobot reads them as, in every command: bytes, with the channels last.

    Raises:
        ConfigError: If they are not.
    """
    for key, value in raw.items():
        if key != "pixels" and not key.startswith("pixels/"):
            continue
        shape = value.shape[1:]
        if value.dtype != np.uint8 or len(shape) != 3 or shape[2] >= min(shape[:2]):
            raise config_error(
                "env.type",
                f"the environment gives {key!r} as {value.dtype} of shape {shape}; LeRobot reads pictures as uint8 of "
                "shape (height, width, channels): change that in the environment, or in a wrapper around it",
            )
