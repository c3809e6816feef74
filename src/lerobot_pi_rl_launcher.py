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

import yaml

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
# prctl(PR_SET_PDEATHSIG): Linux sends the signal to a child whose parent dies.
PR_SET_PDEATHSIG = 1

CONFIG_PATH, NUM_ACTORS = "config_path", "algorithm.collection.num_actors"
TRAIN_CONFIG, PRETRAINED_MODEL = "train_config.json", "pretrained_model"
RECIPES = (Path(__file__).parent / "lerobot_policy_pi_rl/recipes", Path(__file__).parents[1] / "recipes")
"""Where recipes lie: in an installed package, and in a repository that is installed to be edited."""

_SETTINGS = """
PI-RL's settings are not in this list, which is LeRobot's. Some of them:
    --policy.path=FOLDER                 the policy to start from: pi_rl, or a stock pi0, pi05, smolvla, ...
    --policy.online_steps=N              environment steps of the whole run
    --algorithm.collection.num_envs=N    environments of an actor
    --algorithm.lr=RATE                  learning rate of the policy
    --env_eval_freq=N                    iterations between validations
All, with their defaults: docs/configuration.md. What to change when: docs/learning.md.
"""
HELP = {
    "train": """
Learner and actors on this machine:
    lerobot-pi-rl-train --config_path=recipes/metaworld.json --actors=2
    lerobot-pi-rl-train --config_path=<output_dir>/checkpoints/last/pretrained_model/train_config.json --resume=true
--actors=N is short for --algorithm.collection.num_actors=N.
"""
    + _SETTINGS,
    "learner": """
The learner alone; it waits for actors:
    lerobot-pi-rl-learner --config_path=recipes/metaworld.json
"""
    + _SETTINGS,
    "actor": """
One actor, with the learner's configuration; each needs its own number:
    lerobot-pi-rl-actor --config_path=recipes/metaworld.json --algorithm.collection.actor_id=1
"""
    + _SETTINGS,
    "supervised": """
LeRobot's supervised training (lerobot-train) with this package's recipes, from any directory:
    lerobot-pi-rl-supervised --config_path=recipes/metaworld_supervised.json --dataset.root=...
With an environment, it validates and keeps the best checkpoint as checkpoints/best:
    --env.type=metaworld_state --env.task=TASK --env_eval_freq=500 --save_freq=500
    --patience=N       end after N validations in a row without a new best
    --max_minutes=M    end at the first validation after M minutes
""",
    "check": """
What a run would begin with, without training:
    lerobot-pi-rl-check --config_path=recipes/metaworld.json
"""
    + _SETTINGS,
}
"""What `--help` says at its end."""


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
    value: object = read_configuration(option(arguments, CONFIG_PATH))
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_configuration(given: str | None) -> dict[str, object]:
    """What a configuration file says; nothing where none is named, or one of the hub.

    Raises:
        SystemExit: If it cannot be read.
    """
    path = Path(given or "")
    # LeRobot also takes the folder of a checkpoint.
    path = path / TRAIN_CONFIG if path.is_dir() else path
    if given is None or not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: {CONFIG_PATH}: {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise SystemExit(
            f"error: {CONFIG_PATH}: {path} must hold settings by name, not {type(content).__name__}"
        )
    return content


def with_recipe(arguments: list[str]) -> list[str]:
    """Names a recipe by its place in the package where the working directory has no such file.

    Raises:
        SystemExit: If the named file is nowhere, or cannot be read.
    """
    given = option(arguments, CONFIG_PATH)
    if given is None:
        return arguments
    found = _find(given)
    read_configuration(found)
    return arguments if found == given else [*without(arguments, CONFIG_PATH), f"--{CONFIG_PATH}={found}"]


def _find(given: str) -> str:
    """Where a configuration file is; a name of the hub is left to LeRobot."""
    path = Path(given)
    if path.is_file() or (path / TRAIN_CONFIG).is_file():
        return given
    if (inner := path / PRETRAINED_MODEL / TRAIN_CONFIG).is_file():
        raise SystemExit(f"error: {CONFIG_PATH}: {given} is the folder around the file; name {inner}")
    if path.is_dir():
        raise SystemExit(f"error: {CONFIG_PATH}: the folder {given} has no {TRAIN_CONFIG}")
    recipes = {file.name: file for folder in RECIPES for file in sorted(folder.glob("*.json"))}
    if path.parent == Path("recipes") and path.name in recipes:
        return str(recipes[path.name])
    if path.suffix not in (".json", ".yaml", ".yml") and given.count("/") <= 1:
        return given
    raise SystemExit(
        f"error: {CONFIG_PATH}: there is no file {given} in {Path.cwd()}; the recipes of this package are "
        f"recipes/<name> with one of {', '.join(recipes)}"
    )


def without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments but for `--name=value` and `--name value`."""
    rest, skip = [], False
    for argument in arguments:
        if not skip and argument != f"--{name}" and not argument.startswith(f"--{name}="):
            rest.append(argument)
        skip = argument == f"--{name}"
    return rest


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


def count_of(given: object, name: str) -> int:
    """A number of actors.

    Raises:
        SystemExit: If it is none.
    """
    if not str(given).isdecimal() or int(str(given)) < 1:
        raise SystemExit(f"error: {name}: must be a whole number of at least 1, got {given!r}")
    return int(str(given))


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
        if self._learner_ends():
            return
        del self._actors[number]
        self._gave_up = not self._actors
        going_on = "ending the run" if self._gave_up else "going on without it"
        actor.show_error()
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
    if is_help(sys.argv):
        _run("learner", "train")
    arguments = with_output_dir(with_actors(with_recipe(sys.argv[1:])))
    num_actors = count_of(setting(arguments, NUM_ACTORS) or 1, NUM_ACTORS)
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
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


def supervised() -> None:
    """`lerobot-pi-rl-supervised`."""
    _run("supervised")


def export() -> None:
    """`lerobot-pi-rl-export`."""
    _run("export")


def status() -> None:
    """`lerobot-pi-rl-status`."""
    _run("status")


def is_help(arguments: Sequence[str]) -> bool:
    """Whether the command line only asks what there is."""
    return "--help" in arguments or "-h" in arguments


def _run(name: str, shown: str | None = None) -> None:
    """Imports and runs one of the package's commands, under its name.

    LeRobot warns at import, over forty lines, when FFmpeg is missing; no command here decodes video with it.

    Args:
        name: The command.
        shown: The one that the user has typed, if another.
    """
    known = shown or name
    sys.argv[0] = f"lerobot-pi-rl-{known}"
    logging.getLogger("lerobot.utils.import_utils").addFilter(
        lambda record: "torchcodec" not in record.getMessage()
    )
    try:
        if not is_help(sys.argv):
            sys.argv[1:] = with_recipe(sys.argv[1:])
        module = importlib.import_module(f"lerobot_policy_pi_rl.scripts.{name}")
        module.main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if is_help(sys.argv) and known in HELP:
            print(HELP[known])


if __name__ == "__main__":
    command = sys.argv.pop(1)
    {"learner": learner, "actor": actor, "check": check, "demos": demos, "train": train}[command]()
