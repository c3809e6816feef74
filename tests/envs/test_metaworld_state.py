"""The environment: what it shows, how it ends, and how LeRobot gets it."""

import draccus
import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs import make_env, preprocess_observation
from lerobot.envs.utils import env_to_policy_features
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.demonstrations import make_expert
from lerobot_policy_pi_rl.envs.metaworld_state import MetaworldStateGym, observed_state
from lerobot_policy_pi_rl.envs.tasks import MT10, all_tasks
from lerobot_policy_pi_rl.errors import ConfigError

from .conftest import Command

STILL = np.zeros(4, dtype=np.float32)


def play(env: MetaworldStateGym, seed: int, steps: int = 15) -> np.ndarray:
    """Observations of an episode with fixed actions, `[steps + 1, 48]`."""
    actions = np.random.default_rng(7).uniform(-1, 1, (steps, 4)).astype(np.float32)
    seen = [env.reset(seed=seed)[0]["agent_pos"]]
    seen += [env.step(action)[0]["agent_pos"] for action in actions]
    return np.stack(seen)


def solve(env: MetaworldStateGym, seed: int) -> tuple[int, float, bool, bool]:
    """Lets the expert play; gives the steps, the last reward and how the episode ended."""
    expert = make_expert(env.task)
    env.reset(seed=seed)
    for step in range(1, 501):
        action = np.clip(expert.get_action(env.stock_state), -1, 1)
        _, reward, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            assert info["is_success"] == terminated
            return step, reward, terminated, truncated
    raise AssertionError("the episode did not end")


def test_the_task_names_are_those_of_metaworld() -> None:
    assert all_tasks() == sorted(ALL_V3_ENVIRONMENTS)
    assert list(MT10) == list(MT10_V3)


def test_a_seed_gives_the_same_episode_whatever_came_before() -> None:
    env = MetaworldStateEnv().make_env("peg-insert-side-v3")
    first = play(env, seed=5)
    play(env, seed=6, steps=40)
    np.testing.assert_array_equal(play(env, seed=5), first)
    np.testing.assert_array_equal(play(MetaworldStateEnv().make_env("peg-insert-side-v3"), seed=5), first)


def test_seeds_draw_objects_and_goals() -> None:
    env = MetaworldStateEnv().make_env("peg-insert-side-v3")
    states = np.stack([env.reset(seed=seed)[0]["agent_pos"] for seed in range(4)])
    assert len(np.unique(states[:, 4:6], axis=0)) == 4
    assert len(np.unique(states[:, 37])) == 4


def test_reset_without_a_seed_continues_the_draws() -> None:
    env = MetaworldStateEnv().make_env("reach-v3")
    env.reset(seed=0)
    draws = [env.reset()[0]["agent_pos"] for _ in range(2)]
    assert not np.array_equal(*draws)
    env.reset(seed=0)
    np.testing.assert_array_equal([env.reset()[0]["agent_pos"] for _ in range(2)], draws)


def test_the_relative_positions_are_object_hand_goal_differences() -> None:
    state = np.zeros(39)
    state[0:3], state[4:7], state[36:39] = (1, 2, 3), (10, 20, 30), (100, 200, 300)
    seen = observed_state(state, relative_features=True)
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen[:39], state)
    np.testing.assert_array_equal(seen[39:], [9, 18, 27, 90, 180, 270, 99, 198, 297])
    np.testing.assert_array_equal(observed_state(state, relative_features=False), state)


def test_a_success_terminates_with_reward_one() -> None:
    env = MetaworldStateEnv(task="reach-v3").make_env("reach-v3")
    steps, reward, terminated, truncated = solve(env, seed=0)
    assert (reward, terminated, truncated) == (1.0, True, False)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(STILL)
    on_last_step = MetaworldStateEnv(task="reach-v3", episode_length=steps).make_env("reach-v3")
    assert solve(on_last_step, seed=0) == (steps, 1.0, True, False)
    too_short = MetaworldStateEnv(task="reach-v3", episode_length=steps - 1).make_env("reach-v3")
    assert solve(too_short, seed=0) == (steps - 1, 0.0, False, True)


def test_the_longest_episode_truncates() -> None:
    env = MetaworldStateEnv(episode_length=500).make_env("peg-insert-side-v3")
    env.reset(seed=0)
    ends = [env.step(STILL)[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_the_dense_reward_is_a_tenth_of_metaworlds_plus_the_bonus() -> None:
    env = MetaworldStateEnv(task="reach-v3", reward="dense").make_env("reach-v3")
    _, reward, terminated, _ = solve(env, seed=0)
    assert terminated
    # MetaWorld pays 10 inside the goal's radius of 5 cm.
    assert reward == pytest.approx(2.0)
    env.reset(seed=0)
    assert 0 < env.step(STILL)[1] < 1


def test_actions_are_clipped_and_checked() -> None:
    env = MetaworldStateEnv().make_env("reach-v3")
    env.reset(seed=0)
    far = env.step(np.full(4, 9.0))[0]["agent_pos"]
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.ones(4))[0]["agent_pos"], far)
    with pytest.raises(ValueError, match=r"shape \(4,\); got \(3,\)"):
        env.step(np.zeros(3))


def test_it_renders_nothing_unless_asked() -> None:
    env = MetaworldStateEnv().make_env("reach-v3")
    env.reset(seed=0)
    frame = env.render()
    # The picture of a notice: letters, which differ from their ground.
    assert frame.shape == (128, 192, 3)
    assert frame.dtype == np.uint8
    assert 20 < frame.min() < 60 < 200 < frame.max()
    assert env.simulation.render_mode is None
    assert MetaworldStateEnv(render_mode="rgb_array").make_env("reach-v3").render_mode == "rgb_array"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "peg-insert-side"}, "did you mean peg-insert-side-v3"),
        ({"task": "qqq"}, "docs/environments.md"),
        ({"task": " , "}, "names no task"),
        ({"task": "MT10,reach-v3"}, "names 'reach-v3' twice"),
        ({"fps": 30}, "must be 80"),
        ({"episode_length": 501}, "1 to 500"),
        ({"reward": "shaped"}, "sparse, dense"),
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_a_bad_setting_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MetaworldStateEnv(**settings)
    assert "\n" not in str(caught.value)


def test_lerobots_parser_reads_it() -> None:
    arguments = ["--env.type=metaworld_state", "--env.task=reach-v3,push-v3", "--env.relative_features=false"]
    config = draccus.parse(Command, args=arguments).env
    assert isinstance(config, MetaworldStateEnv)
    assert config.tasks == ["reach-v3", "push-v3"]
    features = env_to_policy_features(config)
    assert {key: feature.shape for key, feature in features.items()} == {
        "observation.state": (39,),
        "action": (4,),
    }


def test_suites_hold_one_vector_per_task() -> None:
    assert {suite: len(tasks) for suite, tasks in make_env(MetaworldStateEnv(task="MT50")).items()} == {
        "MT50": 50
    }
    suites = make_env(MetaworldStateEnv(task="reach-v3,push-v3"), n_envs=2)
    assert [vector.num_envs for vector in suites["metaworld_state"].values()] == [2, 2]
    assert suites["metaworld_state"][1].call("task") == ("push-v3", "push-v3")


@pytest.mark.parametrize("use_async_envs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluation_finds_success_time_limit_and_task(use_async_envs: bool) -> None:
    config = MetaworldStateEnv(task="reach-v3", episode_length=4)
    (vectors,) = make_env(config, n_envs=2, use_async_envs=use_async_envs).values()
    vector: gym.vector.VectorEnv = vectors[0]
    try:
        observation, _ = vector.reset(seed=[1, 2])
        assert preprocess_observation(observation)["observation.state"].shape == (2, 48)
        assert vector.call("_max_episode_steps") == (4, 4)
        assert vector.call("task_description")[0] == "Reach a goal position"
        for step in range(4):
            _, _, _, truncated, info = vector.step(np.zeros((2, 4), dtype=np.float32))
            assert truncated.tolist() == [step == 3] * 2
            assert "is_success" in (info["final_info"] if step == 3 else info)
    finally:
        vector.close()
