"""A long run of a fast actor and a slow learner: does memory stay flat, and does nothing pile up?

    python -m benchmarks.soak
    python -m benchmarks.soak --minutes 3

Half of the time is synchronous collection, half of it asynchronous. The processes are those of the tests
(`tests/runtime/processes`): a small policy learns to move a point. Samples go to `benchmarks/results/soak`, as
JSON lines.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.run import FOLDER, RESULTS, Row, judge, table
from lerobot_policy_pi_rl.runtime.access import Access
from lerobot_policy_pi_rl.runtime.client import ask_status

MODES = {"synchronous": 0, "asynchronous": 2}
"""Name of each mode, and its `max_staleness`."""
# A quota is a third of a megabyte, and the actor would make many of them while the learner takes one gradient step.
SETTINGS = (
    "--steps=1000000000",
    "--policy.online_steps=1000000000000",
    "--algorithm.collection.num_envs=64",
    "--algorithm.collection.num_workers=1",
    "--algorithm.collection.decisions=32",
    "--algorithm.minibatch_size=1024",
    "--algorithm.epochs=1",
    "--save_freq=200",
)
STEP_SECONDS = 0.1
"""How long each of the learner's gradient steps takes at least."""
WARM_UP = 0.2
"""Part of the time that is not judged: allocators and caches fill up."""
GROWTH_MB = 10.0
"""Noise in a process' memory over the time that is judged."""
START_S = 300.0
END_S = 60.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of both modes together")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two samples")
    parser.add_argument("--results_dir", type=Path, default=RESULTS / "soak", help="folder of the samples")
    options = parser.parse_args(arguments)
    needed = 10 * options.every * len(MODES) / 60
    if options.every <= 0 or options.minutes < needed:
        parser.error(
            f"--minutes {options.minutes:g} is too short for --every {options.every:g}; 10 samples are needed "
            "of each mode"
        )
    return options


@contextmanager
def training(folder: Path, staleness: int) -> Iterator[Any]:
    """A learner and an actor at work; the run, with both as `parts`."""
    sys.path.insert(0, str(FOLDER.parent / "tests/runtime/processes"))
    from line_processes import LineRun, at, slow_down

    run = LineRun(folder, [*SETTINGS, f"--algorithm.collection.max_staleness={staleness}"])
    try:
        run.parts = {"learner": run.learner(faults=[at(slow_down, STEP_SECONDS)]), "actor": run.actor()}
        run.await_rows(lambda rows: len(rows) >= 5, "all of it has been at work", START_S)
        yield run
        for process in run.parts.values():
            process.signal(2)
            if process.wait(END_S) or process.errors():
                raise RuntimeError(f"it did not end in order: {process.shown[-5:]}")
    finally:
        run.end()


def sample(run: Any, began: float) -> dict[str, Any]:
    """What is in memory and in queues now."""
    memory, threads = {}, {}
    for name, process in run.parts.items():
        first = psutil.Process(process.pid)
        for number, one in enumerate([first, *sorted(first.children(recursive=True), key=lambda p: p.pid)]):
            label = f"{name} child {number}" if number else name
            memory[label], threads[label] = one.memory_info().rss, one.num_threads()
    status = ask_status("127.0.0.1", run.port, Access())
    return {
        "seconds": round(time.monotonic() - began, 2),
        "rss": memory,
        "threads": threads,
        "waiting": status["waiting"],
        "version": status["progress"]["version"],
        "decisions": status["progress"]["decisions"],
        "staleness": status["staleness"]["max"],
        "dropped": sum(status["dropped"].values()),
        "refused": sum(status["refused"].values()),
        "actors": len(status["actors"]),
    }


def soak(mode: str, seconds: float, every: float, file: Path) -> list[dict[str, Any]]:
    """Trains in one mode and writes a line every few seconds; returns all of them."""
    samples: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        training(Path(folder), MODES[mode]) as run,
        file.open("w", encoding="utf-8") as lines,
    ):
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            time.sleep(every)
            samples.append(sample(run, began))
            print(json.dumps({"mode": mode, **samples[-1]}), file=lines, flush=True)
    return samples


def judged(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples after the warm-up."""
    return [one for one in samples if one["seconds"] >= WARM_UP * samples[-1]["seconds"]]


def verdicts(mode: str, samples: Sequence[dict[str, Any]]) -> list[Row]:
    """How much memory, threads and queues grew."""
    after = judged(samples)
    times = [one["seconds"] for one in after]
    rows = []
    for name in after[0]["rss"]:
        sizes = [one["rss"][name] / 1e6 for one in after]
        slope = statistics.linear_regression(times, sizes).slope
        threads = [one["threads"][name] for one in after]
        rows.append(
            _row(
                f"{mode}: growth of the {name}",
                slope * (times[-1] - times[0]),
                "MB",
                f"<= {GROWTH_MB:g}",
                f"{3600 * slope:+.1f} MB/h; {sizes[0]:.1f} to {sizes[-1]:.1f} MB in {times[-1] - times[0]:.0f} s, "
                f"{min(threads)} to {max(threads)} threads",
            )
        )
    first, last = after[0], after[-1]
    rate = (last["decisions"] - first["decisions"]) / (times[-1] - times[0])
    quotas = f"{last['version'] - first['version']} iterations, {rate:,.0f} decisions/s"
    for queue in ("decisions", "interactions"):
        most = max(one["waiting"][queue] for one in after)
        # A quota comes with one line of statistics.
        rows.append(_row(f"{mode}: {queue} waiting, most", most, "messages", f"<= {MODES[mode] + 1}", quotas))
    rows.append(
        _row(
            f"{mode}: age of decisions, oldest",
            max(one["staleness"] for one in after),
            "versions",
            f"<= {MODES[mode]}",
            "",
        )
    )
    rows.append(
        _row(f"{mode}: dropped and refused", last["dropped"] + last["refused"], "messages", "<= 0", "")
    )
    return rows


def _row(name: str, value: float, unit: str, target: str, detail: str) -> Row:
    return Row("soak", name, float(value), unit, target, judge(value, target), detail)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks both modes; the exit code is 1 when something grew."""
    options = parse_arguments(arguments)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in MODES:
        print(f"soaking, {mode} ...", file=sys.stderr, flush=True)
        file = options.results_dir / f"{mode}.jsonl"
        rows += verdicts(mode, soak(mode, 60 * options.minutes / len(MODES), options.every, file))
    print(table(rows))
    print(f"\nsamples in {options.results_dir}")
    return int(any(row.verdict == "short" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
