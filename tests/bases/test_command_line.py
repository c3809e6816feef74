"""A stock checkpoint on the command line."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.scripts.arguments import completed, joined, with_policy
from lerobot_policy_pi_rl.scripts.console import run_command


def run(arguments: list[str]) -> None:
    """Runs a command that does not get to its work."""
    with (
        patch.object(sys, "argv", ["command", *arguments]),
        pytest.raises(SystemExit) as left,
    ):
        run_command(lambda: pytest.fail("the command was run"), completed)
    assert left.value.code == 1


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
    assert with_policy(arguments) == [
        "--seed=3",
        "--policy.explorer.kind=flow_noise",
        "--policy.type=pi_rl",
        f"--policy.base_path={path}",
    ]


@pytest.mark.parametrize("where", ["command line", "file"])
def test_a_stock_checkpoint_takes_the_place_of_what_the_file_begins_with(tmp_path: Path, where: str) -> None:
    path, other = checkpoint(tmp_path / "mine", "smolvla"), checkpoint(tmp_path / "recipes", "pi_rl")
    policy = {"path": str(other), "device": "cpu", "base": {"type": "compact"}}
    arguments = [f"--policy.path={path}"]
    if where == "file":
        policy["path"], arguments = str(path), []
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"policy": policy, "seed": 3}))
    *rest, kind, base = with_policy([*arguments, f"--config_path={file}"])
    assert (kind, base) == ("--policy.type=pi_rl", f"--policy.base_path={path}")
    (copy,) = rest
    read = json.loads(Path(copy.removeprefix("--config_path=")).read_text())
    assert read == {"policy": {"type": "pi_rl", "device": "cpu"}, "seed": 3}


def test_the_checkpoint_of_a_file_is_said_on_the_command_line_as_well(tmp_path: Path) -> None:
    """Or LeRobot's parser would not know what the settings beside it belong to."""
    path = checkpoint(tmp_path / "mine", "pi_rl")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"policy": {"path": str(path)}}))
    arguments = [f"--config_path={file}", "--policy.base.hidden_dim=8"]
    assert with_policy(arguments) == [*arguments, f"--policy.path={path}"]
    assert with_policy([*arguments, "--policy.type=pi_rl"]) == [*arguments, f"--policy.path={path}"]


def test_a_checkpoint_takes_the_place_of_a_stock_one_in_the_file(tmp_path: Path) -> None:
    """Which need not be there."""
    path, file = checkpoint(tmp_path / "mine", "pi_rl"), tmp_path / "recipe.json"
    policy = {"type": "pi_rl", "base_path": "outputs/gone", "device": "cpu"}
    file.write_text(json.dumps({"policy": policy, "seed": 3}))
    copy, given = with_policy([f"--config_path={file}", f"--policy.path={path}"])
    assert given == f"--policy.path={path}"
    read = json.loads(Path(copy.removeprefix("--config_path=")).read_text())
    assert read == {"policy": {"path": str(path), "device": "cpu"}, "seed": 3}


def test_a_stock_checkpoint_as_base_takes_the_place_of_a_policy_in_the_file(tmp_path: Path) -> None:
    path, file = checkpoint(tmp_path / "mine", "pi0"), tmp_path / "recipe.json"
    file.write_text(json.dumps({"policy": {"path": "outputs/gone", "device": "cpu"}}))
    copy, kind, base = with_policy([f"--config_path={file}", f"--policy.base_path={path}"])
    assert (kind, base) == ("--policy.type=pi_rl", f"--policy.base_path={path}")
    read = json.loads(Path(copy.removeprefix("--config_path=")).read_text())
    assert read == {"policy": {"type": "pi_rl", "device": "cpu"}}


@pytest.mark.parametrize("where", ["command line", "file"])
def test_the_type_of_a_policy_with_a_base_need_not_be_given(tmp_path: Path, where: str) -> None:
    path, file = checkpoint(tmp_path / "mine", "pi0"), tmp_path / "recipe.json"
    policy = {"base_path": str(path)} if where == "file" else {"device": "cpu"}
    file.write_text(json.dumps({"policy": policy}))
    given = [] if where == "file" else [f"--policy.base_path={path}"]
    assert with_policy([f"--config_path={file}", *given])[-1] == "--policy.type=pi_rl"


def test_the_type_of_the_algorithm_need_not_be_given(tmp_path: Path) -> None:
    """The launcher gives each actor its number."""
    file = tmp_path / "recipe.json"
    begin, number = "--policy.base.type=compact", "--algorithm.collection.actor_id=1"
    assert completed([begin, number])[-2:] == ["--policy.type=pi_rl", "--algorithm.type=pi_rl"]
    file.write_text(json.dumps({"algorithm": {"lr": 1e-4}}))
    assert completed([begin, f"--config_path={file}", number])[-1] == "--algorithm.type=pi_rl"
    for kind in ("sac", "pi_rl"):
        file.write_text(json.dumps({"algorithm": {"type": kind}}))
        assert "--algorithm.type=pi_rl" not in completed([begin, f"--config_path={file}", number])
        assert completed([f"--algorithm.type={kind}", begin])[-1] == "--policy.type=pi_rl"


@pytest.mark.parametrize("given", [[], ["--policy.type=pi_rl"], ["--policy.device=cpu"]])
def test_a_policy_to_begin_with_is_asked_for(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run([*given, "--env.type=metaworld_state"])
    said = capsys.readouterr()
    assert re.fullmatch(r"error: `policy.path`: is missing, .*--policy.base.type=compact.*\n", said.err)
    assert said.out == ""
    # A resumed run has that of its checkpoint, and nothing is asked for where the parser only shows what there is.
    resumed = completed([*given, "--resume=true", "--output_dir=run"])
    assert "--policy.type=pi_rl" in resumed
    assert completed([*given, "--help"]) == [*given, "--help"]


def test_two_checkpoints_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`policy.base_path`: .* beside policy.path=.*leave one of them out"
    ):
        with_policy(["--policy.path=a", "--policy.base_path=b"])


def test_a_type_that_is_not_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "mine", "pi_rl")
    with pytest.raises(ConfigError, match=r"`policy.type`: 'smolvla' does not fit policy.path=.*'pi_rl'"):
        with_policy([f"--policy.path={path}", "--policy.type=smolvla"])


def test_settings_of_a_base_beside_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """They would not change single settings of the checkpoint, but replace them all."""
    path = checkpoint(tmp_path / "pi0", "pi0")
    for given in ("policy.path", "policy.base_path"):
        with pytest.raises(
            ConfigError, match=r"`policy.base.dtype`: would replace all settings of the checkpoint"
        ):
            with_policy([f"--{given}={path}", "--policy.base.type=pi0", "--policy.base.dtype=bfloat16"][::-1])


@pytest.mark.parametrize("where", ["command line", "file"])
@pytest.mark.parametrize("kind", ["act", "wall_x"])
def test_a_checkpoint_of_another_policy_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, where: str
) -> None:
    """Before LeRobot's parser says that the other policy has no such settings."""
    path = checkpoint(tmp_path / kind, kind)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"policy": {"path": str(path)}} if where == "file" else {}))
    arguments = [f"--config_path={file}", "--policy.explorer.kind=flow_noise"]
    run([*arguments, *([f"--policy.path={path}"] if where == "command line" else [])])
    said = capsys.readouterr()
    assert re.fullmatch(
        rf"error: .*policy.path.*holds a '{kind}', which PI-RL does not train.*one of \['eo1', .*'xvla'\], or of "
        r"'pi_rl'\n",
        said.err,
    )
    assert said.out == ""


def test_a_base_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the parser's usage of some hundred lines."""
    run(["--policy.type=pi_rl", "--policy.base.type=foo"])
    said = capsys.readouterr()
    assert re.fullmatch(
        r"error: .*policy.base.type.*'foo' is not a flow-matching base.*\['compact', .*'xvla'\]\n", said.err
    )
    assert said.out == ""


def test_what_a_package_may_bring_is_left_to_lerobot(tmp_path: Path) -> None:
    """It is imported by the parser."""
    path = checkpoint(tmp_path / "mine", "mine")
    for given in (["--policy.base.type=mine", "--policy.type=pi_rl"], [f"--policy.path={path}"]):
        arguments = ["--policy.discover_packages_path=my_package", *given]
        assert with_policy(arguments) == arguments


def test_a_checkpoint_may_be_named_after_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act = checkpoint(tmp_path / "act", "act")
    run(["--policy.path", str(act), "--seed", "3"])
    assert "holds a 'act', which PI-RL does not train" in capsys.readouterr().err
    given = ["--seed", "3", "--resume", "--config_path", "a.json", "--wandb.enable=false"]
    assert joined(given) == ["--seed", "3", "--resume", "--config_path=a.json", "--wandb.enable=false"]


def test_any_other_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    for path in (checkpoint(tmp_path / "pi_rl", "pi_rl"), "someone/something"):
        arguments = ["--seed=3", f"--policy.path={path}"]
        assert with_policy(arguments) == arguments


def test_a_stock_checkpoint_of_the_hub_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the hub's own library keeps what it has downloaded; nothing is asked for over the network.
    repository = tmp_path / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    checkpoint(repository / "snapshots" / ("0" * 40), "smolvla")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert with_policy(["--policy.path=someone/something", "--seed=3"]) == [
        "--seed=3",
        "--policy.type=pi_rl",
        "--policy.base_path=someone/something",
    ]
    # Another one is not there: left to LeRobot, which says so.
    assert with_policy(["--policy.path=someone/else"]) == ["--policy.path=someone/else"]
