"""`lerobot-pi-rl-demos`: records MetaWorld's scripted experts as a LeRobotDataset."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
from draccus.utils import DecodingError
from tqdm import tqdm

from lerobot_pi_rl_cli.options import parse
from lerobot_policy_pi_rl.envs.configuration_metaworld import MetaworldConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_camera import MetaworldCameraEnv
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.demonstrations import DemonstrationPlan, write_demonstrations
from lerobot_policy_pi_rl.errors import check


def collect(options: argparse.Namespace) -> str:
    """Collects the demonstrations with a progress bar.

    Returns:
        One line that says what was recorded, and where.
    """
    env = make_env_config(options)
    plan = DemonstrationPlan(
        env=env,
        num_episodes=options.num_episodes,
        task_episodes=options.task_episodes,
        seed=options.seed,
        action_noise=options.action_noise,
        keep_failures=options.keep_failures,
    )
    root = options.root or default_root(options.repo_id)
    start = time.monotonic()
    played = solved = kept = steps = 0
    episodes = write_demonstrations(plan, options.repo_id, root)
    with (
        contextlib.closing(episodes),
        tqdm(total=plan.total, desc="demonstrations", unit="episode") as bar,
    ):
        for episode in episodes:
            played += 1
            solved += episode.solved
            if plan.keeps(episode):
                kept += 1
                steps += len(episode)
                bar.update()
            bar.set_postfix_str(f"solved {solved}/{played}, {episode.task}")
    seconds = time.monotonic() - start
    return f"{kept} episodes ({solved} of {played} solved, {steps} steps) in {seconds:.1f} s: {root}"


def make_env_config(options: argparse.Namespace) -> MetaworldConfig:
    """The environment that the options name."""
    common = {"task": options.task, "episode_length": options.episode_length}
    camera = {} if options.camera_size is None else {"camera_size": options.camera_size}
    if options.env_type == "metaworld_camera":
        return MetaworldCameraEnv(**common, **camera)
    check(not camera, "camera_size", "is of a camera; add --env.type=metaworld_camera")
    return MetaworldStateEnv(**common)


def default_root(repo_id: str) -> Path:
    """Where LeRobot looks for a dataset without `--dataset.root`."""
    from lerobot.utils.constants import HF_LEROBOT_HOME

    return HF_LEROBOT_HOME / repo_id


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; None reads `sys.argv`.

    Returns:
        Exit code: 0, 1 after an error that is reported in one line, or 130 after Ctrl-C.
    """
    options = parse("demos", arguments)
    # One bar for the whole, not one per saved episode.
    datasets.disable_progress_bars()
    try:
        print(collect(options))
    except (DecodingError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
