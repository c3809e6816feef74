"""Trains one baseline with one seed and writes its learning curve.

    python -m benchmarks.baselines sac --seed 0 --demonstrations outputs/demo/demonstrations

One run is one process. A run whose file is finished is skipped, one that was interrupted starts anew.
"""

import argparse
import importlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Neither loads torch: the command line answers at once, and a finished run is skipped at once.
from .curves import RESULTS, CurveWriter, finished, run_file

METHODS = {"sac": "lerobot", "ppo": "stable_baselines3"}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines", description="Trains one baseline and writes its curve."
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default="peg-insert-side-v3")
    parser.add_argument(
        "--demonstrations", type=Path, required=True, help="folder that lerobot-pi-rl-demos wrote"
    )
    parser.add_argument("--env_steps", type=int, default=400_000, help="end after so many environment steps")
    parser.add_argument("--minutes", type=float, help="or after so many minutes of training")
    parser.add_argument("--eval_every", type=int, default=10_000, help="steps between two evaluations")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the curves")
    return parser.parse_args()


def record(options: argparse.Namespace) -> dict[str, Any]:
    """What the run is made with, apart from the method's own settings."""
    return {
        "method": options.method,
        "task": options.task,
        "seed": options.seed,
        "env_steps": options.env_steps,
        "minutes": options.minutes,
        "eval_every": options.eval_every,
        "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        METHODS[options.method]: version(METHODS[options.method]),
        "torch": version("torch"),
    }


def run(options: argparse.Namespace, file: Path) -> None:
    """Trains and writes the file."""
    from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
    from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv

    from .task import EVALUATION_ENVS, EVALUATION_WORKERS, Budget, Job, open_demonstrations

    env_cfg = MetaworldStateEnv(task=options.task)
    dataset = open_demonstrations(options.demonstrations, env_cfg.state_size)
    method = importlib.import_module(f".{options.method}", __package__)
    # Workers copy this process, so they come before torch starts threads.
    with ChunkedVectorEnv(env_cfg, EVALUATION_ENVS, EVALUATION_WORKERS) as envs:
        import torch

        torch.set_num_threads(options.threads)
        writer = CurveWriter(file, record(options) | method.describe())
        budget = Budget(options.env_steps, options.minutes, options.eval_every)
        method.train(Job(env_cfg, dataset, envs, budget, writer, options.seed))


def main() -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments()
    file = run_file(options.output_dir, options.method, options.task, options.seed)
    if finished(file):
        print(f"{file} is finished; remove it to run again")
        return 0
    try:
        version(METHODS[options.method])
    except ImportError:
        print(
            f"{METHODS[options.method]} is not installed: uv pip install -e '.[baselines]'", file=sys.stderr
        )
        return 2
    try:
        run(options, file)
    except (FileNotFoundError, ValueError) as error:
        if file.exists():
            # Not about the arguments: training has begun.
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
