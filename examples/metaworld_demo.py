"""The main job, start to finish: demonstrations, supervised training, PI-RL, and an evaluation before and after.

Run by `make demo`. Each stage is a command of LeRobot's or of this package, as a user would type it; what they
print goes to `outputs/demo/logs`. It loads nothing heavy itself, so that the commands have the cores to themselves.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TASK = "peg-insert-side-v3"
REPO_ID = "pi_rl/demo"
# Few enough that a policy trained until validation stops rising still fails often (seed 0).
NUM_DEMONSTRATIONS = 3
NUM_EVALUATIONS = 100
# Validations in a row without a new best after which supervised training ends.
PATIENCE = 3
# Starts of the reported evaluations: neither trained on nor used to choose a checkpoint.
EVALUATION_SEED = 100_000
# Quantile of the normal distribution for a two-sided 95 % interval.
Z = 1.96


@dataclass(frozen=True)
class Summary:
    """What the demo found, as written to `summary.json`."""

    task: str
    seed: int
    n_eval: int
    supervised_success: float
    pi_rl_success: float
    env_steps: int
    rl_minutes: float
    checkpoint: str


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        title: What it does.
        command: Name and arguments.
        log: Where its output goes.
    """

    title: str
    command: Sequence[str]
    log: Path


def run(stage: Stage, total: int | None = None, progress: Callable[[str], int | None] | None = None) -> None:
    """Runs a stage with a progress bar.

    Args:
        stage: What to run.
        total: Length of the bar, if the stage tells how far it is.
        progress: How far it is, from a line of its output, or None.

    Raises:
        SystemExit: If the command fails, with the end of its log.
    """
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    layout = "{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}" if total else "{desc}: {elapsed}"
    began, terminal = time.monotonic(), sys.stderr.isatty()
    with (
        stage.log.open("w", encoding="utf-8") as log,
        tqdm(
            desc=stage.title,
            total=total,
            bar_format=layout,
            mininterval=0.5,
            miniters=0,
            disable=not terminal,
        ) as bar,
        subprocess.Popen(
            [str(BIN / stage.command[0]), *stage.command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdout is not None
        # Python's text mode ends lines at the carriage returns of progress bars, too.
        for line in process.stdout:
            log.write(line)
            done = progress(line) if progress else None
            bar.update(0 if done is None else min(done, total or done) - bar.n)
    if not terminal:
        # A bar in a file is hundreds of bars on one line.
        print(f"{stage.title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if process.returncode:
        tail = "\n".join(stage.log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(
            f"{stage.title} failed (exit code {process.returncode}); the end of {stage.log}:\n{tail}"
        )


def training_step(line: str) -> int | None:
    """How many steps lerobot-train has done, from its progress bar."""
    found = re.search(r"\|\s*(\d+)/\d+ \[", line)
    return int(found.group(1)) if found else None


def environment_arguments(recipe: str = "metaworld") -> list[str]:
    """The environment of a recipe, but for the task, as it is named on the command line."""
    env = json.loads((ROOT / f"recipes/{recipe}.json").read_text(encoding="utf-8"))["env"]
    return [f"--env.{name}={value}" for name, value in env.items() if name != "task"]


def demonstrations_command(
    task: str, count: int, seed: int, root: Path, recipe: str = "metaworld"
) -> list[str]:
    """Scripted experts, recorded as a LeRobotDataset."""
    return [
        "lerobot-pi-rl-demos",
        f"--task={task}",
        *environment_arguments(recipe),
        f"--num_episodes={count}",
        f"--seed={seed}",
        f"--root={root}",
        f"--repo_id={REPO_ID}",
    ]


def dataset_arguments(demonstrations: Path) -> list[str]:
    """Where the demonstrations are."""
    return [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={demonstrations}"]


def supervised_command(
    task: str, demonstrations: Path, output: Path, seed: int, recipe: str = "metaworld"
) -> list[str]:
    """LeRobot's own training, until validation stops rising."""
    return [
        "lerobot-pi-rl-supervised",
        "--config_path=recipes/metaworld_supervised.json",
        *dataset_arguments(demonstrations),
        *environment_arguments(recipe),
        f"--env.task={task}",
        f"--output_dir={output}",
        f"--seed={seed}",
        f"--patience={PATIENCE}",
    ]


def improvement_command(
    task: str, checkpoint: Path, output: Path, seed: int, recipe: str = "metaworld"
) -> list[str]:
    """PI-RL: learner and actor."""
    return [
        "lerobot-pi-rl-train",
        f"--config_path=recipes/{recipe}.json",
        f"--policy.path={checkpoint}",
        f"--env.task={task}",
        f"--output_dir={output}",
        f"--seed={seed}",
    ]


def evaluation_command(
    task: str, checkpoint: Path, count: int, output: Path, recipe: str = "metaworld"
) -> list[str]:
    """LeRobot's own evaluation, on held-out starts of each task."""
    return [
        "lerobot-eval",
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        *environment_arguments(recipe),
        f"--env.task={task}",
        f"--eval.n_episodes={count}",
        f"--eval.batch_size={min(50, count)}",
        "--eval.use_async_envs=false",
        f"--seed={EVALUATION_SEED}",
        f"--output_dir={output}",
    ]


def evaluate(title: str, checkpoint: Path, folder: Path, log: Path) -> float:
    """Success of a checkpoint on the held-out starts."""
    run(Stage(title, evaluation_command(TASK, checkpoint, NUM_EVALUATIONS, folder), log))
    return (
        float(json.loads((folder / "eval_info.json").read_text(encoding="utf-8"))["overall"]["pc_success"])
        / 100
    )


def interval(success: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    centre = success + Z**2 / (2 * count)
    half = Z * math.sqrt(success * (1 - success) / count + Z**2 / (4 * count**2))
    return (centre - half) / (1 + Z**2 / count), (centre + half) / (1 + Z**2 / count)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The learner's metrics, one row per iteration."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw_curve(rows: list[dict[str, float]], summary: Summary, file: Path) -> None:
    """Draws success over environment steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    exploring = [(r["progress/env_steps"], r["rollout/success"]) for r in rows if "rollout/success" in r]
    validated = [(r["progress/env_steps"], r["eval/success"]) for r in rows if "eval/success" in r]
    # A short run may have no episode that has ended.
    if exploring:
        axes.plot(*zip(*exploring, strict=True), color="tab:blue", alpha=0.35, label="while exploring")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:blue", label="validation starts (ODE)")
    axes.axhline(summary.supervised_success, color="tab:gray", ls="--", label="supervised, held-out starts")
    axes.axhline(summary.pi_rl_success, color="tab:green", ls="--", label="PI-RL, held-out starts")
    axes.set(
        xlabel="environment steps",
        ylabel="success rate",
        ylim=(0, 1.02),
        title=f"{summary.task}, seed {summary.seed}",
    )
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)


def print_table(summary: Summary, curve: Path) -> None:
    """Prints the closing table."""
    print(f"\n{summary.task}, seed {summary.seed}, {summary.n_eval} held-out starts, deterministic ODE\n")
    print(f"{'policy':<12}{'success':>9}{'95 % interval':>18}{'env steps':>12}{'minutes':>10}")
    rows = [
        ("supervised", summary.supervised_success, "-", "-"),
        ("PI-RL", summary.pi_rl_success, f"{summary.env_steps:,}", f"{summary.rl_minutes:.1f}"),
    ]
    for name, success, steps, minutes in rows:
        low, high = interval(success, summary.n_eval)
        print(f"{name:<12}{success:>9.2f}{f'{low:.2f} to {high:.2f}':>18}{steps:>12}{minutes:>10}")
    print(f"\nlearning curve  {curve}\ncheckpoint      {summary.checkpoint}")


def demo(seed: int, output: Path) -> Summary:
    """Runs all stages.

    Args:
        seed: Of everything: demonstrations, supervised training and PI-RL.
        output: Folder for all results; emptied first.
    """
    shutil.rmtree(output, ignore_errors=True)
    logs, demonstrations = output / "logs", output / "demonstrations"
    command = demonstrations_command(TASK, NUM_DEMONSTRATIONS, seed, demonstrations)
    run(Stage(f"1/5 {NUM_DEMONSTRATIONS} demonstrations", command, logs / "demonstrations.log"))
    supervised = output / "supervised"
    steps = json.loads((ROOT / "recipes/metaworld_supervised.json").read_text(encoding="utf-8"))["steps"]
    command = supervised_command(TASK, demonstrations, supervised, seed)
    run(Stage("2/5 supervised training", command, logs / "supervised.log"), steps, training_step)
    before_checkpoint = supervised / "checkpoints/best/pretrained_model"
    before = evaluate(
        "3/5 evaluation", before_checkpoint, output / "eval_supervised", logs / "eval_supervised.log"
    )
    improved = output / "pi_rl"
    began = time.monotonic()
    improve(before_checkpoint, improved, seed)
    minutes = (time.monotonic() - began) / 60
    checkpoint = (improved / "checkpoints/best/pretrained_model").resolve()
    after = evaluate("5/5 evaluation", checkpoint, output / "eval_pi_rl", logs / "eval_pi_rl.log")
    rows = read_metrics(improved / "metrics.jsonl")
    steps_used = int(rows[-1]["progress/env_steps"])
    summary = Summary(
        TASK, seed, NUM_EVALUATIONS, before, after, steps_used, round(minutes, 2), str(checkpoint)
    )
    (output / "summary.json").write_text(json.dumps(asdict(summary), indent=4) + "\n", encoding="utf-8")
    draw_curve(rows, summary, output / "learning_curve.png")
    return summary


def improve(checkpoint: Path, output: Path, seed: int) -> None:
    """Runs learner and actor, whose progress bar goes straight to the terminal."""
    print("4/5 PI-RL: learner and actor", file=sys.stderr)
    name, *arguments = improvement_command(TASK, checkpoint, output, seed)
    code = subprocess.call([str(BIN / name), *arguments], cwd=ROOT)
    if code:
        raise SystemExit(f"PI-RL failed (exit code {code}); see {output}/logs")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    arguments = parser.parse_args()
    output = arguments.output_dir.resolve()
    print_table(demo(arguments.seed, output), output / "learning_curve.png")


if __name__ == "__main__":
    main()
