"""Grid files, and the cells they describe."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "grids"
RECIPES = FOLDER.parent.parent / "recipes"
RECIPE = "metaworld"
# How a cell's supervised policy is trained: until validation stops rising, or by the 200 steps of version 0.1.0.
STARTS = ("converged", "steps_200")
# What a cell does with it: PI-RL, or one of the controls. Self-imitation keeps its own successes and trains on them;
# supervised training goes on, on the same demonstrations, for the minutes that PI-RL takes.
PI_RL, SELF_IMITATION, SUPERVISED = METHODS = ("pi_rl", "self_imitation", "supervised")
# Environments of a grid beside those of the recipes: by type, the package that brings and records them.
PACKAGES = {"small": "lerobot_env_small"}
# MetaWorld's demonstrations know this many blocks of starts.
NUM_SEEDS = 50
# What the runner sets itself, in every command.
OWNED = (
    "config_path",
    "dataset.repo_id",
    "dataset.root",
    "env.task",
    "env.type",
    "output_dir",
    "policy.actor_learner_config.learner_port",
    "policy.path",
    "resume",
    "root",
    "seed",
    "task",
)


class GridError(ValueError):
    """A grid file or a selection is wrong; the text is one line."""


@dataclass(frozen=True)
class Overrides:
    """Arguments added to the commands of a cell, as typed on the command line.

    Attributes:
        demonstrations: Of `lerobot-pi-rl-demos`.
        supervised: Of `lerobot-train`.
        train: Of `lerobot-pi-rl-train`.
        evaluation: Of `lerobot-eval`, before and after.
    """

    demonstrations: tuple[str, ...] = ()
    supervised: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    def __add__(self, other: "Overrides") -> "Overrides":
        """Both, the other one's last, so that they win."""
        return Overrides(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Cell:
    """One learning run.

    Attributes:
        task: A task, several separated by commas, `MT10` or `MT50`.
        seed: Of demonstrations, supervised training and PI-RL.
        variant: Name of the variant.
        demonstrations: Number of demonstrations per task.
        num_evaluations: Held-out starts per task.
        recipe: Name of the file in `recipes` that PI-RL runs with; its environment is that of all stages.
        overrides: Of the task and the variant.
        start: One of `STARTS`.
        method: One of `METHODS`.
        environment: Type of the environment, one of `PACKAGES`; None is that of the recipe.
    """

    task: str
    seed: int
    variant: str
    demonstrations: int
    num_evaluations: int
    recipe: str
    overrides: Overrides
    start: str = STARTS[0]
    method: str = PI_RL
    environment: str | None = None

    def __str__(self) -> str:
        """How the cell is called in what is printed."""
        return f"{self.task} seed {self.seed} {self.variant}"

    @property
    def label(self) -> str:
        """Name of the cell's files."""
        return f"{slug([self.task])}_{self.seed}_{slug([self.variant])}"


@dataclass(frozen=True)
class Grid:
    """All cells of a grid file.

    Attributes:
        name: Name of its results.
        cells: The cells, in the order in which they run: one seed of everything first.
    """

    name: str
    cells: tuple[Cell, ...]


def slug(words: Sequence[str]) -> str:
    """A short name for a folder, which tells different words apart.

    Plain names stay as they are. Of `--group.name=value` the group is left out and a few digits of a hash are added.
    """
    text = "_".join(re.sub(r"^--(?:\w+\.)*", "", word) for word in words)
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:60]
    if [readable] == list(words):
        return readable
    return f"{readable}_{hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:6]}"


def load(name: str) -> Grid:
    """Reads a grid file.

    Args:
        name: Path of the file, or the name of one in `benchmarks/grids`.

    Raises:
        GridError: If there is no such file, or something in it is wrong.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise GridError(f"there is no grid file {path}; there are: {known}") from None
    except json.JSONDecodeError as error:
        raise GridError(f"{path} is no JSON: {error}") from None
    try:
        return parse(content)
    except GridError as error:
        raise GridError(f"{path.name}: {error}") from None


def parse(content: Any) -> Grid:
    """Makes a grid of the content of its file.

    Raises:
        GridError: If something is missing, unknown, empty or of another kind.
    """
    grid = _record(
        "the grid",
        content,
        required=("name", "tasks", "seeds"),
        optional=("variants", "num_evaluations", "start", "environment"),
    )
    name = grid["name"]
    _check(isinstance(name, str) and slug([name]) == name, f"name: {name!r} is no name for a folder")
    everywhere = _seeds("seeds", grid["seeds"])
    count = grid.get("num_evaluations", 100)
    _check(
        _whole(count) and count >= 1, f"num_evaluations: must be a whole number of at least 1, got {count!r}"
    )
    start = _one_of("start", grid.get("start", STARTS[0]), STARTS)
    environment = grid.get("environment")
    if environment is not None:
        _one_of("environment", environment, list(PACKAGES))
    tasks = _named("tasks", grid["tasks"])
    variants = _named("variants", grid.get("variants", {"default": {}}))
    stages = [f.name for f in fields(Overrides)]
    methods = {
        name: _one_of(f"variants.{name}.method", entry.get("method", PI_RL), METHODS)
        for name, entry in variants.items()
        if isinstance(entry, dict)
    }
    seeds: dict[str, list[int]] = {}
    for task, entry in tasks.items():
        _record(
            f"tasks.{task}", entry, required=("demonstrations",), optional=("seeds", "recipe", "overrides")
        )
        _recipe(f"tasks.{task}.recipe", entry.get("recipe", RECIPE))
        seeds[task] = _seeds(f"tasks.{task}.seeds", entry.get("seeds", everywhere))
        _per_seed(f"tasks.{task}.demonstrations", entry["demonstrations"], seeds[task])
    cells = tuple(
        Cell(
            task=task,
            seed=seeds[task][place],
            variant=variant,
            demonstrations=_per_seed("demonstrations", tasks[task]["demonstrations"], seeds[task])[
                seeds[task][place]
            ],
            num_evaluations=count,
            recipe=tasks[task].get("recipe", RECIPE),
            overrides=_overrides(f"tasks.{task}.overrides", tasks[task].get("overrides", {}), stages)
            + _overrides(f"variants.{variant}", variants[variant], stages, more=("method",)),
            start=start,
            method=methods[variant],
            environment=environment,
        )
        for place, variant, task in itertools.product(range(max(map(len, seeds.values()))), variants, tasks)
        if place < len(seeds[task])
    )
    return Grid(name, cells)


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that a selection names.

    Args:
        cells: To choose from.
        only: Each `task=...,seed=...,variant=...`; a name given several times means either.

    Raises:
        GridError: If a name or a value is unknown.
    """
    wanted: dict[str, set[str]] = {}
    for pair in itertools.chain.from_iterable(re.split(r",(?=\w+=)", given) for given in only):
        name, _, value = pair.partition("=")
        _check(name in ("task", "seed", "variant"), f"--only: {pair!r} is not task=, seed= or variant=")
        known = {str(getattr(cell, name)): None for cell in cells}
        _check(value in known, f"--only: there is no {name} {value!r}; there are: {', '.join(known)}")
        wanted.setdefault(name, set()).add(value)
    return [c for c in cells if all(str(getattr(c, name)) in values for name, values in wanted.items())]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise GridError(message)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seeds(name: str, value: Any) -> list[int]:
    _check(isinstance(value, list) and bool(value), f"{name}: needs a list such as [0, 1, 2], got {value!r}")
    for seed in value:
        _check(
            _whole(seed) and 0 <= seed < NUM_SEEDS,
            f"{name}: {seed!r} is no whole number from 0 to {NUM_SEEDS - 1}",
        )
    _check(len(set(value)) == len(value), f"{name}: {value} names one twice")
    return value


def _per_seed(name: str, value: Any, seeds: list[int]) -> dict[int, int]:
    """A whole number for every seed: one for all of them, or a list with one for each."""
    numbers = value if isinstance(value, list) else [value] * len(seeds)
    _check(
        len(numbers) == len(seeds),
        f"{name}: {value!r} needs one number, or one for each of the seeds {seeds}",
    )
    for number in numbers:
        _check(_whole(number) and number >= 1, f"{name}: must be at least 1, got {number!r}")
    return dict(zip(seeds, numbers, strict=True))


def _recipe(name: str, value: Any) -> None:
    known = sorted(file.stem for file in RECIPES.glob("*.json"))
    _check(value in known, f"{name}: there is no recipe {value!r}; there are: {', '.join(known)}")


def _record(
    name: str, value: Any, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> Mapping[str, Any]:
    """A JSON object with the keys it must have, and no others than it may have."""
    _check(isinstance(value, dict), f"{name}: must be an object, got {value!r}")
    known = [*required, *optional]
    for key in value:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
        _check(key in known, f"{name}: unknown key {key!r}; {hint}")
    for key in required:
        _check(key in value, f"{name}: {key!r} is missing")
    return value


def _named(name: str, value: Any) -> Mapping[str, Any]:
    _check(isinstance(value, dict) and bool(value), f"{name}: needs at least one, by name; got {value!r}")
    return value


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    _check(value in known, f"{name}: {value!r} is none of {', '.join(known)}")
    return str(value)


def _overrides(name: str, value: Any, stages: list[str], more: Sequence[str] = ()) -> Overrides:
    """The arguments of the stages; `more` are keys that are read elsewhere."""
    record = _record(name, value, optional=[*stages, *more])
    given = {stage: arguments for stage, arguments in record.items() if stage in stages}
    for stage, arguments in given.items():
        _check(isinstance(arguments, list), f"{name}.{stage}: must be a list of arguments, got {arguments!r}")
        for argument in arguments:
            found = re.match(r"--([\w.]+)=", argument) if isinstance(argument, str) else None
            _check(found is not None, f"{name}.{stage}: {argument!r} is not of the form --name=value")
            assert found is not None
            _check(found[1] not in OWNED, f"{name}.{stage}: --{found[1]} is set by the runner")
    return Overrides(**{stage: tuple(arguments) for stage, arguments in given.items()})
