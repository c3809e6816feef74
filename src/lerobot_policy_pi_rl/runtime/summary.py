"""The closing lines of a run: success before and after, what it took, and the commands that come next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
from lerobot.envs import EnvConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR

from . import metrics
from .checkpoint import BEST_CHECKPOINT_LINK
from .findings import wilson
from .robots import is_robot
from .seeds import EVALUATION_SEED

# Episodes of the evaluation that the summary proposes.
EPISODES = 100


def closing_lines(output_dir: Path, env: EnvConfig, starts: int, *, is_stock: bool) -> list[str]:
    """Sums up a run from its metrics.

    Args:
        output_dir: The run's directory.
        env: Its environment.
        starts: Episodes of each validation.
        is_stock: Whether the base is one of LeRobot's own policies, which can be exported.

    Returns:
        Lines for the console; none for a run without an iteration.
    """
    lines = metrics.read(output_dir / metrics.FILE_NAME)
    trained = [line for line in lines if "progress/env_steps" in line and line[metrics.STEP] > 0]
    if not trained:
        return []
    steps, seconds = int(trained[-1]["progress/env_steps"]), float(trained[-1].get("progress/seconds", 0.0))
    text = [f"{steps:,} environment steps in {seconds / 60:.1f} minutes, version {trained[-1][metrics.STEP]}"]
    best = output_dir / CHECKPOINTS_DIR / BEST_CHECKPOINT_LINK / PRETRAINED_MODEL_DIR
    return [*_success(lines, starts), *text, *_next_steps(best, env, is_stock=is_stock)]


def _success(lines: Sequence[Mapping[str, Any]], starts: int) -> list[str]:
    """Validation success before and of the best version, with 95 % intervals."""
    validated = [line for line in lines if line.get(metrics.EVALUATION) is not None]
    if not validated:
        return ["no validation was made (env_eval_freq), so nothing says whether it got better"]
    first, best = validated[0], max(validated, key=lambda line: line[metrics.EVALUATION])
    rows = [("before" if first[metrics.STEP] == 0 else f"version {first[metrics.STEP]}", first)]
    if best is not first:
        rows.append((f"best (version {best[metrics.STEP]})", best))
    text = [f"success by the ODE, 95 % interval, {starts} validation starts:"]
    for name, line in rows:
        success = float(line[metrics.EVALUATION])
        low, high = wilson(round(success * starts), starts)
        text.append(f"  {name:<16} {success:.2f} {low:.2f} to {high:.2f}")
    if len(validated) > 1:
        text.append(
            f"The best of {len(validated)} validations is a little higher than held-out starts will show."
        )
    return text


def _next_steps(best: Path, env: EnvConfig, *, is_stock: bool) -> list[str]:
    """The best checkpoint, and the commands that evaluate and export it."""
    if not best.is_dir():
        return []
    place = shlex.quote(str(best))
    text = [f"best checkpoint: {best}"]
    if not is_robot(env):
        text += [
            "next, on held-out starts:",
            f"  lerobot-eval --policy.path={place} {shlex.join(environment_arguments(env))} "
            f"--eval.n_episodes={EPISODES} --eval.batch_size=50 --eval.use_async_envs=false --seed={EVALUATION_SEED}",
        ]
    if is_stock:
        exported = shlex.quote(str(best.parents[2] / "exported"))
        text += [
            "next, the stock policy that needs no plugin:",
            f"  lerobot-pi-rl-export --policy.path={place} --output_dir={exported}",
        ]
    return text


def environment_arguments(env: EnvConfig) -> list[str]:
    """The command-line arguments of an environment: its type, its task, and every simple setting that was changed."""
    chosen, default = draccus.encode(env), draccus.encode(type(env)())
    changed = [
        f"--env.{name}={value}"
        for name, value in chosen.items()
        if name == "task" or (isinstance(value, (str, int, float)) and value != default.get(name))
    ]
    return [
        f"--env.type={env.type}",
        *(argument for argument in changed if not argument.startswith("--env.type=")),
    ]
