"""The two devices."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.teleoperators.utils import TeleopEvents

from .config_scripted import ScriptedConfig, ScriptedTeleopConfig

SIZE = 16


class _Device:
    """What robot and teleoperator share: they are connected or not, and need no calibration."""

    is_calibrated = True
    _connected = False

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def disconnect(self) -> None:
        self._connected = False

    def calibrate(self) -> None:
        raise NotImplementedError

    def configure(self) -> None:
        raise NotImplementedError


class Scripted(_Device, Robot):
    """The robot."""

    config_class = ScriptedConfig
    name = robot_type = "scripted"

    def __init__(self, config: ScriptedConfig) -> None:
        self.config, self.steps = config, 0
        self.bus = SimpleNamespace(motors=dict.fromkeys(config.motors))
        self.cameras = dict.fromkeys(config.views)
        self.place = dict.fromkeys(config.motors, 0.0)
        # Every command, in order.
        self.commands: list[list[float]] = []

    @property
    def observation_features(self) -> dict[str, Any]:
        return {f"{name}.pos": float for name in self.place} | dict.fromkeys(self.cameras, (SIZE, SIZE, 3))

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{name}.pos": float for name in self.place}

    def get_observation(self) -> dict[str, Any]:
        first = next(iter(self.place.values()))
        picture = np.full((SIZE, SIZE, 3), np.clip(first * 100 + 100, 0, 255), np.uint8)
        picture[:, ::2] = 0
        return {f"{name}.pos": place for name, place in self.place.items()} | dict.fromkeys(
            self.cameras, picture
        )

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.config.latency[self.steps % len(self.config.latency)])
        self.steps += 1
        if self.steps == self.config.fails_at:
            raise ConnectionError("the bus does not answer")
        self.place = {name: float(action[f"{name}.pos"]) for name in self.place}
        self.commands.append(list(self.place.values()))
        return action


class ScriptedTeleop(_Device, Teleoperator):
    """The person: their n-th step sends the first motor to n thousandths."""

    config_class = ScriptedTeleopConfig
    name = "scripted"

    def __init__(self, config: ScriptedTeleopConfig) -> None:
        self.config, self.steps = config, 0

    @property
    def action_features(self) -> dict[str, Any]:
        return {"dtype": "float32", "shape": (4,), "names": ["delta_x", "delta_y", "delta_z", "gripper"]}

    @property
    def feedback_features(self) -> dict[str, Any]:
        return {}

    def get_action(self) -> dict[str, float]:
        return {"delta_x": self.steps / 1000, "delta_y": 0.5, "delta_z": -0.5, "gripper": 1.0}

    def get_teleop_events(self) -> dict[Any, bool]:
        letter = self.config.script[self.steps % len(self.config.script)]
        self.steps += 1
        return {
            TeleopEvents.IS_INTERVENTION: letter in "iSV",
            TeleopEvents.SUCCESS: letter in "sS",
            TeleopEvents.TERMINATE_EPISODE: letter in "fvV",
            TeleopEvents.RERECORD_EPISODE: letter in "vV",
        }

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        raise NotImplementedError
