"""The comparison with other methods: its demonstrations, its measure of success and its curves; nothing learns."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.demonstrations import Episode, add_episode, dataset_features
from lerobot_policy_pi_rl.runtime.pool import ChunkStep

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.baselines import curves, report, sac, task

SIZE = 48


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two episodes of 3 and 2 steps whose states and actions count upwards; each ends with a success."""
    env = MetaworldStateEnv()
    root = tmp_path_factory.mktemp("data") / "demonstrations"
    dataset = LeRobotDataset.create(
        "pi_rl/demo",
        fps=80,
        features=dataset_features(env),
        root=root,
        use_videos=False,
        video_backend="pyav",
    )
    for first, length in ((0, 3), (3, 2)):
        steps = np.arange(first, first + length, dtype=np.float32)
        solved = np.arange(length) == length - 1
        add_episode(
            dataset,
            env,
            Episode(
                task="count",
                observation={"agent_pos": np.repeat(steps[:, None], SIZE, axis=1)},
                action=np.repeat(steps[:, None] / 10, 4, axis=1),
                reward=solved.astype(np.float32),
                success=solved,
            ),
        )
    dataset.finalize()
    return root


class CountingEnvs:
    """Environments whose episodes take as many steps as their seed says, and succeed if it is even."""

    def __init__(self, num_envs):
        self.num_envs, self.started = num_envs, []

    def reset(self, seeds):
        self._seeds, self._left = seeds.copy(), seeds.copy()
        self.started += list(seeds)
        return {"agent_pos": self._left[:, None].astype(np.float32)}

    def step(self, chunks, reset_seeds):
        assert chunks.shape == (self.num_envs, 1, 1)
        self._left = self._left - 1
        done = self._left == 0
        success = done & (self._seeds % 2 == 0)
        self.started += list(reset_seeds[done])
        self._seeds = np.where(done, reset_seeds, self._seeds)
        self._left = np.where(done, reset_seeds, self._left)
        now = {"agent_pos": self._left[:, None].astype(np.float32)}
        ones = np.ones(self.num_envs, dtype=np.int64)
        return ChunkStep(
            success.astype(np.float32),
            ones,
            success,
            done & ~success,
            success,
            now,
            now,
            np.zeros_like(done),
            np.zeros_like(ones),
            *[np.full(self.num_envs, "")] * 3,
        )


def test_demonstrations_as_arrays(demonstrations):
    arrays = task.as_arrays(task.open_demonstrations(demonstrations, SIZE))
    np.testing.assert_array_equal(arrays.state[:, 0], [0, 1, 2, 3, 4])
    np.testing.assert_allclose(arrays.action[:, 3], [0, 0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(arrays.reward, [0, 0, 1, 0, 1])
    np.testing.assert_array_equal(arrays.done, [False, False, True, False, True])


def test_demonstrations_of_another_environment_are_refused(demonstrations):
    with pytest.raises(ValueError, match="have 48 numbers; the environment gives 39"):
        task.open_demonstrations(demonstrations, 39)


def test_missing_demonstrations_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="lerobot-pi-rl-demos"):
        task.open_demonstrations(tmp_path, SIZE)


def test_sac_learns_from_demonstrations_with_lerobots_own_parts(demonstrations):
    dataset = task.open_demonstrations(demonstrations, SIZE)
    settings = sac.SACSettings(
        online_buffer_capacity=16, offline_buffer_capacity=16, online_step_before_learning=2
    )
    torch.manual_seed(0)
    agent = sac.Agent(settings, MetaworldStateEnv(), dataset)
    state = {OBS_STATE: torch.ones(1, SIZE)}
    assert agent.explore(state).shape == (1, 4)
    before = agent.save()
    assert np.abs(agent.act(np.ones((3, SIZE), dtype=np.float32))).max() <= 1
    for number in range(3):
        agent.learn(
            {
                "state": state,
                ACTION: torch.full((4,), 0.5),
                "reward": 0.0,
                "next_state": state,
                "done": False,
                "truncated": False,
                "complementary_info": None,
            }
        )
        changed = any(not torch.equal(before[name], value) for name, value in agent.save().items())
        # The first of them is not enough to learn from.
        assert changed == (number >= 1)
    agent.load(before)
    assert all(torch.equal(before[name], value) for name, value in agent.save().items())


def test_the_mode_of_sac_is_the_squashed_mean(demonstrations):
    agent = sac.Agent(sac.SACSettings(), MetaworldStateEnv(), task.open_demonstrations(demonstrations, SIZE))
    state = torch.full((1, SIZE), 2.0)
    # States from 0 to 4 are scaled to -1 to 1, so that 2 is 0.
    mean = agent.policy({OBS_STATE: torch.zeros(1, SIZE)})["action_mean"]
    np.testing.assert_allclose(agent.act(state.numpy()), torch.tanh(mean).detach().numpy(), atol=1e-6)


def test_nearly_constant_states_get_a_wider_range():
    low, high = sac.state_ranges(np.array([[0.0, 1.0, 2.0], [0.3, 1.0, 2.02]]))
    np.testing.assert_allclose(low, [0, 0.95, 1.96])
    np.testing.assert_allclose(high, [0.3, 1.05, 2.06])


@pytest.mark.parametrize("num_envs", [1, 2, 4, 7])
def test_success_rate_counts_each_start_once(num_envs):
    seeds = np.array([3, 4, 1, 2, 7])
    envs = CountingEnvs(num_envs)
    assert task.success_rate(lambda state: np.zeros((len(state), 1)), envs, seeds) == pytest.approx(2 / 5)
    assert set(seeds) == set(envs.started)


def test_a_course_keeps_the_best_weights_and_resumes_by_skipping(tmp_path, monkeypatch):
    # Success on the validation starts, then of the last and of the best weights on the held-out ones.
    rates = iter([0.25, 0.75, 0.5, 0.4, 0.6])
    monkeypatch.setattr(task, "success_rate", lambda *_: next(rates))
    weights, loaded = iter("ab"), []
    file = curves.run_file(tmp_path, "sac", "reach-v3", 1)
    writer = curves.CurveWriter(file, {"method": "sac", "seed": 1})
    course = task.Course(writer, None, task.Budget(100, None, 40), lambda: next(weights), loaded.append)
    for steps in range(0, 101, 20):
        course.visit(steps, None) if steps != 80 else None
    assert not curves.finished(file)
    course.finish(100, None)
    curve = curves.read_baseline(file)
    assert [point.env_steps for point in curve.points] == [0, 40, 100]
    assert curve.success.tolist() == [0.25, 0.75, 0.5]
    assert loaded == ["b"]
    assert (curve.held_out.success, curve.held_out.last_success, curve.held_out.n) == (0.6, 0.4, 100)
    assert curves.finished(file)


def test_a_course_ends_with_its_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "success_rate", lambda *_: 0.0)
    writer = curves.CurveWriter(tmp_path / "run.jsonl", {})
    course = task.Course(writer, None, task.Budget(100, 0.0, 40), dict, dict)
    assert course.over(1)


def write_lines(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_pi_rl_metrics_give_evaluations_the_time_of_the_iteration_before(tmp_path):
    file = write_lines(
        tmp_path / "pi_rl" / "metrics.jsonl",
        {"step": 0, "eval/success": 0.5, "eval/episodes": 64.0, "progress/env_steps": 0},
        {"step": 1, "progress/env_steps": 100, "progress/seconds": 30.0},
        {"step": 1, "eval/success": 0.75, "eval/episodes": 64.0, "progress/env_steps": 100},
    )
    (tmp_path / "summary.json").write_text(json.dumps({"pi_rl_success": 0.8, "n_eval": 100}))
    curve = curves.read_pi_rl(file)
    assert curve.points == (curves.Point(0, 0.0, 0.5, 64), curves.Point(100, 30.0, 0.75, 64))
    assert curve.held_out == curves.HeldOut(0.8, 100)


def test_a_grids_curve_is_read_with_its_result(tmp_path):
    file = write_lines(
        tmp_path / "curves" / "reach-v3_1_default.jsonl",
        {"step": 0, "env_steps": 0, "seconds": 0.0, "eval/success": 0.25},
        {"step": 10, "env_steps": 50, "seconds": 6.0, "rollout/success": 0.4},
        {"step": 20, "env_steps": 90, "seconds": 12.0, "eval/success": 0.5},
    )
    found = {"n_eval": 100, "supervised_minutes": 1.5}
    rows = [
        {"task": "reach-v3", "seed": 0, "variant": "default", "best": 0.1, "last": 0.1, **found},
        {"task": "reach-v3", "seed": 1, "variant": "default", "best": 0.9, "last": 0.7, **found},
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    curve = curves.read_pi_rl(file)
    assert curve.minutes.tolist() == [0.0, 0.2]
    assert curve.held_out == curves.HeldOut(0.9, 100, 0.7, imitation_minutes=1.5)


def test_a_file_without_evaluations_is_refused(tmp_path):
    file = write_lines(tmp_path / "metrics.jsonl", {"step": 1, "progress/env_steps": 100})
    with pytest.raises(ValueError, match="eval/success"):
        curves.read_pi_rl(file)


def test_median_curve_interpolates_up_to_the_shortest_run():
    xs = [np.array([0.0, 10.0]), np.array([0.0, 5.0, 20.0]), np.array([0.0, 20.0])]
    ys = [np.array([0.0, 1.0]), np.array([0.0, 0.2, 0.2]), np.array([0.4, 0.4])]
    places, middle = curves.median_curve(xs, ys, resolution=3)
    np.testing.assert_allclose(places, [0, 5, 10])
    # At 0: 0, 0, 0.4. At 5: 0.5, 0.2, 0.4. At 10: 1, 0.2, 0.4.
    np.testing.assert_allclose(middle, [0, 0.4, 0.4])


def test_success_at_a_place_is_that_of_the_last_evaluation_before():
    x, success = np.array([0.0, 10.0, 20.0]), np.array([0.1, 0.5, 0.3])
    assert curves.at(x, success, 19.0) == 0.5
    assert curves.at(x, success, 20.2) == 0.3
    assert curves.at(x, success, 30.0) is None
    assert curves.reached(x, success, 0.4) == 10.0
    assert curves.reached(x, success, 0.6) is None


def make_curve(method, success, minutes=(0, 1, 2)):
    points = [
        curves.Point(100 * number, 60.0 * minute, rate, 64)
        for number, (minute, rate) in enumerate(zip(minutes, success, strict=True))
    ]
    return curves.Curve(method, tuple(points), curves.HeldOut(success[-1], 100, 0.1, 200, 120.0))


def test_report_compares_at_equal_steps_and_equal_minutes(tmp_path):
    runs = {
        "pi_rl": [make_curve("pi_rl", (0.3, 0.9, 1.0)), make_curve("pi_rl", (0.1, 0.7, 0.8))],
        "sac": [make_curve("sac", (0.0, 0.1, 0.2), minutes=(0, 10, 20))],
    }
    lines = report.table(runs, steps=100, minutes=2.0).splitlines()
    assert "success at 100 steps" in lines[0]
    pi_rl, baseline = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:])
    assert pi_rl == [
        "2", "0.90 (1.00, 0.80)", "0.10 (0.10, 0.10)", "0.80", "0.90", "100 (1 of 2 seeds)", "1.0 (1 of 2 seeds)",
        "200", "2.0", "-",
    ]  # fmt: skip
    assert baseline == [
        "1",
        "0.20 (0.20)",
        "0.10 (0.10)",
        "0.10",
        "0.00",
        "never",
        "never",
        "200",
        "20.0",
        "-",
    ]
    report.draw(runs, "reach-v3", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_collect_takes_finished_runs_of_the_task(tmp_path):
    for seed, complete in ((0, True), (1, False)):
        file = curves.run_file(tmp_path, "ppo", "reach-v3", seed)
        writer = curves.CurveWriter(file, {"method": "ppo", "seed": seed})
        writer.add(curves.Point(0, 0.0, 0.5, 64))
        if complete:
            writer.finish(curves.HeldOut(0.5, 100))
    assert [curve.settings["seed"] for curve in report.collect(tmp_path, "reach-v3", [])["ppo"]] == [0]
    assert report.collect(tmp_path, "push-v3", []) == {}
