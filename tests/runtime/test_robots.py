"""LeRobot's robot environment, driven through its real classes by a robot without hardware and a scripted person."""

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Condition, Event, current_thread, main_thread
from types import SimpleNamespace
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import (
    EnvConfig,
    GripperConfig,
    HILSerlProcessorConfig,
    HILSerlRobotEnvConfig,
    ResetConfig,
    RewardClassifierConfig,
)
from lerobot.rl import gym_manipulator
from lerobot.robots.so_follower import SOFollowerRobotConfig
from safetensors.torch import load_file

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.demonstrations import DemonstrationBatch
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime import robots
from lerobot_policy_pi_rl.runtime.actor import Actor, Shown
from lerobot_policy_pi_rl.runtime.client import LearnerClient, LearnerLost
from lerobot_policy_pi_rl.runtime.collector import Collector, Interrupted
from lerobot_policy_pi_rl.runtime.control import Clock, ControlStatistics
from lerobot_policy_pi_rl.runtime.evaluation import evaluate
from lerobot_policy_pi_rl.runtime.gather import NothingUsable
from lerobot_policy_pi_rl.runtime.learner import Learner
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.runtime.pool import ChunkStep
from lerobot_policy_pi_rl.runtime.robots import RobotVector
from lerobot_policy_pi_rl.runtime.statistics import control_metrics
from lerobot_policy_pi_rl.runtime.wire import (
    Weights,
    WeightsHeader,
    encode_demonstrations,
    is_of_demonstrations,
)
from lerobot_policy_pi_rl.runtime.workers import EnvironmentFailed

STAND_IN = Path(__file__).parent / "stand_in"
RECIPE = Path(__file__).parents[2] / "recipes/so101.json"
CAMERA = "observation.images.front"
FEATURES = {
    "action": PolicyFeature(FeatureType.ACTION, (4,)),
    "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
}
FPS = 1000
DEMONSTRATIONS = "demonstrations"

MakeRobot = Callable[..., RobotVector]


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted devices, as `register_third_party_plugins` loads them; the person need not wait for a reset."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    importlib.import_module("lerobot_robot_scripted")
    stock = gym_manipulator.RobotEnv
    monkeypatch.setattr(gym_manipulator, "RobotEnv", lambda **more: stock(reset_time_s=0.0, **more))


def scripted(script: str = ".", control_time_s: float = 1.0, processor: Any = None, **robot: Any) -> Any:
    """The environment; LeRobot counts the reset as the first step of its time limit."""
    plugin = importlib.import_module("lerobot_robot_scripted")
    given = {"gripper": GripperConfig(use_gripper=True), "max_gripper_pos": None} | (processor or {})
    return HILSerlRobotEnvConfig(
        robot=plugin.ScriptedConfig(**robot),
        teleop=plugin.ScriptedTeleopConfig(script=script),
        task="put it there",
        fps=FPS,
        features=dict(FEATURES),
        features_map={key: key for key in FEATURES},
        processor=HILSerlProcessorConfig(reset=ResetConfig(control_time_s=control_time_s), **given),
    )


@pytest.fixture
def make_robot() -> Iterator[MakeRobot]:
    robots = []

    def make(*arguments: Any, lookahead: int = 0, stop: Event | None = None, **settings: Any) -> RobotVector:
        robots.append(RobotVector(scripted(*arguments, **settings), lookahead=lookahead, stop=stop))
        robots[-1].reset(np.zeros(1))
        return robots[-1]

    yield make
    for robot in robots:
        robot.close()


def chunk_of(steps: int, first: float = 1.0) -> np.ndarray:
    """A chunk whose n-th action sends all motors to `first + n`, in tenths."""
    return np.repeat((first + np.arange(steps))[None, :, None] / 10, 4, 2).astype(np.float32)


def execute(robot: RobotVector, steps: int = 4, first: float = 1.0) -> ChunkStep:
    robot.send(chunk_of(steps, first), np.ones(1, dtype=np.int64))
    return robot.receive()


def commands(robot: RobotVector) -> list[float]:
    """Where the first motor was sent, step by step."""
    return [command[0] for command in robot._env.robot.commands]


def test_a_chunk_is_executed_action_by_action(make_robot: MakeRobot) -> None:
    robot = make_robot()
    outcome = execute(robot)
    np.testing.assert_allclose(commands(robot), [0.1, 0.2, 0.3, 0.4])
    assert outcome.executed.tolist() == [4]
    assert not (outcome.done | outcome.taken_over | outcome.success).any()
    np.testing.assert_allclose(outcome.observation["observation.state"], [[0.4] * 4])
    assert outcome.observation[CAMERA].shape == (1, 3, 16, 16)
    assert outcome.observation[CAMERA].dtype == np.uint8
    assert set(outcome.observation[CAMERA].flat) == {0, 140}
    assert robot.tasks == ["put it there"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_chunk_that_is_not_finite_moves_nothing(make_robot: MakeRobot, value: float) -> None:
    """Neither its own steps nor the finite ones before them, and whatever the actions are."""
    robot = make_robot()
    chunk = chunk_of(4)
    chunk[0, 2:, 1] = value
    with pytest.raises(EnvironmentFailed, match="not finite, and the robot holds") as error:
        robot.send(chunk, np.ones(1, dtype=np.int64))
    assert "\n" not in str(error.value)
    assert commands(robot) == []


def test_the_time_limit_truncates_and_the_next_episode_begins(make_robot: MakeRobot) -> None:
    robot = make_robot(control_time_s=4 / FPS)
    outcome = execute(robot)
    assert outcome.executed.tolist() == [3]
    assert outcome.truncated.tolist() == [True]
    assert outcome.terminated.tolist() == [False]
    assert execute(robot).executed.tolist() == [3]


@pytest.mark.parametrize(("letter", "reward"), [("s", 1.0), ("f", 0.0)])
def test_a_verdict_ends_the_episode_without_an_intervention(
    make_robot: MakeRobot, letter: str, reward: float
) -> None:
    outcome = execute(make_robot(f".{letter}.."))
    assert outcome.executed.tolist() == [2]
    assert outcome.reward.tolist() == [reward]
    assert outcome.terminated.tolist() == [True]
    assert outcome.success.tolist() == [reward > 0]


def test_an_episode_that_is_declared_void_is_no_failure(make_robot: MakeRobot) -> None:
    outcome = execute(make_robot(".v.."))
    assert outcome.terminated.tolist() == [False]
    assert outcome.truncated.tolist() == [True]


def test_the_penalty_of_the_gripper_is_part_of_the_reward(make_robot: MakeRobot) -> None:
    """The robot is at once where it is sent: closed when it was told to close, so only opening it costs."""
    processor = {
        "gripper": GripperConfig(use_gripper=True, gripper_penalty=-0.25),
        "max_gripper_pos": 1.0,
    }
    robot = make_robot(processor=processor)
    seen: list[float] = []
    stock = robot._env.step

    def lagging(action: torch.Tensor) -> Any:
        """The gripper has not moved yet when it is looked at."""
        seen.append(float(action[-1]))
        outcome = stock(action)
        robot._env._raw_joint_positions["gripper.pos"] = seen[-2] if len(seen) > 1 else 0.0
        return outcome

    robot._env.step = lagging
    chunk = np.zeros((1, 4, 4), np.float32)
    # Closes, stays closed, opens, stays open.
    chunk[0, :, 3] = [1, 1, 0, 0]
    robot.send(chunk, np.ones(1, dtype=np.int64))
    assert robot.receive().reward.tolist() == [-0.5]


def test_the_reward_classifier_decides_on_success(
    make_robot: MakeRobot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.rewards.classifier.modeling_classifier import Classifier

    def predict_reward(images: dict[str, torch.Tensor], threshold: float) -> float:
        """As bright as the third action makes it."""
        return float(images[CAMERA].max() > 0.5)

    stub = SimpleNamespace(to=lambda device: None, eval=lambda: None, predict_reward=predict_reward)
    monkeypatch.setattr(Classifier, "from_pretrained", lambda path: stub)
    processor = {"reward_classifier": RewardClassifierConfig(pretrained_path="somewhere", success_reward=2.0)}
    outcome = execute(make_robot(processor=processor))
    assert outcome.executed.tolist() == [3]
    assert outcome.reward.tolist() == [2.0]
    assert outcome.terminated.tolist() == outcome.success.tolist() == [True]


# People


def test_an_intervention_ends_the_decision_before_its_first_step(make_robot: MakeRobot) -> None:
    robot = make_robot("..iii.")
    outcome = execute(robot)
    # The person's steps are numbers 2, 3 and 4; then they let go, and the robot stays where they left it.
    np.testing.assert_allclose(commands(robot), [0.1, 0.2, 0.002, 0.003, 0.004, 0.004], atol=1e-7)
    assert outcome.executed.tolist() == [2]
    assert outcome.taken_over.tolist() == [True]
    assert not outcome.done.any()
    np.testing.assert_allclose(outcome.final_observation["observation.state"], [[0.2] * 4])
    np.testing.assert_allclose(outcome.observation["observation.state"], [[0.004, 0.5, -0.5, 1.0]], atol=1e-7)


def test_what_the_person_did_is_recorded_as_a_demonstration(make_robot: MakeRobot) -> None:
    robot = make_robot("..iii.")
    execute(robot)
    (intervention,) = robot.take_interventions()
    np.testing.assert_allclose(
        intervention.action, [[n / 1000, 0.5, -0.5, 1.0] for n in (2, 3, 4)], atol=1e-7
    )
    np.testing.assert_allclose(
        intervention.observation["observation.state"],
        [[0.2] * 4, [0.002, 0.5, -0.5, 1.0], [0.003, 0.5, -0.5, 1.0]],
        atol=1e-7,
    )
    assert intervention.observation[CAMERA].shape == (3, 3, 16, 16)
    assert robot.take_interventions() == []


def test_an_episode_that_a_person_finishes_is_not_the_policys_success(make_robot: MakeRobot) -> None:
    outcome = execute(make_robot(".iS."))
    assert outcome.executed.tolist() == [1]
    assert outcome.reward.tolist() == [0.0]
    assert outcome.success.tolist() == [False]
    # The policy is told what the take-over looked like, and not that the task was solved from there.
    assert outcome.terminated.tolist() == [False]
    assert outcome.truncated.tolist() == [True]
    np.testing.assert_allclose(outcome.final_observation["observation.state"], [[0.1] * 4])


def test_a_success_after_help_is_rewarded_and_not_counted(make_robot: MakeRobot) -> None:
    robot = make_robot(".i...s....s")
    execute(robot)
    helped = execute(robot)
    assert helped.reward.tolist() == [1.0]
    assert helped.terminated.tolist() == [True]
    assert helped.success.tolist() == [False]
    execute(robot)
    alone = execute(robot)
    assert alone.terminated.tolist() == alone.success.tolist() == [True]


def test_a_void_intervention_is_not_kept(make_robot: MakeRobot) -> None:
    robot = make_robot(".iV.")
    assert execute(robot).truncated.tolist() == [True]
    assert robot.take_interventions() == []
    assert robot.unkept_steps == 2


def test_what_a_quota_cannot_carry_is_counted(
    make_robot: MakeRobot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(robots, "MAX_RECORDED", 3)
    robot = make_robot(".iiiiii." + ".ii.." + "." * 100)
    execute(robot)
    execute(robot)
    assert [len(intervention.action) for intervention in robot.take_interventions()] == [3]
    assert robot.unkept_steps == 3 + 2
    assert "3 of 6 steps of an intervention are not kept: a quota carries 3" in caplog.text
    assert "2 of 2 steps of an intervention are not kept: a quota carries 3" in caplog.text


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("script", "shown"), [(".." + "i" * 10_000, 3), ("." * 10_000, 0)])
def test_a_stop_ends_an_intervention_and_a_chunk_at_the_next_step(
    make_robot: MakeRobot, script: str, shown: int
) -> None:
    """Without a time limit a person may go on for ever; what they have shown until then is kept."""
    stop = Event()
    robot = make_robot(script, stop=stop, control_time_s=1000.0)
    stock = robot._env.step

    def step(action: torch.Tensor) -> Any:
        if len(commands(robot)) == 4:
            stop.set()
        return stock(action)

    robot._env.step = step
    execute(robot, steps=100)
    assert len(commands(robot)) == 5
    assert sum(len(intervention.action) for intervention in robot.take_interventions()) == shown


def test_the_simulation_holds_still_when_a_person_lets_go(make_robot: MakeRobot) -> None:
    """Displacements: nothing but a gripper that is left as it is."""
    robot = make_robot()
    robot._cfg.processor.inverse_kinematics = object()
    assert robot._hold(np.ones(4, np.float32)).tolist() == [0, 0, 0, 1]
    robot._cfg.processor.gripper.use_gripper = False
    assert robot._hold(np.ones(3, np.float32)).tolist() == [0, 0, 0]


def test_control_is_counted_by_who_acted(make_robot: MakeRobot) -> None:
    robot = make_robot("..iii.")
    execute(robot)
    execute(robot)
    statistics = robot.take_statistics()
    # Two, then three and the one in which they let go; then two, and the same again.
    assert statistics.steps == 4
    assert statistics.person_steps == 8
    assert statistics.interventions == 2
    assert statistics.decisions == 1
    assert statistics.thinking_seconds > 0
    assert statistics.intervals == 11
    assert robot.take_statistics().steps == 0


# The next chunk, chosen while the current one is executed


class Thoughts:
    """A policy that notes what it has seen, and in which thread, and may take its time."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.threads: list[str] = []
        self.may_end, self.began = Event(), Event()
        self.may_end.set()

    def __call__(self, observation: dict[str, np.ndarray]) -> str:
        self.seen.append(float(observation["observation.state"][0, 0]))
        self.threads.append(current_thread().name)
        self.began.set()
        assert self.may_end.wait(20)
        return f"thought {len(self.seen)}"


def think_through(robot: RobotVector, think: Thoughts | None, steps: int = 5) -> ChunkStep:
    """Executes a chunk as `execute` does, and the policy thinks."""
    robot.send(chunk_of(steps), np.ones(1, dtype=np.int64))
    return robot.receive(think)


def test_the_next_chunk_is_chosen_for_what_is_seen_before_the_end(make_robot: MakeRobot) -> None:
    robot, think = make_robot(lookahead=2), Thoughts()
    outcome = think_through(robot, think)
    np.testing.assert_allclose(commands(robot), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert robot.thought() == "thought 1"
    np.testing.assert_allclose(think.seen, [0.3])
    assert think.threads[0].startswith("policy")
    assert outcome.delay.tolist() == [2]
    np.testing.assert_allclose(outcome.observation["observation.state"], [[0.3] * 4])
    # What an end would be valued by is what a decision that follows acts on.
    np.testing.assert_allclose(outcome.final_observation["observation.state"], [[0.3] * 4])
    # It was given once.
    assert robot.thought() is None


def test_the_robot_moves_on_while_the_policy_thinks(make_robot: MakeRobot) -> None:
    """Until its chunk ends: the policy is not through before the last command has been sent."""
    robot, think = make_robot(lookahead=2), Thoughts()
    think.may_end.clear()
    outcome = think_through(robot, think)
    assert len(commands(robot)) == 5
    assert outcome.delay.tolist() == [2]
    think.may_end.set()
    assert robot.thought() == "thought 1"


def test_nothing_is_chosen_ahead_of_a_pause(make_robot: MakeRobot) -> None:
    """After it, the newest observation there is will be acted on."""
    robot = make_robot(lookahead=2)
    outcome = think_through(robot, None)
    assert robot.thought() is None
    assert outcome.delay.tolist() == [0]
    np.testing.assert_allclose(outcome.observation["observation.state"], [[0.5] * 4])
    np.testing.assert_allclose(outcome.final_observation["observation.state"], [[0.3] * 4])


def test_what_was_thought_of_an_episode_that_has_ended_is_forgotten(make_robot: MakeRobot) -> None:
    robot, think = make_robot("....s", lookahead=2), Thoughts()
    outcome = think_through(robot, think)
    assert outcome.terminated.tolist() == [True]
    assert outcome.executed.tolist() == [5]
    assert len(think.seen) == 1
    assert robot.thought() is None
    assert outcome.delay.tolist() == [0]


def test_a_person_does_not_wait_for_what_the_policy_thinks(make_robot: MakeRobot) -> None:
    robot, think = make_robot("....iii.", lookahead=2), Thoughts()
    think.may_end.clear()
    follow = robot._follow

    def followed(*arguments: Any) -> Any:
        """The policy thinks from before the person's first step until after their last."""
        assert think.began.wait(20)
        moment = follow(*arguments)
        think.may_end.set()
        return moment

    robot._follow = followed  # type: ignore[method-assign]
    outcome = think_through(robot, think)
    assert outcome.executed.tolist() == [4]
    assert outcome.taken_over.tolist() == [True]
    assert outcome.delay.tolist() == [0]
    assert robot.thought() is None
    # Two steps before the person's first one, and where they have left it.
    np.testing.assert_allclose(outcome.final_observation["observation.state"], [[0.2] * 4])
    np.testing.assert_allclose(outcome.observation["observation.state"], [[0.006, 0.5, -0.5, 1.0]], atol=1e-7)
    assert robot.take_statistics().ahead == 0


def test_an_end_near_the_start_is_valued_by_the_start(make_robot: MakeRobot) -> None:
    robot = make_robot(".v", lookahead=4)
    start = robot._observation["observation.state"].copy()
    outcome = think_through(robot, None)
    assert outcome.executed.tolist() == [2]
    np.testing.assert_array_equal(outcome.final_observation["observation.state"], start)


def test_an_error_of_the_policy_is_not_lost(make_robot: MakeRobot) -> None:
    def fails(observation: Any) -> None:
        raise ValueError("not today")

    robot = make_robot(lookahead=2)
    think_through(robot, fails)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not today"):
        robot.thought()


class SharedTime:
    """Time passes when the robot sleeps, and while it waits for the policy, in steps of exactly what is needed."""

    def __init__(self) -> None:
        self.now, self._changed, self._robot_waits = 100.0, Condition(), False

    def sleep(self, seconds: float) -> None:
        """The robot's clock waits."""
        with self._changed:
            self.now += seconds
            self._changed.notify_all()

    def pass_until(self, ready: float) -> None:
        """The policy is ready then, at whatever time its thread has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._robot_waits or self.now >= ready, 20)
            self.now = max(self.now, ready)

    @contextlib.contextmanager
    def robot_waits(self) -> Iterator[None]:
        with self._changed:
            self._robot_waits = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._robot_waits = False


def control_with(
    make_collector: Callable[..., Collector],
    monkeypatch: pytest.MonkeyPatch,
    lookahead: int,
    thinking_s: float,
) -> ControlStatistics:
    """How six chunks of five steps go at ten steps a second with a policy that needs so many seconds for each."""
    collector = make_collector(*ahead_arguments(".", lookahead), "--env.fps=10")
    time, robot, policy = SharedTime(), collector._groups[0].envs, collector._player.policy
    robot._clock = Clock(10, lambda: time.now, time.sleep)
    explore, thought = policy.explore, robot.thought

    def slow(*arguments: Any) -> Any:
        if current_thread() is main_thread():
            time.sleep(thinking_s)
        else:
            time.pass_until(robot._asked + thinking_s)
        return explore(*arguments)

    def waiting() -> Any:
        with time.robot_waits():
            return thought()

    monkeypatch.setattr(policy, "explore", slow)
    monkeypatch.setattr(robot, "thought", waiting)
    collector.restart(0)
    control = collector.collect(0).control
    assert control is not None
    # The first decision after a reset is nobody's wait.
    assert (control.steps, control.decisions, control.intervals) == (30, 5, 29)
    assert control.thinking_seconds == pytest.approx(5 * thinking_s)
    return control


def test_a_slow_policy_drops_frames_without_a_lookahead(
    make_collector: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of six chunks: a quarter of a second is two and a half periods, of which one is free."""
    control = control_with(make_collector, monkeypatch, 0, 0.25)
    assert (control.overruns, control.dropped_frames) == (5, 5)
    assert control.ahead == 0


def test_a_slow_policy_keeps_the_rate_with_a_lookahead(
    make_collector: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are three periods from what was seen to the first action: 0.05 seconds are left."""
    control = control_with(make_collector, monkeypatch, 2, 0.25)
    assert (control.overruns, control.dropped_frames) == (0, 0)
    assert (control.ahead, control.late) == (5, 0)
    assert control.margin_seconds == pytest.approx(5 * 0.05)


def test_a_policy_that_is_slower_than_its_lookahead_is_counted(
    make_collector: Callable[..., Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = control_with(make_collector, monkeypatch, 2, 0.45)
    assert (control.overruns, control.dropped_frames) == (5, 5)
    assert (control.ahead, control.late) == (5, 5)
    assert control.margin_seconds == pytest.approx(-5 * 0.15)


def test_how_chunks_come_in_time_is_told_where_any_were_chosen_ahead() -> None:
    """Two actors: four chunks, one of them late, and 0.1 seconds left in all."""
    one = ControlStatistics(decisions=4, ahead=3, late=1, margin_seconds=-0.1)
    other = ControlStatistics(decisions=1, ahead=1, margin_seconds=0.2)
    metrics = control_metrics([asdict(one), asdict(other)])
    assert metrics["control/ahead_in_time"] == pytest.approx(0.75)
    assert metrics["control/ahead_margin_s"] == pytest.approx(0.025)
    assert "control/ahead_in_time" not in control_metrics([asdict(ControlStatistics(decisions=4))])


# What can go wrong


def test_a_robot_that_fails_is_one_line(make_robot: MakeRobot) -> None:
    robot = make_robot(fails_at=2)
    with pytest.raises(EnvironmentFailed, match="failed: ConnectionError: the bus does not answer"):
        execute(robot)


def test_features_that_the_robot_does_not_give_are_one_line() -> None:
    cfg = scripted()
    cfg.features[CAMERA] = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    robot = RobotVector(cfg)
    try:
        with pytest.raises(
            EnvironmentFailed, match=r"has shape \(3, 32, 32\), but .* with shape \(3, 16, 16\)"
        ):
            robot.reset(np.zeros(1))
    finally:
        robot.close()


def test_closing_disconnects_both_devices(make_robot: MakeRobot) -> None:
    robot = make_robot()
    device, person = robot._env.robot, robot._teleop
    assert device.is_connected
    assert person.is_connected
    robot.close()
    assert not device.is_connected
    assert not person.is_connected


# Decisions


SIMULATION = [
    "--env.type=gym_manipulator",
    "--env.name=gym_hil",
    "--env.task=Helped-v0",
    f"--env.fps={FPS}",
    '--env.features={"action": {"type": "ACTION", "shape": [2]}, "observation.state": {"type": "STATE", "shape": [4]}}',
    '--env.features_map={"action": "action", "observation.state": "observation.state"}',
    "--env.processor.gripper.use_gripper=false",
    "--env.processor.gripper.gripper_penalty=-0.1",
    "--algorithm.collection.num_envs=1",
    "--algorithm.collection.eval_envs=0",
]


def features(size: int = 16) -> str:
    """The setting, for a picture of some size."""
    shapes = {key: feature.shape for key, feature in FEATURES.items()} | {CAMERA: (3, size, size)}
    kinds = {key: feature.type.name for key, feature in FEATURES.items()}
    return "--env.features=" + json.dumps({key: {"type": kinds[key], "shape": shapes[key]} for key in shapes})


def robot_arguments(script: str, *more: str) -> list[str]:
    """A small run on the scripted robot."""
    return [
        "--env.type=gym_manipulator",
        f"--env.fps={FPS}",
        "--env.task=put it there",
        "--env.robot.type=scripted",
        "--env.teleop.type=scripted",
        f"--env.teleop.script='{script}'",
        features(),
        "--env.features_map=" + json.dumps({key: key for key in FEATURES}),
        "--env.processor.reset.control_time_s=0.02",
        "--env.processor.max_gripper_pos=null",
        "--env.processor.gripper.use_gripper=true",
        "--algorithm.collection.num_envs=1",
        "--algorithm.collection.eval_envs=0",
        "--algorithm.collection.decisions=6",
        *more,
    ]


def test_a_collection_holds_only_what_the_policy_did(make_collector: Callable[..., Collector]) -> None:
    collector = make_collector(*robot_arguments("......ii......." + "i" + "." * 200))
    collector.restart(0)
    collected = collector.collect(0)
    batch = collected.decisions
    # Chunks of five: five steps, one and a take-over, five, one and a take-over, and whatever follows.
    assert batch.executed[:2].tolist() == [5, 1]
    assert batch.truncated[:2].tolist() == [False, True]
    assert {1} <= set(batch.next_row.tolist())
    assert batch.index.tolist() == list(range(6))
    assert collected.control is not None
    assert collected.control.steps == batch.steps
    assert collected.control.interventions == 2
    assert collected.demonstrations is not None
    # Two steps and one, as the person's numbers say.
    torch.testing.assert_close(collected.demonstrations.action[:, 0], torch.tensor([0.006, 0.007, 0.015]))
    assert collected.demonstrations.last.tolist() == [False, True, True]
    assert collected.demonstrations.observation[CAMERA].dtype == torch.uint8
    assert collector.collect(1).demonstrations is None


def test_a_robot_that_is_asked_to_stop_does_not_finish_its_quota(
    make_collector: Callable[..., Collector],
) -> None:
    collector = make_collector(*robot_arguments("."))
    collector.restart(0)
    collector._stop.set()
    with pytest.raises(Interrupted):
        collector.collect(0)
    assert len(commands(collector._groups[0].envs)) == 5


def test_a_decision_that_was_never_begun_is_not_sent(make_collector: Callable[..., Collector]) -> None:
    """The person takes over between two chunks: the one before ends there, and its value is what was seen then."""
    collector = make_collector(*robot_arguments("....." + "iii" + "." * 100))
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.executed[:2].tolist() == [5, 5]
    assert batch.truncated[:2].tolist() == [True, False]
    assert batch.index.tolist() == list(range(6))
    place = batch.next_row.tolist().index(0)
    # After the fifth action, which is what the robot sees as its place, and not where the person left it.
    torch.testing.assert_close(batch.next_observation["observation.state"][place], batch.action[0, 4])


def test_the_learner_scores_pictures_as_the_robots_actor_saw_them(
    make_collector: Callable[..., Collector],
) -> None:
    resized = (
        "--env.processor.image_preprocessing.resize_size=[12, 12]",
        features(size=12),
    )
    collector = make_collector(*robot_arguments("."), *resized)
    collector.restart(0)
    batch, player = collector.collect(0).decisions, collector._player
    assert batch.observation[CAMERA].dtype == torch.uint8
    with torch.no_grad():
        context = player.policy.encode(player.preprocess_packed(batch.observation, batch.task))
        score = player.policy.score(context, batch.chain, batch.step)
    torch.testing.assert_close(score.log_prob, batch.log_prob, atol=1e-4, rtol=1e-4)


def ahead_arguments(script: str, lookahead: int = 2, *more: str) -> list[str]:
    """A small run on the scripted robot in which chunks of seven are executed in part, five steps each."""
    return [
        *robot_arguments(script),
        "--env.processor.reset.control_time_s=1000",
        "--policy.chunk_size=7",
        "--policy.n_action_steps=5",
        f"--algorithm.collection.lookahead_steps={lookahead}",
        *more,
    ]


def check_executed(collector: Collector, batch: DecisionBatch, lookahead: int) -> None:
    """Compares decisions with what the robot was sent, where nobody interfered.

    Each begins with the action for its time, and has seen what was there `delay` steps before; what it carries as its
    own next observation was there `lookahead` steps before its end, or at the beginning of its episode.
    """
    sent = commands(collector._groups[0].envs)
    seen = [0.0, *sent]
    carried = dict(
        zip(batch.next_row.tolist(), batch.next_observation["observation.state"][:, 0].tolist(), strict=True)
    )
    begin, episode = 0, 0
    for row in range(len(batch)):
        delay, end = int(batch.delay[row]), begin + int(batch.executed[row])
        chunk = batch.action[row, delay : delay + end - begin, 0]
        assert sent[begin:end] == pytest.approx(chunk.tolist(), abs=1e-6)
        assert batch.observation["observation.state"][row, 0].item() == pytest.approx(seen[begin - delay])
        if row in carried:
            assert carried[row] == pytest.approx(seen[max(end - lookahead, episode)])
        begin = end
        if batch.terminated[row] or batch.truncated[row]:
            episode = end
    assert len(carried) >= 1


def test_decisions_chosen_ahead_are_what_the_robot_did(make_collector: Callable[..., Collector]) -> None:
    """An episode has nineteen steps: it ends in the lookahead of its fourth decision."""
    collector = make_collector(*ahead_arguments("."), "--env.processor.reset.control_time_s=0.02")
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.executed.tolist() == [5, 5, 5, 4, 5, 5]
    assert batch.delay.tolist() == [0, 2, 2, 2, 0, 2]
    assert batch.truncated.tolist() == [False, False, False, True, False, False]
    assert batch.next_row.tolist() == [3, 5]
    check_executed(collector, batch, lookahead=2)
    # The weights change now: the robot holds, and looks again.
    assert collector.collect(1).decisions.delay.tolist()[:2] == [0, 2]


def test_a_success_in_the_lookahead_belongs_to_the_chunk_that_was_executed(
    make_collector: Callable[..., Collector],
) -> None:
    """The ninth step is the fourth of the second chunk, while the third one is chosen."""
    collector = make_collector(*ahead_arguments("........s" + "." * 200))
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.executed.tolist() == [5, 4, 5, 5, 5, 5]
    assert batch.reward.tolist() == [0, 1, 0, 0, 0, 0]
    assert batch.terminated.tolist() == [False, True, False, False, False, False]
    assert batch.delay.tolist() == [0, 2, 0, 2, 2, 2]
    check_executed(collector, batch, lookahead=2)


def test_what_was_chosen_ahead_of_an_intervention_is_not_sent(
    make_collector: Callable[..., Collector],
) -> None:
    """A person takes the second chunk's last two steps; the third decision is made when they have let go."""
    collector = make_collector(*ahead_arguments("........ii" + "." * 200))
    collector.restart(0)
    collected = collector.collect(0)
    batch, sent = collected.decisions, commands(collector._groups[0].envs)
    assert batch.executed.tolist() == [5, 3, 5, 5, 5, 5]
    assert batch.delay.tolist() == [0, 2, 0, 2, 2, 2]
    assert batch.truncated.tolist() == [False, True, False, False, False, False]
    assert batch.index.tolist() == list(range(6))
    assert sent[5:8] == pytest.approx(batch.action[1, 2:5, 0].tolist(), abs=1e-6)
    # The person's two steps and the one in which they let go, then the next decision from its beginning.
    np.testing.assert_allclose(sent[8:11], [0.008, 0.009, 0.009], atol=1e-7)
    assert sent[11:16] == pytest.approx(batch.action[2, :5, 0].tolist(), abs=1e-6)
    assert batch.observation["observation.state"][2, 0].item() == pytest.approx(0.009)
    # The second was taken over after the eighth step, and is valued by what was seen two steps earlier.
    place = batch.next_row.tolist().index(1)
    assert batch.next_observation["observation.state"][place, 0].item() == pytest.approx(sent[5])
    assert collected.demonstrations is not None
    torch.testing.assert_close(collected.demonstrations.action[:, 0], torch.tensor([0.008, 0.009]))


def test_a_person_at_the_first_step_of_a_chunk_chosen_ahead(make_collector: Callable[..., Collector]) -> None:
    """Nothing of it was executed: it is not sent, and the one before is valued as at an end."""
    collector = make_collector(*ahead_arguments("....." + "iii" + "." * 100))
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.executed.tolist() == [5] * 6
    assert batch.truncated.tolist()[:2] == [True, False]
    assert batch.delay.tolist() == [0, 0, 2, 2, 2, 2]
    place = batch.next_row.tolist().index(0)
    torch.testing.assert_close(batch.next_observation["observation.state"][place], batch.action[0, 2])


def test_a_robot_that_is_asked_to_stop_does_not_begin_what_was_chosen_ahead(
    make_collector: Callable[..., Collector],
) -> None:
    collector = make_collector(*ahead_arguments("."))
    collector.restart(0)
    collector._stop.set()
    with pytest.raises(Interrupted):
        collector.collect(0)
    assert len(commands(collector._groups[0].envs)) == 5
    # The policy thinks no more when weights may be loaded again.
    collector.restart(1)
    assert collector._groups[0].envs.thought() is None


def test_a_validation_looks_ahead_as_the_collection_does(make_collector: Callable[..., Collector]) -> None:
    collector = make_collector(*ahead_arguments("......s" + "....f"))
    robot, threads = collector._groups[0].envs, []
    policy = collector._player.policy
    choose = policy.predict_action_chunk

    def noted(*arguments: Any, **more: Any) -> Any:
        threads.append(current_thread() is main_thread())
        return choose(*arguments, **more)

    policy.predict_action_chunk = noted  # type: ignore[method-assign]
    result = evaluate(collector._player, collector._groups, np.arange(2))
    assert result.success.tolist() == [True, False]
    assert result.length.tolist() == [7, 5]
    # The first of each episode while the robot holds, and the one after it, of which the second one was in vain.
    assert threads == [True, False, True, False]
    assert robot.thought() is None


def test_a_validation_start_that_was_helped_is_not_solved(make_collector: Callable[..., Collector]) -> None:
    collector = make_collector(*robot_arguments("..i..s" + ".....s"))
    result = evaluate(collector._player, collector._groups, np.arange(2))
    assert result.success.tolist() == [False, True]
    assert result.length.tolist() == [4, 6]


def test_the_simulation_is_run_with_its_interventions(make_collector: Callable[..., Collector]) -> None:
    """`gym_hil` reports who acted after the step, by other names, and penalises the gripper by itself."""
    collector = make_collector(*SIMULATION, "--algorithm.collection.decisions=9")
    collector.restart(0)
    collected = collector.collect(0)
    batch, control = collected.decisions, collected.control
    # Episodes of ten steps, of which a person takes those after the third: three of the policy, and it is over.
    assert batch.executed.tolist() == [3] * 9
    assert batch.truncated.all()
    assert not batch.success.any()
    torch.testing.assert_close(batch.reward, torch.full((9,), -0.3))
    assert control is not None
    assert (control.steps, control.interventions) == (27, 9)
    # They may be near enough one step early.
    assert 6 * 9 <= control.person_steps <= 7 * 9


def test_episodes_of_the_simulation_begin_where_their_seed_says(
    make_collector: Callable[..., Collector],
) -> None:
    starts = []
    for _ in range(2):
        collector = make_collector(*SIMULATION, "--algorithm.collection.decisions=3")
        collector.restart(0)
        starts.append(collector.collect(0).decisions.observation["observation.state"])
    torch.testing.assert_close(*starts)
    assert not torch.equal(starts[0][0], starts[0][1])


def test_the_recipe_for_an_so101_drives_a_robot_of_that_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the devices, the solver and the pose for a reset, which needs a motor bus."""
    plugin = importlib.import_module("lerobot_robot_scripted")
    monkeypatch.setattr(gym_manipulator, "RobotKinematics", plugin.Kinematics)
    recipe = json.loads(RECIPE.read_text())
    del recipe["policy"]["path"]
    cfg = draccus.decode(PIRLTrainConfig, recipe | {"policy": recipe["policy"] | {"type": "pi_rl"}})
    assert isinstance(cfg.env.robot, SOFollowerRobotConfig)
    assert cfg.env.teleop.type == "gamepad"
    PIRLTrainConfig._check_robot(cfg.algorithm, cfg.env)
    plugin.without_hardware(cfg.env, script="..i.", fps=FPS)
    robot = RobotVector(cfg.env)
    try:
        seen = robot.reset(np.zeros(1))
        assert {key: value.shape[1:] for key, value in seen.items()} == {
            key: tuple(feature.shape) for key, feature in cfg.env.features.items() if key != "action"
        }
        # Along x, with a gripper that stays; nine is far out of the range.
        chunk = np.tile(np.array([9.0, 0, 0, 1], np.float32), (1, 3, 1))
        robot.send(chunk, np.ones(1, dtype=np.int64))
        outcome = robot.receive()
        assert outcome.executed.tolist() == [2]
        # Two steps of two centimetres, then the person's, and one without any.
        np.testing.assert_allclose(commands(robot)[:2], [2, 4], atol=1e-4)
        assert len(commands(robot)) == 4
    finally:
        robot.close()


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (
            "--algorithm.collection.lookahead_steps=6",
            "lookahead_steps.*at most policy.n_action_steps=5, got 6",
        ),
        ("--algorithm.collection.lookahead_steps=2", r"2 needs policy.chunk_size.* = 7, got 5"),
        ("--algorithm.collection.num_envs=2", r"num_envs.*must be 1 for env.type='gym_manipulator', got 2"),
        ("--algorithm.collection.eval_envs=1", r"eval_envs.*must be 0"),
        ("--env.name=gym_hil", r"env.robot.*does not fit"),
    ],
)
def test_settings_that_fit_no_robot_are_refused(
    make_cfg: Callable[..., Any], argument: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        make_cfg(*robot_arguments("."), argument)


def test_the_settings_of_a_robot_can_be_saved(make_cfg: Callable[..., Any]) -> None:
    """LeRobot's own encoding fails on the settings of its reset."""
    cfg = make_cfg(*robot_arguments("."))
    encoded = cfg.to_dict()["env"]
    assert encoded["processor"]["reset"]["control_time_s"] == 0.02
    assert encoded["robot"]["type"] == "scripted"
    again = draccus.decode(EnvConfig, encoded)
    assert again == cfg.env


# Runs


def run_here(cfg: PIRLTrainConfig, again: PIRLTrainConfig) -> list[dict[str, Any]]:
    """Learner and actor in this process, from two readings of the same settings; returns the metrics."""
    stop = Event()
    learner = Learner(cfg, stop)
    again.is_actor, again.resume = True, False
    again.validate()
    actor = Actor(again, stop)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(actor.run)
        try:
            learner.run()
        finally:
            stop.set()
            future.result(60)
            actor.close()
    return [json.loads(line) for line in (cfg.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_a_person_shows_is_learned_from_and_found_again(
    make_cfg: Callable[..., Any], free_port: int, tmp_path: Path
) -> None:
    """With no data set: there is nothing to imitate but what the person does."""

    def settings(steps: int, *more: str) -> list[str]:
        return [
            *robot_arguments("......ii....s"),
            f"--policy.actor_learner_config.learner_port={free_port}",
            "--algorithm.critic_warmup=0",
            "--algorithm.demonstration_weight=0.1",
            f"--steps={steps}",
            *more,
        ]

    rows = run_here(make_cfg(*settings(2)), make_cfg(*settings(2), validate=False))
    assert [row["rollout/decisions"] for row in rows] == [6, 6]
    assert all(row["loss/supervised"] > 0 for row in rows)
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in rows)
    shown = [row["control/demonstrations"] for row in rows]
    assert 0 < shown[0] < shown[1]
    assert (
        sum(len(load_file(file)["action"]) for file in (tmp_path / "run/interventions").iterdir()) == shown[1]
    )
    resumed = settings(3, "--resume=true")
    assert (
        run_here(make_cfg(*resumed), make_cfg(*resumed, validate=False))[2]["control/demonstrations"]
        > shown[1]
    )


def test_what_a_person_did_is_on_the_disk_when_its_actor_hears_so(
    make_cfg: Callable[..., Any], free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the learner is at: its actor may leave, and the learner be killed before its update ends."""
    port = f"--policy.actor_learner_config.learner_port={free_port}"
    learner = Learner(make_cfg(*robot_arguments("."), port), Event())
    spec = learner._gatherer._spec
    shown = DemonstrationBatch(
        {key: torch.zeros(2, *one.shape, dtype=one.dtype) for key, one in spec.observation.items()},
        ["put it there"] * 2,
        torch.zeros(2, *spec.action[1:]),
        torch.tensor([False, True]),
    )

    def update() -> None:
        client = LearnerClient("127.0.0.1", free_port, 0, settings=learner._service._settings)
        client.connect(10.0)
        client.send_decisions(encode_demonstrations(shown))
        assert client.close(10.0)
        (file,) = (tmp_path / "run/interventions").iterdir()
        assert len(load_file(file)["action"]) == 2
        raise NothingUsable("nothing was finite")

    monkeypatch.setattr(learner, "_train", update)
    with pytest.raises(NothingUsable):
        learner.run()


def test_an_actor_keeps_no_more_than_its_learner_would(caplog: pytest.LogCaptureFixture) -> None:
    def shown(steps: int) -> DemonstrationBatch:
        last = torch.arange(steps) == steps - 1
        return DemonstrationBatch(
            {"x": torch.zeros(steps, 1000)}, ["a task"] * steps, torch.zeros(steps, 2), last
        )

    for capacity, max_bytes in ((6, 10**9), (100, 30_000)):
        kept, sent = Shown(0, capacity, max_bytes), []  # type: tuple[Shown, list[bytes]]
        for _ in range(3):
            kept.add(shown(3))
        assert len(kept) == kept.unsent == 6
        assert "3 steps of a person are given up for newer ones" in caplog.text
        assert kept.given_up == 3
        caplog.clear()
        kept.send(sent.append)
        assert (len(sent), len(kept), kept.unsent) == (2, 6, 0)


class LossyClient:
    """A learner's end that takes messages while it is there."""

    def __init__(self) -> None:
        self.there, self.sent = True, []  # type: tuple[bool, list[bytes]]
        self.counts, self.told = {"failed_attempts": 2}, []  # type: tuple[dict[str, int], list[dict[str, Any]]]

    def send_interaction(self, values: dict[str, Any], stop: Event | None = None) -> None:
        if not self.there:
            raise LearnerLost("gone")
        self.told.append(values)

    def send_decisions(self, payload: bytes, stop: Event | None = None) -> None:
        self.send_interaction({})
        self.sent.append(payload)

    def reconnect(self, timeout_s: float, stop: Event) -> None:
        self.there, self.sent = True, []

    def close(self, flush_s: float) -> bool:
        return self.there

    def kinds(self) -> list[str]:
        return [DEMONSTRATIONS if is_of_demonstrations(payload) else "decisions" for payload in self.sent]


@pytest.fixture
def scripted_actor(make_cfg: Callable[..., Any]) -> Iterator[tuple[Actor, LossyClient]]:
    """An actor whose person shows two steps once, and the learner's end of its connection."""
    cfg = make_cfg(*robot_arguments("......ii" + "." * 10_000), validate=False)
    cfg.is_actor = True
    cfg.validate()
    actor, client = Actor(cfg, Event()), LossyClient()
    actor._client = client  # type: ignore[assignment]
    yield actor, client
    actor.close()


def weights_of(actor: Actor, version: int) -> Weights:
    header = WeightsHeader(version, restart=version == 0, evaluate=False, final=False, sent_at=0.0)
    return Weights(header, actor._player.policy.trainable_state(), {})


def test_what_was_shown_outlives_the_connection(scripted_actor: tuple[Actor, LossyClient]) -> None:
    """Whether it was lost before anything was sent or after, until later weights say that it has arrived."""
    actor, client = scripted_actor
    actor._take(weights_of(actor, 0), restarts=True)
    client.there = False
    with pytest.raises(LearnerLost):
        actor._collect(0, 0, 0.0)
    for _ in range(2):
        actor._reconnect(LearnerLost("gone"))
        actor._take(weights_of(actor, 0), restarts=True)
        assert client.kinds() == [DEMONSTRATIONS]
    # Once on each connection.
    actor._collect(0, 0, 0.0)
    assert client.kinds() == [DEMONSTRATIONS, "decisions"]
    # The quota of version 0 may be one that had arrived earlier, that of version 1 is not.
    actor._take(weights_of(actor, 1), restarts=False)
    assert len(actor._shown) == 2
    actor._take(weights_of(actor, 2), restarts=False)
    assert len(actor._shown) == 0
    actor._reconnect(LearnerLost("gone"))
    actor._take(weights_of(actor, 2), restarts=True)
    assert client.sent == []


def test_what_was_shown_is_sent_before_an_actor_leaves(scripted_actor: tuple[Actor, LossyClient]) -> None:
    actor, client = scripted_actor
    actor._take(weights_of(actor, 0), restarts=True)
    robot = actor._groups[0].envs
    assert isinstance(robot, RobotVector)
    stock = robot._env.step

    def step(action: torch.Tensor) -> Any:
        if len(commands(robot)) == 6:
            actor._stop.set()
        return stock(action)

    robot._env.step = step
    with pytest.raises(Interrupted):
        actor._collect(0, 0, 0.0)
    assert client.sent == []
    actor.close()
    assert client.kinds() == [DEMONSTRATIONS]


@pytest.mark.parametrize("there", [True, False], ids=["taken", "broken"])
def test_what_may_not_have_arrived_is_said_when_an_actor_leaves(
    scripted_actor: tuple[Actor, LossyClient], caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    """Also what was sent on a connection that broke since, before anybody noticed."""
    actor, client = scripted_actor
    actor._take(weights_of(actor, 0), restarts=True)
    actor._collect(0, 0, 0.0)
    assert client.kinds() == [DEMONSTRATIONS, "decisions"]
    (told,) = (values for values in client.told if values.get("kind") == "collection")
    assert (told["failed_attempts"], told["unkept_steps"]) == (2, 0)
    client.there = there
    actor.close()
    assert ("2 steps of a person may be lost" in caplog.text) is not there


def test_a_run_looks_ahead(make_cfg: Callable[..., Any], free_port: int) -> None:
    """What was chosen ahead is scored as it was sampled, and how it went is told."""
    settings = [
        *ahead_arguments("........s"),
        f"--policy.actor_learner_config.learner_port={free_port}",
        "--algorithm.critic_warmup=0",
        "--steps=2",
    ]
    rows = run_here(make_cfg(*settings), make_cfg(*settings, validate=False))
    assert [row["rollout/decisions"] for row in rows] == [6, 6]
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in rows)
    # How much is up to the machine, on which nothing is fast enough for a thousand steps a second.
    assert all({"control/ahead_in_time", "control/ahead_margin_s"} <= row.keys() for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["robot", "simulation"])
def test_a_run_trains_and_learns_from_the_person(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With no data set: there is nothing to imitate but what the person does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    arguments = {
        "robot": robot_arguments("......ii....s", "--env.processor.reset.control_time_s=60"),
        "simulation": SIMULATION,
    }[kind]
    run = make_run(
        *arguments,
        "--steps=2",
        "--save_freq=0",
        "--algorithm.collection.decisions=8",
        "--algorithm.critic_warmup=0",
        "--algorithm.demonstration_weight=0.1",
    )
    for command in [
        side(without=("--env.episode_length", "--env.reward")) for side in (run.learner, run.actor)
    ]:
        assert command.wait(200) == 0, command.shown
        assert command.errors() == []
    rows = run.rows()
    assert [row["rollout/decisions"] for row in rows] == [8, 8]
    for row in rows:
        assert row["ppo/ratio_first_error"] <= 1e-3
        assert row["control/interventions"] >= 1
        assert 0 < row["control/intervention_rate"] < 1
        assert 0 < row["control/step_hz"] <= 1.001 * FPS
        assert row["control/policy_hz"] > 0
        assert row["loss/supervised"] > 0
    assert 0 < rows[0]["control/demonstrations"] < rows[1]["control/demonstrations"]
