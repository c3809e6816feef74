"""A robot with no hardware and a teleoperator that follows a script, as a LeRobot plugin like any other."""

from .config_scripted import ScriptedConfig, ScriptedTeleopConfig
from .scripted import Scripted, ScriptedTeleop

__all__ = ["Scripted", "ScriptedConfig", "ScriptedTeleop", "ScriptedTeleopConfig"]
