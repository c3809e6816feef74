"""PI-RL for LeRobot: improve a flow policy by online reinforcement learning.

Importing this package registers the policy `pi_rl`, the algorithm `pi_rl` and the environments `metaworld_state` and
`metaworld_camera` with LeRobot. LeRobot imports it by itself, because its name starts with `lerobot_policy_`.
"""

from . import processor_pi_rl as _processor  # noqa: F401  registers processor steps
from .algorithm import factory as _factory
from .algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from .configuration_pi_rl import PIRLConfig
from .envs.configuration_metaworld_camera import MetaworldCameraEnv
from .envs.configuration_metaworld_state import MetaworldStateEnv
from .lerobot_compat import warn_if_untested

warn_if_untested()
_factory.install()

__all__ = ["MetaworldCameraEnv", "MetaworldStateEnv", "PIRLAlgorithmConfig", "PIRLConfig"]
