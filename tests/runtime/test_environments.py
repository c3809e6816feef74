"""The chunked vector, with real worker processes."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium import spaces
from lerobot.envs.configs import EnvConfig

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv, first_ready
from lerobot_policy_pi_rl.runtime.pool import ChunkStep, nested

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


@pytest.mark.parametrize("workers", [1, 2])
def test_an_environments_error_arrives_in_one_line(workers: int) -> None:
    vector = ChunkedVectorEnv(CounterConfig(), 3, workers)
    vector.reset(np.arange(3))
    with pytest.raises(RuntimeError, match="failed: ValueError: the gripper fell off") as caught:
        vector.step(chunk(2, command=-1), np.arange(3))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="are closed"):
        vector.reset(np.arange(3))


def test_a_worker_that_dies_in_a_chunk_is_reported() -> None:
    with ChunkedVectorEnv(CounterConfig(), 3, 2) as vector:
        vector.reset(np.arange(3))
        with pytest.raises(RuntimeError, match=r"died \(SIGKILL\)"):
            vector.step(chunk(2, command=-2), np.arange(3))


def test_a_worker_killed_between_chunks_is_reported() -> None:
    with ChunkedVectorEnv(CounterConfig(), 3, 2) as vector:
        vector.reset(np.arange(3))
        process = vector._workers[1].process
        process.kill()
        process.join()
        with pytest.raises(RuntimeError, match=r"environments 1 to 2 .* died \(SIGKILL\)"):
            vector.step(chunk(2), np.arange(3))


def test_a_stuck_worker_is_given_up() -> None:
    vector = ChunkedVectorEnv(CounterConfig(), 2, 2, step_timeout=0.5)
    vector.reset(np.arange(2))
    actions = chunk(1, num_envs=2)
    actions[1, 0, 0] = -3
    processes = [psutil.Process(worker.process.pid) for worker in vector._workers]
    with pytest.raises(RuntimeError, match="did not answer in time"):
        vector.step(actions, np.arange(2))
    assert not any(process.is_running() for process in processes)


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
