"""One MetaWorld task as a Gymnasium environment that observes a small picture."""

from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces

from lerobot_policy_pi_rl.envs.configuration_metaworld_camera import PROPRIOCEPTION_SIZE
from lerobot_policy_pi_rl.envs.metaworld import PROPRIOCEPTION, MetaworldGym

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.fast_sawyer import FastSawyer


class MetaworldCameraGym(MetaworldGym):
    """A task of which a picture is observed as `pixels`, and hand position and gripper opening as `agent_pos`.

    A picture is drawn when `observe` or `render` asks for one, at most once for each moment.

    Args:
        task: Task name.
        episode_length: Time limit in control steps.
        reward: `sparse` or `dense`.
        camera_size: Height and width of the picture.
    """

    render_mode = "rgb_array"

    def __init__(
        self, task: str, episode_length: int = 200, reward: str = "sparse", camera_size: int = 64
    ) -> None:
        picture = spaces.Box(0, 255, (camera_size, camera_size, 3), dtype=np.uint8)
        hand = spaces.Box(-np.inf, np.inf, (PROPRIOCEPTION_SIZE,), dtype=np.float32)
        super().__init__(task, spaces.Dict({"agent_pos": hand, "pixels": picture}), episode_length, reward)
        self._size = camera_size
        # The picture, and the state that it shows.
        self._drawn: tuple[np.ndarray, np.ndarray] | None = None

    def observe(self) -> dict[str, np.ndarray]:
        """Picture `[size, size, 3]` uint8 and the hand's own state `[4]` float32."""
        return {"agent_pos": self._state[PROPRIOCEPTION].astype(np.float32), "pixels": self.render()}

    def render(self) -> np.ndarray:
        """The picture that is observed, `[size, size, 3]` uint8."""
        from lerobot_policy_pi_rl.envs.camera import camera_of_process

        if self._drawn is None or self._drawn[1] is not self._state:
            model, data = self.simulation.model, self.simulation.data
            self._drawn = camera_of_process(self.task, model, self._size).draw(model, data), self._state
        return self._drawn[0]

    def _make_simulation(self) -> "FastSawyer":
        from lerobot_policy_pi_rl.envs.camera import hide_arm
        from lerobot_policy_pi_rl.envs.fast_sawyer import make_simulation

        simulation = make_simulation(self.task)
        hide_arm(simulation.model)
        return simulation
