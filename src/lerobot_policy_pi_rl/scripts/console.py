"""What every command shares: plugins, logging, signals, and errors of one line."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

from draccus.utils import DraccusException
from lerobot.utils.import_utils import register_third_party_plugins

from ..algorithm.pi_rl import RatioError
from ..runtime.checkpoint import CheckpointError


def run_command(command: Callable[[], None]) -> None:
    """Runs a command; an expected error is one line on stderr and exit code 1, never a stack trace.

    Args:
        command: Does the work.

    Raises:
        SystemExit: With code 1 after an error.
    """
    logging.getLogger().setLevel(logging.WARNING)
    register_third_party_plugins()
    try:
        command()
    except EXPECTED_ERRORS as error:
        logging.getLogger(__name__).debug("Ended by", exc_info=True)
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


# Errors that say what to do; anything else is a defect and keeps its stack trace.
EXPECTED_ERRORS = (DraccusException, CheckpointError, RatioError, OSError, ValueError)


def one_line(error: BaseException) -> str:
    """The text of an error, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def log_to(file: Path, level: int = logging.INFO) -> None:
    """Sends the log of this process to a file, and its warnings to stderr as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    to_file, to_console = logging.FileHandler(file), logging.StreamHandler()
    to_console.setLevel(logging.WARNING)
    for handler in (to_file, to_console):
        handler.setFormatter(form)
        root.addHandler(handler)
    root.setLevel(level)


def stop_on_signals() -> Event:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once."""
    stop = Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop
