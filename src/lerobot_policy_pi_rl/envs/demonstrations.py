"""Scripted demonstrations: MetaWorld's own experts, recorded as a LeRobotDataset."""

import shutil
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lerobot.configs import FeatureType
from lerobot.utils.constants import ACTION, DONE, REWARD

from lerobot_policy_pi_rl.envs.configuration_metaworld import ACTION_SIZE, MetaworldConfig
from lerobot_policy_pi_rl.envs.tasks import expert_name
from lerobot_policy_pi_rl.errors import check

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from lerobot_policy_pi_rl.envs.metaworld import MetaworldGym

SUCCESS = "next.success"
# Demonstration seed s starts its episodes from the reset seeds 1000 s to 1000 s + 999, so all of them lie below 50,000;
# held-out evaluation starts at 100,000.
SEEDS_PER_BLOCK = 1000
NUM_BLOCKS = 50


class Expert(Protocol):
    """A scripted policy of MetaWorld."""

    def get_action(self, obs: np.ndarray) -> np.ndarray:
        """Action `[4]` for MetaWorld's state `[39]`."""


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps.

    Attributes:
        task: Task text.
        observation: What the policy sees before each action, in the environment's names, `[T, ...]` each.
        action: What the expert wants, within the action bounds, `[T, 4]` float32.
        reward: Reward of each step, `[T]` float32.
        success: The step solved the task, `[T]` bool.
    """

    task: str
    observation: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    success: np.ndarray

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.reward)

    @property
    def solved(self) -> bool:
        """The task was solved."""
        return bool(self.success.any())


@dataclass(frozen=True)
class DemonstrationPlan:
    """What to collect."""

    # Environment and tasks.
    env: MetaworldConfig
    # Episodes to keep per task.
    num_episodes: int = 10
    # Episodes to keep of single tasks, by name, in place of `num_episodes`.
    task_episodes: Mapping[str, int] = field(default_factory=dict)
    # Block of reset seeds, 0 to 49.
    seed: int = 0
    # Standard deviation of the Gaussian noise on the executed action, in action units. The recorded action is the
    # expert's own, so noise shows how to come back from states that the expert alone would never see.
    action_noise: float = 0.0
    # Keep the episodes in which the expert fails, too.
    keep_failures: bool = False

    def __post_init__(self) -> None:
        for task in self.task_episodes:
            check(
                task in self.env.tasks, "task_episodes", f"{task!r} is not among {', '.join(self.env.tasks)}"
            )
        for name, count in (("num_episodes", self.num_episodes), *self.task_episodes.items()):
            check(
                1 <= count <= SEEDS_PER_BLOCK, name, f"must be 1 to {SEEDS_PER_BLOCK} per task; got {count}"
            )
        check(0 <= self.seed < NUM_BLOCKS, "seed", f"must be 0 to {NUM_BLOCKS - 1}; got {self.seed}")
        check(self.action_noise >= 0, "action_noise", f"must not be negative; got {self.action_noise}")

    @property
    def reset_seeds(self) -> range:
        """Reset seeds to try, in order."""
        return range(self.seed * SEEDS_PER_BLOCK, (self.seed + 1) * SEEDS_PER_BLOCK)

    def episodes_of(self, task: str) -> int:
        """Episodes to keep of one task."""
        return self.task_episodes.get(task, self.num_episodes)

    @property
    def total(self) -> int:
        """Episodes to keep of all tasks."""
        return sum(self.episodes_of(task) for task in self.env.tasks)

    def keeps(self, episode: Episode) -> bool:
        """The episode belongs in the dataset."""
        return episode.solved or self.keep_failures


def make_expert(task: str) -> Expert:
    """The scripted policy of a task."""
    from metaworld import policies

    return getattr(policies, expert_name(task))()


def demonstrate(env: "MetaworldGym", expert: Expert, seed: int, action_noise: float = 0.0) -> Episode:
    """Lets the expert play one episode.

    Args:
        env: The environment.
        expert: The task's expert.
        seed: Reset seed; also seeds the noise.
        action_noise: Standard deviation of the noise on the executed action.
    """
    noise = np.random.default_rng(seed)
    observations, actions, rewards, successes = [], [], [], []
    observation, _ = env.reset(seed=seed)
    done = False
    while not done:
        action = np.clip(expert.get_action(env.stock_state), -1, 1).astype(np.float32)
        disturbed = action + action_noise * noise.standard_normal(ACTION_SIZE).astype(np.float32)
        observations.append(observation)
        observation, reward, terminated, truncated, info = env.step(disturbed)
        actions.append(action)
        rewards.append(reward)
        successes.append(info["is_success"])
        done = terminated or truncated
    return Episode(
        task=env.task_description,
        observation={key: np.stack([seen[key] for seen in observations]) for key in observations[0]},
        action=np.stack(actions),
        reward=np.array(rewards, dtype=np.float32),
        success=np.array(successes, dtype=bool),
    )


def demonstrations(plan: DemonstrationPlan, task: str) -> Iterator[Episode]:
    """Plays one task until enough episodes are good.

    Args:
        plan: What to collect.
        task: One of the plan's tasks.

    Yields:
        Every episode played, failed ones included; ends when as many as the plan asks for are to be kept.

    Raises:
        RuntimeError: The expert keeps failing.
    """
    env, expert = plan.env.make_env(task), make_expert(task)
    kept = 0
    try:
        with warnings.catch_warnings():
            # The experts ask for more than a full action and say so at every step.
            warnings.filterwarnings("ignore", message="Constant")
            for seed in plan.reset_seeds:
                episode = demonstrate(env, expert, seed, plan.action_noise)
                kept += plan.keeps(episode)
                yield episode
                if kept == plan.episodes_of(task):
                    return
    finally:
        env.close()
    raise RuntimeError(
        f"the expert of {task!r} solved only {kept} of {len(plan.reset_seeds)} episodes: "
        "lower action_noise, raise episode_length or ask for fewer episodes"
    )


def dataset_features(env: MetaworldConfig) -> dict[str, dict[str, Any]]:
    """The columns of the dataset, in LeRobot's format; pictures are files of their own, not videos."""
    observed: dict[str, dict[str, Any]] = {}
    for key, feature in env.observed_features.items():
        image = feature.type is FeatureType.VISUAL
        observed[env.features_map[key]] = {
            "dtype": "image" if image else "float32",
            "shape": feature.shape,
            "names": ["height", "width", "channels"] if image else None,
        }
    return {
        **observed,
        ACTION: {"dtype": "float32", "shape": (ACTION_SIZE,), "names": ["x", "y", "z", "gripper"]},
        REWARD: {"dtype": "float32", "shape": (1,), "names": None},
        SUCCESS: {"dtype": "bool", "shape": (1,), "names": None},
        DONE: {"dtype": "bool", "shape": (1,), "names": None},
    }


def add_episode(dataset: "LeRobotDataset", env: MetaworldConfig, episode: Episode) -> None:
    """Appends one episode to a dataset."""
    columns = {env.features_map[key]: seen for key, seen in episode.observation.items()}
    for step in range(len(episode)):
        dataset.add_frame(
            {
                **{name: seen[step] for name, seen in columns.items()},
                ACTION: episode.action[step],
                REWARD: episode.reward[step : step + 1],
                SUCCESS: episode.success[step : step + 1],
                DONE: np.array([step == len(episode) - 1]),
                "task": episode.task,
            }
        )
    dataset.save_episode()


def write_demonstrations(plan: DemonstrationPlan, repo_id: str, root: Path) -> Generator[Episode, None, None]:
    """Collects all tasks of a plan into a new dataset.

    Args:
        plan: What to collect.
        repo_id: The dataset's name, `user/name`; nothing is uploaded.
        root: Folder to create.

    Returns:
        An iterator over every episode played, for progress; only the kept ones are in the dataset. The dataset is
        complete when the iterator ends, and removed if it is closed before.

    Raises:
        FileExistsError: The folder exists.
    """
    if root.exists():
        raise FileExistsError(f"{root} exists already: choose another --root, or remove it first")
    return _write(plan, repo_id, root)


def _write(plan: DemonstrationPlan, repo_id: str, root: Path) -> Generator[Episode, None, None]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        repo_id=repo_id,
        fps=plan.env.fps,
        features=dataset_features(plan.env),
        root=root,
        robot_type="sawyer",
        use_videos=False,
        # Named although there are no videos: looking for the best one logs pages where FFmpeg is missing.
        video_backend="pyav",
    )
    complete = False
    try:
        for task in plan.env.tasks:
            for episode in demonstrations(plan, task):
                if plan.keeps(episode):
                    add_episode(dataset, plan.env, episode)
                yield episode
        complete = True
    finally:
        dataset.finalize()
        if not complete:
            shutil.rmtree(root, ignore_errors=True)
