"""Runs the benchmarks and prints one table.

Every `benchmarks/bench_*.py` has a function `run(quick: bool)` that returns rows
`{"name", "value", "unit", "target", "detail"}`. The target is `None`, a bound such as `">= 5"` or `"<= 0.1"`,
or a number, which means at least that.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
Verdict = Literal["pass", "short", "", "error"]


@dataclass(frozen=True)
class Row:
    """One measured figure and how it compares with what was asked of it."""

    benchmark: str
    name: str
    value: float | None
    unit: str
    target: str | None
    verdict: Verdict
    detail: str


def judge(value: float, target: str | None) -> Verdict:
    """Compares a figure with its bound, `">= x"` or `"<= x"`."""
    if target is None:
        return ""
    relation, _, bound = target.partition(" ")
    if relation not in (">=", "<="):
        raise ValueError(f"target '{target}' is no bound: write '>= 5' or '<= 0.1'")
    met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return "pass" if met else "short"


def measure(benchmark: str, quick: bool) -> list[Row]:
    """Runs one benchmark; an exception becomes a row of its own, so that the others still run."""
    try:
        rows = importlib.import_module(f"bench_{benchmark}").run(quick)
        return [_row(benchmark, row) for row in rows]
    except Exception as error:
        traceback.print_exc()
        return [Row(benchmark, "failed", None, "", None, "error", f"{type(error).__name__}: {error}")]


def _row(benchmark: str, row: dict[str, Any]) -> Row:
    target = row.get("target")
    target = f">= {target:g}" if isinstance(target, int | float) else target
    verdict = judge(row["value"], target)
    return Row(
        benchmark, row["name"], float(row["value"]), row["unit"], target, verdict, row.get("detail", "")
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text; the longest column, the detail, comes last."""
    header = ("benchmark", "measure", "value", "unit", "target", "", "detail")
    cells = [
        (row.benchmark, row.name, _figure(row.value), row.unit, row.target or "", row.verdict, row.detail)
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    return "\n".join(_line(line, widths) for line in [header, *cells])


def _figure(value: float | None) -> str:
    """Four significant digits, and all of a larger whole number."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    # Figures read best flush right.
    aligned = [
        cell.rjust(width) if column == 2 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def machine() -> dict[str, Any]:
    """What the figures depend on, without what would tell this machine from another of its kind."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(rows: list[Row], seconds: float, complete: bool) -> Path:
    """Writes the rows as JSON.

    Args:
        rows: What was measured.
        seconds: How long that took.
        complete: Every benchmark ran at full length. Only such a run becomes the record of its day and the
            latest one; any other goes to a file of its own.

    Returns:
        The file that was written.
    """
    now = datetime.now(UTC)
    record = {
        "date": now.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }
    names = [f"{now:%Y-%m-%d}.json", "latest.json"] if complete else ["partial.json"]
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        (RESULTS / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return RESULTS / names[0]


def arguments(available: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Runs the benchmarks and prints one table.")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=available,
        default=available,
        metavar="NAME",
        help=f"run only these, of: {', '.join(available)}",
    )
    parser.add_argument("--quick", action="store_true", help="shorter, noisier measurements")
    return parser.parse_args()


def main() -> int:
    """Runs the chosen benchmarks; the exit code is 1 when one of them failed to run."""
    available = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    options = arguments(available)
    started = time.monotonic()
    rows: list[Row] = []
    for benchmark in options.only:
        print(f"running {benchmark} ...", file=sys.stderr, flush=True)
        rows += measure(benchmark, options.quick)
    complete = not options.quick and options.only == available
    path = save(rows, time.monotonic() - started, complete)
    print(table(rows))
    print(f"\n{len(rows)} figures, also in {path.relative_to(FOLDER.parent)}")
    return int(any(row.verdict == "error" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
