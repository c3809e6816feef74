"""The closing lines of a run."""

import json
from pathlib import Path

import pytest
from lerobot.envs.configs import HILSerlRobotEnvConfig

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.summary import closing_lines, environment_arguments


def write(folder: Path, *lines: dict) -> None:
    (folder / "checkpoints/000020-best/pretrained_model").mkdir(parents=True)
    (folder / "checkpoints/best").symlink_to("000020-best")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


LINES = (
    {"step": 0, "progress/env_steps": 0, "eval/success": 0.25},
    {"step": 10, "progress/env_steps": 5120, "progress/seconds": 60.0, "rollout/success": 0.5},
    {"step": 20, "progress/env_steps": 10240, "progress/seconds": 120.0, "rollout/success": 0.6},
    {"step": 20, "progress/env_steps": 10240, "eval/success": 1.0},
    {"step": 30, "progress/env_steps": 15360, "progress/seconds": 180.0, "rollout/success": 0.6},
    {"step": 30, "progress/env_steps": 15360, "progress/seconds": 180.0, "eval/success": 0.75},
)


def test_a_run_ends_with_before_and_after_and_the_commands_that_come_next(tmp_path: Path) -> None:
    write(tmp_path, *LINES)
    env = MetaworldStateEnv(task="reach-v3", episode_length=150)
    text = "\n".join(closing_lines(tmp_path, env, 16, is_stock=True))
    # Wilson's interval of 4 of 16, and of 16 of 16, worked out by hand with z = 1.96: z^2 = 3.8416,
    # centre (0.25 + 0.12005) / 1.2401 = 0.2984, half sqrt(0.25 * 0.75 / 16 + 3.8416 / 1024) * 1.96 / 1.2401 = 0.1965.
    assert "before           0.25 0.10 to 0.49" in text
    assert "best (version 20) 1.00 0.81 to 1.00" in text
    assert "95 % interval, 16 validation starts" in text
    assert "15,360 environment steps in 3.0 minutes, version 30" in text
    assert "The best of 3 validations" in text
    best = tmp_path / "checkpoints/best/pretrained_model"
    assert f"best checkpoint: {best}" in text
    assert (
        f"lerobot-eval --policy.path={best} --env.type=metaworld_state --env.task=reach-v3 --env.episode_length=150 "
        "--eval.n_episodes=100" in text
    )
    assert f"lerobot-pi-rl-export --policy.path={best} --output_dir={tmp_path / 'exported'}" in text


def test_a_policy_that_cannot_be_exported_and_a_robot_have_no_such_commands(tmp_path: Path) -> None:
    write(tmp_path, *LINES)
    text = "\n".join(closing_lines(tmp_path, HILSerlRobotEnvConfig(), 16, is_stock=False))
    assert "best checkpoint" in text
    assert "lerobot-eval" not in text
    assert "export" not in text


def test_a_run_without_validations_says_so_and_one_without_iterations_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, LINES[1])
    env = MetaworldStateEnv(task="reach-v3")
    assert "no validation was made" in closing_lines(tmp_path, env, 16, is_stock=False)[0]
    write_nothing = tmp_path / "empty"
    write_nothing.mkdir()
    assert closing_lines(write_nothing, env, 16, is_stock=False) == []


def test_a_path_with_a_blank_can_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    write(folder, *LINES)
    text = "\n".join(closing_lines(folder, MetaworldStateEnv(task="reach-v3"), 16, is_stock=False))
    assert f"--policy.path='{folder}/checkpoints/best/pretrained_model'" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "push-v3"}, ["--env.type=metaworld_state", "--env.task=push-v3"]),
        (
            {"task": "push-v3", "reward": "dense"},
            ["--env.type=metaworld_state", "--env.task=push-v3", "--env.reward=dense"],
        ),
    ],
)
def test_only_what_was_changed_of_an_environment_is_repeated(changes: dict, expected: list[str]) -> None:
    assert environment_arguments(MetaworldStateEnv(**changes)) == expected
