"""How the commands start, and `lerobot-pi-rl-train`, which starts learner and actors on one machine.

A module of its own beside the package, because importing the package imports LeRobot and torch: seconds that
`lerobot-pi-rl-train` leaves to the processes it starts.
"""

import contextlib
import ctypes
import datetime as dt
import importlib
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread

# Seconds an actor gets to leave by itself before it is terminated, and then killed.
LEAVE_S = 20.0
# The same for the learner, which saves a checkpoint; that of a large policy takes a while.
SAVE_S = 120.0
# Seconds between looks at the processes.
POLL_S = 0.2
# Seconds the learner gets to report an error before an actor's is shown: a wrong setting ends both alike.
SAME_ERROR_S = 5.0
# An actor that dies is started again this often.
MAX_RESTARTS = 3
# prctl(PR_SET_PDEATHSIG): Linux sends the signal to a child whose parent dies.
PR_SET_PDEATHSIG = 1


def option(arguments: Sequence[str], name: str) -> str | None:
    """Value of `--name=value` or `--name value`, the last one given."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}" and position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def setting(arguments: Sequence[str], name: str) -> object:
    """A setting from the command line, or from the configuration file, or None."""
    if (given := option(arguments, name)) is not None:
        return given
    path = Path(option(arguments, "config_path") or "")
    # LeRobot also takes the folder of a checkpoint.
    path = path / "train_config.json" if path.is_dir() else path
    if not path.is_file():
        return None
    value: object = json.loads(path.read_text())
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def with_output_dir(arguments: list[str]) -> list[str]:
    """Names an output folder where none is named, so that learner and actors share one."""
    if setting(arguments, "output_dir"):
        return arguments
    now = dt.datetime.now()
    return [*arguments, f"--output_dir=outputs/train/{now:%Y-%m-%d}/{now:%H-%M-%S}_pi_rl"]


def with_actors(arguments: list[str]) -> list[str]:
    """Replaces `--actors N` by the setting that it stands for.

    Raises:
        SystemExit: If N is no number of actors.
    """
    given = option(arguments, "actors")
    if given is None:
        return arguments
    if not given.isdecimal() or int(given) < 1:
        raise SystemExit(f"error: --actors: must be a whole number of at least 1, got {given!r}")
    rest, skip = [], False
    for argument in arguments:
        if not skip and argument != "--actors" and not argument.startswith("--actors="):
            rest.append(argument)
        skip = argument == "--actors"
    return [*rest, f"--algorithm.collection.num_actors={given}"]


def start(name: str, arguments: Sequence[str], stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Starts one of the commands in a session of its own, so that Ctrl-C reaches it through this process only."""
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, name, *arguments],
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Actor:
    """An actor's process. What it says is passed on at once, except the error with which it ends."""

    def __init__(self, number: int, arguments: Sequence[str]) -> None:
        """Starts it."""
        self.process = start(
            "actor", [*arguments, f"--algorithm.collection.actor_id={number}"], stderr=subprocess.PIPE
        )
        self._error: list[str] = []
        self._reader = Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in (raw.decode(errors="replace") for raw in lines):
                if self._error or line.startswith(("error:", "Traceback")):
                    self._error.append(line)
                else:
                    print(line, end="", file=sys.stderr, flush=True)

    def show_error(self) -> None:
        """Prints the error with which it ended."""
        self._reader.join(POLL_S)
        print(*self._error, sep="", end="", file=sys.stderr, flush=True)


class Supervisor:
    """Owns the processes of a run."""

    def __init__(self, arguments: list[str], num_actors: int) -> None:
        """Starts them."""
        self._arguments = arguments
        self._learner = start("learner", arguments)
        self._actors = {number: Actor(number, arguments) for number in range(num_actors)}
        self._restarts = 0
        self._gave_up = False

    def watch(self, stop: Event) -> int:
        """Waits for the end of the run; returns its exit code."""
        while self._learner.poll() is None and not stop.is_set() and not self._gave_up:
            for number, actor in list(self._actors.items()):
                if actor.process.poll() not in (None, 0) and self._learner.poll() is None:
                    self._replace(number, actor)
            stop.wait(POLL_S)
        return self._end()

    def _replace(self, number: int, actor: Actor) -> None:
        """Starts an actor again that was killed; one that ended with an error of its own would only end again."""
        code = actor.process.returncode
        self._restarts += 1
        if code < 0 and self._restarts <= MAX_RESTARTS:
            say(f"actor {number} was ended by signal {-code}; starting it again")
            self._actors[number] = Actor(number, self._arguments)
            return
        if self._learner_ends():
            return
        del self._actors[number]
        self._gave_up = not self._actors
        going_on = "ending the run" if self._gave_up else "going on without it"
        actor.show_error()
        say(f"actor {number} ended with exit code {code}; {going_on}")

    def _learner_ends(self) -> bool:
        """Whether the learner ends as well, for the same reason, which it reports itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._learner.wait(SAME_ERROR_S)
        return self._learner.returncode is not None

    def _end(self) -> int:
        """Ends the learner first: it saves a checkpoint and sends the actors home."""
        stopping = self._learner.poll() is None
        if stopping:
            say("stopping the learner; it saves what it has trained")
            self._learner.terminate()
        self._wait([self._learner], SAVE_S)
        actors = [actor.process for actor in self._actors.values()]
        if stopping or self._learner.returncode != 0:
            # Nobody will read what they are at, and an evaluation is long.
            for actor in actors:
                actor.terminate()
        self._wait(actors, LEAVE_S)
        code = self._learner.returncode
        if self._gave_up:
            return 1
        # As a shell does: 128 and the signal's number.
        return 128 - code if code < 0 else code

    @staticmethod
    def _wait(processes: list[subprocess.Popen[bytes]], patience_s: float) -> None:
        """Waits for processes to leave; one that does not in this time is terminated, then killed."""
        for end in (subprocess.Popen.terminate, subprocess.Popen.kill, None):
            deadline = time.monotonic() + patience_s
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            for process in processes:
                if process.poll() is None and end is not None:
                    end(process)


def say(text: str) -> None:
    """Prints a line beside the progress bar."""
    print(f"lerobot-pi-rl-train: {text}", file=sys.stderr, flush=True)


def train() -> None:
    """`lerobot-pi-rl-train`."""
    arguments = with_actors(with_output_dir(sys.argv[1:]))
    if "--help" in arguments or "-h" in arguments:
        learner()
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    num_actors = int(str(setting(arguments, "algorithm.collection.num_actors") or 1))
    say(f"starting one learner and {num_actors} actor(s); logs in {setting(arguments, 'output_dir')}/logs")
    raise SystemExit(Supervisor(arguments, num_actors).watch(stop))


def learner() -> None:
    """`lerobot-pi-rl-learner`."""
    _run("learner")


def actor() -> None:
    """`lerobot-pi-rl-actor`."""
    _run("actor")


def check() -> None:
    """`lerobot-pi-rl-check`."""
    _run("check")


def demos() -> None:
    """`lerobot-pi-rl-demos`."""
    _run("demos")


def export() -> None:
    """`lerobot-pi-rl-export`."""
    _run("export")


def status() -> None:
    """`lerobot-pi-rl-status`."""
    _run("status")


def _run(name: str) -> None:
    """Imports and runs one of the package's commands.

    LeRobot warns at import, over forty lines, when FFmpeg is missing; no command here decodes video with it.
    """
    logging.getLogger("lerobot.utils.import_utils").addFilter(
        lambda record: "torchcodec" not in record.getMessage()
    )
    try:
        module = importlib.import_module(f"lerobot_policy_pi_rl.scripts.{name}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    module.main()


if __name__ == "__main__":
    command = sys.argv.pop(1)
    {"learner": learner, "actor": actor, "check": check, "demos": demos, "train": train}[command]()
