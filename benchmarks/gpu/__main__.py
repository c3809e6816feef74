"""Measures memory and speed of pi0, prints a table and writes it as JSON.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --size tiny --device cpu

Weights are random and observations are noise; nothing is downloaded.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.run import RESULTS, Row, machine, table

from .measure import SCALES, Job, collection_speed, memory, update_speed
from .policies import SIZES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measures memory and speed of pi0 on one GPU."
    )
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--output", type=Path, help="the JSON file; one in benchmarks/results/gpu if not given"
    )
    return parser.parse_args(arguments)


def measure(job: Job, compiled: bool) -> list[Row]:
    """All rows, each of which is printed as soon as it is there."""
    rows = []
    for part in (update_speed(job), collection_speed(job, compiled), memory(job)):
        for row in part:
            print(
                f"{row.benchmark} {row.name}: {row.value} {row.unit} {row.detail}",
                file=sys.stderr,
                flush=True,
            )
            rows.append(row)
    return rows


def save(rows: list[Row], options: argparse.Namespace) -> Path:
    """Writes the rows and what they were measured with."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    made_with = {"size": options.size, "dtype": options.dtype, "device": device}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | made_with,
        "rows": [asdict(row) for row in rows],
    }
    file = options.output or RESULTS / "gpu" / f"{options.size}_{options.device}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    return file


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU; try --size tiny --device cpu", file=sys.stderr)
        return 2
    job = Job(SIZES[options.size], SCALES[options.size], options.device, options.dtype)
    rows = measure(job, compiled=not options.no_compile)
    file = save(rows, options)
    print(table(rows))
    print(f"\n{len(rows)} figures, also in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
