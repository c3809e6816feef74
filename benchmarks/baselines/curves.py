"""Learning curves as JSON lines: how a run writes them, and how several runs are put side by side.

A file of a run has its settings in the first line, one line per evaluation, and the held-out evaluation last:

    {"settings": {"method": "sac", "task": "peg-insert-side-v3", "seed": 0, ...}}
    {"env_steps": 0, "seconds": 0.0, "success": 0.0, "n": 64}
    {"held_out": {"success": 0.4, "n": 100, "last_success": 0.3, "env_steps": 400000, "seconds": 2400.0}}

Seconds are those of training; evaluations stop the clock.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "results" / "baselines"


@dataclass(frozen=True)
class Point:
    """One evaluation during training.

    Attributes:
        env_steps: Environment steps taken for training until then.
        seconds: Wall time of training until then.
        success: Share of the validation starts that were solved.
        n: Number of validation starts, 0 if the file does not tell.
    """

    env_steps: int
    seconds: float
    success: float
    n: int


@dataclass(frozen=True)
class HeldOut:
    """The evaluation on the held-out starts after training.

    Attributes:
        success: Share solved by the weights that were best on the validation starts.
        n: Number of held-out starts.
        last_success: Share solved by the weights at the end of training, if that was measured.
        env_steps: Environment steps of the whole training.
        seconds: Wall time of the whole training.
        imitation_minutes: Wall time of imitating the demonstrations before reinforcement learning, which is not in
            `seconds`.
    """

    success: float
    n: int
    last_success: float | None = None
    env_steps: int | None = None
    seconds: float | None = None
    imitation_minutes: float | None = None


@dataclass(frozen=True)
class Curve:
    """One run of one method.

    Attributes:
        method: `pi_rl`, `sac` or `ppo`.
        points: Evaluations in the order of training.
        held_out: The last evaluation, None if the run has none (yet).
        settings: What the run was made with.
    """

    method: str
    points: tuple[Point, ...]
    held_out: HeldOut | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def env_steps(self) -> np.ndarray:
        """Environment steps of the evaluations, `[P]`."""
        return np.array([point.env_steps for point in self.points], dtype=float)

    @property
    def minutes(self) -> np.ndarray:
        """Minutes of training at the evaluations, `[P]`."""
        return np.array([point.seconds for point in self.points]) / 60

    @property
    def success(self) -> np.ndarray:
        """Success at the evaluations, `[P]`."""
        return np.array([point.success for point in self.points])


class CurveWriter:
    """Writes the file of one run, line by line, so that an interrupted run leaves what it had."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")

    def add(self, point: Point) -> None:
        """Appends an evaluation."""
        self._append(asdict(point))

    def finish(self, held_out: HeldOut) -> None:
        """Appends the last line, which marks the run as finished."""
        self._append({"held_out": asdict(held_out)})

    def _append(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def run_file(folder: Path, method: str, task: str, seed: int) -> Path:
    """Where the curve of a run is kept."""
    return folder / f"{method}_{task}_{seed}.jsonl"


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def finished(file: Path) -> bool:
    """Whether the run of this file came to its end."""
    return file.exists() and "held_out" in _rows(file)[-1]


def read_baseline(file: Path) -> Curve:
    """Reads a file that `CurveWriter` wrote, finished or not."""
    rows = _rows(file)
    settings = rows[0]["settings"]
    held_out = next((HeldOut(**row["held_out"]) for row in rows if "held_out" in row), None)
    points = tuple(Point(**row) for row in rows[1:] if "held_out" not in row)
    return Curve(settings["method"], points, held_out, settings)


def _either(row: dict[str, Any], name: str) -> float | None:
    return row.get(f"progress/{name}", row.get(name))


def read_pi_rl(file: Path) -> Curve:
    """Reads the curve of a PI-RL run, and its held-out success where that lies beside it.

    Args:
        file: `metrics.jsonl` of a run, or a raw curve of a grid (`benchmarks/results/grid/<name>/curves`).

    Raises:
        ValueError: It has no evaluations.
    """
    rows = _rows(file)
    points = tuple(
        Point(int(steps), seconds, float(row["eval/success"]), int(row.get("eval/episodes", 0)))
        for row, steps, seconds in zip(rows, *_clock(rows), strict=True)
        if "eval/success" in row
    )
    if not points:
        raise ValueError(f"{file} has no line with 'eval/success'")
    return Curve("pi_rl", points, _demo_result(file) or _grid_result(file), {"file": str(file)})


def _clock(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Environment steps and seconds of every line; an evaluation without its own time has that of the line before."""
    steps, seconds = [0.0], [0.0]
    for row in rows:
        steps.append(row.get("progress/env_steps", row.get("env_steps", steps[-1])))
        seconds.append(row.get("progress/seconds", row.get("seconds", seconds[-1])))
    return steps[1:], seconds[1:]


def _demo_result(file: Path) -> HeldOut | None:
    """What the demo wrote for this run, beside it or one folder above."""
    for summary in (file.parent / "summary.json", file.parent.parent / "summary.json"):
        found = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        if "pi_rl_success" in found:
            return HeldOut(success=found["pi_rl_success"], n=found["n_eval"])
    return None


def _grid_result(file: Path) -> HeldOut | None:
    """What the grid's summary, one folder above, says of this curve."""
    summary = file.parent.parent / "summary.json"
    rows = json.loads(summary.read_text(encoding="utf-8")).get("rows", []) if summary.exists() else []
    for row in rows:
        if f"{row['task']}_{row['seed']}_{row['variant']}" == file.stem and row["best"] is not None:
            return HeldOut(
                success=row["best"],
                n=row["n_eval"],
                last_success=row["last"],
                imitation_minutes=row["supervised_minutes"],
            )
    return None


def median_curve(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], resolution: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Median over runs whose evaluations lie at different places.

    Args:
        xs: Places of each run's evaluations, increasing.
        ys: Success at these places.
        resolution: Number of places of the result.

    Returns:
        Places from 0 to where the first of the runs ends, and the median of the linearly interpolated runs there.
    """
    places = np.linspace(0.0, min(x[-1] for x in xs), resolution)
    return places, np.median([np.interp(places, x, y) for x, y in zip(xs, ys, strict=True)], axis=0)


def at(x: np.ndarray, success: np.ndarray, place: float, slack: float = 0.02) -> float | None:
    """Success of the last evaluation up to a place.

    Args:
        x: Places of the evaluations, increasing.
        success: Success there.
        place: Environment steps or minutes.
        slack: A run that ends less than this share before the place counts as having reached it.

    Returns:
        None if the run ended before.
    """
    if x[-1] < place * (1 - slack):
        return None
    return float(success[np.searchsorted(x, place, side="right") - 1])


def reached(x: np.ndarray, success: np.ndarray, level: float) -> float | None:
    """Place of the first evaluation with at least this success, None if there is none."""
    where = np.flatnonzero(success >= level)
    return float(x[where[0]]) if len(where) else None
