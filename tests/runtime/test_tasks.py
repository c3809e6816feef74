"""Success by task: counted by actors, summed by the learner, checked on the way."""

from collections.abc import Callable

import numpy as np
import pytest

from lerobot_policy_pi_rl.runtime.collector import Collector, make_groups
from lerobot_policy_pi_rl.runtime.evaluation import evaluate
from lerobot_policy_pi_rl.runtime.pipeline import make_player, parts
from lerobot_policy_pi_rl.runtime.tasks import count_by_task, success_by_task

from .conftest import MakeConfig

TASKS = ("reach-v3", "push-v3", "door-open-v3")


def test_actors_are_summed_task_by_task() -> None:
    first = count_by_task(["push", "reach", "push"], np.array([True, False, False]))
    assert first == {"episodes/push": 2, "successes/push": 1, "episodes/reach": 1, "successes/reach": 0}
    second = {"actor": 1, "seconds": 0.5, **count_by_task(["push", "lift"], np.array([True, True]))}
    assert success_by_task([first, second]) == {"lift": 1.0, "push": pytest.approx(2 / 3), "reach": 0.0}


def test_one_task_needs_no_table_of_its_own() -> None:
    assert success_by_task([count_by_task(["push"] * 3, np.ones(3, bool))]) == {}
    assert success_by_task([]) == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_is_counted_for_the_task_it_ran_in(make_cfg: MakeConfig, workers: int) -> None:
    cfg = make_cfg(
        "--env.type=metaworld_state",
        f"--env.task={','.join(TASKS)}",
        "--env.episode_length=4",
        "--algorithm.collection.num_envs=6",
        f"--algorithm.collection.num_workers={workers}",
    )
    _, algorithm, env = parts(cfg)
    groups = make_groups(env, algorithm.collection)
    try:
        player, ran = make_player(cfg), {}
        seeds = np.arange(20)
        for group in groups:
            reset = group.envs.reset

            def recorded(starts: np.ndarray, reset: Callable = reset, envs: object = group.envs) -> dict:
                ran.update(zip(starts.tolist(), envs.tasks, strict=True))
                return reset(starts)

            group.envs.reset = recorded
        result = evaluate(player, groups, seeds)
        assert {seed: result.tasks[seed] for seed in ran} == ran
        assert len(set(result.tasks)) == len(TASKS)
        # Validation gives every task its share.
        counts = [result.tasks.count(task) for task in set(result.tasks)]
        assert max(counts) - min(counts) <= len(groups)
    finally:
        Collector(player, groups, algorithm.collection, 0).close()
