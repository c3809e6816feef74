"""The small environments of the benchmarks: their controllers solve them, and LeRobot takes them as they are."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.factory import make_env, make_env_config

from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv

SMALL = Path(__file__).parents[2] / "benchmarks/small_environments"
TASKS = ("PointMass-v0", "Pendulum-v0", "PushTState-v0", "Reacher-v0", "Arm-v0")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, found as it is where it is not installed: by its folder."""
    monkeypatch.syspath_prepend(SMALL)
    import lerobot_env_small

    return lerobot_env_small


def make_one(task: str) -> gym.Env:
    config = make_env_config("small", task=task)
    return gym.make(config.gym_id, disable_env_checker=True, **config.gym_kwargs)


def play(env: gym.Env, seed: int) -> tuple[list[np.ndarray], bool]:
    """What the controller sees in one episode, and whether it solves it."""
    observation, _ = env.reset(seed=seed)
    seen = [observation["agent_pos"]]
    while True:
        observation, reward, terminated, truncated, info = env.step(env.unwrapped.control())
        seen.append(observation["agent_pos"])
        assert reward == float(info["is_success"]) == float(terminated)
        if terminated or truncated:
            return seen, terminated


@pytest.mark.parametrize("task", TASKS)
def test_the_controller_solves_most_starts(task: str) -> None:
    env = make_one(task)
    assert sum(play(env, seed)[1] for seed in range(10)) >= 8


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_episode_whatever_came_before(task: str) -> None:
    env, fresh = make_one(task), make_one(task)
    play(env, 1)
    again, first = play(env, 2)[0], play(fresh, 2)[0]
    np.testing.assert_array_equal(np.stack(again), np.stack(first))


@pytest.mark.parametrize("task", TASKS)
def test_the_configuration_states_what_the_environment_has(task: str) -> None:
    env, config = make_one(task), make_env_config("small", task=task)
    observation, _ = env.reset(seed=0)
    assert observation["agent_pos"].shape == config.features["agent_pos"].shape
    assert observation in env.observation_space
    assert env.action_space.shape == config.features["action"].shape
    assert env.render().shape == (96, 96, 3)
    # A picture shows the goal and something that moves.
    assert len(np.unique(env.render().reshape(-1, 3), axis=0)) == 3


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'Rocket-v0' is unknown; choose one of PointMass-v0"):
        make_env_config("small", task="Rocket-v0")


def test_lerobot_and_the_chunked_vector_play_the_same_episode() -> None:
    config = make_env_config("small", task="PointMass-v0")
    stock = make_env(config, n_envs=1)["small"][0]
    stock.reset(seed=[5])
    push = np.full((1, 3, 2), 0.5, dtype=np.float32)
    for step in range(3):
        seen = stock.step(push[:, step])[0]["agent_pos"]
    with ChunkedVectorEnv(config, num_envs=1, num_workers=0) as vector:
        vector.reset(np.array([5]))
        assert vector.time_limits.tolist() == [40]
        assert vector.tasks == ["Bring the point to rest at the goal."]
        np.testing.assert_array_equal(vector.step(push, np.array([6])).observation["agent_pos"], seen)


def test_a_recording_is_a_dataset_of_solved_episodes(tmp_path: Path) -> None:
    from lerobot_env_small.record import main

    root = tmp_path / "demonstrations"
    arguments = ["--task=PointMass-v0", "--num_episodes=2", "--seed=3", f"--root={root}"]
    assert main(arguments) == 0
    dataset = LeRobotDataset("local/small", root=root)
    assert dataset.num_episodes == 2
    assert dataset.num_frames == len(dataset.hf_dataset)
    rewards = np.array(dataset.hf_dataset["next.reward"]).ravel()
    assert rewards.sum() == 2
    first = np.array(dataset.hf_dataset[0]["observation.state"])
    np.testing.assert_array_equal(first, make_one("PointMass-v0").reset(seed=3000)[0]["agent_pos"])
    # An existing folder is not written to.
    assert main(arguments) == 1
