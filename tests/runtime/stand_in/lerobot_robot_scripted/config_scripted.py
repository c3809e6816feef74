"""Their settings."""

from dataclasses import dataclass

from lerobot.robots import RobotConfig
from lerobot.teleoperators import TeleoperatorConfig


@RobotConfig.register_subclass("scripted")
@dataclass
class ScriptedConfig(RobotConfig):
    """Motors that are at once where they are sent, and cameras that show the first one's place."""

    motors: tuple[str, ...] = ("x", "y", "z", "gripper")
    views: tuple[str, ...] = ("front",)
    # The bus breaks down at this step; 0 is never.
    fails_at: int = 0
    # Seconds each command takes, in turn.
    latency: tuple[float, ...] = (0.0,)


@TeleoperatorConfig.register_subclass("scripted")
@dataclass
class ScriptedTeleopConfig(TeleoperatorConfig):
    """One letter for each step, over and over.

    `.` nothing, `i` the person acts, `s` a success, `S` the person acts and succeeds, `f` the person ends the episode,
    `v` the person ends it and wants it recorded again, `V` the same while acting.
    """

    script: str = "."
