"""What the tests of the environments share."""

from dataclasses import dataclass

from lerobot.envs.configs import EnvConfig
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv


@dataclass
class Command:
    """A command line that chooses an environment."""

    env: EnvConfig


def make_stock(task: str, seed: int) -> SawyerXYZEnv:
    """A freshly made environment of MetaWorld that shows its goal and draws it from a seed."""
    env = ALL_V3_ENVIRONMENTS[task]()
    env._partially_observable = False
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    del env.sawyer_observation_space
    env.seed(seed)
    return env
