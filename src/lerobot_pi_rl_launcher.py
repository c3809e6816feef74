"""How the commands start, and `lerobot-pi-rl-train`, which starts learner and actors on one machine.

A module of its own beside the package, because importing the package imports LeRobot and torch: seconds that
`lerobot-pi-rl-train` leaves to the processes it starts.
"""

import contextlib
import ctypes
import datetime as dt
import importlib
import importlib.metadata
import io
import locale
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread

from lerobot_pi_rl_cli import commands, options
from lerobot_pi_rl_cli.arguments import CONFIG_PATH, option, setting, without
from lerobot_pi_rl_cli.preflight import preflight

# Seconds an actor gets to leave by itself before it is terminated, and then killed.
LEAVE_S = 20.0
# The same for the learner, which saves a checkpoint; that of a large policy takes a while.
SAVE_S = 120.0
# Seconds between looks at the processes.
POLL_S = 0.2
# Seconds the learner gets to report an error before an actor's is shown: a wrong setting ends both alike.
SAME_ERROR_S = 5.0
# So often within so many seconds an actor that dies is started again: a run of days has room for more.
MAX_RESTARTS, RESTART_WINDOW_S = 3, 3600.0
# Environment variable with the descriptor on which the learner says that it is ready.
READY = "LEROBOT_PI_RL_READY"
# prctl(PR_SET_PDEATHSIG): Linux sends the signal to a child whose parent dies.
PR_SET_PDEATHSIG = 1
# Back to the beginning of a terminal's line, and all of it cleared (ECMA-48).
ERASE_LINE = "\r\x1b[K"

TOKEN_VARIABLE, TOKEN_FILE = "LEROBOT_PI_RL_TOKEN", "algorithm.security.token_file"
HOST, PORT = "policy.actor_learner_config.learner_host", "policy.actor_learner_config.learner_port"
LOOPBACK = (None, "127.0.0.1", "localhost", "::1")
DEFAULT_PORT = 50051
NUM_ACTORS = "algorithm.collection.num_actors"


def with_output_dir(arguments: list[str]) -> list[str]:
    """Names an output folder where none is named, so that learner and actors share one.

    A resumed run goes on where its checkpoint lies, wherever it was when the checkpoint was written.
    """
    if option(arguments, "output_dir") is None and (home := resumed_folder(arguments)) is not None:
        return [*arguments, f"--output_dir={home}"]
    if setting(arguments, "output_dir"):
        return arguments
    now = dt.datetime.now()
    return [*arguments, f"--output_dir=outputs/train/{now:%Y-%m-%d}/{now:%H-%M-%S}_pi_rl"]


def resumed_folder(arguments: list[str]) -> Path | None:
    """Output folder of the run whose checkpoint `--config_path` names, if it is to be resumed."""
    given = option(arguments, CONFIG_PATH)
    if given is None or setting(arguments, "resume") not in (True, "true"):
        return None
    place = Path(given).absolute()
    checkpoint = (place.parent if place.is_file() else place).parent
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None


def with_actors(arguments: list[str]) -> list[str]:
    """Replaces `--actors N` by the setting that it stands for.

    Raises:
        SystemExit: If N is no number of actors.
    """
    given = option(arguments, "actors")
    if given is None:
        if "--actors" in arguments:
            raise SystemExit("error: --actors: needs a number, as in --actors=2")
        return arguments
    count_of(given, "--actors")
    return [*without(arguments, "actors"), f"--{NUM_ACTORS}={given}"]


def token_path(port: object) -> Path:
    """Where the token of a run on this machine lies, for other commands of the same user."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lerobot_policy_pi_rl" / "tokens" / str(port)


@contextlib.contextmanager
def own_token(arguments: Sequence[str]) -> Iterator[None]:
    """Gives the processes of a run a token where none is given: other users of the machine reach its port, too.

    They take it from their environment, which no other user can read. It also lies in a file that no other user can
    read, until the run is over.
    """
    given = setting(arguments, TOKEN_FILE) or os.environ.get(TOKEN_VARIABLE)
    if given or setting(arguments, HOST) not in LOOPBACK:
        yield
        return
    os.environ[TOKEN_VARIABLE] = token = secrets.token_hex(32)
    path = token_path(setting(arguments, PORT) or DEFAULT_PORT)
    # Without the file only what others ask of the run fails.
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
        ) as file:
            file.write(token)
    try:
        yield
    finally:
        os.environ.pop(TOKEN_VARIABLE, None)
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii") == token:
                path.unlink()


def count_of(given: object, name: str) -> int:
    """A number of actors.

    Raises:
        SystemExit: If it is none.
    """
    if not str(given).isdecimal() or int(str(given)) < 1:
        raise SystemExit(f"error: {name}: must be a whole number of at least 1, got {given!r}")
    return int(str(given))


def start(
    name: str, arguments: Sequence[str], stderr: int | None = None, ready: int | None = None
) -> subprocess.Popen[bytes]:
    """Starts one of the commands in a session of its own, so that Ctrl-C reaches it through this process only.

    Args:
        name: The command.
        arguments: Its command line.
        stderr: Where its lines go; None is where ours go.
        ready: Descriptor on which it says that its configuration is accepted.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, name, *arguments],
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent,
        pass_fds=() if ready is None else (ready,),
        env=None if ready is None else {**os.environ, READY: str(ready)},
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
        self.muted = False
        self._error: list[str] = []
        self._reader = Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in (raw.decode(errors="replace") for raw in lines):
                if self._error or line.startswith(("error:", "Traceback")):
                    self._error.append(line)
                elif not self.muted:
                    show(line)

    def show_error(self) -> None:
        """Prints the error with which it ended."""
        self._reader.join(POLL_S)
        show("".join(self._error))


class Learner:
    """The learner's process, which says when it has accepted its configuration."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Starts it."""
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        self.process = start("learner", arguments, ready=writing)
        os.close(writing)
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether there may be something to save."""
        if not self._is_ready:
            with contextlib.suppress(BlockingIOError):
                self._is_ready = bool(os.read(self._reading, 1))
        return self._is_ready


class Supervisor:
    """Owns the processes of a run."""

    def __init__(self, arguments: list[str], num_actors: int) -> None:
        """Starts them."""
        self._arguments = arguments
        self._starting = Learner(arguments)
        self._learner = self._starting.process
        self._actors = {number: Actor(number, arguments) for number in range(num_actors)}
        # When each actor was started again, by the monotonic clock.
        self._restarts: dict[int, list[float]] = {}
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
        if code < 0 and self._may_restart(number):
            say(f"actor {number} was ended by signal {-code}; starting it again")
            self._actors[number] = Actor(number, self._arguments)
            return
        if self._gave_up or self._learner_ends():
            return
        del self._actors[number]
        actor.show_error()
        if not self._starting.is_ready and code > 0:
            # The configuration is refused, and the others would say so as well; there is nothing to save.
            self._gave_up = True
            return
        self._gave_up = not self._actors
        going_on = (
            "ending the run; the learner saves what it has trained"
            if self._gave_up
            else "going on without it"
        )
        say(f"actor {number} ended with exit code {code}; {going_on}")

    def _may_restart(self, number: int) -> bool:
        """Whether an actor was not started again too often; notes that it is."""
        now = time.monotonic()
        recent = [then for then in self._restarts.get(number, []) if now - then < RESTART_WINDOW_S]
        self._restarts[number] = [*recent, now]
        return len(recent) < MAX_RESTARTS

    def _learner_ends(self) -> bool:
        """Whether the learner ends as well, for the same reason, which it reports itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._learner.wait(SAME_ERROR_S)
        return self._learner.returncode is not None

    def _end(self) -> int:
        """Ends the learner first: it saves a checkpoint and sends the actors home."""
        stopping = self._learner.poll() is None
        if stopping and self._gave_up and not self._starting.is_ready:
            self._learner.kill()
        elif stopping:
            if self._starting.is_ready and not self._gave_up:
                say("stopping the learner; it saves what it has trained")
            self._learner.terminate()
        self._wait([self._learner], SAVE_S)
        actors = [actor.process for actor in self._actors.values()]
        if stopping or self._learner.returncode != 0:
            # Nobody will read what they are at, and an evaluation is long.
            for actor in self._actors.values():
                actor.muted = not self._starting.is_ready
                actor.process.terminate()
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
    """Prints a line of this process."""
    show(f"lerobot-pi-rl-train: {text}\n")


def show(text: str) -> None:
    """Prints lines where the learner draws its progress bar: what there is of it is erased, and drawn anew below."""
    erase = ERASE_LINE if text and sys.stderr.isatty() else ""
    print(f"{erase}{text}", end="", file=sys.stderr, flush=True)


def train() -> None:
    """`lerobot-pi-rl-train`."""
    arguments = with_output_dir(_read("train"))
    num_actors = count_of(setting(arguments, NUM_ACTORS) or 1, NUM_ACTORS)
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    say(f"starting one learner and {num_actors} actor(s); logs in {setting(arguments, 'output_dir')}/logs")
    with own_token(arguments):
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


def supervised() -> None:
    """`lerobot-pi-rl-supervised`."""
    _run("supervised")


def export() -> None:
    """`lerobot-pi-rl-export`."""
    _run("export")


def status() -> None:
    """`lerobot-pi-rl-status`."""
    _run("status")


def _read(name: str) -> list[str]:
    """Answers help, versions and mistakes at once; gives the command line in the form that the parser reads.

    Args:
        name: The command.
    """
    arguments = sys.argv[1:]
    sys.argv[0] = f"lerobot-pi-rl-{name}"
    _use_utf8()
    if not commands.COMMANDS[name].takes_settings:
        options.look(name, options.parse(name, arguments))
        return arguments
    if commands.VERSION in arguments:
        _answer(commands.versions())
    if commands.is_help(arguments):
        _answer(commands.help_text(name, arguments))
    return preflight(with_actors(arguments) if name == "train" else arguments, name)


def _answer(text: str) -> None:
    """Prints and ends; who reads may have seen enough before the end, as `head` has."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)
        raise SystemExit(0)
    os._exit(0)


def _use_utf8() -> None:
    """Has LeRobot read files as UTF-8, too, where it leaves that to the locale."""
    if locale.getencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        os.environ["PYTHONUTF8"] = "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(name: str) -> None:
    """Imports and runs one of the package's commands, under its name.

    LeRobot warns at import, over forty lines, when FFmpeg is missing; no command here decodes video with it.
    gRPC's core writes lines of its own to stderr, such as "Got goaway" at an ordinary end; what matters of them is an
    error in Python, too.
    """
    try:
        sys.argv[1:] = _read(name)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        logging.getLogger("lerobot.utils.import_utils").addFilter(
            lambda record: "torchcodec" not in record.getMessage()
        )
        module = importlib.import_module(f"lerobot_policy_pi_rl.scripts.{name}")
        code = module.main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lerobot" or "cannot import name" not in str(error):
            raise
        found = importlib.metadata.version("lerobot")
        raise SystemExit(
            f"error: LeRobot {found} has moved what this package uses ({error.name}: {str(error).partition(' (')[0]}); "
            "take a newer release of lerobot_policy_pi_rl, or pip install 'lerobot==0.6.1'"
        ) from None
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command = sys.argv.pop(1)
    {"learner": learner, "actor": actor, "check": check, "demos": demos, "train": train}[command]()
