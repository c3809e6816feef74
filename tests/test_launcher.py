"""What `lerobot-pi-rl-train` does with processes that end; the processes here are small stand-ins."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest

import lerobot_pi_rl_launcher as launcher
from lerobot_pi_rl_cli import arguments as arguments_module

STAY = "import time; time.sleep(60)"


FAIL = "raise SystemExit('error: wrong')"


class Stage:
    """Starts stand-ins instead of the commands: an actor's first life runs `first`, later ones stay."""

    def __init__(self, first: str, learner: str = STAY) -> None:
        self.first, self.learner, self.starts = first, learner, 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, arguments: object, stderr: int | None = None, ready: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Stands in for `launcher.start`; a learner is ready at once, unless it only fails."""
        self.starts += name == "actor"
        code = self.learner if name == "learner" else self.first if self.starts == 1 else STAY
        if ready is not None and self.learner == STAY:
            os.write(ready, b"\n")
        self.processes.append(subprocess.Popen([sys.executable, "-c", code], stderr=stderr))
        return self.processes[-1]

    def close(self) -> None:
        """Ends what is left."""
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    """Puts a stage in place of the commands; ends its processes."""
    stages: list[Stage] = []

    def make(*arguments: str) -> Stage:
        stages.append(Stage(*arguments))
        monkeypatch.setattr(launcher, "start", stages[-1].start)
        monkeypatch.setattr(launcher, "SAME_ERROR_S", 1.0)
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's folder for what can be made anew, and no token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launcher.TOKEN_VARIABLE, raising=False)
    return tmp_path / "lerobot_policy_pi_rl" / "tokens"


@pytest.mark.timeout(60)
def test_a_run_has_a_token_of_its_own_that_only_its_user_can_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The processes have it in their environment and not on their command line; the file is gone with the run."""
    code = "import os; print(os.environ['LEROBOT_PI_RL_TOKEN'], flush=True)"
    started: list[list[str]] = []

    def start(
        name: str, arguments: list[str], stderr: int | None = None, ready: int | None = None
    ) -> subprocess.Popen[bytes]:
        started.append(list(arguments))
        if ready is not None:
            os.write(ready, b"\n")
        return subprocess.Popen([sys.executable, "-c", code], stderr=stderr)

    monkeypatch.setattr(launcher, "start", start)
    port = f"--{launcher.PORT}=50123"
    with launcher.own_token([port]):
        token = (cache / "50123").read_text()
        assert (cache / "50123").stat().st_mode & 0o777 == 0o600
        assert launcher.Supervisor([port], num_actors=1).watch(Event()) == 0
    assert len(token) == 64
    assert token in capfd.readouterr().out
    assert len(started) == 2
    assert token not in str(started)
    assert not (cache / "50123").exists()
    assert launcher.TOKEN_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("argument", "variable"),
    [
        (f"--{launcher.TOKEN_FILE}=mine", ""),
        ("", "a-token-of-my-own-making"),
        (f"--{launcher.HOST}=0.0.0.0", ""),
    ],
)
def test_a_token_that_is_given_counts(
    cache: Path, monkeypatch: pytest.MonkeyPatch, argument: str, variable: str
) -> None:
    if variable:
        monkeypatch.setenv(launcher.TOKEN_VARIABLE, variable)
    with launcher.own_token([argument]):
        assert os.environ.get(launcher.TOKEN_VARIABLE, "") == variable
        assert not cache.exists()


@pytest.mark.timeout(60)
def test_a_killed_actor_is_started_again(
    play: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    stage = play("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    supervisor = launcher.Supervisor([], num_actors=1)
    stop = Event()
    watching = Thread(target=lambda: supervisor.watch(stop))
    watching.start()
    deadline = time.monotonic() + 30
    while stage.starts < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    watching.join(30)
    assert stage.starts == 2
    assert "actor 0 was ended by signal 9; starting it again" in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_an_actor_that_is_busy_does_not_hold_up_the_end(play: Callable[..., Stage], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    leaves = (
        "import pathlib, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
        f"pathlib.Path({str(ready)!r}).touch(); "
    )
    stage = play(STAY, leaves + STAY)
    supervisor, stop = launcher.Supervisor([], num_actors=1), Event()
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    began = time.monotonic()
    assert supervisor.watch(stop) == 0
    assert time.monotonic() - began < launcher.LEAVE_S / 2
    assert all(process.poll() is not None for process in stage.processes)


@pytest.mark.timeout(60)
def test_an_actor_with_an_error_of_its_own_ends_the_run(
    play: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    stage = play(f"import sys; print('loading', file=sys.stderr); {FAIL}")
    assert launcher.Supervisor([], num_actors=1).watch(Event()) == 1
    assert stage.starts == 1
    assert capfd.readouterr().err.splitlines() == [
        "loading",
        "error: wrong",
        "lerobot-pi-rl-train: actor 0 ended with exit code 1; ending the run; the learner saves what it has trained",
    ]


@pytest.mark.timeout(60)
def test_a_configuration_that_an_actor_refuses_is_one_line(
    play: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    """The learner has not begun, so there is nothing to save; its own last words would be a second line."""
    waits = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped')); time.sleep(60)"
    stage = play(FAIL, waits)
    assert launcher.Supervisor([], num_actors=2).watch(Event()) == 1
    assert capfd.readouterr().err.splitlines() == ["error: wrong"]
    assert all(process.poll() is not None for process in stage.processes)


@pytest.mark.timeout(60)
def test_a_configuration_that_the_learner_refuses_is_one_line(
    play: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    """The actors, which are sent home, say nothing of it."""
    leaves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped')); time.sleep(60)"
    play(leaves, f"import time; time.sleep(1); {FAIL}")
    assert launcher.Supervisor([], num_actors=1).watch(Event()) == 1
    assert capfd.readouterr().err.splitlines() == ["error: wrong"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("says", [True, False])
def test_a_learner_says_when_it_is_ready(monkeypatch: pytest.MonkeyPatch, says: bool) -> None:
    code = f"import os; os.write(int(os.environ['{launcher.READY}']), b'1')" if says else ""

    def start(name: str, arguments: object, ready: int) -> subprocess.Popen[bytes]:
        given = {**os.environ, launcher.READY: str(ready)}
        return subprocess.Popen([sys.executable, "-c", code], pass_fds=(ready,), env=given)

    monkeypatch.setattr(launcher, "start", start)
    learner = launcher.Learner([])
    assert learner.process.wait(30) == 0
    assert [learner.is_ready, learner.is_ready] == [says, says]


@pytest.mark.timeout(60)
def test_an_error_of_learner_and_actor_is_shown_once(
    play: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    play(FAIL, f"import time; time.sleep(0.3); {FAIL}")
    assert launcher.Supervisor([], num_actors=1).watch(Event()) == 1
    assert capfd.readouterr().err.splitlines() == ["error: wrong"]


def test_settings_come_from_the_command_line_first_and_then_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"output_dir": "there", "algorithm": {"collection": {"num_actors": 3}}}))
    arguments = [f"--config_path={file}"]
    assert launcher.setting(arguments, "algorithm.collection.num_actors") == 3
    assert launcher.setting([*arguments, "--output_dir", "here"], "output_dir") == "here"
    assert launcher.setting(arguments, "seed") is None
    assert launcher.with_output_dir(arguments) == arguments
    (named,) = launcher.with_output_dir([])
    assert named.startswith("--output_dir=outputs/train/")


@pytest.mark.parametrize("resume", [["--resume=true"], []])
def test_a_resumed_run_goes_on_where_its_checkpoint_lies(tmp_path: Path, resume: list[str]) -> None:
    """On the command line or, if it was resumed before, in its own file; that names the folder where it was then."""
    file = tmp_path / "checkpoints/last/pretrained_model/train_config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"output_dir": "where/it/was", "resume": not resume}))
    for named in (file, file.parent):
        arguments = [f"--config_path={named}", *resume]
        assert launcher.with_output_dir(arguments)[-1] == f"--output_dir={tmp_path}"
        assert launcher.with_output_dir([*arguments, "--output_dir=new"])[-1] == "--output_dir=new"
    fresh = [f"--config_path={file}", "--resume=false"]
    assert launcher.with_output_dir(fresh) == fresh


@pytest.mark.parametrize("given", [["--actors=3"], ["--actors", "3"]])
def test_the_number_of_actors_is_a_setting_of_the_collection(given: list[str]) -> None:
    arguments = launcher.with_actors(["--config_path=run.json", *given, "--seed=1"])
    assert arguments == ["--config_path=run.json", "--seed=1", "--algorithm.collection.num_actors=3"]
    assert launcher.with_actors(["--seed=1"]) == ["--seed=1"]


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "many", ""])
def test_a_number_of_actors_that_is_none_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: --actors: must be a whole number of at least 1, got "):
        launcher.with_actors([f"--actors={given}"])


def test_actors_without_a_number_are_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: --actors: needs a number"):
        launcher.with_actors(["--seed=1", "--actors"])


# What is read before anything is started


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("bad.json", '{"policy": {', "bad.json cannot be read: Expecting property name"),
        ("bad.yaml", "policy: [1", "bad.yaml cannot be read: while parsing"),
        ("bytes.json", b"\xff\xfe", "bytes.json cannot be read: 'utf-8' codec"),
        ("list.json", "[1, 2]", "list.json must hold settings by name, not list"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, text: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as error:
        arguments_module.with_recipe([f"--config_path={file}"])
    (line,) = str(error.value).splitlines()
    assert line.startswith("error: config_path: ")
    assert text in line


def test_settings_come_from_yaml_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("algorithm:\n  collection:\n    num_actors: 4\n")
    assert launcher.setting([f"--config_path={file}"], "algorithm.collection.num_actors") == 4


@pytest.mark.parametrize("folder", ["repository", "package"])
@pytest.mark.parametrize(
    "given", [["--config_path=recipes/some.json"], ["--config_path", "recipes/some.json"]]
)
def test_a_recipe_is_found_wherever_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, given: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments_module, "RECIPES", (tmp_path / "repository", tmp_path / "package"))
    file = tmp_path / folder / "some.json"
    file.parent.mkdir()
    file.write_text("{}")
    assert arguments_module.with_recipe(["--seed=1", *given]) == ["--seed=1", f"--config_path={file}"]
    own = tmp_path / "recipes/some.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert arguments_module.with_recipe(given) == given


def test_the_recipes_are_those_of_the_repository() -> None:
    assert any((folder / "metaworld.json").is_file() for folder in arguments_module.RECIPES)


@pytest.mark.parametrize("given", ["recipes/missing.json", "run.yaml", "outputs/train/run/checkpoints"])
def test_a_file_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        arguments_module.with_recipe([f"--config_path={given}"])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"error: config_path: there is no file {given} in {tmp_path}; the recipes")
    assert "metaworld.json" in line


def test_a_folder_of_a_checkpoint_is_told_from_the_one_around_it(tmp_path: Path) -> None:
    inner = tmp_path / "pretrained_model"
    inner.mkdir()
    with pytest.raises(SystemExit, match=r"the folder .* has no train_config.json"):
        arguments_module.with_recipe([f"--config_path={tmp_path}"])
    (inner / "train_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"is the folder around the file; name .*train_config.json$"):
        arguments_module.with_recipe([f"--config_path={tmp_path}"])
    assert arguments_module.with_recipe([f"--config_path={inner}"]) == [f"--config_path={inner}"]


@pytest.mark.parametrize("arguments", [[], ["--config_path=somebody/a-policy"], ["--seed=1"]])
def test_what_is_no_file_is_left_to_lerobot(arguments: list[str]) -> None:
    assert arguments_module.with_recipe(arguments) == arguments


def test_restarts_are_counted_by_actor_and_hour(
    play: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    play("")
    now = 1000.0
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now)
    supervisor = launcher.Supervisor([], num_actors=2)
    assert [supervisor._may_restart(0) for _ in range(4)] == [True, True, True, False]
    assert supervisor._may_restart(1)
    now += launcher.RESTART_WINDOW_S
    assert supervisor._may_restart(0)


@pytest.mark.parametrize(("returned", "code"), [(None, None), (0, None), (1, 1), (130, 130)])
def test_the_code_with_which_a_command_ends_is_that_of_its_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, returned: int | None, code: int | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["any", f"--root={tmp_path / 'new'}"])
    monkeypatch.setattr(
        launcher.importlib, "import_module", lambda name: SimpleNamespace(main=lambda: returned)
    )
    if code is None:
        launcher.demos()
        return
    with pytest.raises(SystemExit) as left:
        launcher.demos()
    assert left.value.code == code


def test_ctrl_c_during_the_imports_has_the_code_of_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["any", f"--root={tmp_path / 'new'}"])
    monkeypatch.setattr(launcher.importlib, "import_module", interrupt)
    with pytest.raises(SystemExit) as left:
        launcher.demos()
    assert left.value.code == 130


@pytest.mark.parametrize(("terminal", "erased"), [(True, "\r\x1b[K"), (False, "")])
def test_a_line_of_an_actor_does_not_tear_the_bar_of_the_learner(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, erased: str
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    launcher.show("actor 1 left\n")
    launcher.show("")
    assert stream.getvalue() == f"{erased}actor 1 left\n"
