"""A robot with no hardware and a teleoperator that follows a script, as a LeRobot plugin like any other."""

from .arm import Kinematics, without_hardware
from .config_scripted import ScriptedConfig, ScriptedTeleopConfig
from .scripted import Scripted, ScriptedTeleop

__all__ = [
    "Kinematics",
    "Scripted",
    "ScriptedConfig",
    "ScriptedTeleop",
    "ScriptedTeleopConfig",
    "without_hardware",
]
