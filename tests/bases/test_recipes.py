"""The recipes for LIBERO, MetaWorld from pixels and an SO-101: each is read as the commands read it, built and run.

LIBERO's package needs assets from the hub, so a small simulator stands in for it, and a scripted robot for the SO-101;
everything above them, LeRobot's own environments, their configuration and their processors included, is the real thing.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, parser
from lerobot.envs.configs import LiberoEnv, MetaworldEnv
from lerobot.rl import gym_manipulator
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv
from lerobot_policy_pi_rl.runtime.observations import ObservationPath, offered_features
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.runtime.seeds import (
    EVALUATION_SEED,
    TRAINING_SEEDS,
    VALIDATION_SEED,
    recorded_start,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(240)

RECIPES = Path(__file__).parents[2] / "recipes"
STAND_IN = Path(__file__).parents[1] / "runtime/stand_in"
BASES = ("pi0", "pi05", "smolvla")
ITERATIONS, SIZE = 2, 32
IMAGE, WRIST = "observation.images.image", "observation.images.image2"
SUITES = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
# What makes a recipe small; all else is as it stands in the file.
SMALL = (
    "--policy.device=cpu",
    "--algorithm.critic_hidden_dims=[16]",
    "--algorithm.minibatch_size=8",
    "--algorithm.micro_batch_size=4",
    f"--steps={ITERATIONS}",
    f"--save_freq={ITERATIONS}",
)
SMALL_SIMULATION = (
    "--algorithm.collection.num_envs=2",
    "--algorithm.collection.num_workers=0",
    "--algorithm.collection.decisions=4",
    "--algorithm.collection.eval_envs=1",
    f"--env_eval_freq={ITERATIONS}",
    "--eval.n_episodes=1",
    "--env.episode_length=11",
)
SMALL_ROBOT = (
    "--algorithm.collection.decisions=8",
    "--algorithm.critic_warmup=0",
    "--algorithm.demonstration_batch_size=2",
    "--env.processor.reset.control_time_s=0.02",
    f"--env.processor.image_preprocessing.resize_size=[{SIZE},{SIZE}]",
)


# Stand-ins


class Simulator:
    """What LeRobot asks of LIBERO's simulator: a hand is moved by its actions, and solved is above 0.3."""

    def __init__(
        self,
        bddl_file_name: str,
        camera_heights: int,
        camera_widths: int,
        control_freq: int,
        hard_reset: bool,
    ) -> None:
        assert (control_freq, hard_reset) == (20, True)
        self.height, self.width = camera_heights, camera_widths
        self.robots = [SimpleNamespace(controller=SimpleNamespace(ee_ori_mat=np.eye(3), use_delta=False))]
        self.hand = np.zeros(3)

    def seed(self, seed: int) -> None:
        """Its recorded starts are all that varies."""

    def reset(self) -> dict[str, Any]:
        return self._observe()

    def set_init_state(self, state: np.ndarray) -> dict[str, Any]:
        self.hand = state.copy()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        assert len(action) == 7
        self.hand = self.hand + 0.02 * np.clip(action[:3], -1, 1)
        return self._observe(), float(self.check_success()), False, {}

    def check_success(self) -> bool:
        return bool(self.hand[2] > 0.3)

    def close(self) -> None:
        """Holds nothing."""

    def _observe(self) -> dict[str, Any]:
        # The top left corner says that nobody has turned the picture.
        picture = np.full((self.height, self.width, 3), 40 + 100 * np.clip(self.hand[2], 0, 1), np.uint8)
        picture[: self.height // 2, : self.width // 2] = 255
        return {
            "agentview_image": picture,
            "robot0_eye_in_hand_image": picture // 2,
            "robot0_eef_pos": self.hand,
            "robot0_eef_quat": np.array([0, 0, np.sqrt(0.5), np.sqrt(0.5)]),
            "robot0_gripper_qpos": np.array([0.1, -0.1]),
            "robot0_gripper_qvel": np.zeros(2),
            "robot0_joint_pos": np.zeros(7),
            "robot0_joint_vel": np.zeros(7),
        }


class Suite:
    """Ten tasks with fifty recorded starts each, of which one number tells which it is."""

    def __init__(self, name: str) -> None:
        self.tasks = [
            SimpleNamespace(
                name=f"{name}_{number}",
                language=f"pick the cube {number}",
                problem_folder=name,
                bddl_file=f"{number}.bddl",
                init_states_file=f"{number}.pruned_init",
            )
            for number in range(10)
        ]

    def get_task(self, number: int) -> SimpleNamespace:
        return self.tasks[number]


@pytest.fixture
def libero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Puts the small simulator where LeRobot imports LIBERO from."""
    starts = np.zeros((50, 3))
    starts[:, 0] = np.arange(50) / 100
    for name in SUITES:
        folder = tmp_path / "init_states" / name
        folder.mkdir(parents=True)
        for number in range(10):
            torch.save(starts, folder / f"{number}.pruned_init")
    package, inner, envs = (ModuleType(n) for n in ("libero", "libero.libero", "libero.libero.envs"))
    suites = {name: partial(Suite, name) for name in SUITES}
    inner.benchmark = SimpleNamespace(get_benchmark_dict=lambda: suites, Benchmark=Suite)
    inner.get_libero_path = lambda kind: str(tmp_path / kind)
    envs.OffScreenRenderEnv = Simulator
    for module in (package, inner, envs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # Imported anew, and forgotten afterwards.
    monkeypatch.delitem(sys.modules, "lerobot.envs.libero", raising=False)
    yield
    sys.modules.pop("lerobot.envs.libero", None)


class Painted(gym.Env):
    """What LeRobot's `metaworld` environment gives and takes, without rendering."""

    observation_space = gym.spaces.Dict({})
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    _max_episode_steps = 500

    def __init__(self, task: str) -> None:
        self.task_description = task

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.height = np.random.default_rng(seed).uniform(0, 0.5)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.height += 0.1 * float(np.clip(action[2], -1, 1))
        solved = self.height > 1
        # MetaWorld's own reward is shaped.
        return self._observe(), 7.0, solved, False, {"is_success": solved}

    def _observe(self) -> dict:
        picture = np.full((480, 480, 3), 128 + 100 * np.clip(self.height, -1, 1), np.uint8)
        return {"pixels": picture, "agent_pos": np.full(4, self.height)}


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the painted pictures where LeRobot makes its MetaWorld environments."""
    from lerobot.envs import metaworld

    monkeypatch.setattr(metaworld, "MetaworldEnv", lambda task, **_: Painted(task))


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The scripted devices, for environments that a recipe describes; the person need not wait for a reset."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    plugin = importlib.import_module("lerobot_robot_scripted")
    monkeypatch.setattr(gym_manipulator, "RobotKinematics", plugin.Kinematics)
    monkeypatch.setattr(gym_manipulator, "RobotEnv", partial(gym_manipulator.RobotEnv, reset_time_s=0.0))
    return plugin


# What a checkpoint for these environments reads and does.
FEATURES = {
    "libero": (
        {
            IMAGE: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
            WRIST: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (8,)),
        },
        7,
    ),
    "metaworld": (
        {
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (4,)),
        },
        4,
    ),
    "so101": (
        {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (6,)),
        },
        4,
    ),
}


@parser.wrap()
def read(cfg: PIRLTrainConfig) -> PIRLTrainConfig:
    """Reads a configuration as the commands do."""
    return cfg


@pytest.fixture
def run_recipe(
    monkeypatch: pytest.MonkeyPatch,
    save_stock: Callable[..., Path],
    run_both: Callable[..., list[dict[str, Any]]],
    free_port: int,
    tmp_path: Path,
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a recipe from a small checkpoint of its base; returns the metrics."""

    def configure(
        arguments: list[str], adapt: Callable[[PIRLTrainConfig], None], is_actor: bool
    ) -> PIRLTrainConfig:
        monkeypatch.setattr(sys, "argv", ["test", *arguments])
        cfg = read()
        adapt(cfg)
        cfg.is_actor = is_actor
        cfg.validate()
        return cfg

    def run(
        base: str,
        benchmark: str,
        *arguments: str,
        adapt: Callable[[PIRLTrainConfig], None] = lambda cfg: None,
    ) -> list[dict[str, Any]]:
        inputs, action_dim = FEATURES[benchmark]
        outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))}
        checkpoint = save_stock(base, input_features=inputs, output_features=outputs)
        given = [
            f"--config_path={RECIPES / f'{base}_{benchmark}.json'}",
            f"--policy.base_path={checkpoint}",
            *SMALL,
            f"--policy.actor_learner_config.learner_port={free_port}",
            f"--output_dir={tmp_path / 'run'}",
            *arguments,
        ]
        return run_both(partial(configure, given, adapt))

    return run


def check(rows: list[dict[str, Any]], run: Path, validated: Sequence[int] = (0, ITERATIONS)) -> None:
    """A run of two iterations, with validations after those that are given, and a checkpoint."""
    iterations = [row for row in rows if "rollout/decisions" in row]
    assert [row["step"] for row in iterations] == [1, 2]
    assert [row["rollout/decisions"] for row in iterations] == [8, 8]
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in iterations)
    assert all(row["dropped/malformed_messages"] == 0 for row in iterations)
    assert [row["step"] for row in rows if "eval/success" in row] == [*validated]
    assert (run / "checkpoints" / "last" / "pretrained_model" / "config.json").is_file()


@pytest.mark.parametrize("base", BASES)
def test_the_libero_recipe_runs_from_a_checkpoint(
    base: str, libero: None, run_recipe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = run_recipe(
        base,
        "libero",
        *SMALL_SIMULATION,
        f"--env.observation_height={SIZE}",
        f"--env.observation_width={SIZE}",
    )
    check(rows, tmp_path / "run")


@pytest.mark.parametrize("base", BASES)
def test_the_metaworld_recipe_runs_from_a_checkpoint(
    base: str, painted: None, run_recipe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    check(run_recipe(base, "metaworld", *SMALL_SIMULATION), tmp_path / "run")


@pytest.mark.parametrize("base", BASES)
def test_the_so101_recipe_runs_from_a_checkpoint(
    base: str, robot: ModuleType, run_recipe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """All of it but the devices, the solver and the pose for a reset; now and then a person intervenes."""

    def adapt(cfg: PIRLTrainConfig) -> None:
        robot.without_hardware(cfg.env, script="......ii....s", fps=1000)
        for key, feature in cfg.env.features.items():
            if feature.type is FeatureType.VISUAL:
                cfg.env.features[key] = PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE))

    rows = run_recipe(base, "so101", *SMALL_ROBOT, adapt=adapt)
    check(rows, tmp_path / "run", validated=())
    assert any(row.get("loss/supervised", 0) > 0 for row in rows)


def test_the_recipes_for_an_so101_describe_the_same_robot() -> None:
    """Pictures differ in size, and nothing else does."""

    def environment(name: str) -> dict[str, Any]:
        env = json.loads((RECIPES / f"{name}.json").read_text())["env"]
        size = env["processor"]["image_preprocessing"].pop("resize_size")
        for feature in env["features"].values():
            if feature["type"] == "VISUAL":
                assert feature.pop("shape") == [3, *size]
        return env

    assert all(environment(f"{base}_so101") == environment("so101") for base in BASES)


# The path between LeRobot's environments and the policy


@pytest.mark.parametrize(("suite", "steps"), SUITES.items())
def test_the_ten_tasks_of_a_suite_are_dealt_and_cut_at_its_limit(
    suite: str, steps: int, libero: None
) -> None:
    with ChunkedVectorEnv(LiberoEnv(task=suite), 12, 1) as vector:
        assert vector.tasks == [f"pick the cube {number % 10}" for number in range(12)]
        assert vector.time_limits.tolist() == [steps] * 12


def test_libero_s_episode_begins_where_its_seed_says_and_is_cut(libero: None) -> None:
    cfg = LiberoEnv(observation_height=SIZE, observation_width=SIZE, episode_length=7)
    with ChunkedVectorEnv(cfg, 2, 0) as vector:
        first = vector.reset(np.array([103, 12]))
        again = vector.reset(np.array([103, 12]))
        np.testing.assert_array_equal(first["robot_state/eef/pos"], again["robot_state/eef/pos"])
        step = vector.step(np.zeros((2, 5, 7)), np.array([1, 2]))
        assert not step.done.any()
        step = vector.step(np.zeros((2, 5, 7)), np.array([1, 2]))
        assert step.executed.tolist() == [2, 2]
        assert step.truncated.all()
        assert not step.terminated.any()
        first = vector.reset(np.array([1, 2]))
        np.testing.assert_array_equal(step.observation["robot_state/eef/pos"], first["robot_state/eef/pos"])


def test_libero_s_starts_of_training_validation_and_reports_never_meet(libero: None) -> None:
    """Of 50 starts, whose place is their number in centimetres, 10 and 10 are held out."""
    cfg, begun = LiberoEnv(observation_height=SIZE, observation_width=SIZE), {}
    with ChunkedVectorEnv(cfg, 2, 0) as vector:
        for first in (EVALUATION_SEED, VALIDATION_SEED, TRAINING_SEEDS[0]):
            places = [
                vector.reset(np.array([seed, seed + 1]))["robot_state/eef/pos"][:, 0]
                for seed in range(first, first + 400, 2)
            ]
            begun[first] = set(np.rint(100 * np.concatenate(places)).astype(int).tolist())
    assert list(begun.values()) == [set(range(10)), set(range(10, 20)), set(range(20, 50))]


def test_libero_s_own_processors_make_what_the_policy_reads(libero: None) -> None:
    cfg = LiberoEnv(observation_height=SIZE, observation_width=SIZE)
    inputs, _ = FEATURES["libero"]
    offered = offered_features(cfg, None, {WRIST: "observation.images.wrist"})
    assert {key: tuple(feature.shape) for key, feature in offered.items()} == {
        IMAGE: (3, SIZE, SIZE),
        "observation.images.wrist": (3, SIZE, SIZE),
        OBS_STATE: (8,),
        ACTION: (7,),
    }
    path = ObservationPath(inputs, cfg, None)
    with ChunkedVectorEnv(cfg, 2, 0) as vector:
        found = path.from_environment(vector.reset(np.array([3, 4])), vector.tasks)
    # Position, rotation of a quarter about z, gripper.
    expected = torch.tensor([0, 0, 0, 0, 0, torch.pi / 2, 0.1, -0.1]).repeat(2, 1)
    expected[:, 0] = torch.tensor([recorded_start(seed, 50) / 100 for seed in (3, 4)])
    torch.testing.assert_close(found[OBS_STATE], expected)
    # The corner that was at the top left is at the bottom right.
    assert (found[IMAGE][..., -1, -1] == 1).all()
    assert (found[IMAGE][..., 0, 0] < 1).all()
    packed = path.pack(found)
    for key, entry in path.wire_fields().items():
        assert tuple(packed[key].shape[1:]) == entry.shape
        assert torch.equal(path.unpack(packed)[key], found[key])


def test_the_metaworld_recipes_name_all_fifty_tasks_and_reward_success(painted: None) -> None:
    cfg = MetaworldEnv(task="easy,medium,hard,very_hard", episode_length=100)
    with ChunkedVectorEnv(cfg, 50, 0, reward="success") as vector:
        assert len({*vector.tasks}) == 50
        assert vector.time_limits.tolist() == [100] * 50
        vector.reset(np.arange(50))
        up = np.zeros((50, 12, 4))
        up[:, :, 2] = 1
        step = vector.step(up, np.arange(50))
    assert step.success.all()
    assert step.reward.tolist() == [1] * 50
