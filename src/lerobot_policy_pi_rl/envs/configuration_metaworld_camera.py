"""Configuration of the MetaWorld environment with a small camera; loads no simulator."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from lerobot_policy_pi_rl.envs.configuration_metaworld import MetaworldConfig
from lerobot_policy_pi_rl.errors import check

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.metaworld_camera import MetaworldCameraGym

CAMERA_SIZES = range(16, 481)
# Hand position and gripper opening.
PROPRIOCEPTION_SIZE = 4


@EnvConfig.register_subclass("metaworld_camera")
@dataclass
class MetaworldCameraEnv(MetaworldConfig):
    """MetaWorld seen through one small camera; of the simulator's state, only the hand's own is observed."""

    # Height and width of the picture, 16 to 480 pixels.
    camera_size: int = 64

    # The environment's names -> LeRobot's names.
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.camera_size in CAMERA_SIZES,
            "env.camera_size",
            f"must be {CAMERA_SIZES.start} to {CAMERA_SIZES.stop - 1} pixels; got {self.camera_size}",
        )

    @property
    def observed_features(self) -> dict[str, PolicyFeature]:
        """The picture and what the hand knows of itself."""
        picture = (self.camera_size, self.camera_size, 3)
        return {
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(PROPRIOCEPTION_SIZE,)),
            "pixels": PolicyFeature(type=FeatureType.VISUAL, shape=picture),
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `MetaworldCameraGym`, except the task."""
        return {**super().gym_kwargs, "camera_size": self.camera_size}

    def make_env(self, task: str) -> "MetaworldCameraGym":
        """Creates one environment; simulator and renderer are loaded at the first reset.

        Args:
            task: A task name.
        """
        from lerobot_policy_pi_rl.envs.metaworld_camera import MetaworldCameraGym

        return MetaworldCameraGym(task, **self.gym_kwargs)
