"""A plugin of pytest, `-p benchmarks.with_pi_rl`: this package is loaded as LeRobot's commands load it."""

from lerobot.configs import PreTrainedConfig
from lerobot.rl.algorithms.configs import RLAlgorithmConfig
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()
for registry in (PreTrainedConfig, RLAlgorithmConfig):
    if "pi_rl" not in registry.get_known_choices():
        raise RuntimeError(f"{registry.__name__} does not know pi_rl: is lerobot_policy_pi_rl installed?")
