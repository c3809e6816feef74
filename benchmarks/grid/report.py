"""Sums up what a grid has so far: rows as JSON, raw curves, a table and a picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from examples.metaworld_demo import ROOT, interval, read_metrics

from .picture import Line, draw, points_of
from .plan import Cell, Grid
from .stages import OUTPUT, Stage, stages, success, successes

RESULTS = ROOT / "benchmarks/results/grid"
SUMMARY = "summary.json"
# Iterations that become one line of a raw curve.
THIN = 10
# Of `metrics.jsonl`, as explained in docs/metrics.md.
CURVE = (
    "rollout/success",
    "ppo/approx_kl",
    "ppo/clip_fraction",
    "ppo/explained_variance",
    "ppo/lr",
)
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Row:
    """What one cell found. What is not there yet is None.

    Attributes:
        task: As in the grid file.
        seed: Of demonstrations, supervised training and PI-RL.
        variant: Its name.
        demonstrations: Per task.
        n_eval: Held-out starts, of all tasks together.
        supervised: Success before.
        best: Success of the checkpoint that validation chose.
        last: Success of the last checkpoint.
        supervised_interval: Wilson's 95 % interval.
        best_interval: The same of `best`.
        last_interval: The same of `last`.
        per_task: The three by task, where there are several.
        env_steps: Of PI-RL.
        decisions: Of PI-RL, those that were learned from.
        decisions_per_s: Of PI-RL, as `decision_rate` measures it.
        iterations: Of PI-RL.
        best_iteration: After which `best` was saved.
        rl_minutes: Wall time of PI-RL, start-up and validation included.
        supervised_minutes: Wall time of supervised training.
        commands: As they were run from the repository, but for the learner's port.
        made_with: Date, packages, source, cores and parallel jobs of the newest stage.
    """

    task: str
    seed: int
    variant: str
    demonstrations: int
    n_eval: int
    supervised: float
    best: float | None
    last: float | None
    supervised_interval: tuple[float, float]
    best_interval: tuple[float, float] | None
    last_interval: tuple[float, float] | None
    per_task: dict[str, dict[str, float]] | None
    env_steps: int | None
    decisions: int | None
    decisions_per_s: float | None
    iterations: int | None
    best_iteration: int | None
    rl_minutes: float | None
    supervised_minutes: float
    commands: list[str]
    made_with: dict[str, Any]


def summarise(grid: Grid, output: Path = OUTPUT, results: Path = RESULTS) -> str:
    """Writes the summary of a grid, its raw curves, its table and its picture.

    Args:
        grid: The grid.
        output: Folder of all stages.
        results: Folder of all summaries.

    Returns:
        The table, with a line on what is missing.
    """
    found = [(cell, row) for cell in grid.cells if (row := row_of(cell, output)) is not None]
    rows = [row for _, row in found]
    curves = {
        cell: curve_of(stages(cell, output).train.output) for cell, row in found if row.last is not None
    }
    folder = results / grid.name
    text = "\n".join([*table(rows), "", *notes(grid, rows, len(curves))]) + "\n"
    if (before := _complete_in(folder)) > len(curves):
        # Results of another machine, or of runs that have been removed since, are not lost by looking.
        return f"{text}\nNothing was written: {folder.name} holds {before} complete cells; remove it first.\n"
    summary = {
        "grid": grid.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cells": len(grid.cells),
        "complete": len(curves),
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(text, encoding="utf-8")
    _write_curves(folder / "curves", curves)
    lines = [
        Line(cell.task, cell.seed, cell.variant, points, row.supervised)
        for cell, row in found
        if cell in curves and (points := points_of(curves[cell]))
    ]
    if lines:
        draw(lines, folder / "curves.png")
    return text


def _complete_in(folder: Path) -> int:
    """How many complete cells a folder of results holds."""
    file = folder / SUMMARY
    return int(json.loads(file.read_text(encoding="utf-8"))["complete"]) if file.exists() else 0


def _write_curves(folder: Path, curves: Mapping[Cell, Curve]) -> None:
    folder.mkdir(exist_ok=True)
    # A cell that is no longer in the grid leaves no curve behind.
    for old in folder.glob("*.jsonl"):
        old.unlink()
    for cell, curve in curves.items():
        lines = "".join(json.dumps(line) + "\n" for line in curve)
        (folder / f"{cell.label}.jsonl").write_text(lines, encoding="utf-8")


def row_of(cell: Cell, output: Path = OUTPUT) -> Row | None:
    """What a cell found; None before its supervised policy is evaluated."""
    made = stages(cell, output)
    if not made.before.done:
        return None
    complete = made.train.done and made.best.done and made.last.done
    evaluations = {"supervised": made.before} | ({"best": made.best, "last": made.last} if complete else {})
    rates = {name: round(success(stage), 4) for name, stage in evaluations.items()}
    by_task = _per_task(cell, evaluations)
    count = cell.num_evaluations * max(1, len(by_task or {}))
    intervals = {name: _interval(rate, count) for name, rate in rates.items()}
    run = read_counters(made.train.output) if complete else {}
    used = [stage for stage in made.all() if complete or stage in made.all(supervised_only=True)]
    results = [stage.result() for stage in used]
    return Row(
        task=cell.task,
        seed=cell.seed,
        variant=cell.variant,
        demonstrations=cell.demonstrations,
        n_eval=count,
        supervised=rates["supervised"],
        best=rates.get("best"),
        last=rates.get("last"),
        supervised_interval=intervals["supervised"],
        best_interval=intervals.get("best"),
        last_interval=intervals.get("last"),
        per_task=by_task,
        env_steps=run.get("env_steps"),
        decisions=run.get("decisions"),
        decisions_per_s=decision_rate(made.train.output) if complete else None,
        iterations=run.get("version"),
        best_iteration=run.get("best_version"),
        rl_minutes=round(made.train.result()["seconds"] / 60, 2) if complete else None,
        supervised_minutes=round(made.supervised.result()["seconds"] / 60, 2),
        commands=[stage.result()["command"] for stage in used],
        made_with={k: v for k, v in results[-1].items() if k not in ("command", "seconds")}
        | {"source": sorted({result["source"] for result in results})},
    )


def _interval(rate: float, count: int) -> tuple[float, float]:
    low, high = interval(rate, count)
    return round(low, 4), round(high, 4)


def _per_task(cell: Cell, evaluations: Mapping[str, Stage]) -> dict[str, dict[str, float]] | None:
    """Success by task, of a policy for several."""
    rates = {name: successes(stage) for name, stage in evaluations.items()}
    if len(rates["supervised"]) == 1:
        return None
    # Loads LeRobot, which only a grid of several tasks must wait for.
    from lerobot_policy_pi_rl.envs.tasks import expand_tasks

    return {
        task: {name: rates[name][number] for name in rates}
        for number, task in enumerate(expand_tasks(cell.task))
    }


def read_counters(run: Path) -> dict[str, Any]:
    """Counters of the end of a run; the best version is that of the link, set after the last checkpoint as well."""
    counters = json.loads((run / "checkpoints/last/training_state/counters.json").read_text(encoding="utf-8"))
    return counters | {"best_version": int((run / "checkpoints/best").resolve().name.removesuffix("-best"))}


def decision_rate(run: Path) -> float | None:
    """Decisions per second of a run, collecting and learning together; None of a control.

    Left out are iterations that wait for a validation, start-up, checkpoints, and pauses between resumes.
    """
    lines = read_metrics(run / "metrics.jsonl")
    # The iteration after a version is the one that waits for its validation.
    validated = {line["step"] + 1 for line in lines if "eval/success" in line}
    counted = [line for line in lines if "rollout/decisions" in line and line["step"] not in validated]
    if not counted:
        return None
    parts = ("speed/wait_seconds", "speed/update_seconds", "speed/critic_seconds")
    seconds = sum(line[part] for line in counted for part in parts)
    return round(sum(line["rollout/decisions"] for line in counted) / max(seconds, 1e-9), 1)


def curve_of(run: Path) -> Curve:
    """A small raw curve: each validation, and the mean over every few iterations."""
    curve: Curve = []
    window: list[dict[str, float]] = []
    seconds = 0.0
    for line in read_metrics(run / "metrics.jsonl"):
        seconds = line.get("progress/seconds", seconds)
        # Supervised training has no environment steps.
        env_steps = line.get("progress/env_steps", 0)
        place = {"step": line["step"], "env_steps": env_steps, "seconds": round(seconds, 1)}
        if "eval/success" in line:
            curve.append(place | {"eval/success": line["eval/success"]})
            continue
        window.append(line)
        if len(window) == THIN:
            curve.append(place | _means(window))
            window = []
    if window:
        curve.append(place | _means(window))
    return curve


def _means(window: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    means = {}
    for name in CURVE:
        values = [value for line in window if (value := line.get(name)) is not None]
        if values:
            means[name] = float(f"{statistics.fmean(values):.4g}")
    return means


def table(rows: Sequence[Row]) -> list[str]:
    """One Markdown line per task and variant."""
    head = (
        "task",
        "variant",
        "demonstrations",
        "seeds",
        "supervised",
        "best checkpoint",
        "last checkpoint",
        "worst seed: before, best (95 %)",
        "environment steps",
        "minutes of PI-RL",
        "decisions/s",
        "over the first variant's",
    )
    lines = [head, ("---",) * len(head)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.variant), []).append(row)
    for (task, variant), group in groups.items():
        counts = [str(row.demonstrations) for row in sorted(group, key=lambda row: row.seed)]
        done = [row for row in group if row.best is not None]
        seeds = f"{len(group)}" if len(done) == len(group) else f"{len(group)}, {len(done)} done"
        lines.append(
            (
                task,
                variant,
                counts[0] if len(set(counts)) == 1 else ", ".join(counts),
                seeds,
                _spread([row.supervised for row in group]),
                _spread([row.best for row in done]),
                _spread([row.last for row in done]),
                _worst(done),
                _middle([row.env_steps for row in done], "{:,.0f}"),
                _middle([row.rl_minutes for row in done], "{:.1f}"),
                _middle([row.decisions_per_s for row in done], "{:,.0f}"),
                _spread(_over_first(done, rows)),
            )
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def _over_first(group: Sequence[Row], rows: Sequence[Row]) -> list[float | None]:
    """Decisions per second over those of the first variant with the same task and seed, where both are there."""
    first = {(row.task, row.seed): row.decisions_per_s for row in reversed(rows)}
    ratios: list[float | None] = []
    for row in group:
        base = first[row.task, row.seed]
        ratios.append(row.decisions_per_s / base if row.decisions_per_s and base else None)
    return ratios


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def _middle(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.median(known)) if known else "-"


def _worst(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    row = min(rows, key=lambda row: row.best or 0.0)
    low, high = row.best_interval or (0.0, 0.0)
    return f"seed {row.seed}: {row.supervised:.2f}, {row.best:.2f} ({low:.2f} to {high:.2f})"


def notes(grid: Grid, rows: Sequence[Row], complete: int) -> list[str]:
    """What a reader of the table must know."""
    counts = sorted({row.n_eval for row in rows})
    lines = [
        f"Median over the seeds, and their range; success on {' or '.join(map(str, counts)) or 'no'} held-out "
        "starts, deterministic ODE."
    ]
    missing = len(grid.cells) - complete
    if missing:
        lines.append(f"Not complete: {missing} of {len(grid.cells)} cells are missing.")
    versions = {source for row in rows for source in row.made_with["source"]}
    if len(versions) > 1:
        lines.append(f"Made with {len(versions)} versions of the sources: {', '.join(sorted(versions))}.")
    return lines
