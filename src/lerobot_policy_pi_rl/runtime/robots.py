"""LeRobot's robot environment (`gym_manipulator`) as a vector of one, which a person may take over at any step.

A chunk is executed action by action at the control rate, in the actor's own process and through LeRobot's processors.
With a lookahead, the next one is chosen in a thread while the robot executes the last steps of the current one.
Where a person takes over, the decision ends: it has executed the steps before, and is valued by what was seen then.
What the person does until they let go is kept apart, as a demonstration.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

import numpy as np
import torch
from lerobot.envs import EnvConfig, env_to_policy_features
from lerobot.envs.configs import HILSerlRobotEnvConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.processor.hil_processor import DISCRETE_PENALTY_KEY, TELEOP_ACTION_KEY
from lerobot.teleoperators.utils import TeleopEvents
from lerobot.utils.constants import ACTION, OBS_STR
from torch import Tensor

from ..bases.untrusted import forbid_remote_code
from .control import Clock, ControlStatistics
from .pool import ChunkStep, Observation
from .tasks import check_text
from .workers import EnvironmentFailed

logger = logging.getLogger(__name__)

# Steps by people that are kept until they are fetched; a person who goes on for longer is no longer recorded.
MAX_RECORDED = 10_000
# What LeRobot's simulation is called; any other name is a robot.
SIMULATION = "gym_hil"

# Chooses the next chunk for an observation.
Think = Callable[[Observation], Any]


@dataclass(frozen=True)
class Intervention:
    """What a person did, from taking over to letting go or the end of the episode; T steps.

    Attributes:
        observation: Seen before each action, `[T, ...]` in LeRobot's keys, images as uint8.
        action: Executed, in the environment's units, `[T, A]` float32.
    """

    observation: Observation
    action: np.ndarray


@dataclass(frozen=True)
class _Moment:
    """What one step did.

    Attributes:
        observation: Seen after it, `[1, ...]`.
        action: Executed, by whomever, `[A]`.
        reward: Of the task and of the gripper's penalty.
        solved: The task was solved in it.
        terminated: The episode ended by the task, by the reward classifier or by a person's verdict.
        truncated: The episode was cut by the time limit, or declared void by a person.
        by_person: A person acted.
        void: A person wants the episode to be recorded again.
    """

    observation: Observation
    action: np.ndarray
    reward: float
    solved: bool
    terminated: bool
    truncated: bool
    by_person: bool
    void: bool

    @property
    def over(self) -> bool:
        """The episode has ended."""
        return self.terminated or self.truncated


class RobotVector:
    """One robot, or LeRobot's simulation of one, behind the interface of `ChunkedVectorEnv`."""

    num_envs = 1
    # It ends its episodes by the clock (`processor.reset.control_time_s`), and none is cut short on purpose.
    time_limits = np.zeros(1, dtype=np.int64)

    def __init__(
        self,
        env_cfg: HILSerlRobotEnvConfig,
        device: str = "cpu",
        lookahead: int = 0,
        stop: Event | None = None,
    ) -> None:
        """Connects robot and teleoperator.

        Args:
            env_cfg: LeRobot's configuration.
            device: Where a reward classifier computes.
            lookahead: Steps before the end of a chunk at which the next one begins to be chosen.
            stop: Set from outside to end a chunk, or what a person does, at the next step; the robot is not reset then.

        Raises:
            EnvironmentFailed: They cannot be connected.
        """
        # A reward classifier is a checkpoint, too.
        forbid_remote_code()
        self.names = self.tasks = [env_cfg.task or ""]
        check_text(self.tasks[0])
        # A driver that fails ends the actor: only a person can mend a robot.
        self.failures = 0
        self.numbers, self.num_tasks = np.zeros(1, dtype=np.int64), 1
        self._cfg = env_cfg
        self._clock = Clock(env_cfg.fps)
        self._stop = stop or Event()
        self._env: Any = None
        self._teleop: Any = None
        self._transition: Any = None
        self._observation: Observation = {}
        self._pending: tuple[np.ndarray, int, bool] | None = None
        # A person has acted in the running episode.
        self._assisted = False
        self._interventions: list[Intervention] = []
        # Steps by people that were not recorded, or are of no use.
        self.unkept_steps = 0
        # When the policy got the observation that it thinks about.
        self._asked: float | None = None
        self._lookahead = lookahead
        # The newest observations of the policy's own steps, the newest last.
        self._seen: deque[Observation] = deque(maxlen=lookahead + 1)
        # What the policy thinks while the robot moves, and when it was ready. The robot keeps the actor's own thread.
        self._pool = ThreadPoolExecutor(1, "policy")
        self._thought: Future[tuple[Any, float]] | None = None
        try:
            with _failing("cannot be started"):
                self._connect(device)
        except BaseException:
            self.close()
            raise

    def _connect(self, device: str) -> None:
        # Imported here, because it loads the drivers of robots and cameras.
        from lerobot.rl import gym_manipulator

        self._env, self._teleop = gym_manipulator.make_robot_env(self._cfg)
        self._env_processor, self._action_processor = gym_manipulator.make_processors(
            self._env, self._teleop, self._cfg, device
        )

    @property
    def answers(self) -> list[Connection]:
        """No pipes: `receive` does the work itself."""
        return []

    def reset(self, seeds: np.ndarray) -> Observation:
        """Starts an episode; the seed means something in simulation only."""
        self._pending = self._asked = None
        self._forget_thought()
        # Of validation, or of an episode that was abandoned.
        self._clock.take_statistics()
        return self._reset(int(seeds[0]))

    def send(self, chunks: np.ndarray, reset_seeds: np.ndarray, cut: np.ndarray | None = None) -> None:
        """Notes the chunk `[1, H, A]` that `receive` executes.

        Raises:
            EnvironmentFailed: It is not finite; the robot holds.
        """
        if self._pending is not None:
            raise RuntimeError("send was called twice: receive the first result before sending again")
        if not np.isfinite(chunks[0]).all():
            # No bounds would hold it: clamping keeps NaN.
            raise EnvironmentFailed(
                "the policy chose actions that are not finite, and the robot holds; go on from an earlier checkpoint "
                "with a smaller algorithm.lr, and look for numbers that are not finite in the observations"
            )
        if self._asked is not None:
            self._count(decisions=1, thinking_seconds=self._clock.now() - self._asked)
        self._pending = (chunks[0], int(reset_seeds[0]), cut is not None and bool(cut[0]))

    def receive(self, think: Think | None = None) -> ChunkStep:
        """Executes the chunk until its end, the episode's, or a person takes over; then waits until they let go.

        Args:
            think: Chooses the next chunk. With a lookahead it is called in a thread, with what is seen that many steps
                before the chunk's end; if the chunk gets there, that is what to act on next, and `thought` has the
                choice. Without it the robot holds after the chunk, and what is seen then is acted on.
        """
        if self._pending is None:
            raise RuntimeError("nothing to receive: call send first")
        (chunk, seed, cut), self._pending = self._pending, None
        reward, executed, solved, taken_over = 0.0, 0, False, False
        for number, action in enumerate(chunk):
            if think is not None and number == len(chunk) - self._lookahead:
                self._begin_thought(think)
            last_seen = self._observation
            moment = self._step(torch.tensor(action, dtype=torch.float32))
            if moment.by_person:
                moment, taken_over = self._follow(last_seen, moment), True
                break
            self._seen.append(moment.observation)
            reward, executed, solved = reward + moment.reward, executed + 1, solved or moment.solved
            if moment.over or self._stop.is_set():
                break
        self._count(steps=executed)
        # Whatever a person brought about is neither the policy's success nor its failure.
        terminated = moment.terminated and not taken_over
        truncated = (moment.over or cut) and not terminated
        success = solved and not self._assisted
        # As old as the observations are from which the policy has learned to value what follows a chunk.
        final, following, delay = self._seen[0], moment.observation, 0
        if terminated or truncated:
            # A reset takes seconds, and nothing follows when the actor leaves.
            following = following if self._stop.is_set() else self._reset(seed)
        elif taken_over:
            self._see_only(following)
        elif self._thought is not None:
            following, delay = final, self._lookahead
        if delay == 0:
            # What it was about has not come to pass; it ends before the policy thinks again.
            self._forget_thought()
            self._asked = self._clock.now()
        return ChunkStep(
            reward=np.array([reward], dtype=np.float32),
            executed=np.array([executed]),
            terminated=np.array([terminated]),
            truncated=np.array([truncated]),
            success=np.array([success]),
            final_observation=final,
            observation=following,
            taken_over=np.array([taken_over]),
            delay=np.array([delay]),
            task=np.array(self.tasks),
            unjudged=np.array([""]),
            failure=np.array([""]),
        )

    def thought(self) -> Any:
        """What `think` has chosen for the observation to act on next, once it has; None where it was not asked."""
        if self._thought is None:
            return None
        assert self._asked is not None
        (choice, ready), self._thought = self._thought.result(), None
        due = self._clock.due
        margin = 0.0 if due is None else due - ready
        self._count(
            decisions=1,
            thinking_seconds=ready - self._asked,
            ahead=1,
            late=int(margin < 0),
            margin_seconds=margin,
        )
        self._asked = None
        return choice

    def _begin_thought(self, think: Think) -> None:
        """Lets the policy think about what was seen last while the robot goes on."""
        seen = self._observation
        self._asked = self._clock.now()
        self._thought = self._pool.submit(lambda: (think(seen), self._clock.now()))

    def _forget_thought(self) -> None:
        """Waits until the policy thinks no more: it has one set of weights and one state of its randomness."""
        thought, self._thought = self._thought, None
        if thought is not None:
            thought.result()

    def _see_only(self, observation: Observation) -> None:
        """Begins anew: what was seen before no longer says what the policy would act on."""
        self._seen.clear()
        self._seen.append(observation)

    def take_statistics(self) -> ControlStatistics:
        """How control went since the last time; the pause that follows is not counted."""
        self._clock.pause()
        self._forget_thought()
        self._asked = None
        return self._clock.take_statistics()

    def take_interventions(self) -> list[Intervention]:
        """What people did since the last time."""
        taken, self._interventions = self._interventions, []
        return taken

    def close(self) -> None:
        """Disconnects robot and teleoperator; may be called twice."""
        self._pool.shutdown()
        (env, self._env), (teleop, self._teleop) = (self._env, None), (self._teleop, None)
        with _failing("cannot be disconnected"):
            if env is not None:
                env.close()
            if teleop is not None and teleop.is_connected:
                teleop.disconnect()

    def _follow(self, seen: Observation, moment: _Moment) -> _Moment:
        """Lets a person act and records it, until they let go, the episode ends, or the actor is asked to leave.

        Args:
            seen: Before their first action.
            moment: Of their first action.

        Returns:
            The last step: the first one that was not theirs, the end of the episode, or any where the actor leaves.
        """
        self._assisted = True
        observations, actions, count, by_person = [seen], [moment.action], 1, 1
        room = MAX_RECORDED - sum(len(intervention.action) for intervention in self._interventions)
        while moment.by_person and not moment.over and not self._stop.is_set():
            seen = moment.observation
            moment, count = self._step(self._hold(moment.action)), count + 1
            by_person += moment.by_person
            if moment.by_person and len(actions) < room:
                observations.append(seen)
                actions.append(moment.action)
        self._count(interventions=1, person_steps=count)
        kept = 0 if moment.void or room <= 0 else len(actions)
        if unkept := by_person - kept:
            self.unkept_steps += unkept
            reason = "it was declared void" if moment.void else f"a quota carries {MAX_RECORDED}"
            logger.warning("%d of %d steps of an intervention are not kept: %s", unkept, by_person, reason)
        if not kept:
            return moment
        joined = {key: np.concatenate([part[key] for part in observations]) for key in seen}
        self._interventions.append(Intervention(joined, np.stack(actions)))
        return moment

    def _hold(self, last: np.ndarray) -> Tensor:
        """The action `[A]` that is executed when a person lets go: nothing has been decided yet, so do not move.

        Of positions the last one is repeated; a displacement is none, with a gripper that 1 leaves as it is.
        """
        if not self._displaces:
            return torch.from_numpy(last.copy())
        action, gripper = torch.zeros(len(last)), self._cfg.processor.gripper
        if gripper is None or gripper.use_gripper:
            action[-1] = 1.0
        return action

    @property
    def _displaces(self) -> bool:
        """Actions are displacements (in LeRobot's simulation, and with inverse kinematics), not positions."""
        return self._cfg.name == SIMULATION or self._cfg.processor.inverse_kinematics is not None

    def _bounded(self, action: Tensor) -> Tensor:
        """Displacements within their range: a policy that explores has no bounds, and a jump ends LeRobot's control."""
        space = self._env.action_space
        if not self._displaces or space.shape != tuple(action.shape):
            return action
        return action.clamp(torch.as_tensor(space.low), torch.as_tensor(space.high))

    def _step(self, action: Tensor) -> _Moment:
        """One step at its time."""
        from lerobot.rl.gym_manipulator import step_env_and_process_transition

        self._clock.wait()
        with _failing("failed"):
            action = self._bounded(action)
            self._transition = step_env_and_process_transition(
                self._env, self._transition, action, self._env_processor, self._action_processor
            )
        moment = _read(self._transition, action)
        self._observation = moment.observation
        return moment

    def _reset(self, seed: int) -> Observation:
        from lerobot.rl.gym_manipulator import reset_and_build_transition

        with _failing("cannot be reset"):
            # LeRobot resets without a seed, which leaves this generator as it is.
            self._env.unwrapped.np_random = np.random.default_rng(seed)
            self._transition = reset_and_build_transition(
                self._env, self._env_processor, self._action_processor
            )
        self._assisted = False
        self._clock.pause()
        self._observation = _observed(self._transition)
        self._see_only(self._observation)
        self._check_features()
        return self._observation

    def _check_features(self) -> None:
        """The configuration says what there is to see; the learner believes it."""
        for key, feature in env_to_policy_features(self._cfg).items():
            if key == ACTION:
                continue
            shape = self._observation[key].shape[1:] if key in self._observation else None
            if shape != tuple(feature.shape):
                found = f"gives {key} with shape {shape}" if shape else f"does not give {key}"
                raise EnvironmentFailed(
                    f"env.features: {key} has shape {tuple(feature.shape)}, but the robot environment {found}; "
                    f"it gives { {name: value.shape[1:] for name, value in self._observation.items()} }"
                )

    def _count(self, **more: float) -> None:
        self._clock.statistics = self._clock.statistics.plus(**more)


def is_robot(env_cfg: EnvConfig) -> bool:
    """Whether an environment is LeRobot's `gym_manipulator`: a robot, or `gym_hil` with its processors."""
    return isinstance(env_cfg, HILSerlRobotEnvConfig)


def _read(transition: Any, action: Tensor) -> _Moment:
    """What a processed transition says, in plain numbers."""
    info, more = transition[TransitionKey.INFO], transition[TransitionKey.COMPLEMENTARY_DATA]
    reward = float(transition[TransitionKey.REWARD])
    void = bool(info.get(TeleopEvents.RERECORD_EPISODE, False))
    terminated = bool(transition[TransitionKey.DONE]) and not void
    return _Moment(
        observation=_observed(transition),
        action=torch.as_tensor(more.get(TELEOP_ACTION_KEY, action))
        .detach()
        .float()
        .cpu()
        .numpy()
        .reshape(-1),
        # LeRobot's SAC learns the gripper apart from the rest and keeps its penalty apart; one policy has one reward.
        reward=reward + float(more.get(DISCRETE_PENALTY_KEY, 0.0)),
        # Its environments, its classifier and a person's verdict reward a success, and nothing else.
        solved=reward > 0,
        terminated=terminated,
        truncated=not terminated and (void or bool(transition[TransitionKey.TRUNCATED])),
        by_person=bool(info.get(TeleopEvents.IS_INTERVENTION, False)),
        void=void,
    )


def _observed(transition: Any) -> Observation:
    """Observations of a processed transition, `[1, ...]`, images rounded to uint8 as they cross the wire."""
    found: Observation = {}
    for key, value in transition[TransitionKey.OBSERVATION].items():
        if isinstance(value, Tensor) and key.startswith(OBS_STR):
            value = value.detach().float().cpu()
            image = value.ndim == 4
            found[key] = (value * 255).round().to(torch.uint8).numpy() if image else value.numpy().copy()
    return found


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns any error of the robot's drivers into one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise EnvironmentFailed(f"the robot environment {what}: {type(error).__name__}: {text}") from error
