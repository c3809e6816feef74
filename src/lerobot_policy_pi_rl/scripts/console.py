"""What every command shares: plugins, logging, signals, and errors of one line."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event, Timer
from typing import Any, NoReturn

from draccus.utils import DecodingError, DraccusException, ParsingError
from draccus.wrappers import docstring
from lerobot.configs.parser import PluginLoadError
from lerobot.utils.import_utils import register_third_party_plugins
from tqdm import tqdm

from ..algorithm.pi_rl import RatioError
from ..runtime.checkpoint import CheckpointError
from ..runtime.gather import NothingUsable
from ..runtime.workers import EnvironmentFailed

PACKAGE = "lerobot_policy_pi_rl"
# Environment variable with the descriptor on which `lerobot-pi-rl-train` hears that its learner is ready.
READY = "LEROBOT_PI_RL_READY"
# Seconds that a process which is asked to leave while it starts gets for its environments and its robot.
LEAVE_S = 5.0


class StoppedEarly(BaseException):
    """The process was asked to leave before its work began."""


def run_command(
    command: Callable[[], None], complete: Callable[[Sequence[str]], list[str]] | None = None
) -> None:
    """Runs a command; an expected error is one line on stderr and exit code 1, never a stack trace.

    Args:
        command: Does the work.
        complete: Completes the command line before it is parsed.

    Raises:
        SystemExit: With code 1 after an error, 0 when it was asked to leave before its work began.
    """
    logging.getLogger().setLevel(logging.WARNING)
    register_third_party_plugins()
    try:
        with parser_in_one_line():
            if complete is not None:
                sys.argv[1:] = complete(sys.argv[1:])
            command()
    except EXPECTED_ERRORS as error:
        logging.getLogger(__name__).debug("Ended by", exc_info=True)
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except StoppedEarly:
        print("stopped while starting; there was nothing to save", file=sys.stderr, flush=True)
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("stopped at once; nothing was saved", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


@contextlib.contextmanager
def parser_in_one_line() -> Iterator[None]:
    """Has LeRobot's parser answer a mistake in one line, where it would print thousands of lines of usage.

    It also collects no texts for a help that this process never shows, which takes it five seconds.
    """
    plain = DecodingError.__str__
    changed: tuple[tuple[Any, str, Any], ...] = (
        (argparse.ArgumentParser, "error", _end_with_one_line),
        (DecodingError, "__str__", lambda error: " ".join(plain(error).split())),
        (docstring, "get_attribute_docstring", lambda *_: docstring.AttributeDocString()),
    )
    before = [getattr(owner, name) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


def _end_with_one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def tell_ready() -> None:
    """Tells the process that has started this one, if it asks, that the configuration is accepted."""
    descriptor = os.environ.pop(READY, None)
    if descriptor is not None:
        os.write(int(descriptor), b"\n")
        os.close(int(descriptor))


# Errors that say what to do; anything else is a defect and keeps its stack trace.
EXPECTED_ERRORS = (
    argparse.ArgumentError,
    DraccusException,
    PluginLoadError,
    CheckpointError,
    EnvironmentFailed,
    NothingUsable,
    RatioError,
    OSError,
    ValueError,
)


def one_line(error: BaseException) -> str:
    """The text of an error, on one line; of the parser's that only says "using the given arguments", with its cause."""
    if type(error) is ParsingError and error.__cause__ is not None:
        return f"{error} {one_line(error.__cause__)}"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


class ConsoleHandler(logging.Handler):
    """Shows what a user should see, above the progress bar: our own notes, and everybody's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record on stderr; a terminal that was closed is no reason to end a run."""
        if record.levelno >= logging.WARNING or record.name.startswith(PACKAGE):
            with contextlib.suppress(OSError):
                tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.FileHandler):
    """The log on the disk. While that is full, lines are lost; the console has those that matter."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leaves out the stack trace that logging would print for every line."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def log_to(file: Path) -> None:
    """Sends the log of this process to a file, and the part that a user should see to stderr as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    to_file, to_console = LogFile(file, encoding="utf-8"), ConsoleHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(to_file)
    root.addHandler(to_console)
    root.setLevel(logging.INFO)


def leave_on_signals() -> Event:
    """Has Ctrl-C and SIGTERM end this process at once, while it builds what it needs: there is nothing to save yet.

    What was built is closed on the way out; where that takes too long, or somebody holds the exception back, the
    process ends without, and the workers of environments with it.

    Returns:
        The event for `stop_on_signals`, set as well.
    """
    stop = Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            return
        stop.set()
        late = Timer(LEAVE_S, os._exit, [0])
        late.daemon = True
        late.start()
        raise StoppedEarly

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def stop_on_signals(stop: Event) -> None:
    """Has Ctrl-C and SIGTERM set an event from now on; a second Ctrl-C ends the process at once."""

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
