"""What the commands answer before they import anything slow: help, versions, and mistakes in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

import lerobot_pi_rl_launcher as launcher
from lerobot_pi_rl_cli import commands, options, preflight, settings

ROOT = Path(__file__).parent.parent
RECIPES = sorted(file for file in (ROOT / "recipes").glob("*.json") if "supervised" not in file.name)
STATE, BASE = "--env.type=metaworld_state", "--policy.base.type=compact"


@pytest.fixture(autouse=True)
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other modules may have put a plugin on the path."""
    monkeypatch.setattr(settings, "has_plugins", lambda: False)


def read(arguments: Sequence[str], command: str = "learner") -> list[str]:
    """What the parser gets of a command line that begins with a policy."""
    first, *rest = preflight.preflight([BASE, *arguments], command)
    assert first == BASE
    return rest


def refusal(*arguments: str, command: str = "learner") -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        preflight.preflight(arguments, command)
    (line,) = str(error.value.code).splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# The description of the settings


def test_the_description_of_the_settings_is_up_to_date() -> None:
    # In a process of its own: other tests register bases and environments in this one.
    program = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['content']()))"
    made = json.loads(
        subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "docs/make_settings.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
            stdout=subprocess.PIPE,
            timeout=200,
            check=True,
        ).stdout.splitlines()[-1]
    )
    stored = json.loads(settings.FILE.read_text(encoding="utf-8"))
    # Of another LeRobot nothing is checked before its own parser does.
    assert stored == made or stored["lerobot"] != made["lerobot"], "run python docs/make_configuration.py"


def test_another_lerobot_may_know_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "is_other_lerobot", lambda: True)
    given = [
        STATE,
        "--new_field=1",
        "--seed=abc",
        "--eval.new=1",
    ]
    assert read(given) == given
    # What is only ours is known.
    assert "--algorithm.epochs" in refusal(STATE, "--algorithm.epoch=3")
    assert "a whole number" in refusal(STATE, "--algorithm.epochs=many")


# Names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--ouput_dir=x", "--output_dir"),
        ("--output-dir=x", "--output_dir"),
        ("--algorithm.epoch=3", "--algorithm.epochs"),
        ("--lr=0.1", "--algorithm.lr"),
        ("--algorithm.num_envs=3", "--algorithm.collection.num_envs"),
        ("--env.tpye=metaworld_state", "--env.type"),
        ("--policy.explorer.knd=joint", "--policy.explorer.kind"),
        ("--configpath=x", "--config_path"),
        ("-config_path=x", "--config_path"),
    ],
)
def test_a_misspelled_name_is_answered_with_the_one_that_is_meant(typed: str, meant: str) -> None:
    line = refusal(STATE, typed)
    assert line.startswith(f"{typed.partition('=')[0]}")
    assert f"did you mean {meant}" in line


def test_a_name_that_resembles_none_is_one_line() -> None:
    line = refusal(STATE, "--xyzzy=1")
    assert (
        line
        == "--xyzzy: there is no such setting; All are listed by lerobot-pi-rl-learner --help-all".replace(
            "; All", "; all"
        )
    )


def test_a_setting_of_another_environment_is_told() -> None:
    assert refusal(STATE, "--env.camera_size=64") == (
        "--env.camera_size: is a setting of env.type=metaworld_camera; here it is metaworld_state"
    )


def test_a_setting_of_some_environment_is_known_before_its_type_is() -> None:
    given = ["--config_path=somebody/on-the-hub", "--env.camera_size=64"]
    assert read(given) == given


@pytest.mark.parametrize("typed", ["actors", "--", "=3"])
def test_what_is_no_option_is_one_line(typed: str) -> None:
    assert refusal(STATE, typed).startswith(f"{typed}: is no option; ")


def test_the_number_of_actors_is_an_option_of_one_command() -> None:
    assert "there is no such setting" in refusal(STATE, "--actors=2")
    assert "did you mean --actors" in refusal(STATE, "--actor=2", command="train")


# Values


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--algorithm.collection.num_envs=abc", "must be a whole number, got 'abc'"),
        ("--algorithm.collection.num_envs=1e3", "must be a whole number, got '1e3'"),
        ("--steps=", "needs a value"),
        ("--output_dir=", "needs a value"),
        ("--seed=x", "must be a whole number or null, got 'x'"),
        ("--algorithm.lr=fast", "must be a number, got 'fast'"),
        ("--save_checkpoint=2", "must be true or false, got '2'"),
        (
            "--policy.explorer.kind=flow_sd",
            "'flow_sd' is unknown; choose one of ['flow_sde', ",
        ),
        ("--policy.base.type=compat", "'compat' is unknown; did you mean 'compact'? Choose one of compact, "),
        ("--algorithm.type=sac", "'sac' is trained by lerobot.rl.learner; this command trains pi_rl"),
        ("--policy.type=act", "is 'act', which PI-RL does not train"),
        ("--policy.type=pi_rll", "'pi_rll' is unknown; did you mean 'pi_rl'?"),
        ("--policy.type=pi0", "--policy.type=pi_rl --policy.base_path=<checkpoint>"),
    ],
)
def test_a_wrong_value_is_one_line(typed: str, said: str) -> None:
    line = refusal(STATE, typed)
    assert line.startswith(f"{typed.partition('=')[0]}: ")
    assert said in line


def test_an_environment_that_there_is_not_is_one_line() -> None:
    line = refusal("--env.type=metaworld_stat")
    assert line.startswith(
        "--env.type: 'metaworld_stat' is unknown; did you mean 'metaworld_state'? Choose one of aloha,"
    )


@pytest.mark.parametrize(
    "given", [["--env.discover_packages_path=mine"], ["--discover_packages_path", "mine"]]
)
def test_what_a_package_may_bring_is_left_to_the_parser(given: list[str]) -> None:
    start = ["--env.type=mine", "--env.speed=3", "--policy.base.type=theirs", "--policy.base.width=2", *given]
    assert [one.partition("=")[0] for one in preflight.preflight(start)] == [
        one.partition("=")[0] for one in start if one != "mine"
    ]


def test_what_an_installed_plugin_may_bring_is_left_to_the_parser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert settings.has_plugins() == ("lerobot" in sys.modules)
    monkeypatch.delitem(sys.modules, "lerobot", raising=False)
    assert not settings.has_plugins()
    (tmp_path / "lerobot_policy_pi_rl-0.1.0.dist-info").mkdir()
    assert not settings.has_plugins()
    (tmp_path / "lerobot_robot_mine-1.0.dist-info").mkdir()
    assert settings.has_plugins()


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        (["--seed", "3"], "--seed=3"),
        (["--algorithm.entropy_coef", "-1e-3"], "--algorithm.entropy_coef=-1e-3"),
        (["--resume"], "--resume=true"),
        (["--resume", "--seed=3"], "--resume=true"),
        (["--resume=True"], "--resume=true"),
        (["--save_checkpoint", "no"], "--save_checkpoint=false"),
        (["--seed=1", "--seed=2"], "--seed=2"),
        (["--config_path=a/b", "--config_path=c/d"], "--config_path=c/d"),
        (["--seed=null"], "--seed=null"),
        (["--job_name=yes"], "--job_name=yes"),
        (["--policy.input_features={}"], "--policy.input_features={}"),
    ],
)
def test_all_ways_to_give_a_value_become_one(typed: list[str], read_as: str) -> None:
    """LeRobot looks some up as `--name=value` only, and takes the first of two where its parser takes the last."""
    arguments = read([STATE, *typed])
    name = read_as.partition("=")[0]
    assert [one for one in arguments if one.startswith(f"{name}=")] == [read_as]


def test_an_option_without_its_value_is_one_line() -> None:
    assert refusal(STATE, "--seed") == "--seed: needs a value, as in --seed=..."
    assert refusal(STATE, "--seed", "--resume") == "--seed: needs a value, as in --seed=..."


# Paths


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["output_dir", "dataset.root", "algorithm.security.token_file"])
def test_the_home_folder_is_found_on_the_command_line(home: Path, name: str) -> None:
    assert f"--{name}={home}/x" in read([STATE, f"--{name}=~/x"])


def test_the_home_folder_is_found_in_a_file(home: Path) -> None:
    file = home / "run.json"
    content = {
        "env": {"type": "metaworld_state", "task": "reach-v3"},
        "output_dir": "~/runs",
        "dataset": {"repo_id": "a/b", "root": "~/data"},
        "algorithm": {"security": {"token_file": "~/token"}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    assert read(["--config_path=~/run.json", "--dataset.root=mine"]) == [
        f"--config_path={file}",
        "--dataset.root=mine",
        f"--output_dir={home}/runs",
        f"--algorithm.security.token_file={home}/token",
    ]


@pytest.mark.parametrize("name", ["policy.path", "policy.base_path"])
@pytest.mark.parametrize(
    "folder", ["/no/where", "~/nowhere", "outputs/run/checkpoints/last", "./here", "there"]
)
def test_a_checkpoint_that_is_not_there_is_one_line(home: Path, name: str, folder: str) -> None:
    (home / "there").mkdir()
    path = folder.replace("~", str(home))
    assert refusal(STATE, f"--{name}={folder}") == (
        f"`{name}`: {Path(path)} holds no policy (no config.json); name a pretrained_model folder"
    )


@pytest.mark.parametrize("given", ["someone/something", "policy"])
def test_a_checkpoint_that_may_be_on_the_hub_is_left_to_lerobot(home: Path, given: str) -> None:
    assert f"--policy.path={given}" in read([STATE, f"--policy.path={given}"])


def test_a_resumed_run_asks_not_where_it_began(home: Path) -> None:
    given = [STATE, "--policy.path=/no/where", "--resume=true"]
    assert read(given) == given


def test_a_checkpoint_of_another_policy_is_one_line(home: Path) -> None:
    (home / "config.json").write_text(json.dumps({"type": "act"}), encoding="utf-8")
    assert "holds a 'act', which PI-RL does not train" in refusal(STATE, f"--policy.path={home}")
    (home / "config.json").write_text(json.dumps({"type": "pi_rl"}), encoding="utf-8")
    assert read([STATE, f"--policy.path={home}"])
    (home / "config.json").write_text("{", encoding="utf-8")
    assert "config.json cannot be read" in refusal(STATE, f"--policy.path={home}")


@pytest.mark.parametrize(
    "given", [["--policy.base_path=a/b"], ["--policy.path=a/b"], [BASE], ["--resume=true"]]
)
def test_there_must_be_a_policy_to_begin_with(given: list[str]) -> None:
    assert preflight.preflight([STATE, *given]) == [STATE, *given]
    assert refusal(STATE).startswith("`policy.path`: is missing, so there is nothing to improve")
    assert refusal(STATE, "--policy.type=pi_rl").startswith("`policy.path`: is missing")


# Settings without an effect


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--policy.push_to_hub=true", "nothing is pushed to the hub during a run"),
        ("--policy.repo_id=me/x", "nothing is pushed to the hub during a run"),
        ("--peft.method_type=LORA", "adapters are set by policy.trainable=lora"),
        ("--optimizer.type=adam", "is of supervised training"),
        ("--batch_size=3", "is of supervised training"),
    ],
)
def test_a_setting_without_an_effect_is_one_line(tmp_path: Path, typed: str, said: str) -> None:
    name, _, value = typed.partition("=")
    assert refusal(STATE, BASE, typed).startswith(f"{name}: has no effect here: {said}")
    assert preflight.preflight([STATE, BASE, typed], "supervised") == [STATE, BASE, typed]
    content: object = json.loads(value) if value in ("true", "3") else value
    for part in reversed(name.removeprefix("--").split(".")):
        content = {part: content}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert f"{name.removeprefix('--')}`: has no effect here: {said}" in refusal(
        STATE, BASE, f"--config_path={file}"
    )


def test_the_default_of_a_setting_without_an_effect_may_be_given() -> None:
    given = ["--batch_size=8", "--use_policy_training_preset=true", "--policy.repo_id=null"]
    assert read([STATE, *given]) == [STATE, *given]


def test_what_a_checkpoint_has_written_was_not_given(tmp_path: Path) -> None:
    file = tmp_path / "pretrained_model/train_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"batch_size": 3, "env": {"type": "metaworld_state"}}), encoding="utf-8")
    assert read([f"--config_path={file}"]) == [f"--config_path={file}"]


# Files


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_accepted(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(preflight, "is_installed", lambda module: True)
    given = [f"--config_path={file}", "--policy.path=someone/something", "--policy.online_steps=1000"]
    assert read(given) == given


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"ouput_dir": "x"}, "`ouput_dir`: there is no such setting; did you mean output_dir?"),
        (
            {"algorithm": {"epoch": 3}},
            "`algorithm.epoch`: there is no such setting; did you mean algorithm.epochs?",
        ),
        ({"env": {"type": "metaworld_state", "camera_size": 3}}, "is a setting of env.type=metaworld_camera"),
        ({"env": {"type": "metaworld_stat"}}, "`env.type`: 'metaworld_stat' is unknown; did you mean"),
        ({"algorithm": {"collection": {"num_envs": "abc"}}}, "must be a whole number, got 'abc'"),
        ({"save_checkpoint": 1}, "`save_checkpoint`: must be true or false, got 1"),
        ({"policy": {"type": "pi0"}}, "is 'pi0'; this command trains 'pi_rl'"),
        ({"env": "metaworld_state"}, "must be a section of settings, got 'metaworld_state'"),
        ({"wandb": 3}, "must be a section of settings, got 3"),
        ({"output_dir": ["a"]}, "must be a path or null, got ['a']"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: dict[str, object], said: str
) -> None:
    monkeypatch.setattr(preflight, "is_installed", lambda module: True)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"env": {"type": "pusht"}, **content}), encoding="utf-8")
    line = refusal(f"--config_path={file}")
    assert said in line
    if "section" not in said:
        assert line.startswith(f"{file}: ")


def test_the_command_line_takes_the_place_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"env": {"type": "metaworld_stat"}, "seed": "x"}), encoding="utf-8")
    given = [f"--config_path={file}", STATE, "--seed=3"]
    assert read(given) == given


def test_a_file_may_hold_letters_of_any_language(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"job_name": "Übung ☃", "env": {"type": "metaworld_state"}}', encoding="utf-8")
    code = "from lerobot_pi_rl_cli.preflight import preflight; import sys; preflight(sys.argv[1:])"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    asked = subprocess.run([sys.executable, "-c", code, BASE, f"--config_path={file}"], env=plain, timeout=60)
    assert asked.returncode == 0


# Environments


def test_an_environment_must_be_named() -> None:
    assert refusal().startswith("`env.type`: is missing; online training needs an environment")


def test_a_simulator_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "is_installed", lambda module: module != "libero")
    for command in ("train", "learner", "actor", "check"):
        assert refusal("--env.type=libero", command=command) == (
            "`env.type`: 'libero' needs the package 'libero', which is not installed: "
            "CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install 'lerobot_policy_pi_rl[libero]'"
        )
    # A learner whose actors are elsewhere needs no simulator.
    elsewhere = ["--env.type=libero", "--policy.actor_learner_config.learner_host=192.0.2.1"]
    assert read(elsewhere, "learner") == elsewhere
    assert "libero" in refusal(*elsewhere, command="actor")


# The commands themselves, in processes: nothing slow is imported


def ask(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process in which neither LeRobot nor torch can be imported."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('lerobot', 'torch', 'numpy', 'draccus', 'lerobot_policy_pi_rl')))\n"
        "import lerobot_pi_rl_launcher as launcher\n"
        f"sys.argv = ['-', *{list(arguments)!r}]\n"
        f"launcher.{command}()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", sorted(commands.COMMANDS))
def test_help_and_version_import_nothing_slow(command: str) -> None:
    said = ask(command, "--version")
    expected = f"lerobot_policy_pi_rl {version('lerobot_policy_pi_rl')}, lerobot {version('lerobot')}, torch "
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(expected)
    said = ask(command, "-h")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"usage: lerobot-pi-rl-{command} ")
    assert f"lerobot-pi-rl-{command} --" in said.stdout.partition("\n")[2]


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("train", ["--config_path=recipes/metaworld.json", "--ouput_dir=x"], "did you mean --output_dir?"),
        ("actor", [STATE, "--algorithm.collection.num_envs=abc"], "must be a whole number"),
        ("supervised", ["--patence=3"], "did you mean --patience?"),
        ("status", ["--learner=nowhere"], "'nowhere' is no address; give one such as 127.0.0.1:50051"),
        ("status", ["--lerner=nowhere:1"], "did you mean --learner?"),
        ("export", ["--policy.path=x"], "the following arguments are required: --output_dir"),
        ("demos", ["--env.type=metaworld_stat"], "invalid choice: 'metaworld_stat'"),
        ("demos", ["--num_episodes=many"], "invalid int value: 'many'"),
        ("demos", [f"--root={ROOT}"], "exists already: choose another --root, or remove it first"),
    ],
)
def test_a_mistake_imports_nothing_slow(command: str, arguments: list[str], said: str) -> None:
    answer = ask(command, *arguments)
    assert (answer.returncode, answer.stdout) == (1, "")
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_help_has_our_own_settings_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    short, whole = (commands.help_text("train", [ask]) for ask in ("--help", "--help-all"))
    for name, node in settings.names(
        {"env": "metaworld_state", "policy.base": "compact", "algorithm": "pi_rl"}
    ):
        assert f"--{name}=" in whole or name in commands.FILLED_IN
        if node.get("own") and "unread" not in node and name not in commands.FILLED_IN:
            assert f"--{name}=" in short
    assert "--policy.path=" in "\n".join(short.splitlines()[:20])
    # LeRobot's own business.
    assert "--dataset.streaming=" not in short
    assert whole.index("--dataset.streaming=") > whole.index("--env.relative_features=")
    assert max(map(len, short.splitlines())) < 160


def test_help_describes_the_environment_that_is_named() -> None:
    assert "--env.camera_size=" in commands.help_text("train", ["--help", "--env.type=metaworld_camera"])
    assert "--env.camera_size=" not in commands.help_text("train", ["--help"])


def test_help_names_only_what_there_is() -> None:
    known = dict(settings.names({}))
    assert set(commands.FIRST) <= set(known)
    assert set(commands.SUPERVISED) <= set(known)


def test_every_command_is_in_the_table() -> None:
    for name, command in commands.COMMANDS.items():
        assert callable(getattr(launcher, name))
        assert command.takes_settings != (name in options.PARSERS)


def test_options_of_the_other_commands_find_the_home_folder(home: Path) -> None:
    assert options.parse("demos", ["--root=~/x"]).root == home / "x"
    export = options.parse("export", ["--policy.path", "~/a", "--output_dir=~/b"])
    assert (export.path, export.output_dir) == (home / "a", home / "b")
    assert options.parse("status", ["--token_file=~/token"]).token_file == str(home / "token")


def test_demonstrations_need_their_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "is_installed", lambda module: False)
    with pytest.raises(
        SystemExit, match=r"'metaworld_state' needs the package 'metaworld', which is not installed"
    ):
        options.look("demos", options.parse("demos", []))


@pytest.mark.parametrize("address", ["somewhere", "host:", ":50051", "host:port", "host:0", "host:70000"])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    with pytest.raises(SystemExit, match=r"is no address; give one such as 127\.0\.0\.1:50051"):
        options.parse("status", [f"--learner={address}"])


def test_addresses_of_ipv6_are_understood() -> None:
    assert options.parse("status", ["--learner=[::1]:50051"]).learner == ("::1", 50051)
    assert options.parse("status", []).learner == ("127.0.0.1", 50051)
