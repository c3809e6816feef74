"""What `lerobot-pi-rl-train` does with processes that end; the processes here are small stand-ins."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

import lerobot_pi_rl_launcher as launcher

STAY = "import time; time.sleep(60)"


FAIL = "raise SystemExit('error: wrong')"


class Stage:
    """Starts stand-ins instead of the commands: an actor's first life runs `first`, later ones stay."""

    def __init__(self, first: str, learner: str = STAY) -> None:
        self.first, self.learner, self.starts = first, learner, 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, arguments: object, stderr: int | None = None) -> subprocess.Popen[bytes]:
        """Stands in for `launcher.start`."""
        self.starts += name == "actor"
        code = self.learner if name == "learner" else self.first if self.starts == 1 else STAY
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
        "lerobot-pi-rl-train: actor 0 ended with exit code 1; ending the run",
        "lerobot-pi-rl-train: stopping the learner; it saves what it has trained",
    ]


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


@pytest.mark.parametrize("given", [["--actors=3"], ["--actors", "3"]])
def test_the_number_of_actors_is_a_setting_of_the_collection(given: list[str]) -> None:
    arguments = launcher.with_actors(["--config_path=run.json", *given, "--seed=1"])
    assert arguments == ["--config_path=run.json", "--seed=1", "--algorithm.collection.num_actors=3"]
    assert launcher.with_actors(["--seed=1"]) == ["--seed=1"]


@pytest.mark.parametrize("given", ["0", "-1", "many", ""])
def test_a_number_of_actors_that_is_none_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: --actors: must be a whole number of at least 1, got "):
        launcher.with_actors([f"--actors={given}"])
