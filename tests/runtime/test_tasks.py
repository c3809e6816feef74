"""Several tasks in one policy: success is counted for each, and environments go where they are needed."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lerobot.envs.configs import EnvConfig

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.collector import Collector, make_groups
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv
from lerobot_policy_pi_rl.runtime.evaluation import evaluate
from lerobot_policy_pi_rl.runtime.pipeline import make_player, parts
from lerobot_policy_pi_rl.runtime.tasks import count_by_task, deal, success_by_task, task_shares

from .conftest import Line, LineConfig, MakeCollector, MakeConfig, Train

TASKS = ("reach-v3", "push-v3", "door-open-v3")
THREE = f"--env.task={','.join(TASKS)}"


class Chore(Line):
    """Ends after two steps whatever is done: solved or not, as the task is easy or impossible."""

    def __init__(self, number: int) -> None:
        super().__init__(2)
        self.task_description = f"chore {number}"
        self.easy = number < 2

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation = super().step(action)[0]
        over = bool(self.state[1] >= 2)
        return (
            observation,
            float(over and self.easy),
            over and self.easy,
            over,
            {"is_success": over and self.easy},
        )


@EnvConfig.register_subclass("test_chores")
@dataclass
class ChoresConfig(LineConfig):
    """Three chores, the last of which nobody can do."""

    episode_length: int = 2

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        makers = [[lambda number=number: Chore(number)] * n_envs for number in range(3)]
        return {"chores": {number: gym.vector.SyncVectorEnv(make) for number, make in enumerate(makers)}}


CHORES = ("--env.type=test_chores", "--algorithm.collection.num_envs=12", "--policy.n_action_steps=2")


# Counting


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
        THREE,
        "--env.episode_length=4",
        "--algorithm.collection.num_envs=6",
        f"--algorithm.collection.num_workers={workers}",
    )
    _, algorithm, env = parts(cfg)
    groups = make_groups(env, algorithm.collection)
    try:
        player, ran = make_player(cfg), {}
        for group in groups:
            reset = group.envs.reset

            def recorded(starts: np.ndarray, reset: Callable = reset, envs: Any = group.envs) -> dict:
                ran.update(zip(starts.tolist(), envs.tasks, strict=True))
                return reset(starts)

            group.envs.reset = recorded
        result = evaluate(player, groups, np.arange(20))
        assert {seed: result.tasks[seed] for seed in ran} == ran
        assert len(set(result.tasks)) == len(TASKS)
        # Validation gives every task its share.
        counts = [result.tasks.count(task) for task in set(result.tasks)]
        assert max(counts) - min(counts) <= len(groups)
    finally:
        Collector(player, groups, algorithm.collection, 0).close()


# Dealing


def test_shares_go_from_even_to_proportional_to_failures() -> None:
    success = {"solved": 1.0, "half": 0.5, "never": 0.0}
    assert task_shares(success, 0.0) == pytest.approx(dict.fromkeys(success, 1 / 3))
    assert task_shares(success, 1.0) == pytest.approx({"solved": 0, "half": 1 / 3, "never": 2 / 3})
    assert task_shares(success, 0.5) == pytest.approx({"solved": 1 / 6, "half": 1 / 3, "never": 1 / 2})
    assert task_shares(dict.fromkeys(success, 1.0), 1.0) == pytest.approx(dict.fromkeys(success, 1 / 3))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 60))
def test_every_task_gets_its_part_and_at_least_one(weights: list[float], more: int) -> None:
    shares = (np.array(weights) + 1e-3) / (np.array(weights) + 1e-3).sum()
    places = len(shares) + more
    numbers = deal(shares, places)
    assert len(numbers) == places
    counts = np.bincount(numbers, minlength=len(shares))
    assert np.all(np.abs(counts - (1 + shares * more)) < 1)
    # Each worker takes some neighbours: of every task it gets about what it should.
    half = np.bincount(numbers[: places // 2], minlength=len(shares))
    assert np.all(np.abs(half - counts / 2) <= 1 + len(shares) / 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_environments_change_their_tasks_and_come_back_to_them(workers: int) -> None:
    config = MetaworldStateEnv(task=",".join(TASKS), episode_length=9)
    with ChunkedVectorEnv(config, 4, workers) as vector:
        assert vector.numbers.tolist() == [0, 1, 2, 0]
        seeds = np.arange(4)
        before, tasks = vector.reset(seeds)["agent_pos"], vector.tasks
        vector.deal(np.array([2, 2, 1, 2]))
        assert vector.tasks == [tasks[2], tasks[2], tasks[1], tasks[2]]
        vector.reset(seeds)
        vector.step(np.ones((4, 2, 4), np.float32), seeds)
        vector.deal(np.array([0, 1, 2, 0]))
        assert vector.tasks == tasks
        np.testing.assert_array_equal(vector.reset(seeds)["agent_pos"], before)


def test_tasks_of_lerobots_own_suites_are_dealt_as_well() -> None:
    with ChunkedVectorEnv(ChoresConfig(), 3, 0) as vector:
        vector.deal(np.array([2, 2, 2]))
        assert (vector.tasks, vector.num_tasks) == (["chore 2"] * 3, 3)


def test_actors_deal_one_whole_among_themselves(make_collector: MakeCollector) -> None:
    dealt: Counter[str] = Counter()
    for actor in range(2):
        collector = make_collector(
            *CHORES,
            "--algorithm.collection.num_actors=2",
            f"--algorithm.collection.actor_id={actor}",
            "--algorithm.collection.task_focus=1",
            "--save_freq=1",
        )
        collector.focus({"chore 0": 0.0, "chore 2": 1.0})
        dealt.update(task for group in collector._groups for task in group.envs.tasks)
    # Of chore 1 no episode has ended: it counts as the hardest. 24 are one each, and 21 for the shares.
    assert dealt == {"chore 0": 1, "chore 1": 12, "chore 2": 11}


def test_groups_keep_their_task(make_collector: MakeCollector) -> None:
    collector = make_collector(
        *CHORES,
        "--algorithm.advantage=group",
        "--algorithm.collection.group_size=3",
        "--algorithm.collection.task_focus=1",
        "--save_freq=1",
    )
    collector.focus({"chore 0": 0.0, "chore 1": 0.0, "chore 2": 1.0})
    (group,) = collector._groups
    assert Counter(group.envs.tasks) == {"chore 0": 3, "chore 1": 3, "chore 2": 6}
    assert all(len(set(group.envs.tasks[first : first + 3])) == 1 for first in range(0, 12, 3))


# Whole runs


def counters(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints/last/training_state/counters.json").read_text())


def test_a_run_deals_more_to_the_task_that_fails_and_resumes_so(train: Train, tmp_path: Path) -> None:
    settings = (*CHORES, "--algorithm.collection.task_focus=1", "--save_freq=2")
    rows = train(*settings, "--steps=6", folder="whole")
    by_step = {row["step"]: row for row in rows if "rollout/success/chore 0" in row}
    assert {row["rollout/success/chore 0"] for row in by_step.values()} == {1.0}
    assert {row["rollout/success/chore 2"] for row in by_step.values()} == {0.0}
    # A third of the episodes fails, then all but those of one environment for each of the other tasks.
    assert by_step[2]["rollout/success"] == pytest.approx(2 / 3)
    assert by_step[4]["rollout/success"] == pytest.approx(2 / 12)
    assert counters(tmp_path / "whole")["task_shares"] == {"chore 0": 0.0, "chore 1": 0.0, "chore 2": 1.0}

    train(*settings, "--steps=4", folder="half")
    resumed = train(*settings, "--steps=6", "--resume=true", folder="half")
    mine = ("loss", "ppo", "rollout", "gradient")
    for row in resumed:
        expected = by_step.get(row["step"], {})
        assert {n: v for n, v in row.items() if n.split("/")[0] in mine} == {
            n: v for n, v in expected.items() if n.split("/")[0] in mine
        }


def test_without_focus_all_tasks_stay_even(train: Train, tmp_path: Path) -> None:
    rows = train(*CHORES, "--save_freq=2", "--steps=4", folder="even")
    found = [row["rollout/success"] for row in rows if "rollout/success" in row]
    assert found == pytest.approx([2 / 3] * len(found))
    assert found
    assert counters(tmp_path / "even")["task_shares"] == {}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task_focus": 2.0}, r"task_focus.*must be 0 to 1, got 2"),
        ({"task_focus": 0.5, "max_staleness": 1}, r"task_focus.*max_staleness=1 to 0"),
    ],
)
def test_what_cannot_be_collected_is_one_line(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        CollectionConfig(**settings)
    assert "\n" not in str(caught.value)


FOCUSED = (*CHORES, "--algorithm.collection.task_focus=0.5")


def test_focus_needs_checkpoints(make_cfg: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"task_focus.*none are saved; set save_freq") as caught:
        make_cfg(*FOCUSED, "--save_freq=0")
    assert "\n" not in str(caught.value)


def test_focus_needs_an_environment_for_each_task(make_cfg: MakeConfig) -> None:
    cfg = make_cfg(*FOCUSED, "--save_freq=1", "--algorithm.collection.num_envs=2")
    with pytest.raises(ConfigError, match=r"task_focus.*3 tasks.*num_envs to at least 3") as caught:
        make_groups(parts(cfg)[2], parts(cfg)[1].collection)
    assert "\n" not in str(caught.value)
