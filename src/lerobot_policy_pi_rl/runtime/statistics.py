"""An iteration's numbers under the names of the metrics page."""

from typing import Any

from lerobot.rl.algorithms.configs import TrainingStats

from .gather import STATISTICS, Gathered
from .tasks import success_by_task
from .wire import Scalar


def total(rows: list[dict[str, Scalar]], name: str) -> float:
    """Sum of a statistic over actors."""
    return sum(float(row[name]) for row in rows)


def rollout_metrics(gathered: Gathered, version: int) -> dict[str, float]:
    """Success and return of the episodes that count, exploration included, and the age of the data."""
    episodes = total(gathered.collections, "episodes")
    metrics: dict[str, float] = {
        "rollout/episodes": episodes,
        "rollout/staleness": float(version - gathered.decisions.version.float().mean()),
        "rollout/staleness_max": float(version - int(gathered.decisions.version.min())),
    }
    if episodes:
        metrics["rollout/return"] = total(gathered.collections, "return_sum") / episodes
        metrics["rollout/episode_length"] = total(gathered.collections, "length_sum") / episodes
    if judged := total(gathered.collections, "judged"):
        metrics["rollout/success"] = total(gathered.collections, "successes") / judged
    by_task = success_by_task(gathered.collections)
    return metrics | {f"rollout/success/{task}": share for task, share in by_task.items()}


def control_metrics(control: list[dict[str, Scalar]]) -> dict[str, float]:
    """How robots were controlled during a collection; nothing without robots."""
    if not control:
        return {}
    sums = {name: total(control, name) for name in STATISTICS["control"]}
    steps = sums["steps"] + sums["person_steps"]
    ahead = {
        "control/ahead_in_time": 1 - sums["late"] / max(sums["ahead"], 1),
        "control/ahead_margin_s": sums["margin_seconds"] / max(sums["ahead"], 1),
    }
    return {
        "control/step_hz": sums["intervals"] / max(sums["seconds"], 1e-9),
        "control/policy_hz": sums["decisions"] / max(sums["thinking_seconds"], 1e-9),
        "control/overruns": sums["overruns"] / max(sums["intervals"], 1),
        "control/dropped_frames": sums["dropped_frames"],
        "control/interventions": sums["interventions"],
        "control/intervention_rate": sums["person_steps"] / max(steps, 1),
        **(ahead if sums["ahead"] else {}),
    }


def learning_metrics(stats: TrainingStats) -> dict[str, Any]:
    """The algorithm's statistics under the names of the metrics page."""
    return {
        **{f"loss/{name.removesuffix('_loss')}": value for name, value in stats.losses.items()},
        **{f"gradient/{name}_norm": value for name, value in stats.grad_norms.items()},
        **{f"ppo/{name}": value for name, value in stats.extra.items()},
    }
