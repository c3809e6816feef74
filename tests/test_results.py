"""The tables of results on the pages say what the raw results say."""

import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.baselines import report
from lerobot_policy_pi_rl.runtime.findings import Findings, advise

ROOT = Path(__file__).parent.parent
GRID = ROOT / "benchmarks/results/grid"
README, BENCHMARKS, BASELINES = ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/baselines.md"
TASK = "peg-insert-side-v3"


def shown(page: Path, heading: str) -> list[list[str]]:
    """Cells of the table whose heading begins so, without emphasis."""
    lines = page.read_text().splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith(heading)]
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("*", "").replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def cells(grid: str) -> list[dict[str, Any]]:
    """The cells of a grid, ordered by seed."""
    rows = json.loads((GRID / grid / "summary.json").read_text())["rows"]
    return sorted(rows, key=lambda row: row["seed"])


def by_variant(grid: str) -> dict[str, list[dict[str, Any]]]:
    rows = cells(grid)
    return {
        name: [row for row in rows if row["variant"] == name] for name in {row["variant"] for row in rows}
    }


def interval(row: dict[str, Any]) -> str:
    low, high = row["best_interval"]
    return f"{row['best']:.2f} ({low:.2f} to {high:.2f})"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def listed(values: list[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def test_single_tasks() -> None:
    expected = [
        [
            row["task"],
            str(row["demonstrations"]),
            str(row["seed"]),
            f"{row['supervised']:.2f}",
            interval(row),
            f"{row['last']:.2f}",
            f"{row['env_steps']:,}",
        ]
        for row in cells("single_task")
    ]
    assert sorted(shown(README, "| task | demonstrations | seed |")) == sorted(expected)


def test_explorers() -> None:
    tasks = ("peg-insert-side-v3", "reach-v3")

    def row(grid: str, variant: str, value: str) -> list[str]:
        rows = by_variant(grid)[variant]
        return [spread([row[value] for row in rows if row["task"] == task]) for task in tasks]

    assert [found[1:] for found in shown(BENCHMARKS, "| explorer |")] == [
        row("single_task", "default", "supervised"),
        row("single_task", "default", "best"),
        row("explorers", "flow_sde_joint", "best"),
        row("explorers", "flow_noise", "best"),
    ]


def mean_over_curves(rows: list[dict[str, Any]], metric: str, form: str) -> str:
    """A metric's mean over a run and over the seeds; a dash where it does not exist."""
    means = []
    for row in rows:
        name = f"{row['task']}_{row['seed']}_{row['variant']}.jsonl"
        lines = (GRID / "ablation/curves" / name).read_text().splitlines()
        values = [line[metric] for line in map(json.loads, lines) if metric in line]
        means += [statistics.mean(values)] if values else []
    return format(statistics.mean(means), form) if means else "-"


def test_ablation() -> None:
    variants = by_variant("ablation")
    expected = {
        name: [
            *(f"{row['last']:.2f}" for row in rows),
            f"{statistics.mean(row['last'] for row in rows):.2f}",
            mean_over_curves(rows, "ppo/approx_kl", ".3f"),
            mean_over_curves(rows, "ppo/clip_fraction", ".2f"),
            mean_over_curves(rows, "ppo/explained_variance", ".2f"),
        ]
        for name, rows in variants.items()
    }
    assert {row[0]: row[1:] for row in shown(BENCHMARKS, "| variant | seed 0 |")} == expected


def test_the_ablation_is_complete() -> None:
    grid = json.loads((ROOT / "benchmarks/grids/ablation.json").read_text())
    assert set(grid["variants"]) == set(by_variant("ablation"))


def test_the_check_of_reported_policies() -> None:
    """The table, and that the present rules see a signal in what PI-RL has learned from."""
    names = {field.name for field in fields(Findings)}
    found = []
    for name in ("pick_place_seed_0", "pick_place_seed_1", "pick_place_seed_2", "mt10_half_seed_0"):
        record = json.loads((ROOT / f"benchmarks/results/check/{name}.json").read_text())
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        findings = Findings(**{key: value for key, value in given.items() if key in names})
        advice = advise(findings)
        assert advice.signal
        assert record["verdict"] == advice.verdict
        found.append(
            [
                f"{findings.ode_success:.2f}",
                f"{findings.exploring_success:.2f}",
                *(
                    f"{share:.0%}".replace("%", " %")
                    for share in (findings.never, findings.sometimes, findings.always)
                ),
                f"{100 * findings.clipped:.1f} % / {100 * findings.clipped_ode:.1f} %",
                f"{findings.solved_length:.0f} of {findings.time_limit}",
                f"{findings.late:.0%}".replace("%", " %"),
            ]
        )
    assert [row[1:] for row in shown(ROOT / "docs/check.md", "| policy | by the ODE |")] == found


def test_asynchronous_collection() -> None:
    expected = {
        str(staleness): [
            listed([row["last"] for row in rows], ".2f"),
            listed([row["decisions_per_s"] for row in rows], ".0f"),
        ]
        for staleness in (0, 1, 2)
        for rows in [by_variant("async")[f"staleness_{staleness}"]]
    }
    assert {row[0]: row[2:4] for row in shown(BENCHMARKS, "| `max_staleness` |")} == expected


def test_through_a_small_camera() -> None:
    expected = [
        [
            str(row["seed"]),
            f"{row['supervised']:.2f}",
            interval(row),
            f"{row['last']:.2f}",
            f"{row['rl_minutes']:.1f}",
        ]
        for row in cells("camera")
    ]
    assert shown(BENCHMARKS, "| seed | supervised | best checkpoint (95 %) |") == expected


def thousands(steps: str) -> str:
    return f"{round(int(steps.replace(',', '')), -3):,}" if steps[0].isdigit() else steps


def test_ten_tasks_from_half_of_the_starts() -> None:
    seeds = [row for row in cells("mt10_half") if row["best"] is not None]
    expected = [
        [
            task.removesuffix("-v3"),
            *(f"{row['per_task'][task][when]:.2f}" for row in seeds for when in ("supervised", "best")),
        ]
        for task in seeds[0]["per_task"]
    ]
    assert shown(BENCHMARKS, "| task | seed 0: supervised |")[:-1] == expected
    mean = shown(BENCHMARKS, "| task | seed 0: supervised |")[-1][1:]
    assert mean[1::2] == [interval(row) for row in seeds]
    assert [cell.split()[0] for cell in mean[::2]] == [f"{row['supervised']:.2f}" for row in seeds]


def test_against_what_people_use() -> None:
    files = sorted(report.GRID.glob(f"{TASK}_*_default.jsonl"))
    curves = report.collect(report.RESULTS, TASK, files)
    steps, minutes = (
        min(values)
        for values in zip(*[(c.env_steps[-1], c.minutes[-1]) for c in curves["pi_rl"]], strict=True)
    )
    expected = []
    for method in ("pi_rl", "ppo", "sac"):
        _, _, held_out, _, at_steps, at_minutes, to_level, in_minutes, all_steps, all_minutes, _ = report.row(
            method, curves[method], steps, minutes, report.LEVEL
        )
        whole = f"{thousands(all_steps)} in {float(all_minutes):g}"
        expected.append([held_out, at_steps, at_minutes, thousands(to_level), in_minutes, whole])
    places = [f"{thousands(f'{steps:.0f}')} steps", f"{minutes:.1f} minutes"]
    heading = "| | held-out success | " + " | ".join(f"success after {place}" for place in places)
    assert [row[1:] for row in shown(BASELINES, heading)] == expected


def test_speed() -> None:
    record = json.loads((ROOT / "benchmarks/results/latest.json").read_text())
    value = {row["name"]: row["value"] for row in record["rows"]}
    assert {row["verdict"] for row in record["rows"]} <= {"pass", ""}
    fast = [ratio for name, ratio in value.items() if name.startswith("fast environment over stock, ")]
    pushes = [value[f"push over {what}, all tensors trained"] for what in ("the policy", "policy and critic")]
    assert [row[1].split(" (")[0] for row in shown(BENCHMARKS, "| benchmark | value | wanted |")] == [
        f"{value['training loop over bare environments']:.2f}",
        f"{value["our actor over a stock one, with MetaWorld's environment"]:.1f}",
        f"{value['our actor over a stock one, with our fast environment']:.1f}",
        f"{min(fast):.1f} to {max(fast):.1f}",
        "; ".join(f"{ratio:.2f}" for ratio in pushes),
    ]


def test_pi0_at_its_real_size() -> None:
    lines = (ROOT / "benchmarks/results/gpu/real_cpu_float32.txt").read_text().splitlines()
    measured = [float(line.rsplit(": ", 1)[1].split()[0]) for line in lines[1:6]]
    off = [line.rsplit(" ", 1)[1] for line in lines[2:5]]
    page = BENCHMARKS.read_text()
    (heading,) = [number for number, line in enumerate(page.splitlines()) if "real size on a CPU" in line]
    table = [line for line in page.splitlines()[heading:] if line.startswith("|")][2:8]
    values = [line.strip("| ").split(" | ")[1] for line in table]
    exact, kept, again, plain, speedup = measured
    rates = [f"{rate:.3f} samples/s" for rate in (kept, again, plain)]
    assert values == [f"{exact:g}", ", ".join(f"{float(one):g}" for one in off), *rates, f"{speedup:.1f}"]
