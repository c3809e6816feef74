"""Which checkpoint is the best one, over resumes as well."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint
from .progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Best:
    """A best checkpoint on the disk.

    Attributes:
        success: Its validation success.
        version: Of its weights.
    """

    success: float
    version: int


class BestCheckpoint:
    """Keeps `checkpoints/best`.

    A run that is resumed after a kill may find one there that is better than anything its counters know: the run had
    been further. It stays until a validation is at least as good, and counts when the run has come to its version
    again; until then it is the run that was not interrupted, which did not know it either.
    """

    def __init__(self, output_dir: Path, is_milestone: Callable[[int], bool]) -> None:
        """Knows of no checkpoint yet.

        Args:
            output_dir: The run's directory.
            is_milestone: Whether a version has a checkpoint for another reason than being the best.
        """
        self._output_dir, self._is_milestone = output_dir, is_milestone
        self._unknown: _Best | None = None

    def resume(self, progress: Progress) -> None:
        """Looks for a checkpoint that is better than a resumed run's counters know."""
        self._unknown = self._find_unknown(progress)
        if self._unknown is not None:
            logger.info(
                "The best checkpoint (validation success %.2f, version %d) stays until one is as good",
                self._unknown.success,
                self._unknown.version,
            )

    def mark(self, progress: Progress, state: Callable[[], checkpoint.TrainingState]) -> None:
        """Makes the current version the best checkpoint, unless a better one is there that the run does not know.

        Args:
            progress: With its success as the best one.
            state: Gives what the checkpoint holds.

        Raises:
            CheckpointNotWritten: There is no room; the one before stays.
        """
        if self._unknown is not None and progress.best_success < self._unknown.success:
            return
        superseded = checkpoint.mark_best(self._output_dir, state())
        self._unknown = None
        if superseded is not None and not self._is_kept_anyway(superseded):
            checkpoint.remove_superseded(superseded)

    def reach(self, progress: Progress) -> None:
        """Counts the checkpoint on the disk if the run has come to its version."""
        if self._unknown is not None and progress.version >= self._unknown.version:
            self.count(progress)

    def count(self, progress: Progress) -> None:
        """From now on the checkpoint on the disk is the run's best one, too."""
        if self._unknown is not None:
            progress.best_success, progress.best_version = self._unknown.success, self._unknown.version
            self._unknown = None

    def _is_kept_anyway(self, place: Path) -> bool:
        """Whether a checkpoint would be there if it had never been the best one."""
        return not place.name.endswith(checkpoint.KEPT) and self._is_milestone(int(place.name))

    def _find_unknown(self, progress: Progress) -> _Best | None:
        found = checkpoint.best_counters(self._output_dir) or {}
        try:
            best = _Best(float(found["best_success"]), int(found["best_version"]))
        except (KeyError, TypeError, ValueError):
            return None
        # Otherwise they tell of another checkpoint, which was the best one when this one was written.
        of_itself = found.get("version") == best.version
        is_known = best.success < progress.best_success or best.version == progress.best_version
        return None if is_known or not of_itself else best
