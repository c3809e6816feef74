"""The fast tasks against MetaWorld's own, number by number."""

import warnings

import numpy as np
import pytest
from metaworld import policies
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from lerobot_policy_pi_rl.envs import fast_sawyer
from lerobot_policy_pi_rl.envs.fast_sawyer import DRAW_DEPENDENT_SETTLING, FastSawyer, make_simulation
from lerobot_policy_pi_rl.envs.tasks import all_tasks, expert_name

from .conftest import make_stock

SEEDS = (3, 100_077)
EXPERT_STEPS = 60


def muddle(fast: FastSawyer) -> None:
    """Leaves traces of another episode."""
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4)).astype(np.float32)
    fast.reseed(1)
    fast.reset()
    for action in actions:
        fast.step(action)


@pytest.mark.parametrize("task", all_tasks())
def test_observations_rewards_and_success_are_those_of_stock_to_the_bit(task: str) -> None:
    fast = make_simulation(task)
    expert = getattr(policies, expert_name(task))()
    for seed in SEEDS:
        muddle(fast)
        stock = make_stock(task, seed)
        expected, _ = stock.reset()
        fast.reseed(seed)
        np.testing.assert_array_equal(fast.reset()[0], expected)
        for _ in range(EXPERT_STEPS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action = np.clip(expert.get_action(expected), -1, 1).astype(np.float32)
            expected, reward, terminated, truncated, info = stock.step(action)
            seen, fast_reward, fast_terminated, fast_truncated, fast_info = fast.step(action)
            np.testing.assert_array_equal(seen, expected)
            assert (fast_reward, fast_terminated, fast_truncated) == (reward, terminated, truncated)
            assert fast_info == info
        stock.close()
    fast.close()


@pytest.mark.parametrize("task", ["peg-insert-side-v3", "box-close-v3"])
def test_only_tasks_with_a_fixed_settling_remember_it(task: str) -> None:
    fast = make_simulation(task)
    fast.reseed(0)
    fast.reset()
    assert (fast._settled is None) == (task in DRAW_DEPENDENT_SETTLING)


def test_a_remembered_settling_that_no_longer_fits_is_simulated_again() -> None:
    fast = make_simulation("peg-insert-side-v3")
    fast.reseed(0)
    expected, _ = fast.reset()
    before, after = fast._settled
    fast._settled = before + 1e-3, after
    fast.reseed(0)
    np.testing.assert_array_equal(fast.reset()[0], expected)


def test_metaworld_itself_is_left_alone() -> None:
    task_class = ALL_V3_ENVIRONMENTS["peg-insert-side-v3"]
    before = dict(vars(task_class)), dict(vars(SawyerXYZEnv)), dict(vars(reward_utils))
    make_simulation("peg-insert-side-v3").close()
    assert (dict(vars(task_class)), dict(vars(SawyerXYZEnv)), dict(vars(reward_utils))) == before
    assert task_class.step is SawyerXYZEnv.step
    assert task_class._get_quat_objects.__globals__["Rotation"] is Rotation


def test_quaternions_are_those_of_scipy_to_the_bit() -> None:
    half_turns = Rotation.from_rotvec(np.pi * np.eye(3)).as_matrix()
    matrices = [np.eye(3), *half_turns, *Rotation.random(2000, random_state=0).as_matrix()]
    for matrix in matrices:
        expected = Rotation.from_matrix(matrix).as_quat()
        np.testing.assert_array_equal(fast_sawyer._Quaternion.from_matrix(matrix).as_quat(), expected)


@pytest.mark.parametrize("sigmoid", ["long_tail", "gaussian"])
def test_tolerance_is_that_of_metaworld_to_the_bit(sigmoid: str) -> None:
    generator = np.random.default_rng(0)
    for x, low, width, margin in generator.uniform(0, 1, (5000, 4)):
        for value in (x, float(x), low, low + width, np.float64(x)):
            arguments = (value, (low, low + width), margin, sigmoid)
            assert fast_sawyer._tolerance(*arguments) == reward_utils.tolerance(*arguments)


def test_tolerance_refuses_what_metaworld_refuses() -> None:
    with pytest.raises(ValueError, match="Lower bound"):
        fast_sawyer._tolerance(0.5, (1.0, 0.0), 0.1, "long_tail")
    with pytest.raises(ValueError, match="margin"):
        fast_sawyer._tolerance(0.5, (0.0, 1.0), -0.1, "long_tail")


def test_an_unfit_mujoco_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mujoco.mjNEQDATA", 12)
    with pytest.raises(RuntimeError, match=r"pip install 'mujoco<3.10'"):
        make_simulation("reach-v3")
