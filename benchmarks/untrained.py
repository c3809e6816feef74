"""An untrained compact policy, saved as `lerobot-train` saves one: what the benchmarks act with.

It acts about as a random policy does, so that the environments beside it do the same work as bare ones.
"""

from pathlib import Path

import torch
from lerobot.configs import FeatureType
from lerobot.envs import EnvConfig
from lerobot.policies import make_policy, make_pre_post_processors

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig


def save_untrained(folder: Path, env_cfg: EnvConfig) -> Path:
    """Saves a policy with random weights and unit statistics.

    Args:
        folder: Where; made if it does not exist.
        env_cfg: The environment whose features it reads and whose actions it gives.

    Returns:
        The folder, for `--policy.path`.
    """
    torch.manual_seed(0)
    config = PIRLConfig(device="cpu", push_to_hub=False)
    policy = make_policy(config, env_cfg=env_cfg)
    features = {**(config.input_features or {}), **(config.output_features or {})}
    stats = {
        key: {"mean": torch.zeros(feature.shape), "std": torch.ones(feature.shape)}
        for key, feature in features.items()
        if feature.type in (FeatureType.STATE, FeatureType.ACTION)
    }
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder
