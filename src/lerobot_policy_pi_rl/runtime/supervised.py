"""Supervised training by LeRobot, with two additions: small data sets in memory, and an end when it stops helping."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lerobot.scripts import lerobot_train
from lerobot.utils.constants import CHECKPOINTS_DIR

from .seeds import VALIDATION_SEED

# A data set of this size or less is held in memory: LeRobot decodes about 500 frames a second; a small
# policy reads about 20,000.
MEMORY_BYTES = 2**30
BEST = "best"
# Under the output folder: one line for each validation, with the names of docs/metrics.md.
METRICS = "metrics.jsonl"


class InMemoryDataset:
    """A LeRobotDataset whose frames were all read once. Anything else is asked of the data set itself."""

    def __init__(self, dataset: Any) -> None:
        """Reads every frame.

        Args:
            dataset: A `LeRobotDataset` without pictures.
        """
        self._dataset = dataset
        self._frames = [dataset[index] for index in range(len(dataset))]

    def __getattr__(self, name: str) -> Any:
        """Everything but the frames, such as `meta` and `episodes`."""
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._frames[index]


def in_memory(dataset: Any) -> Any:
    """Holds a data set in memory if it has no pictures and is small enough."""
    if dataset is None or not hasattr(dataset, "meta") or dataset.meta.camera_keys or not len(dataset):
        return dataset
    per_frame = sum(getattr(value, "nbytes", 0) for value in dataset[0].values())
    return InMemoryDataset(dataset) if per_frame * len(dataset) <= MEMORY_BYTES else dataset


class Converged(Exception):
    """Training has ended before its last step; the text says why."""


class Validation:
    """Follows LeRobot's evaluations during training: keeps the best checkpoint, and ends training.

    Attributes:
        successes: Success of each evaluation so far, between 0 and 1.
    """

    def __init__(
        self,
        evaluate: Callable[..., dict[str, Any]],
        patience: int | None = None,
        max_minutes: float | None = None,
    ) -> None:
        """Begins the clock.

        Args:
            evaluate: LeRobot's `eval_policy_all`.
            patience: Evaluations in a row without a new best after which training ends; None never ends it.
            max_minutes: Minutes after which training ends at the next evaluation; None never ends it.
        """
        self._evaluate, self._patience, self._max_minutes = evaluate, patience, max_minutes
        self._began = time.monotonic()
        self.successes: list[float] = []

    def __call__(self, *arguments: Any, videos_dir: Path, **settings: Any) -> dict[str, Any]:
        """Runs an evaluation in place of `eval_policy_all`, from this project's validation starts and without videos.

        Raises:
            Converged: If training is to end; its checkpoint of this step is complete.
        """
        settings |= {"start_seed": VALIDATION_SEED, "max_episodes_rendered": 0}
        found = self._evaluate(*arguments, videos_dir=None, **settings)
        self.successes.append(float(found["overall"]["pc_success"]) / 100)
        # `.../eval/videos_step_000500`
        output_dir, step = videos_dir.parent.parent, videos_dir.name.rpartition("_")[2]
        best = max(self.successes)
        if self.successes[-1] == best and self.successes.index(best) == len(self.successes) - 1:
            _link(output_dir / CHECKPOINTS_DIR / BEST, step)
        seconds = time.monotonic() - self._began
        line = {"step": int(step), "progress/seconds": round(seconds, 1), "eval/success": self.successes[-1]}
        with (output_dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logging.info(
            "Validation at step %s: success %.3f, best %.3f, %.1f minutes",
            step,
            self.successes[-1],
            best,
            seconds / 60,
        )
        self._end_if_done(seconds / 60)
        return found

    def _end_if_done(self, minutes: float) -> None:
        since_best = len(self.successes) - 1 - self.successes.index(max(self.successes))
        if self._patience is not None and since_best >= self._patience:
            raise Converged(f"no better validation in the last {since_best}")
        if self._max_minutes is not None and minutes >= self._max_minutes:
            raise Converged(f"{minutes:.1f} minutes are used")


@contextmanager
def additions(patience: int | None, max_minutes: float | None) -> Iterator[Validation]:
    """Puts both additions into LeRobot's training for as long as the context lasts."""
    evaluate, make_datasets = lerobot_train.eval_policy_all, lerobot_train.make_train_eval_datasets
    validation = Validation(evaluate, patience, max_minutes)

    def make_in_memory(cfg: Any) -> Sequence[Any]:
        return tuple(in_memory(dataset) for dataset in make_datasets(cfg))

    lerobot_train.eval_policy_all = validation
    lerobot_train.make_train_eval_datasets = make_in_memory
    try:
        yield validation
    finally:
        lerobot_train.eval_policy_all = evaluate
        lerobot_train.make_train_eval_datasets = make_datasets


def _link(link: Path, target: str) -> None:
    """Points a link at a neighbour, in one step."""
    aside = link.with_suffix(".writing")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)
