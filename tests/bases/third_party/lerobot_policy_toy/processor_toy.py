"""Processors of the toy policy."""

from typing import Any

from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines

from .configuration_toy import ToyConfig


def make_toy_pre_post_processors(config: ToyConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    steps = make_default_policy_processor_steps(config, dataset_stats, normalizer_device=config.device)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
