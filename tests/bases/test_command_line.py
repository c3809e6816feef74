"""A stock checkpoint on the command line."""

import json
from pathlib import Path

import pytest

from lerobot_policy_pi_rl.scripts.console import wrap_stock_policy


def checkpoint(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"type": kind}))
    return folder


@pytest.mark.parametrize(
    "kind",
    ["pi0", "pi05", "smolvla", "xvla", "multi_task_dit", "eo1", "evo1", "vla_jepa", "groot", "molmoact2"],
)
def test_a_stock_checkpoint_is_wrapped_on_its_way_in(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / kind, kind)
    arguments = [f"--policy.path={path}", "--seed=3", "--policy.explorer.kind=flow_noise"]
    assert wrap_stock_policy(arguments) == [
        "--seed=3",
        "--policy.explorer.kind=flow_noise",
        "--policy.type=pi_rl",
        f"--policy.base_path={path}",
    ]


def test_any_other_checkpoint_is_left_to_lerobot(tmp_path: Path) -> None:
    for kind in ("pi_rl", "act"):
        arguments = [f"--policy.path={checkpoint(tmp_path / kind, kind)}", "--seed=3"]
        assert wrap_stock_policy(arguments) == arguments
    for arguments in (["--policy.path=someone/something"], ["--seed=3"], []):
        assert wrap_stock_policy(arguments) == arguments


def test_a_stock_checkpoint_of_the_hub_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the hub's own library keeps what it has downloaded; nothing is asked for over the network.
    repository = tmp_path / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    checkpoint(repository / "snapshots" / ("0" * 40), "smolvla")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert wrap_stock_policy(["--policy.path=someone/something", "--seed=3"]) == [
        "--seed=3",
        "--policy.type=pi_rl",
        "--policy.base_path=someone/something",
    ]
    # Another one is not there: left to LeRobot, which says so.
    assert wrap_stock_policy(["--policy.path=someone/else"]) == ["--policy.path=someone/else"]
