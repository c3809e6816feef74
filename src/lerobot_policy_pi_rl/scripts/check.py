"""`lerobot-pi-rl-check`: measures a policy before a run and says whether reinforcement learning has a signal."""

import contextlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import parser
from tqdm import tqdm

from ..errors import check, config_error
from ..runtime.check import count_episodes, measure
from ..runtime.collector import make_eval_groups, make_groups
from ..runtime.findings import Advice, Findings, advise, wilson
from ..runtime.pipeline import PIRLTrainConfig, make_player, parts
from ..runtime.robots import is_robot
from .arguments import completed
from .console import run_command

FILE_NAME = "check.json"
# Exit code of a check that found no signal; 1 is an error, as everywhere.
NO_SIGNAL = 2


@parser.wrap()
def examine(cfg: PIRLTrainConfig) -> Advice:
    """Measures with a parsed configuration, prints what was found, and writes it to an output folder that is named."""
    torch.set_num_threads(1)
    writes = cfg.output_dir is not None
    # Like an actor, it is welcome in the folder of a run.
    cfg.is_actor = True
    cfg.validate()
    if is_robot(parts(cfg)[2]):
        raise config_error(
            "env.type",
            "'gym_manipulator' is not measured: that takes hundreds of episodes from chosen starts",
        )
    findings = _measure(cfg)
    advice = advise(findings)
    print("\n".join([*table(findings), "", *sentences(advice)]), flush=True)
    if writes:
        assert cfg.output_dir is not None
        policy = str(parts(cfg)[0].pretrained_path)
        write(Path(cfg.output_dir) / FILE_NAME, {"policy": policy}, findings, advice)
    return advice


def _measure(cfg: PIRLTrainConfig) -> Findings:
    """Measures with a progress bar."""
    _, algorithm, env = parts(cfg)
    starts = int(cfg.eval.n_episodes)
    check(starts >= 1, "eval.n_episodes", f"must be at least 1 start for the ODE, got {starts}")
    with contextlib.ExitStack() as stack:
        # First of all, because it forks.
        groups = make_groups(env, algorithm.collection)
        for group in groups:
            stack.callback(group.envs.close)
        eval_groups = make_eval_groups(env, algorithm.collection)
        for group in eval_groups:
            stack.callback(group.envs.close)
        player = make_player(cfg)
        bar = stack.enter_context(tqdm(total=count_episodes(cfg, groups), desc="check", unit="episode"))
        return measure(cfg, player, groups, eval_groups or groups, bar.update)


def table(findings: Findings) -> list[str]:
    """The findings as people read them, a line each."""
    low, high = wilson(findings.ode_successes, findings.ode_episodes)
    rows = {
        "success by the ODE": f"{findings.ode_success:.2f} ({low:.2f} to {high:.2f}) of {findings.ode_episodes} starts",
        "success exploring": (
            f"{findings.exploring_success:.2f} of {len(findings.solved)} starts x {findings.tries} tries"
        ),
        "starts solved": (
            f"never {findings.never:.0%}, sometimes {findings.sometimes:.0%}, always {findings.always:.0%}"
        ),
        "solved episodes": _solved_episodes(findings),
        "actions out of range": f"{findings.clipped:.1%} exploring, {findings.clipped_ode:.1%} by the ODE",
        "decisions not finite": str(findings.non_finite),
        "first ratio": f"off by {findings.ratio_error:.1e} (tolerance {findings.ratio_tolerance:.0e})",
        "one decision": (
            f"policy {1000 * findings.policy_seconds:.1f} ms, environments {1000 * findings.env_seconds:.1f} ms "
            f"({findings.batch} environments together)"
        ),
        "collection": f"{findings.steps_per_s:,.0f} environment steps/s",
    }
    width = max([22, *(len(task) + 4 for task in findings.by_task)])
    rows |= {f"  {task}": _of_task(findings, solved) for task, solved in findings.by_task.items()}
    return [f"{name:<{width}}{text.replace('%', ' %')}" for name, text in rows.items()]


def _of_task(findings: Findings, solved: tuple[int, ...]) -> str:
    starts = len(solved)
    return f"{sum(solved) / (starts * findings.tries):.2f} of {starts} starts x {findings.tries} tries"


def _solved_episodes(findings: Findings) -> str:
    if math.isnan(findings.solved_length):
        return f"none within the time limit of {findings.time_limit} steps"
    return (
        f"{findings.solved_length:.0f} of {findings.time_limit} steps in the median, "
        f"{findings.late:.0%} in the last tenth"
    )


def sentences(advice: Advice) -> list[str]:
    """The verdict and what to change, a line each."""
    return [advice.verdict, *(f"- {change}" for change in advice.changes)]


def write(file: Path, about: dict[str, str], findings: Findings, advice: Advice) -> None:
    """Writes findings and advice as JSON, after what they are about; what is not a number becomes null."""
    shares = {name: getattr(findings, name) for name in ("ode_success", "exploring_success")}
    shares |= {name: getattr(findings, name) for name in ("never", "sometimes", "always")}
    record: dict[str, Any] = {**about, **asdict(findings), **shares, **asdict(advice)}
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point.

    Raises:
        SystemExit: With 0 when there is a signal, `NO_SIGNAL` when there is none, 1 after an error.
    """
    found: list[Advice] = []
    run_command(lambda: found.append(examine()), completed)
    if not all(advice.signal for advice in found):
        raise SystemExit(NO_SIGNAL)


if __name__ == "__main__":
    main()
