"""Runs a grid of learning runs, picks up where it was stopped, and sums it up.

    python -m benchmarks.grid single_task --jobs 2

Complete stages are kept under `outputs/grid` and shared between grids; the summary goes to
`benchmarks/results/grid/<name>`.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .execute import Processes, Runner, Stop, Stopped, source
from .plan import Cell, Grid, GridError, load, select
from .report import RESULTS, ROOT, summarise
from .stages import OUTPUT, stages


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__.splitlines()[0])
    parser.add_argument("grid", help="a name in benchmarks/grids, or a path that ends in .json")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at a time")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="task=...,seed=...,variant=...",
        help="only these cells; a name given twice means either",
    )
    parser.add_argument("--supervised_only", action="store_true", help="stop before PI-RL")
    parser.add_argument("--dry_run", action="store_true", help="say what is missing, run nothing")
    parser.add_argument("--summary", action="store_true", help="only sum up what is there")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="folder of the stages")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="folder of the summaries")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, 1 when a cell failed, 2 for a wrong grid file, 130 after Ctrl-C.
    """
    options = parse_arguments(arguments)
    options.output_dir, options.results_dir = options.output_dir.resolve(), options.results_dir.resolve()
    try:
        grid = load(options.grid)
        cells = select(grid.cells, options.only)
    except GridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.summary:
        return show(grid, options)
    stop = Stop()
    runner = Runner(
        Processes(stop, options.jobs),
        stop,
        jobs=options.jobs,
        output=options.output_dir,
        supervised_only=options.supervised_only,
    )
    missing = [cell for cell in cells if runner.missing(cell)]
    print(f"{grid.name}: {len(missing)} of {len(cells)} cells to do", flush=True)
    if options.dry_run:
        for cell in missing:
            print(f"{cell}: {', '.join(stage.title for stage in runner.missing(cell))}")
        return 0
    warn_of_other_sources(cells, options.output_dir)
    stop.listen()
    code = run(runner, missing)
    show(grid, options)
    return code


def run(runner: Runner, cells: list[Cell]) -> int:
    """Runs cells; returns the exit code."""
    began = time.monotonic()
    try:
        failed = runner.run(cells)
    except Stopped:
        print("stopped; the same command goes on from here\n")
        return 130
    print(f"{len(cells) - len(failed)} cells done in {(time.monotonic() - began) / 60:.1f} min\n")
    if failed:
        names = ", ".join(map(str, failed))
        print(f"{len(failed)} failed: {names}; the same command tries them again\n", file=sys.stderr)
    return int(bool(failed))


def show(grid: Grid, options: argparse.Namespace) -> int:
    """Writes and prints the summary."""
    print(summarise(grid, options.output_dir, options.results_dir))
    print(f"in {os.path.relpath(options.results_dir / grid.name, ROOT)}")
    return 0


def warn_of_other_sources(cells: list[Cell], output: Path) -> None:
    """Says how many complete stages were made with other sources than those that lie there now."""
    now = source().rpartition("-")[2]
    done = {stage.folder: stage for cell in cells for stage in stages(cell, output).all() if stage.done}
    others = sum(stage.result()["source"].rpartition("-")[2] != now for stage in done.values())
    if others:
        print(
            f"note: {others} of {len(done)} complete stages were made with other sources or recipes than now; "
            "remove their folders, or name another --output_dir, to make them again",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
