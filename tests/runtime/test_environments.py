"""The chunked vector, with real worker processes."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from lerobot.envs.configs import EnvConfig

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.environments import MAX_FAILURES, ChunkedVectorEnv, first_ready
from lerobot_policy_pi_rl.runtime.pool import ChunkStep, _Slot, nested, reported_success
from lerobot_policy_pi_rl.runtime.workers import EnvironmentFailed

WORKERS = [0, 1, 2]


class Counter(gym.Env):
    """Counts steps from its seed; terminates at `limit` steps, truncates at `cut`, and can break."""

    observation_space = spaces.Dict({"pixels": spaces.Dict({"top": spaces.Box(-1e9, 1e9, (1,))})})
    action_space = spaces.Box(-1e9, 1e9, (2,))
    task_description = "count"

    def __init__(self, limit: int, cut: int) -> None:
        self.limit, self.cut = limit, cut
        self.seen = np.zeros(1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed == -9:
            raise ValueError("no such start")
        self.steps = 0
        self.seen[0] = seed
        return {"pixels": {"top": self.seen}}, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        if action[0] == -1:
            raise ValueError("the gripper fell off")
        if action[0] == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        if action[0] == -3:
            time.sleep(60)
        self.steps += 1
        self.seen += 1
        solved = self.steps == self.limit
        return (
            {"pixels": {"top": self.seen}},
            action[1],
            solved,
            self.steps == self.cut,
            {"is_success": solved},
        )


@EnvConfig.register_subclass("test_counter")
@dataclass
class CounterConfig(EnvConfig):
    limit: int = 5
    cut: int = 100
    episode_length: int | None = None

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"count": {0: gym.vector.SyncVectorEnv([lambda: Counter(self.limit, self.cut)] * n_envs)}}


class Named(Counter):
    """A counter of one task, whose time limit is only stated, and whose start is a number beside the seed."""

    def __init__(self, task: str) -> None:
        super().__init__(limit=6, cut=100)
        self.task_description, self._max_episode_steps = task, 4
        self.init_state_id = -1

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        start = self.init_state_id
        self.init_state_id += 1
        return super().reset(seed=start)


@EnvConfig.register_subclass("test_suites")
@dataclass
class SuitesConfig(CounterConfig):
    """Two suites of two tasks and of one, as LeRobot's benchmarks give them."""

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        suites = {"one": ("open", "close"), "two": ("push",)}
        return {
            suite: {
                number: gym.vector.SyncVectorEnv([lambda task=task: Named(task)] * n_envs)
                for number, task in enumerate(tasks)
            }
            for suite, tasks in suites.items()
        }


def chunk(length: int, num_envs: int = 3, command: float = 0.0) -> np.ndarray:
    """Actions whose rewards are 1, 2, 4, ... so that a sum says which were executed."""
    actions = np.full((num_envs, length, 2), command)
    actions[:, :, 1] = 2.0 ** np.arange(length)
    return actions


@pytest.mark.parametrize("workers", WORKERS)
def test_a_chunk_stops_where_the_episode_ends(workers: int) -> None:
    with ChunkedVectorEnv(CounterConfig(limit=5), 3, workers) as vector:
        assert vector.tasks == ["count"] * 3
        first = vector.reset(np.array([100, 200, 300]))
        np.testing.assert_array_equal(first["pixels/top"].ravel(), [100, 200, 300])
        seeds = np.array([400, 500, 600])
        step = vector.step(chunk(3), seeds)
        assert step.executed.tolist() == [3, 3, 3]
        assert step.reward.tolist() == [7, 7, 7]
        assert not step.done.any()
        np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), [103, 203, 303])
        step = vector.step(chunk(4), seeds)
        assert step.executed.tolist() == [2, 2, 2]
        assert step.reward.tolist() == [3, 3, 3]
        assert step.terminated.all()
        assert step.success.all()
        assert not step.truncated.any()
        np.testing.assert_array_equal(step.final_observation["pixels/top"].ravel(), [105, 205, 305])
        np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), seeds)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_time_limit_truncates_and_a_success_wins_over_it(workers: int) -> None:
    with ChunkedVectorEnv(CounterConfig(cut=2), 3, workers) as vector:
        vector.reset(np.arange(3))
        step = vector.step(chunk(4), np.arange(3))
        assert (step.truncated.all(), step.terminated.any(), step.success.any()) == (True, False, False)
        np.testing.assert_array_equal(step.final_observation["pixels/top"].ravel(), [2, 3, 4])
    with ChunkedVectorEnv(CounterConfig(limit=2, cut=2), 3, workers) as vector:
        vector.reset(np.arange(3))
        step = vector.step(chunk(4), np.arange(3))
        assert (step.truncated.any(), step.terminated.all(), step.success.all()) == (False, True, True)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_episode_is_cut_on_demand_after_its_chunk(workers: int) -> None:
    with ChunkedVectorEnv(CounterConfig(limit=4), 3, workers) as vector:
        vector.reset(np.array([100, 200, 300]))
        step = vector.step(chunk(3), np.array([400, 500, 600]), np.array([False, True, False]))
        assert step.truncated.tolist() == [False, True, False]
        assert step.executed.tolist() == [3, 3, 3]
        np.testing.assert_array_equal(step.final_observation["pixels/top"].ravel(), [103, 203, 303])
        np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), [103, 500, 303])
        # One that ends by itself in that chunk was not cut.
        step = vector.step(chunk(2), np.array([700, 800, 900]), np.array([True, False, False]))
        assert (step.terminated.tolist(), step.truncated.any()) == ([True, False, True], False)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_tasks_of_all_suites_are_dealt_in_turn(workers: int) -> None:
    with ChunkedVectorEnv(SuitesConfig(), 5, workers) as vector:
        assert vector.tasks == ["open", "close", "push", "open", "close"]
    # The second of several vectors, two neighbours for each task.
    with ChunkedVectorEnv(SuitesConfig(), 5, workers, first=3, per_task=2) as vector:
        assert vector.tasks == ["close", "push", "push", "open", "open"]
        # Neighbours of one task are not one environment.
        first = vector.reset(np.array([10, 20, 30, 40, 50]))
        np.testing.assert_array_equal(first["pixels/top"].ravel(), [10, 20, 30, 40, 50])
        step = vector.step(chunk(2, num_envs=5), np.arange(5))
        np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), [12, 22, 32, 42, 52])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_limit_that_an_environment_only_states_is_kept(workers: int) -> None:
    with ChunkedVectorEnv(SuitesConfig(), 2, workers) as vector:
        assert vector.time_limits.tolist() == [4, 4]
        vector.reset(np.array([10, 20]))
        for start in (10, 30):
            step = vector.step(chunk(3, num_envs=2), np.array([0, 0]))
            assert not step.done.any()
            step = vector.step(chunk(3, num_envs=2), np.array([30, 40]))
            assert step.executed.tolist() == [1, 1]
            assert step.truncated.all()
            assert not step.terminated.any()
            assert step.final_observation["pixels/top"][0] == start + 4
            # LIBERO's starts are numbered and follow one another; here the seed says which.
            np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), [30, 40])


def test_the_smaller_limit_counts() -> None:
    for configured, limit in ((3, 3), (9, 4)):
        with ChunkedVectorEnv(SuitesConfig(episode_length=configured), 1, 0) as vector:
            assert vector.time_limits.tolist() == [limit]
            vector.reset(np.array([10]))
            assert vector.step(chunk(5, num_envs=1), np.array([0])).executed.tolist() == [limit]
    with ChunkedVectorEnv(CounterConfig(), 1, 0) as vector:
        assert vector.time_limits.tolist() == [0]


def test_success_can_be_the_reward() -> None:
    with ChunkedVectorEnv(CounterConfig(limit=4), 3, 0, reward="success") as vector:
        vector.reset(np.arange(3))
        assert vector.step(chunk(3), np.arange(3)).reward.tolist() == [0, 0, 0]
        assert vector.step(chunk(3), np.arange(3)).reward.tolist() == [1, 1, 1]


def test_types_and_shapes() -> None:
    with ChunkedVectorEnv(CounterConfig(), 3, 2) as vector:
        vector.reset(np.arange(3))
        step = vector.step(chunk(1), np.arange(3))
    assert isinstance(step, ChunkStep)
    assert [value.dtype for value in (step.reward, step.executed, step.success)] == [
        np.float32,
        np.int64,
        bool,
    ]
    assert nested(step.observation)["pixels"]["top"].shape == (3, 1)


def metaworld_run(workers: int) -> list[np.ndarray]:
    config = MetaworldStateEnv(task="reach-v3,peg-insert-side-v3", episode_length=11)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 3, 4, 4)).astype(np.float32)
    with ChunkedVectorEnv(config, 3, workers) as vector:
        assert vector.tasks == ["Reach a goal position", "Insert a peg sideways", "Reach a goal position"]
        seen = [vector.reset(np.arange(3))["agent_pos"]]
        for number, chunks in enumerate(actions):
            step = vector.step(chunks, 10 * number + np.arange(3))
            seen += [step.final_observation["agent_pos"], step.observation["agent_pos"], step.executed]
    return seen


def test_metaworld_is_the_same_in_one_process_or_in_several() -> None:
    alone = metaworld_run(0)
    assert alone[0].shape == (3, 48)
    assert alone[9].tolist() == [3, 3, 3]
    for workers in (1, 2):
        for here, there in zip(alone, metaworld_run(workers), strict=True):
            np.testing.assert_array_equal(here, there)


def commands(*ones: float) -> np.ndarray:
    """One action for each environment."""
    actions = np.zeros((len(ones), 1, 2))
    actions[:, 0, 0] = ones
    return actions


@pytest.mark.parametrize("workers", WORKERS)
def test_an_environment_that_raises_is_made_anew_and_the_others_go_on(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ChunkedVectorEnv(CounterConfig(limit=3), 3, workers, first=6) as vector:
        vector.reset(np.array([100, 200, 300]))
        vector.step(commands(0, 0, 0), np.arange(3))
        step = vector.step(commands(0, -1, 0), np.array([400, 500, 600]))
        assert step.failure.tolist() == ["", "ValueError: the gripper fell off", ""]
        assert step.executed.tolist() == [1, 0, 1]
        assert (step.truncated.tolist(), step.terminated.any()) == ([False, True, False], False)
        np.testing.assert_array_equal(step.observation["pixels/top"].ravel(), [102, 500, 302])
        assert vector.failures == 1
        # The new one begins with no step behind it, the others have had two.
        step = vector.step(chunk(2), np.arange(3))
        assert step.executed.tolist() == [1, 2, 1]
    (line,) = [record.message for record in caplog.records if record.name.endswith("environments")]
    assert line.startswith(
        "environment 7 failed: ValueError: the gripper fell off; 1 running episode(s) dropped"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_always_raises_ends_in_one_line(workers: int) -> None:
    with ChunkedVectorEnv(CounterConfig(), 2, workers) as vector:
        vector.reset(np.arange(2))
        for _ in range(MAX_FAILURES):
            vector.step(commands(-1, 0), np.arange(2))
        with pytest.raises(
            EnvironmentFailed, match=r"failed 11 times within an hour.*gripper fell off"
        ) as caught:
            vector.step(commands(-1, 0), np.arange(2))
        assert "\n" not in str(caught.value)
        with pytest.raises(RuntimeError, match="are closed"):
            vector.reset(np.arange(2))


def test_an_environment_that_cannot_begin_is_one_line() -> None:
    with pytest.raises(EnvironmentFailed, match="failed: ValueError: no such start") as caught:
        ChunkedVectorEnv(CounterConfig(), 3, 1).reset(np.array([1, -9, 1]))
    assert "\n" not in str(caught.value)


def test_workers_that_are_stuck_or_die_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """One that stands still in a chunk, then one that is killed before a reset; what replaces them is spawned."""
    config = MetaworldStateEnv(task="reach-v3,push-v3", episode_length=20)
    seeds, actions = np.array([10, 20, 30]), np.zeros((3, 2, 4), np.float32)
    with ChunkedVectorEnv(config, 3, 2, step_timeout=2.0) as vector, ChunkedVectorEnv(config, 3, 0) as alone:
        for each in (vector, alone):
            each.deal(np.array([0, 1, 1]))
            each.reset(np.arange(3))
        stuck = psutil.Process(vector._workers[1].process.pid)
        stuck.suspend()
        step, expected = vector.step(actions, seeds), alone.step(actions, seeds)
        # Environments 1 and 2 share a worker.
        assert step.failed.tolist() == [False, True, True]
        assert (step.executed.tolist(), step.truncated.tolist()) == ([2, 0, 0], [False, True, True])
        np.testing.assert_array_equal(step.observation["agent_pos"][0], expected.observation["agent_pos"][0])
        # Their next episodes have begun, in the tasks that they were dealt.
        begun = alone.reset(seeds)["agent_pos"]
        np.testing.assert_array_equal(step.observation["agent_pos"][1:], begun[1:])
        assert vector.tasks == alone.tasks
        assert vector.failures == 2
        assert not stuck.is_running()

        process = vector._workers[0].process
        process.kill()
        process.join()
        np.testing.assert_array_equal(vector.reset(seeds)["agent_pos"], begun)
        assert not vector.step(actions, seeds).failed.any()
        assert vector.failures == 3
    assert "environments 1 to 2" in caplog.text
    assert "did not answer in time" in caplog.text
    assert "died (SIGKILL)" in caplog.text


class Boxed(Counter):
    """Accepts only what is in its action space, as environments that check it do, and shows what it was given."""

    action_space = spaces.Box(np.array([-0.1, -np.inf]), np.array([0.5, np.inf]), dtype=np.float64)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        observation, _, *others = super().step(np.zeros(2))
        return observation, float(action[0] + action[1]), *others


def test_what_is_executed_is_within_the_action_space() -> None:
    slot = _Slot(lambda: Boxed(5, 100), None, "environment", 0)
    slot.reset(0)
    actions = np.array([[2.0, 100.0], [-2.0, 0.0], [0.25, -7.0]], dtype=np.float32)
    assert slot.step(actions, 0, False).reward == 0.5 + 100 - 0.1 + 0.25 - 7


class Renamed(Counter):
    """Names its task at each reset, as LeRobot's robocasa, vlabench and robotwin do."""

    def __init__(self, length: int = 0) -> None:
        super().__init__(limit=2, cut=100)
        self.task, self.task_description, self.length = "pick", "", length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.task_description = f"pick number {seed}" + "!" * self.length
        return super().reset(seed=seed)


@EnvConfig.register_subclass("test_renamed")
@dataclass
class RenamedConfig(CounterConfig):
    length: int = 0

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"renamed": {0: gym.vector.SyncVectorEnv([lambda: Renamed(self.length)] * n_envs)}}


@pytest.mark.parametrize("workers", WORKERS)
def test_the_task_is_what_the_environment_calls_it_in_each_episode(workers: int) -> None:
    with ChunkedVectorEnv(RenamedConfig(), 2, workers) as vector:
        assert vector.names == ["pick", "pick"]
        vector.reset(np.array([4, 5]))
        assert vector.tasks == ["pick number 4", "pick number 5"]
        vector.step(commands(0, 0), np.array([6, 7]))
        assert vector.tasks == ["pick number 4", "pick number 5"]
        step = vector.step(commands(0, -1), np.array([8, 9]))
        assert step.task.tolist() == vector.tasks == ["pick number 8", "pick number 9"]
        assert vector.names == ["pick", "pick"]


def test_a_task_text_that_no_learner_takes_is_one_line() -> None:
    with (
        ChunkedVectorEnv(RenamedConfig(length=5000), 2, 0) as vector,
        pytest.raises(
            EnvironmentFailed, match=r"task text has 5,013 characters, at most 4,096.*'pick number 4"
        ),
    ):
        vector.reset(np.array([4, 5]))


# Success


@pytest.mark.parametrize(
    ("info", "solved"),
    [
        ({}, None),
        ({"reward": 1.0, "successes": 1}, None),
        ({"is_success": True}, True),
        ({"is_success": np.bool_(False)}, False),
        ({"success": 1.0}, True),
        ({"success": np.float32(0.0)}, False),
        ({"succeed": np.array([True])}, True),
        ({"success": torch.tensor([False])}, False),
        ({"success": np.nan}, None),
        ({"success": "no"}, None),
        ({"is_success": False, "final_info": {"is_success": True}}, True),
        ({"final_info": {"success": np.array([1.0]), "_success": np.array([True])}}, True),
        ({"final_info": {"success": np.array([1.0]), "_success": np.array([False])}}, None),
        ({"final_info": [None, {"is_success": True}]}, True),
        ({"final_info": np.array([None, {"success": False}], dtype=object)}, False),
        ({"final_info": None}, None),
    ],
)
def test_success_is_understood_as_environments_spell_it(info: dict, solved: bool | None) -> None:
    assert reported_success(info) is solved


class Silent(Counter):
    """Says nothing of success, but for what `says` gives."""

    says: ClassVar[dict[int, dict]] = {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        *others, _ = super().step(action)
        return *others, {"speed": 3, "distance": 0.1} | self.says.get(self.steps, {})


class AtTheEnd(Silent):
    says: ClassVar = {2: {"final_info": {"success": True}}}


class InTheMiddle(Silent):
    says: ClassVar = {1: {"success": np.float64(0)}}


@pytest.mark.parametrize(
    ("kind", "success", "unjudged"),
    [(Silent, False, "distance, speed"), (AtTheEnd, True, ""), (InTheMiddle, False, "")],
)
def test_an_episode_without_a_word_on_success_names_what_there_was(
    kind: type[Counter], success: bool, unjudged: str
) -> None:
    slot = _Slot(lambda: kind(2, 100), None, "environment", 0)
    slot.reset(0)
    assert slot.step(np.zeros((1, 2)), 0, False).unjudged == ""
    done = slot.step(np.zeros((1, 2)), 0, False)
    assert (done.success, done.unjudged) == (success, unjudged)


def test_workers_ignore_ctrl_c() -> None:
    with ChunkedVectorEnv(CounterConfig(), 2, 2) as vector:
        vector.reset(np.arange(2))
        for worker in vector._workers:
            os.kill(worker.process.pid, signal.SIGINT)
        assert vector.step(chunk(2, num_envs=2), np.arange(2)).executed.tolist() == [2, 2]


def test_workers_die_with_their_parent() -> None:
    receive, send = multiprocessing.Pipe(duplex=False)

    def live() -> None:
        vector = ChunkedVectorEnv(MetaworldStateEnv(), 2, 2)
        send.send([worker.process.pid for worker in vector._workers])
        os.kill(os.getpid(), signal.SIGKILL)

    parent = multiprocessing.get_context("fork").Process(target=live)
    parent.start()
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    pids = receive.recv()
    assert len(pids) == 2
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(alive, timeout=10)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_the_vector_that_answers_first_is_named_first() -> None:
    with ChunkedVectorEnv(CounterConfig(), 2, 1) as one, ChunkedVectorEnv(CounterConfig(), 2, 1) as other:
        for vector in (one, other):
            vector.reset(np.arange(2))
        other.send(chunk(1, num_envs=2), np.arange(2))
        assert first_ready([one, other]) == 1
        # Nobody answers: the first is named when the time is up.
        other.receive()
        assert first_ready([one, other], timeout=0.05) == 0
        os.kill(other._workers[0].process.pid, signal.SIGKILL)
        assert first_ready([one, other]) == 1
    with ChunkedVectorEnv(CounterConfig(), 2, 1) as one, ChunkedVectorEnv(CounterConfig(), 2, 0) as here:
        assert first_ready([one, here]) == 1


def test_misuse_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ChunkedVectorEnv(CounterConfig(), 0, 1)
    with ChunkedVectorEnv(CounterConfig(), 2, 0) as vector:
        with pytest.raises(ValueError, match=r"seeds must have 2 rows.*got \[3\]"):
            vector.reset(np.arange(3))
        vector.reset(np.arange(2))
        with pytest.raises(ValueError, match=r"\[N, H, A\]"):
            vector.step(np.zeros((2, 2)), np.arange(2))
        with pytest.raises(RuntimeError, match="call send first"):
            vector.receive()
        vector.send(chunk(1, num_envs=2), np.arange(2))
        with pytest.raises(RuntimeError, match="twice"):
            vector.send(chunk(1, num_envs=2), np.arange(2))
    with pytest.raises(RuntimeError, match="closed"):
        vector.reset(np.arange(2))
    vector.close()
