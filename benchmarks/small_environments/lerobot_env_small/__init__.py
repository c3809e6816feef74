"""Five small environments for LeRobot: a point mass, a pendulum, PushT from its state, a reacher and a 7-joint arm.

Importing it registers the configuration with LeRobot (`--env.type=small`) and the environments with Gymnasium, and
loads no simulator.
"""

from gymnasium.envs.registration import register

from .configuration import SmallEnvConfig

register("lerobot_env_small/PointMass-v0", "lerobot_env_small.point_mass:PointMass")
register("lerobot_env_small/Pendulum-v0", "lerobot_env_small.pendulum:Pendulum")
register("lerobot_env_small/PushTState-v0", "lerobot_env_small.pusht:PushTState")
register("lerobot_env_small/Reacher-v0", "lerobot_env_small.reacher:Reacher")
register("lerobot_env_small/Arm-v0", "lerobot_env_small.arm:Arm")

__all__ = ["SmallEnvConfig"]
