"""Puts the curves of all methods on one task side by side: one picture, one table.

python -m benchmarks.baselines.report --task peg-insert-side-v3
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .curves import RESULTS, Curve, at, median_curve, reached, read_baseline, read_pi_rl

NAMES = {
    "pi_rl": "PI-RL",
    "sac": "LeRobot SAC, demonstrations in the offline buffer",
    "ppo": "PPO (stable-baselines3), cloned first",
}
COLOURS = {"pi_rl": "tab:blue", "sac": "tab:orange", "ppo": "tab:green"}
GRID = RESULTS.parent / "grid" / "single_task" / "curves"
LEVEL = 0.9
HEADINGS = (
    "method",
    "seeds",
    "held-out success",
    "with the last weights",
    "success at {steps:,.0f} steps",
    "success at {minutes:.1f} min",
    "steps to {level:.0%}",
    "minutes to {level:.0%}",
    "steps in all",
    "minutes in all",
    "minutes of imitation before",
)


def collect(folder: Path, task: str, pi_rl: Sequence[Path]) -> dict[str, list[Curve]]:
    """Reads the finished curves of a task by method, PI-RL's first.

    Args:
        folder: Where the baselines' curves are.
        task: Task name.
        pi_rl: PI-RL's curves.
    """
    curves = {"pi_rl": [read_pi_rl(file) for file in pi_rl]}
    for method in ("sac", "ppo"):
        read = [read_baseline(file) for file in sorted(folder.glob(f"{method}_{task}_*.jsonl"))]
        curves[method] = [curve for curve in read if curve.held_out is not None]
    return {method: runs for method, runs in curves.items() if runs}


def _median(values: Sequence[float | None]) -> float | None:
    """Median of values that all runs have; None if one run lacks it."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.2f} ({', '.join(f'{value:.2f}' for value in known)})"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _first(places: Sequence[float | None], form: str) -> str:
    """Median place where a level was reached; how many runs reached it, if not all did."""
    known = [place for place in places if place is not None]
    if not known:
        return "never"
    median = form.format(statistics.median(known))
    return median if len(known) == len(places) else f"{median} ({len(known)} of {len(places)} seeds)"


def row(method: str, curves: Sequence[Curve], steps: float, minutes: float, level: float) -> list[str]:
    """One line of the table.

    Args:
        method: Whose it is.
        curves: Its runs.
        steps: Environment steps at which the methods are compared.
        minutes: Minutes at which they are compared.
        level: Validation success whose first reaching is reported.
    """
    held_out = [curve.held_out for curve in curves if curve.held_out is not None]
    return [
        NAMES[method],
        str(len(curves)),
        _spread([result.success for result in held_out]),
        _spread([result.last_success for result in held_out]),
        _figure(_median([at(curve.env_steps, curve.success, steps) for curve in curves]), "{:.2f}"),
        _figure(_median([at(curve.minutes, curve.success, minutes) for curve in curves]), "{:.2f}"),
        _first([reached(curve.env_steps, curve.success, level) for curve in curves], "{:,.0f}"),
        _first([reached(curve.minutes, curve.success, level) for curve in curves], "{:.1f}"),
        _figure(_median([curve.env_steps[-1] for curve in curves]), "{:,.0f}"),
        _figure(_median([curve.minutes[-1] for curve in curves]), "{:.1f}"),
        _figure(_median([result.imitation_minutes for result in held_out]), "{:.2f}"),
    ]


def table(curves: Mapping[str, Sequence[Curve]], steps: float, minutes: float, level: float = LEVEL) -> str:
    """The Markdown table; see `row`."""
    headings = [heading.format(steps=steps, minutes=minutes, level=level) for heading in HEADINGS]
    lines = [headings, ["---"] * len(headings)]
    lines += [row(method, runs, steps, minutes, level) for method, runs in curves.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(curves: Mapping[str, Sequence[Curve]], task: str, file: Path) -> None:
    """Draws success over environment steps and over minutes: a thin line per seed, a thick one for their median."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_steps, by_minutes) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for method, runs in curves.items():
        for panel, xs in (
            (by_steps, [curve.env_steps / 1000 for curve in runs]),
            (by_minutes, [curve.minutes for curve in runs]),
        ):
            ys = [curve.success for curve in runs]
            for x, y in zip(xs, ys, strict=True):
                panel.plot(x, y, color=COLOURS[method], lw=0.8, alpha=0.45)
            panel.plot(*median_curve(xs, ys), color=COLOURS[method], lw=2.2, label=NAMES[method])
    by_steps.set(xlabel="thousand environment steps", ylabel="success, validation starts", ylim=(0, 1.02))
    # From a fraction of a minute to an hour.
    by_minutes.set_xscale("symlog", linthresh=1.0)
    by_minutes.set_xlim(left=0)
    by_minutes.xaxis.set_major_formatter("{x:g}")
    by_minutes.set(xlabel="minutes of training (logarithmic from 1 on)")
    figure.suptitle(task)
    handles, labels = by_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.report", description=__doc__)
    parser.add_argument("--task", default="peg-insert-side-v3")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="folder of the curves")
    parser.add_argument(
        "--pi_rl",
        type=Path,
        nargs="*",
        help="curves of PI-RL: metrics.jsonl of runs, or curves of a grid (default: those of single_task)",
    )
    parser.add_argument("--steps", type=float, help="compare at so many steps (default: where PI-RL ends)")
    parser.add_argument(
        "--minutes", type=float, help="compare at so many minutes (default: where PI-RL ends)"
    )
    parser.add_argument("--level", type=float, default=LEVEL, help="success whose first reaching is reported")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    options = parse_arguments()
    pi_rl = options.pi_rl
    if pi_rl is None:
        pi_rl = sorted(GRID.glob(f"{options.task}_*_default.jsonl"))
    curves = collect(options.results_dir, options.task, pi_rl)
    if not curves:
        raise SystemExit(f"no finished curve of {options.task} in {options.results_dir}")
    # Without PI-RL, where the shortest of the others ends.
    ends = curves.get("pi_rl") or [curve for runs in curves.values() for curve in runs]
    steps = options.steps or min(curve.env_steps[-1] for curve in ends)
    minutes = options.minutes or min(curve.minutes[-1] for curve in ends)
    text = table(curves, steps, minutes, options.level)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    (options.results_dir / f"{options.task}.md").write_text(text, encoding="utf-8")
    draw(curves, options.task, options.results_dir / f"{options.task}.png")
    print(text)


if __name__ == "__main__":
    main()
