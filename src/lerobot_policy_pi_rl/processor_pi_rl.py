"""Pre- and post-processing of the `pi_rl` policy: the base's own."""

import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, PolicyAction, TransitionKey
from lerobot.policies import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, ProcessorStep, ProcessorStepRegistry
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from torch import Tensor

from .bases.configuration import TASK_EMBEDDING, CompactConfig, preprocessor_settings
from .bases.untrusted import check_processors
from .configuration_pi_rl import PIRLConfig
from .errors import check

# Below this deviation, in the data's own units, a state component counts as constant: what it has is rounding.
CONSTANT_STD = 1e-5
# A constant component is divided by this share of its feature's largest deviation, so that rounding stays small and a
# quaternion that was constant to 1e-9 does not explode when it moves by 1e-3. Any other is divided by at least this
# share of its own magnitude: components of one vector can have different units, such as metres and milliamperes.
MIN_STD_SHARE = 0.01


def embed_text(text: str, dim: int) -> Tensor:
    """Embeds a task text by feature hashing of its words and word pairs.

    Deterministic, with no vocabulary and no download: the same text gives the same vector on every machine.

    Args:
        text: Task description.
        dim: Width of the embedding.

    Returns:
        Unit-length vector `[dim]`; zeros for an empty text.
    """
    words = text.lower().split()
    vector = torch.zeros(dim)
    for token in words + [f"{a} {b}" for a, b in itertools.pairwise(words)]:
        code = zlib.crc32(token.encode())
        vector[code % dim] += 1.0 if code >> 31 else -1.0
    return vector / vector.norm().clamp(min=1e-6)


@dataclass
@ProcessorStepRegistry.register(name="pi_rl_task_embedding")
class TaskEmbeddingProcessorStep(ProcessorStep):
    """Adds the hashed embedding of the task text to the observation.

    Attributes:
        dim: Width of the embedding.
    """

    dim: int = 64

    def __post_init__(self) -> None:
        """Prepares the cache of texts already embedded."""
        self._known: dict[str, Tensor] = {}

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Adds `observation.task_embedding`, `[B, dim]`."""
        texts = (transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task")
        if texts is None:
            raise ValueError(
                "the batch has no 'task' text and the policy is conditioned on it; "
                "give one, or train with --policy.base.task_dim=0"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        observation = dict(transition[TransitionKey.OBSERVATION])
        observation[TASK_EMBEDDING] = torch.stack([self._embed(text) for text in texts])
        result = transition.copy()
        result[TransitionKey.OBSERVATION] = observation
        return result

    def _embed(self, text: str) -> Tensor:
        if text not in self._known:
            self._known[text] = embed_text(text, self.dim)
        return self._known[text]

    def get_config(self) -> dict[str, Any]:
        """Settings stored with the checkpoint."""
        return {"dim": self.dim}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """The embedding is an extra observation feature."""
        features[PipelineFeatureType.OBSERVATION][TASK_EMBEDDING] = PolicyFeature(
            FeatureType.LANGUAGE, (self.dim,)
        )
        return features


def make_pi_rl_pre_post_processors(
    config: PIRLConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Makes the pipelines of a new policy; those of a checkpoint are loaded by LeRobot from its files.

    A stock base has its own: those of the checkpoint that it comes from or, without one, new ones.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics of the demonstrations, for normalisation.

    Returns:
        Preprocessor and postprocessor.
    """
    if config.stock is not None:
        overrides = {}
        if config.base_path:
            check_processors(config.base_path, "policy.base_path")
            overrides = {
                "device_processor": {"device": config.device},
                **preprocessor_settings(config.base),
            }
        own = make_pre_post_processors(
            config.stock, config.base_path, dataset_stats=dataset_stats, preprocessor_overrides=overrides
        )
        check(
            not any(getattr(step, "use_relative_action", False) for step in own[1].steps),
            "policy.base_path",
            "has actions relative to the state, which are not supported: LeRobot connects their decoder with the state "
            "only where it loads its own GR00T; take a checkpoint with absolute actions",
        )
        return own
    steps = make_default_policy_processor_steps(
        config, floor_deviations(dataset_stats), normalizer_device=config.device
    )
    inputs = [steps.rename_observations, steps.add_batch_dim]
    if isinstance(config.base, CompactConfig) and config.base.task_dim > 0:
        inputs.append(TaskEmbeddingProcessorStep(config.base.task_dim))
    return make_policy_processor_pipelines(
        input_steps=[*inputs, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


def floor_deviations(stats: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
    """Bounds the deviation of every component of an observation from below.

    The bound is `MIN_STD_SHARE` of the feature's largest deviation for a constant component. For one that varies it is
    the same share of the component's own root mean square, where that is less.

    Args:
        stats: Statistics by feature; those with a `std` vector are bounded.

    Returns:
        A copy with bounded deviations, or None if there are none.
    """
    if stats is None:
        return None
    floored = {}
    for key, values in stats.items():
        floored[key] = dict(values)
        if key.startswith("observation.") and values.get("std") is not None:
            std = torch.as_tensor(values["std"], dtype=torch.float32)
            mean = torch.as_tensor(values["mean"], dtype=torch.float32)
            magnitude = torch.where(std > CONSTANT_STD, torch.hypot(mean, std), torch.inf)
            floored[key]["std"] = torch.maximum(std, MIN_STD_SHARE * magnitude.clamp(max=std.max()))
    return floored
