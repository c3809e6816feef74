"""A planar arm with two joints in MuJoCo, driven by torques: its tip is to come to rest at a target."""

import mujoco
import numpy as np

from .goal_env import GoalEnv

MODEL = """
<mujoco>
  <option timestep="0.01" gravity="0 0 0" integrator="implicitfast"/>
  <default><joint type="hinge" axis="0 0 1" damping="0.1" armature="0.01"/><geom type="capsule" size="0.02"/></default>
  <worldbody>
    <body>
      <joint name="shoulder"/><geom fromto="0 0 0 0.5 0 0" mass="0.5"/>
      <body pos="0.5 0 0">
        <joint name="elbow" limited="true" range="-150 150"/><geom fromto="0 0 0 0.4 0 0" mass="0.4"/>
        <site name="tip" pos="0.4 0 0"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder" gear="1.5"/><motor joint="elbow" gear="0.6"/></actuator>
</mujoco>
"""
# Lengths of the links in it, metres.
UPPER, LOWER = 0.5, 0.4
# Physics steps per control step, which is 50 ms.
SUBSTEPS = 5
REACHED, AT_REST = 0.08, 0.4


class Reacher(GoalEnv):
    """Observes the joints' angles and speeds, tip and target (x and y); acts by torques."""

    state_size, action_size = 8, 2
    task_description = "Bring the tip to rest at the target."

    def __init__(self) -> None:
        """Loads the model."""
        super().__init__()
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)

    def begin(self, random: np.random.Generator) -> None:
        """Any bend of the elbow; the target is somewhere in reach."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = random.uniform([-1.5, 0.3], [1.5, 2.0])
        angle, distance = random.uniform(-1.5, 1.5), random.uniform(0.4, 0.8)
        self.target = distance * np.array([np.cos(angle), np.sin(angle)])
        mujoco.mj_forward(self.model, self.data)

    def move(self, action: np.ndarray) -> None:
        """Several steps of the physics under one torque."""
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)

    @property
    def tip(self) -> np.ndarray:
        """Where the tip is, metres."""
        return self.data.site_xpos[0, :2]

    def state(self) -> np.ndarray:
        """Angles, speeds, tip, target."""
        return np.concatenate([self.data.qpos, self.data.qvel, self.tip, self.target])

    def solved(self) -> bool:
        """The tip is near the target, and the joints are slow."""
        near = np.linalg.norm(self.tip - self.target) < REACHED
        return bool(near and np.linalg.norm(self.data.qvel) < AT_REST)

    def control(self) -> np.ndarray:
        """Springs and dampers on the joints, to the angles that have the tip at the target."""
        x, y = self.target
        bend = np.arccos((x * x + y * y - UPPER**2 - LOWER**2) / (2 * UPPER * LOWER))
        lift = np.arctan2(y, x) - np.arctan2(LOWER * np.sin(bend), UPPER + LOWER * np.cos(bend))
        return np.array([4.0, 4.0]) * (np.array([lift, bend]) - self.data.qpos) - 1.0 * self.data.qvel

    def points(self) -> np.ndarray:
        """Target, elbow and tip."""
        return np.stack([self.target, self.data.xpos[2, :2], self.tip])
