"""How much faster the fast MetaWorld environment is than the stock one, resets and steps together."""

import statistics
import time

import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from lerobot_policy_pi_rl.envs.fast_sawyer import make_simulation

TASKS = ("peg-insert-side-v3", "pick-place-v3", "reach-v3", "drawer-open-v3")
STEPS = 150
TARGET = 2.0


def make_stock(task: str) -> SawyerXYZEnv:
    """MetaWorld's own environment, with its goal visible and drawn from a seed."""
    env = ALL_V3_ENVIRONMENTS[task]()
    env._partially_observable = False
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    del env.sawyer_observation_space
    return env


def episode_seconds(env: SawyerXYZEnv, seed: int, actions: np.ndarray) -> float:
    """Time of a seeded reset and an episode of random actions, `[T, 4]`."""
    start = time.perf_counter()
    env.seed(seed)
    env.reset()
    for action in actions:
        env.step(action)
    return time.perf_counter() - start


def compare(task: str, rounds: int) -> dict:
    """Interleaves episodes of both, so that a busy machine slows both alike."""
    stock, fast = make_stock(task), make_simulation(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 4)).astype(np.float32)
    # The first episode of each loads and remembers what later ones reuse.
    for env in (stock, fast):
        episode_seconds(env, 0, actions)
    pairs = [
        (episode_seconds(stock, seed, actions), episode_seconds(fast, seed, actions))
        for seed in range(rounds)
    ]
    for env in (stock, fast):
        env.close()
    ratio = statistics.median(slow / quick for slow, quick in pairs)
    speeds = [STEPS / statistics.median(column) for column in zip(*pairs, strict=True)]
    return {
        "name": f"fast environment over stock, {task}",
        "value": ratio,
        "unit": "x",
        "target": TARGET,
        "detail": f"{speeds[1]:,.0f} against {speeds[0]:,.0f} steps/s with a reset every {STEPS}, {rounds} rounds",
    }


def run(quick: bool = False) -> list[dict]:
    """Rows of the benchmark table.

    Args:
        quick: One task and few rounds.
    """
    return [compare(task, rounds=5 if quick else 15) for task in (TASKS[:1] if quick else TASKS)]


if __name__ == "__main__":
    for row in run():
        print(
            f"{row['name']:<50} {row['value']:6.2f} {row['unit']}  (target {row['target']})  {row['detail']}"
        )
