"""What `lerobot-pi-rl-train` does with processes that end; the processes here are small stand-ins."""

import json
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

import lerobot_pi_rl_launcher as launcher

STAY = "import time; time.sleep(60)"


class Stage:
    """Starts stand-ins instead of the commands: an actor's first life runs `first`, later ones stay."""

    def __init__(self, first: str) -> None:
        self.first, self.starts = first, 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, arguments: object) -> subprocess.Popen[bytes]:
        """Stands in for `launcher.start`."""
        self.starts += name == "actor"
        code = self.first if name == "actor" and self.starts == 1 else STAY
        self.processes.append(subprocess.Popen([sys.executable, "-c", code]))
        return self.processes[-1]

    def close(self) -> None:
        """Ends what is left."""
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("first", "starts"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 2), ("raise SystemExit(1)", 1)],
    ids=["killed", "failed"],
)
def test_an_actor_is_started_again_only_when_it_was_killed(
    monkeypatch: pytest.MonkeyPatch, first: str, starts: int
) -> None:
    stage = Stage(first)
    monkeypatch.setattr(launcher, "start", stage.start)
    try:
        supervisor = launcher.Supervisor([], num_actors=1)
        actor = stage.processes[1]
        actor.wait(30)
        stop = Event()
        if starts == 2:
            supervisor._replace(0, actor.returncode)
            stop.set()
        code = supervisor.watch(stop)
        assert stage.starts == starts
        assert code != 0
    finally:
        stage.close()


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
