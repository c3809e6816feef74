"""The stages of a cell: which command makes what, in which folder, and when it is complete.

The folders are named after what decides their content, so that cells and grids share what they have in common:

    outputs/grid/<task>/<count>_demonstrations/seed_<seed>/
        demonstrations/                 result.json, log.txt, output/
        converged/                      supervised training, as above, and
            evaluation_<count>/
            pi_rl/                      as above, and
                evaluation_best_<count>/, evaluation_last_<count>/
            self_imitation/, supervised/    the controls, like pi_rl/

A folder that belongs to overrides has their names behind its own. Another environment than that of
`recipes/metaworld.json` has a folder below the seed's.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.metaworld_demo import (
    ROOT,
    dataset_arguments,
    demonstrations_command,
    environment_arguments,
    evaluation_command,
    improvement_command,
    supervised_command,
)

from .plan import PACKAGES, PI_RL, RECIPE, SELF_IMITATION, STARTS, Cell, slug

OUTPUT = ROOT / "outputs/grid"
PORT = "--policy.actor_learner_config.learner_port"
# What the supervised training of version 0.1.0 was.
STEPS_200 = ("--steps=200", "--save_freq=200", "--env_eval_freq=0")
# Gradient steps a minute of supervised training, over which a control's learning rate decays; its minutes end it.
STEPS_PER_MINUTE = 3000


@dataclass(frozen=True)
class Stage:
    """One command of a cell.

    Attributes:
        title: What it does.
        folder: Its own folder.
        command: Name and arguments, with paths relative to the repository.
        learns: It is PI-RL: it needs a port, and goes on from its last checkpoint.
        checkpoint: What an evaluation evaluates.
        twin: An evaluation before this one, whose checkpoint may turn out to be the same.
        minutes_of: The stage whose wall time this one gets, too.
    """

    title: str
    folder: Path
    command: tuple[str, ...]
    learns: bool = False
    checkpoint: Path | None = None
    twin: "Stage | None" = None
    minutes_of: "Stage | None" = None

    @property
    def full_command(self) -> tuple[str, ...]:
        """The command, with the minutes that another stage has taken where it gets as many."""
        if self.minutes_of is None:
            return self.command
        minutes = self.minutes_of.result()["seconds"] / 60
        return (
            *self.command,
            f"--max_minutes={minutes:.2f}",
            f"--steps={max(1, round(minutes * STEPS_PER_MINUTE))}",
        )

    @property
    def repeats(self) -> "Stage | None":
        """The twin, if it has evaluated the same checkpoint: of equals, the last one is the best."""
        if self.twin is None or self.checkpoint is None or self.twin.checkpoint is None:
            return None
        same = self.checkpoint.resolve() == self.twin.checkpoint.resolve()
        return self.twin if same and self.twin.done else None

    @property
    def output(self) -> Path:
        """What the command writes to."""
        return self.folder / "output"

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.folder / "log.txt"

    @property
    def result_file(self) -> Path:
        """There when, and only when, the stage is complete."""
        return self.folder / "result.json"

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return self.result_file.exists()

    def result(self) -> dict[str, Any]:
        """How it was made."""
        return json.loads(self.result_file.read_text(encoding="utf-8"))

    def finish(self, result: dict[str, Any]) -> None:
        """Marks it as complete."""
        aside = self.result_file.with_suffix(".writing")
        aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.result_file)

    @property
    def can_resume(self) -> bool:
        """Whether a checkpoint is there to go on from."""
        return self.learns and (self.output / "checkpoints/last").exists()


@dataclass(frozen=True)
class Stages:
    """All stages of a cell, in their order."""

    demonstrations: Stage
    supervised: Stage
    before: Stage
    train: Stage
    best: Stage
    last: Stage

    def all(self, supervised_only: bool = False) -> list[Stage]:
        """The stages to run.

        Args:
            supervised_only: Stop at the evaluation of the supervised policy.
        """
        first = [self.demonstrations, self.supervised, self.before]
        return first if supervised_only else [*first, self.train, self.best, self.last]


def control_of(cell: Cell) -> Cell:
    """The cell that a control is compared with: PI-RL from the same start, without overrides of its own."""
    return replace(cell, method=PI_RL, overrides=replace(cell.overrides, train=()))


def stages(cell: Cell, output: Path = OUTPUT) -> Stages:
    """The stages of a cell.

    Args:
        cell: The cell.
        output: Folder of all stages of all grids.
    """
    more = cell.overrides
    if cell.environment is not None:
        return _in_environment(cell.environment, cell, output)
    place = output / slug([cell.task]) / f"{cell.demonstrations}_demonstrations" / f"seed_{cell.seed}"
    place = place / _name("", more.demonstrations) if more.demonstrations else place
    environment = environment_arguments(cell.recipe)
    place = place / slug(environment) if environment != environment_arguments() else place
    converged = cell.start == STARTS[0]
    demonstrations = place / "demonstrations"
    supervised = place / _name(cell.start if converged else "supervised", more.supervised)
    # What evaluates otherwise, trains and validates in another environment or policy as well.
    name = cell.method if cell.recipe == RECIPE else f"{cell.method}_{cell.recipe}"
    train = supervised / _name(name, more.train)

    def evaluation(name: str, title: str, made_by: Path, link: str, twin: Stage | None = None) -> Stage:
        folder = made_by / _name(f"{name}_{cell.num_evaluations}", more.evaluation)
        checkpoint = made_by / "output/checkpoints" / link / "pretrained_model"
        command = evaluation_command(
            cell.task, _relative(checkpoint), cell.num_evaluations, _relative(folder / "output"), cell.recipe
        )
        return Stage(title, folder, (*command, *more.evaluation), checkpoint=checkpoint, twin=twin)

    data, link = _relative(demonstrations / "output"), "best" if converged else "last"
    start = _relative(supervised / "output/checkpoints" / link / "pretrained_model")
    best = evaluation("evaluation_best", "evaluation of the best", train, "best")
    learning = supervised_command(cell.task, data, _relative(supervised / "output"), cell.seed, cell.recipe)
    if not converged:
        learning = [argument for argument in learning if not argument.startswith(("--patience=", "--env."))]
        learning += STEPS_200
    return Stages(
        demonstrations=Stage(
            f"{cell.demonstrations} demonstrations",
            demonstrations,
            (
                *demonstrations_command(cell.task, cell.demonstrations, cell.seed, data, cell.recipe),
                *more.demonstrations,
            ),
        ),
        supervised=Stage("supervised training", supervised, (*learning, *more.supervised)),
        before=evaluation("evaluation", "evaluation before", supervised, link),
        train=_train_stage(cell, train, data, start, output),
        best=best,
        last=evaluation("evaluation_last", "evaluation of the last", train, "last", best),
    )


def _in_environment(name: str, cell: Cell, output: Path) -> Stages:
    """The stages of a cell whose environment is that of a package beside the recipes."""
    same = stages(replace(cell, environment=None), output / name)
    environment = (f"--env.type={name}", f"--env.discover_packages_path={PACKAGES[name]}")

    def moved(stage: Stage) -> Stage:
        kept = [a for a in stage.command if not a.startswith("--env.") or a.startswith("--env.task=")]
        twin = None if stage.twin is None else moved(stage.twin)
        # The supervised training of 0.1.0 names no environment: it validates nowhere.
        added = environment if any(a.startswith("--env.task=") for a in kept) else ()
        return replace(stage, command=(*kept, *added), twin=twin)

    record = [a for a in same.demonstrations.command[1:] if not a.startswith("--env.")]
    recorder = ("python", "-m", f"{PACKAGES[name]}.record", *record)
    return Stages(
        demonstrations=replace(same.demonstrations, command=recorder),
        supervised=moved(same.supervised),
        before=moved(same.before),
        train=moved(same.train),
        best=moved(same.best),
        last=moved(same.last),
    )


def _train_stage(cell: Cell, folder: Path, data: Path, start: Path, output: Path) -> Stage:
    """PI-RL, or a control in its place."""
    place, more = _relative(folder / "output"), cell.overrides
    improvement = improvement_command(cell.task, start, place, cell.seed, cell.recipe)
    if cell.method == PI_RL:
        dataset = dataset_arguments(data) if _trains_on_demonstrations(more.train) else []
        return Stage("PI-RL", folder, (*improvement, *dataset, *more.train), learns=True)
    if cell.method == SELF_IMITATION:
        command = ("python", "-m", "benchmarks.self_imitation", *improvement[1:], *dataset_arguments(data))
        return Stage("self-imitation", folder, (*command, *more.train))
    supervised = supervised_command(cell.task, data, place, cell.seed, cell.recipe)
    command = (*(a for a in supervised if not a.startswith("--patience=")), f"--policy.path={start}")
    return Stage(
        "supervised training alone",
        folder,
        (*command, *more.train),
        minutes_of=stages(control_of(cell), output).train,
    )


def _trains_on_demonstrations(overrides: Sequence[str]) -> bool:
    return any(argument.startswith("--algorithm.demonstration_weight=") for argument in overrides)


def success(stage: Stage) -> float:
    """Overall success of an evaluation."""
    return float(_evaluation(stage)["overall"]["pc_success"]) / 100


def successes(stage: Stage) -> list[float]:
    """Success of an evaluation on each task, in the order of the tasks."""
    entries = sorted(_evaluation(stage)["per_task"], key=lambda entry: entry["task_id"])
    return [sum(e["metrics"]["successes"]) / len(e["metrics"]["successes"]) for e in entries]


def _evaluation(stage: Stage) -> dict[str, Any]:
    return json.loads((stage.output / "eval_info.json").read_text(encoding="utf-8"))


def reached_end(output: Path) -> bool:
    """Whether a run of PI-RL used its budget, or was good enough; one that was stopped from outside did not."""
    last = output / "checkpoints/last"
    counters = json.loads((last / "training_state/counters.json").read_text(encoding="utf-8"))
    config = json.loads((last / "pretrained_model/train_config.json").read_text(encoding="utf-8"))
    wanted = config["algorithm"]["stop_success"]
    return (
        counters["env_steps"] >= config["policy"]["online_steps"]
        or counters["version"] >= config["steps"]
        or (wanted is not None and counters["best_success"] >= wanted)
        # The guard ended it: that is a result as well, and going on would hide it.
        or counters.get("stopped_by") is not None
    )


def _name(kind: str, overrides: Sequence[str]) -> str:
    return "__".join(part for part in (kind, slug(overrides) if overrides else "") if part)


def _relative(path: Path) -> Path:
    return Path(os.path.relpath(path, ROOT))
