"""Several tasks in one policy: the success of each, and how many environments each gets."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .wire import MAX_TASK_CHARACTERS, Scalar
from .workers import EnvironmentFailed

# What a statistic of one task is called: one of these and the task's text.
EPISODES, SUCCESSES = "episodes/", "successes/"
PER_TASK = (EPISODES, SUCCESSES)


def check_text(task: str) -> None:
    """Checks that a task's text can be sent to the learner.

    Raises:
        EnvironmentFailed: It is too long.
    """
    if len(task) > MAX_TASK_CHARACTERS:
        raise EnvironmentFailed(
            f"the environment's task text has {len(task):,} characters, at most {MAX_TASK_CHARACTERS:,} are sent to "
            f"the learner; shorten it (it begins {task[:40]!r})"
        )


def count_by_task(tasks: Sequence[str], success: np.ndarray) -> dict[str, int]:
    """Counts episodes and successes of each task, as an actor reports them.

    Args:
        tasks: Task text of each episode.
        success: Whether it was solved, `[n]` bool.
    """
    episodes = Counter(tasks)
    successes = Counter(task for task, solved in zip(tasks, success.tolist(), strict=True) if solved)
    counts = {EPISODES + task: count for task, count in episodes.items()}
    return counts | {SUCCESSES + task: successes[task] for task in episodes}


def of_tasks(statistics: Mapping[str, Scalar], prefix: str) -> dict[str, Any]:
    """The statistics of each task, by its text.

    Args:
        statistics: What an actor reports.
        prefix: `EPISODES` or `SUCCESSES`.
    """
    return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}


def success_by_task(statistics: Iterable[Mapping[str, Scalar]]) -> dict[str, float]:
    """Share of solved episodes of each task over what several actors counted; empty if all are of one task."""
    sums: dict[str, float] = defaultdict(float)
    for reported in statistics:
        for name in filter(lambda name: name.startswith(PER_TASK), reported):
            sums[name] += float(reported[name])
    tasks = sorted(name.removeprefix(EPISODES) for name in sums if name.startswith(EPISODES))
    if len(tasks) < 2:
        return {}
    return {task: sums[SUCCESSES + task] / max(sums[EPISODES + task], 1) for task in tasks}


def task_shares(success: Mapping[str, float], focus: float) -> dict[str, float]:
    """How large a part of the environments each task should have.

    Args:
        success: Share of solved episodes of each task.
        focus: 0 gives all tasks the same, 1 gives each in proportion to how often it fails.

    Returns:
        Shares that sum to 1.
    """
    failures = {task: 1 - solved for task, solved in success.items()}
    total = sum(failures.values())
    if total == 0:
        return dict.fromkeys(success, 1 / len(success))
    return {task: (1 - focus) / len(success) + focus * failed / total for task, failed in failures.items()}


def deal(shares: Sequence[float], places: int) -> np.ndarray:
    """Deals places to tasks, one to each and the rest by their shares, evenly mixed.

    Args:
        shares: Share of each task; they sum to 1.
        places: How many there are, at least one for each task.

    Returns:
        Number of the task of each place, `[places]`.
    """
    wanted = np.array(shares) * (places - len(shares))
    counts = np.floor(wanted).astype(int)
    largest_remainders = np.argsort(counts - wanted, kind="stable")
    counts[largest_remainders[: places - len(shares) - counts.sum()]] += 1
    tasks = np.repeat(np.arange(len(shares)), counts + 1)
    # Where a task's places lie when each task spreads its own over the whole.
    positions = np.concatenate([(np.arange(count) + 0.5) / count for count in counts + 1])
    return tasks[np.lexsort((tasks, positions))]
