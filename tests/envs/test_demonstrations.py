"""Scripted demonstrations and the command that records them."""

from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features

from lerobot_policy_pi_rl.envs.configuration_metaworld_camera import MetaworldCameraEnv
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.demonstrations import (
    DemonstrationPlan,
    Episode,
    demonstrations,
    write_demonstrations,
)
from lerobot_policy_pi_rl.envs.tasks import task_text
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.scripts.demos import main

TASK = "reach-v3"


def plan(**settings: object) -> DemonstrationPlan:
    return DemonstrationPlan(MetaworldStateEnv(task=TASK), num_episodes=2, **settings)


def played(episodes: list[Episode]) -> np.ndarray:
    """All numbers of some episodes, for comparison."""
    return np.concatenate(
        [np.concatenate((one.observation["agent_pos"], one.action), axis=1) for one in episodes]
    )


def test_the_command_writes_a_dataset_that_lerobot_reads(tmp_path: Path) -> None:
    root = tmp_path / "demos"
    assert main([f"--task={TASK},drawer-close-v3", "--num_episodes=2", f"--root={root}"]) == 0
    dataset = LeRobotDataset("local/metaworld-demos", root=root)
    assert (dataset.num_episodes, dataset.fps) == (4, 80)
    rows = [dataset[index] for index in range(len(dataset))]
    assert {row["task"] for row in rows} == {"Reach a goal position", "Push and close a drawer"}
    assert rows[0]["observation.state"].shape == (48,)
    assert all(row["action"].shape == (4,) and row["action"].abs().max() <= 1 for row in rows)
    for episode in range(4):
        ends = [row for row in rows if row["episode_index"] == episode]
        assert [bool(row["next.done"]) for row in ends] == [False] * (len(ends) - 1) + [True]
        assert bool(ends[-1]["next.success"])
        assert float(sum(row["next.reward"] for row in ends)) == 1.0
    assert not any("video" in str(path) for path in root.rglob("*"))


def test_the_camera_is_recorded_as_pictures_of_the_same_episodes(tmp_path: Path) -> None:
    common = [f"--task={TASK}", "--num_episodes=2", "--seed=3", "--action_noise=0.2"]
    assert (
        main([*common, "--env.type=metaworld_camera", "--camera_size=32", f"--root={tmp_path / 'seen'}"]) == 0
    )
    assert main([*common, f"--root={tmp_path / 'known'}"]) == 0
    seen, known = (
        LeRobotDataset("local/metaworld-demos", root=tmp_path / name) for name in ("seen", "known")
    )
    assert len(seen) == len(known)
    policy = dataset_to_policy_features(seen.meta.features)
    assert policy["observation.image"].shape == (3, 32, 32)
    assert seen.meta.features["observation.image"]["dtype"] == "image"
    for index in range(len(seen)):
        row, other = seen[index], known[index]
        assert row["action"].tolist() == other["action"].tolist()
        # The hand's position and the gripper's opening.
        assert row["observation.state"].tolist() == other["observation.state"][:4].tolist()
    env = MetaworldCameraEnv(task=TASK, camera_size=32).make_env(TASK)
    first = env.reset(seed=3000)[0]["pixels"]
    np.testing.assert_array_equal((seen[0]["observation.image"] * 255).permute(1, 2, 0).round(), first)
    assert not any(path.suffix == ".mp4" for path in tmp_path.rglob("*"))


def test_a_camera_size_without_a_camera_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--task={TASK}", "--camera_size=32", f"--root={tmp_path / 'demos'}"]) == 1
    error = capsys.readouterr().err
    assert "add --env.type=metaworld_camera" in error
    assert error.count("\n") == 1


def test_the_same_seed_gives_the_same_demonstrations() -> None:
    first = played(list(demonstrations(plan(action_noise=0.1), TASK)))
    np.testing.assert_array_equal(played(list(demonstrations(plan(action_noise=0.1), TASK))), first)
    other = played(list(demonstrations(plan(action_noise=0.1, seed=1), TASK)))
    assert not np.array_equal(other[:5], first[:5])


def test_all_reset_seeds_lie_below_those_of_evaluation() -> None:
    blocks = [plan(seed=seed).reset_seeds for seed in (0, 1, 49)]
    assert [(block.start, block.stop) for block in blocks] == [(0, 1000), (1000, 2000), (49000, 50000)]
    with pytest.raises(ConfigError, match="0 to 49"):
        plan(seed=50)


def test_noise_disturbs_the_executed_action_and_not_the_recorded_one() -> None:
    clean, noisy = (next(demonstrations(plan(action_noise=noise), TASK)) for noise in (0.0, 0.3))
    # The first decision is taken in the same state; what was executed shows in the next one.
    np.testing.assert_array_equal(noisy.action[0], clean.action[0])
    assert not np.array_equal(noisy.observation["agent_pos"][1], clean.observation["agent_pos"][1])


def test_failures_are_kept_only_when_asked() -> None:
    too_short = MetaworldStateEnv(task=TASK, episode_length=3)
    kept = list(demonstrations(DemonstrationPlan(too_short, 2, keep_failures=True), TASK))
    assert [episode.solved for episode in kept] == [False, False]
    with pytest.raises(RuntimeError, match="solved only 0 of 1000"):
        list(demonstrations(DemonstrationPlan(MetaworldStateEnv(task=TASK, episode_length=1), 1), TASK))


def test_an_existing_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--task={TASK}", f"--root={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "exists already" in error
    assert error.count("\n") == 1


def test_a_wrong_task_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task=reach", f"--root={tmp_path / 'demos'}"]) == 1
    error = capsys.readouterr().err
    assert "did you mean reach-v3" in error
    assert error.count("\n") == 1


def test_single_tasks_may_have_another_number_of_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "demos"
    tasks = ["--task=reach-v3,drawer-close-v3", "--num_episodes=1", f"--root={root}"]
    assert main([*tasks, "--task_episodes=reach-v3=2"]) == 0
    dataset = LeRobotDataset("local/metaworld-demos", root=root)
    assert [row["tasks"] for row in dataset.meta.episodes] == [[task_text("reach-v3")]] * 2 + [
        [task_text("drawer-close-v3")]
    ]
    capsys.readouterr()
    for wrong, reason in (
        ("push-v3=2", "'push-v3' is not among reach-v3"),
        ("reach-v3=0", "must be 1 to 1000"),
    ):
        assert main([*tasks, f"--task_episodes={wrong}"]) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    for wrong in ("reach-v3", "reach-v3=1,reach-v3=2", "reach-v3=-1"):
        with pytest.raises(SystemExit):
            main([*tasks, f"--task_episodes={wrong}"])


def test_an_interrupted_collection_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "demos"
    episodes = write_demonstrations(plan(), "local/test", root)
    next(episodes)
    assert root.exists()
    episodes.close()
    assert not root.exists()
