"""The environment with a small camera: what it shows, how often it draws, and that its physics are those from state.

Pictures are drawn in software, by EGL, which needs no display.
"""

from collections import Counter
from collections.abc import Iterator

import draccus
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from lerobot.envs import make_env, preprocess_observation
from lerobot.envs.utils import env_to_policy_features

from lerobot_policy_pi_rl.envs import camera
from lerobot_policy_pi_rl.envs.configuration_metaworld_camera import MetaworldCameraEnv
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.metaworld_camera import MetaworldCameraGym
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv

from .conftest import Command, make_stock

TASK = "reach-v3"
# The colour of reach's goal, in which nothing else of the picture is so bright.
GOAL_RED = 200


@pytest.fixture
def env() -> MetaworldCameraGym:
    return MetaworldCameraEnv(task=TASK).make_env(TASK)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the pictures drawn in this process."""
    count: Counter[str] = Counter()
    draw = camera.Camera.draw

    def counted(self: camera.Camera, *arguments: object) -> np.ndarray:
        count["pictures"] += 1
        return draw(self, *arguments)

    monkeypatch.setattr(camera.Camera, "draw", counted)
    return count


def actions(steps: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (steps, 4)).astype(np.float32)


def test_it_observes_a_picture_and_the_hand_and_nothing_else(env: MetaworldCameraGym) -> None:
    observation, _ = env.reset(seed=0)
    assert observation.keys() == {"agent_pos", "pixels"}
    assert observation in env.observation_space
    np.testing.assert_array_equal(observation["agent_pos"], env.stock_state[:4].astype(np.float32))
    seen = preprocess_observation({key: value[None] for key, value in observation.items()})
    assert {key: tuple(value.shape) for key, value in seen.items()} == {
        "observation.state": (1, 4),
        "observation.image": (1, 3, 64, 64),
    }


def test_gymnasium_finds_nothing_wrong(env: MetaworldCameraGym) -> None:
    check_env(env, skip_render_check=True)


def test_the_goal_is_seen_where_it_is(env: MetaworldCameraGym) -> None:
    """The camera's geometry by hand: a point's place in the picture from where the camera stands."""
    right, up, forward, place = camera_axes()
    # MuJoCo's own default: 45 degrees from the lower to the upper edge.
    scale = 32 / np.tan(np.radians(45 / 2))
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        away = env.stock_state[36:39] - place
        column = 32 + scale * (away @ right) / (away @ forward)
        row = 32 - scale * (away @ up) / (away @ forward)
        red, green, blue = np.moveaxis(observation["pixels"].astype(int), -1, 0)
        rows, columns = np.nonzero((red > GOAL_RED) & (green < 90) & (blue < 90))
        near = (abs(rows + 0.5 - row) < 3) & (abs(columns + 0.5 - column) < 3)
        assert near.sum() >= 3, (seed, row, column)


def camera_axes() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right, up, forward and position of the camera, from its angles."""
    azimuth, elevation = np.radians([camera.AZIMUTH, camera.ELEVATION])
    forward = np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    place = np.array(camera.LOOK_AT) - camera.DISTANCE * forward
    return right, np.cross(right, forward), forward, place


def test_a_picture_shows_what_metaworld_shows_at_that_moment(env: MetaworldCameraGym) -> None:
    """Stock MetaWorld's own simulation, drawn by a camera of its own, looks the same."""
    seed = 11
    stock = make_stock(TASK, seed)
    camera.hide_arm(stock.model)
    own = camera.Camera(stock.model, 64)
    stock.reset()
    np.testing.assert_array_equal(env.reset(seed=seed)[0]["pixels"], own.draw(stock.model, stock.data))
    for action in actions(20):
        stock.step(action)
        seen = env.step(action)[0]["pixels"]
    np.testing.assert_array_equal(seen, own.draw(stock.model, stock.data))
    stock.close()


@pytest.mark.parametrize("task", [TASK, "drawer-open-v3", "box-close-v3"])
def test_the_physics_are_those_of_the_state_environment_to_the_bit(task: str) -> None:
    seeing = MetaworldCameraEnv(task=task).make_env(task)
    knowing = MetaworldStateEnv(task=task).make_env(task)
    for seed in (3, 4):
        seeing.reset(seed=seed)
        knowing.reset(seed=seed)
        for action in actions(30):
            assert seeing.step(action)[1:] == knowing.step(action)[1:]
            np.testing.assert_array_equal(seeing.stock_state, knowing.stock_state)


def test_acting_unseen_is_stepping(env: MetaworldCameraGym) -> None:
    other = MetaworldCameraEnv(task=TASK).make_env(TASK)
    env.reset(seed=5)
    other.reset(seed=5)
    for action in actions(6):
        observation, *outcome = env.step(action)
        assert tuple(outcome) == other.act(action)
    for key, seen in other.observe().items():
        np.testing.assert_array_equal(seen, observation[key])


def run(workers: int, num_envs: int = 3) -> list[np.ndarray]:
    """All that a vector shows in five chunks with ends of episodes among them."""
    config = MetaworldCameraEnv(task=f"{TASK},drawer-open-v3", episode_length=11, camera_size=32)
    seen = []
    with ChunkedVectorEnv(config, num_envs, workers) as vector:
        seen.append(vector.reset(np.arange(num_envs)))
        for number, chunks in enumerate(actions(5 * num_envs * 4).reshape(5, num_envs, 4, 4)):
            step = vector.step(chunks, 10 * number + np.arange(num_envs))
            seen += [step.final_observation, step.observation]
    return [one[key] for one in seen for key in ("pixels", "agent_pos")]


def test_pictures_are_the_same_in_one_process_or_in_several() -> None:
    alone = run(0)
    assert alone[0].shape == (3, 32, 32, 3)
    assert len({picture.tobytes() for pictures in alone[::2] for picture in pictures}) > 20
    for workers in (0, 2):
        for here, there in zip(alone, run(workers), strict=True):
            np.testing.assert_array_equal(here, there)


def test_one_picture_for_a_decision_and_one_more_for_an_end(drawn: Counter[str]) -> None:
    config = MetaworldCameraEnv(task=TASK, episode_length=11)
    still = np.zeros((2, 5, 4), dtype=np.float32)
    with ChunkedVectorEnv(config, 2, 0) as vector:
        vector.reset(np.arange(2))
        assert drawn["pictures"] == 2
        for expected in (4, 6):
            assert vector.step(still, np.arange(2)).executed.tolist() == [5, 5]
            assert drawn["pictures"] == expected
        step = vector.step(still, np.arange(2))
        assert step.executed.tolist() == [1, 1]
        assert step.truncated.all()
        assert drawn["pictures"] == 10
        # Cut on demand within a chunk's length of the limit.
        vector.step(still, np.arange(2), np.array([True, False]))
        assert drawn["pictures"] == 13


def test_rendering_a_moment_again_draws_nothing(env: MetaworldCameraGym, drawn: Counter[str]) -> None:
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), observation["pixels"])
    assert drawn["pictures"] == 1
    first = env.render()
    env.act(np.ones(4))
    assert not np.array_equal(env.render(), first)
    assert drawn["pictures"] == 2


@pytest.mark.parametrize("use_async_envs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lerobots_evaluation_gets_it(use_async_envs: bool) -> None:
    config = MetaworldCameraEnv(task=TASK, episode_length=4, camera_size=32)
    (vectors,) = make_env(config, n_envs=2, use_async_envs=use_async_envs).values()
    vector: gym.vector.VectorEnv = vectors[0]
    try:
        observation, _ = vector.reset(seed=[1, 2])
        assert preprocess_observation(observation)["observation.image"].shape == (2, 3, 32, 32)
        assert vector.call("render")[0].shape == (32, 32, 3)
        for step in range(4):
            observation, _, _, truncated, info = vector.step(np.zeros((2, 4), dtype=np.float32))
            assert truncated.tolist() == [step == 3] * 2
        assert "is_success" in info["final_info"]
    finally:
        vector.close()


def test_lerobots_parser_reads_it() -> None:
    arguments = ["--env.type=metaworld_camera", f"--env.task={TASK}", "--env.camera_size=48"]
    config = draccus.parse(Command, args=arguments).env
    assert isinstance(config, MetaworldCameraEnv)
    assert {key: feature.shape for key, feature in env_to_policy_features(config).items()} == {
        "observation.state": (4,),
        "observation.image": (3, 48, 48),
        "action": (4,),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera_size": 8}, "16 to 480 pixels; got 8"),
        ({"camera_size": 481}, "16 to 480 pixels; got 481"),
        ({"task": "reach"}, "did you mean reach-v3"),
    ],
)
def test_a_bad_setting_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MetaworldCameraEnv(**settings)
    assert "\n" not in str(caught.value)


def test_a_machine_that_cannot_draw_says_so_in_one_line(
    env: MetaworldCameraGym, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(size: int) -> None:
        raise ImportError("Cannot initialize\na EGL device display.")

    monkeypatch.setattr(camera, "_cameras", {})
    monkeypatch.setattr(camera, "_make_gl_context", fails)
    with pytest.raises(RuntimeError, match=r"Cannot initialize a EGL .* set MUJOCO_GL=egl") as caught:
        env.reset(seed=0)
    assert "\n" not in str(caught.value)
