"""Success by task, where one policy learns several: how actors count it and the learner reads it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .wire import Scalar

# What a statistic of one task is called: one of these and the task's text.
EPISODES, SUCCESSES = "episodes/", "successes/"
PER_TASK = (EPISODES, SUCCESSES)


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
