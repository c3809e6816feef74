"""The fast environment over the stock one, on each of MetaWorld's 50 tasks; too long to be part of `make bench`.

`python benchmarks/sweep_environment.py` writes `results/environment_all_tasks.jsonl`, one line per task.
"""

import json
import statistics
import sys
from pathlib import Path

from bench_environment import TARGET, compare
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

RESULT = Path(__file__).parent / "results/environment_all_tasks.jsonl"
ROUNDS = 5


def main() -> None:
    """Measures, writes and summarises."""
    ratios = {}
    lines = []
    for task in sorted(ALL_V3_ENVIRONMENTS):
        row = compare(task, ROUNDS)
        ratios[task] = row["value"]
        lines.append(json.dumps({"task": task, "ratio": round(row["value"], 2), "detail": row["detail"]}))
        print(lines[-1], file=sys.stderr, flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    slowest, fastest = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    below = sum(ratio < TARGET for ratio in ratios.values())
    print(
        f"{len(ratios)} tasks: median {statistics.median(ratios.values()):.2f}, "
        f"{ratios[slowest]:.2f} ({slowest}) to {ratios[fastest]:.2f} ({fastest}), {below} below {TARGET:g}"
    )


if __name__ == "__main__":
    main()
