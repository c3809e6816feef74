"""What makes an environment for an SO-101 run without one."""

from typing import Any

import numpy as np
from lerobot.envs.configs import HILSerlRobotEnvConfig

from .config_scripted import ScriptedConfig, ScriptedTeleopConfig

MOTORS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


class Kinematics:
    """Stands in for the solver: the first three joints move the gripper's frame, a centimetre each."""

    # Metres.
    home = np.array([0.2, 0.0, 0.1])

    def __init__(self, **settings: Any) -> None:
        pass

    def forward_kinematics(self, joints: np.ndarray) -> np.ndarray:
        pose = np.eye(4)
        pose[:3, 3] = self.home + joints[:3] / 100
        return pose

    def inverse_kinematics(self, joints: np.ndarray, pose: np.ndarray) -> np.ndarray:
        return np.concatenate([(pose[:3, 3] - self.home) * 100, joints[3:]])


def without_hardware(env: HILSerlRobotEnvConfig, script: str, fps: int) -> None:
    """Puts the scripted devices in the place of a recipe's; its pose for a reset needs a motor bus and goes, too."""
    env.robot = ScriptedConfig(motors=MOTORS, views=tuple(env.robot.cameras))
    env.teleop = ScriptedTeleopConfig(script=script)
    env.processor.reset.fixed_reset_joint_positions = None
    env.fps = fps
