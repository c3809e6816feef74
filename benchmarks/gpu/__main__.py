"""Measures exactness, speed and memory of pi0, prints a table and writes it as JSON.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --size tiny --device cpu
    python -m benchmarks.gpu --device cpu --dtype float32 --scale few --trained expert --no_compile

Weights are random and observations are noise; nothing is downloaded.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.run import RESULTS, Row, machine, table
from lerobot_policy_pi_rl.configuration_pi_rl import TRAINABLE

from .measure import SCALES, Job, collection_speed, exactness, memory, update_speed
from .policies import SIZES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measures exactness, speed and memory of pi0 on one GPU.",
    )
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scale", choices=SCALES, help="how much is measured; that of the size if not given")
    parser.add_argument(
        "--trained", nargs="+", choices=TRAINABLE, default=TRAINABLE, help="of which memory is measured"
    )
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--output", type=Path, help="the JSON file; one in benchmarks/results/gpu if not given"
    )
    return parser.parse_args(arguments)


def measure(job: Job, compiled: bool, trained: Sequence[str]) -> list[Row]:
    """All rows, each of which is printed as soon as it is there; those so far, if it is interrupted."""
    rows: list[Row] = []
    parts = (exactness(job), update_speed(job), collection_speed(job, compiled), memory(job, trained))
    with contextlib.suppress(KeyboardInterrupt):
        for row in itertools.chain(*parts):
            said = f"{row.benchmark} {row.name}: {row.value} {row.unit} {row.detail}"
            print(said, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def save(rows: list[Row], options: argparse.Namespace) -> Path:
    """Writes the rows and what they were measured with."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    scale = options.scale or options.size
    made_with = {"size": options.size, "scale": scale, "dtype": options.dtype, "device": device}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | made_with,
        "rows": [asdict(row) for row in rows],
    }
    file = options.output or RESULTS / "gpu" / f"{options.size}_{options.device}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return file


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU; try --size tiny --device cpu", file=sys.stderr)
        return 2
    scale = SCALES[options.scale or options.size]
    job = Job(SIZES[options.size], scale, options.device, options.dtype)
    rows = measure(job, not options.no_compile, options.trained)
    file = save(rows, options)
    print(table(rows))
    print(f"\n{len(rows)} figures, also in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
