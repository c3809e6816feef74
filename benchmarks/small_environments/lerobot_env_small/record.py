"""Records demonstrations of a hand-written controller: `python -m lerobot_env_small.record --task=PointMass-v0 ...`.

Also how to turn one's own demonstrations into a LeRobotDataset: one row per control step, with the columns that the
policy will read, and the task's text.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE

from .configuration import SIZES, SmallEnvConfig

# Recording s tries the reset seeds 1000 s to 1000 s + 999. Held-out evaluation begins at 100,000, validation at 500,000
# and training at 1,000,000.
SEEDS_PER_RECORDING = 1000
Step = dict[str, np.ndarray]


def demonstrate(env: gym.Env, seed: int) -> tuple[list[Step], bool]:
    """Lets the controller play one episode.

    Args:
        env: As `gymnasium.make` gives it.
        seed: Where the episode starts.

    Returns:
        What was seen before each action, the action, and what it was worth; and whether the task was solved.
    """
    observation, _ = env.reset(seed=seed)
    steps, ended, solved = [], False, False
    while not ended:
        action = np.clip(env.unwrapped.control(), -1, 1).astype(np.float32)
        seen = observation["agent_pos"]
        observation, reward, terminated, truncated, info = env.step(action)
        ended, solved = terminated or truncated, bool(info["is_success"])
        steps.append({OBS_STATE: seen, ACTION: action, "next.reward": np.array([reward], dtype=np.float32)})
    return steps, solved


def record(config: SmallEnvConfig, num_episodes: int, seed: int, repo_id: str, root: Path) -> int:
    """Writes solved episodes to a new dataset.

    Args:
        config: The environment.
        num_episodes: Episodes to keep.
        seed: Number of the recording, which decides the starts.
        repo_id: The dataset's name; nothing is uploaded.
        root: Folder to create.

    Returns:
        How many episodes were played.

    Raises:
        RuntimeError: The controller solves too few episodes.
    """
    sizes = SIZES[str(config.task)]
    dataset = LeRobotDataset.create(
        repo_id=repo_id,
        fps=config.fps,
        root=root,
        features={
            OBS_STATE: {"dtype": "float32", "shape": (sizes.state,), "names": None},
            ACTION: {"dtype": "float32", "shape": (sizes.action,), "names": None},
            "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        },
        use_videos=False,
        # Named although there are no videos: looking for the best one logs pages where FFmpeg is missing.
        video_backend="pyav",
    )
    env = gym.make(config.gym_id, disable_env_checker=True, **config.gym_kwargs)
    text = env.unwrapped.task_description
    kept = 0
    try:
        for played in range(SEEDS_PER_RECORDING):
            steps, solved = demonstrate(env, seed * SEEDS_PER_RECORDING + played)
            if not solved:
                continue
            for step in steps:
                dataset.add_frame({**step, "task": text})
            dataset.save_episode()
            kept += 1
            if kept == num_episodes:
                return played + 1
        raise RuntimeError(
            f"the controller solved only {kept} of {SEEDS_PER_RECORDING} episodes of {config.task}"
        )
    finally:
        env.close()
        dataset.finalize()
        if kept < num_episodes:
            shutil.rmtree(root, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_env_small.record", description=__doc__)
    parser.add_argument("--task", "--env.task", dest="task", choices=list(SIZES), default="PointMass-v0")
    parser.add_argument("--num_episodes", type=int, default=6, help="episodes to keep")
    parser.add_argument("--seed", type=int, default=0, help="number of the recording, 0 to 99")
    parser.add_argument("--repo_id", default="local/small", help="name of the dataset; no upload")
    parser.add_argument("--root", type=Path, required=True, help="folder to create")
    options = parser.parse_args(arguments)
    try:
        played = record(
            SmallEnvConfig(task=options.task),
            options.num_episodes,
            options.seed,
            options.repo_id,
            options.root,
        )
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.num_episodes} episodes of {played} played: {options.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
