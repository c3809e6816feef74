"""Pictures of learning curves: validation success over environment steps, from the raw curves of a grid.

python -m benchmarks.grid.picture benchmarks/results/grid/*    # draws curves.png of each folder anew
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A panel for each variant, in place of one for each task, where a task has more variants than colours tell apart.
MANY_VARIANTS = 6
PANEL_INCHES, LEAST_WIDTH_INCHES, LEGEND_INCHES = (3.4, 2.6), 7.0, 0.5
DPI = 110


@dataclass(frozen=True)
class Line:
    """The curve of one run.

    Attributes:
        task: Its task.
        seed: Its seed.
        variant: Its variant.
        points: Environment steps, and success on the validation starts.
        before: Success of the supervised policy on held-out starts.
    """

    task: str
    seed: int
    variant: str
    points: list[tuple[float, float]]
    before: float


def points_of(curve: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """The validations of a raw curve."""
    return [(line["env_steps"], line["eval/success"]) for line in curve if "eval/success" in line]


def read(folder: Path) -> list[Line]:
    """The lines of a folder of results; a row whose curve is not there has none."""
    # Loads no other part of the grid: a picture needs the results alone.
    from .plan import slug

    rows: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["rows"]
    lines = []
    for row in rows:
        label = f"{slug([row['task']])}_{row['seed']}_{slug([row['variant']])}"
        file = folder / "curves" / f"{label}.jsonl"
        if file.exists():
            curve = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            lines.append(Line(row["task"], row["seed"], row["variant"], points_of(curve), row["supervised"]))
    return lines


def draw(lines: Sequence[Line], file: Path) -> None:
    """Draws a panel for each task, or for each variant of a single task that has many of them.

    Colours tell variants apart, or seeds where there is only one variant in a panel.

    Args:
        lines: At least one, each with a validation.
        file: Where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(line.task for line in lines))
    variants = list(dict.fromkeys(line.variant for line in lines))
    by_variant = len(tasks) == 1 and len(variants) > MANY_VARIANTS
    titles = variants if by_variant else tasks
    by_seed = by_variant or len(variants) == 1
    names = [f"seed {seed}" for seed in sorted({line.seed for line in lines})] if by_seed else variants
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    columns = min(5 if by_variant else 3, len(titles))
    rows = -(-len(titles) // columns)
    width, height = PANEL_INCHES
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(max(LEAST_WIDTH_INCHES, width * columns), height * rows + LEGEND_INCHES),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel, title in zip(panels.flat, titles, strict=False):
        shown = [line for line in lines if title == (line.variant if by_variant else line.task)]
        for line in shown:
            steps, success = zip(*line.points, strict=True)
            colour = colours[f"seed {line.seed}" if by_seed else line.variant]
            panel.plot([step / 1000 for step in steps], success, ".-", color=colour, lw=1.2, ms=4, alpha=0.85)
        panel.axhline(statistics.median(line.before for line in shown), color="tab:gray", ls="--", lw=1)
        panel.set(title=title[:40], ylim=(0, 1.02))
        panel.title.set_size("medium")
        panel.grid(alpha=0.25)
    for panel in list(panels.flat)[len(titles) :]:
        panel.remove()
    figure.supxlabel("thousand environment steps", size="medium")
    figure.supylabel("success, validation starts", size="medium")
    handles = [plt.Line2D([], [], color=colour, marker=".", label=name) for name, colour in colours.items()]
    handles.append(
        plt.Line2D([], [], color="tab:gray", ls="--", label="supervised (median, held-out starts)")
    )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(3 * columns, 4, len(handles)), frameon=False
    )
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def main() -> None:
    """Draws the pictures of the folders that are named."""
    for name in sys.argv[1:]:
        folder = Path(name)
        lines = [line for line in read(folder) if line.points]
        if lines:
            draw(lines, folder / "curves.png")
            print(folder / "curves.png")


if __name__ == "__main__":
    main()
