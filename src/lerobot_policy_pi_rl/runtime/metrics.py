"""Where the numbers of a run go: JSON lines, one progress bar, and a tracker when the user has one."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
STEP = "step"
# The metric that moves the bar.
POSITION = "progress/env_steps"
EVALUATION = "eval/success"

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Tracker(Protocol):
    """Something that draws curves elsewhere, such as wandb."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of one iteration."""


class WandBTracker:
    """LeRobot's `WandBLogger` as a tracker.

    LeRobot puts `train/` or `eval/` in front of each name; metrics of our group `eval` go to its `eval`.
    """

    def __init__(self, logger: Any) -> None:
        """Wraps a `lerobot.common.wandb_utils.WandBLogger`."""
        self._logger = logger

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of one iteration."""
        groups: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        for name, value in values.items():
            inner = name.removeprefix("eval/")
            groups["train" if inner == name else "eval"][inner] = float(value)
        for mode, group in groups.items():
            if group:
                self._logger.log_dict(group, step=step, mode=mode)


def make_tracker(config: Any) -> Tracker | None:
    """The tracker of a train config: wandb when `wandb.enable` is on and a project is named.

    Args:
        config: A `TrainPipelineConfig`; wandb is imported only when it is wanted.
    """
    if not (config.wandb.enable and config.wandb.project):
        return None
    from lerobot.common.wandb_utils import WandBLogger

    return WandBTracker(WandBLogger(config))


class MetricsWriter:
    """Writes the metrics of each iteration; shows a few of them."""

    def __init__(
        self,
        output_dir: Path,
        tracker: Tracker | None = None,
        *,
        total_steps: int,
        resume_step: int | None = None,
        shown: Mapping[str, str] | None = None,
        every_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """Opens the file and the bar.

        Args:
            output_dir: The run's directory.
            tracker: Gets the same metrics.
            total_steps: Environment steps at the bar's end.
            resume_step: Iteration of the checkpoint that the run continues; what was written after it is cut.
            shown: Metrics for the console: label -> name, in this order.
            every_s: Seconds between lines where there is no terminal for a bar; 0 for a line each iteration.
            stream: The console, standard error by default.
        """
        self.path = output_dir / FILE_NAME
        output_dir.mkdir(parents=True, exist_ok=True)
        cut_after(self.path, resume_step or 0)
        self._file = self.path.open("a", encoding="utf-8")
        # Whether the newest lines could not be written.
        self._behind = False
        self._tracker = tracker
        # Whether it failed the last time.
        self._untracked = False
        self._shown = dict(shown or {})
        self._stream = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._total = total_steps
        self._told = -math.inf
        self._newest: dict[str, float] = {}
        self._bar = self._make_bar() if self._stream.isatty() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one iteration.

        A full disk costs lines, never the run. The file's buffer keeps the newest lines until there is room.

        Args:
            step: The iteration, above all before.
            values: Numbers by `group/name`; what is not finite becomes null in the file.
        """
        line = {STEP: step, **{name: _number(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._behind = False
        except OSError as error:
            if not self._behind:
                logger.warning("Metrics from version %d on are not on the disk yet: %s", step, error)
            self._behind = True
        self._track(step, values)
        self._show(values)

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the metrics to the tracker. Whatever happens to it, they are in the file, and the run goes on."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(step, values)
            self._untracked = False
        except Exception as error:
            if not self._untracked:
                text = " ".join(str(error).split())[:200]
                logger.warning(
                    "The tracker does not take metrics from version %d on (%s: %s); they are in %s",
                    step,
                    type(error).__name__,
                    text,
                    self.path,
                )
            self._untracked = True

    def note(self, text: str) -> None:
        """Shows a line without disturbing the bar; a terminal that was closed is no reason to end a run."""
        with contextlib.suppress(OSError):
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Closes file and bar."""
        if self._bar is not None:
            self._bar.close()
        try:
            self._file.close()
        except OSError as error:
            logger.warning("The last metrics are not on the disk: %s", error)

    def __enter__(self) -> "MetricsWriter":
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes."""
        self.close()

    def _make_bar(self) -> Any:
        return tqdm(
            desc="PI-RL",
            total=self._total,
            unit_scale=True,
            file=self._stream,
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
            mininterval=0.0,
        )

    def _show(self, values: Mapping[str, float]) -> None:
        """Moves the bar; without a terminal, prints a line now and then, and at the end."""
        done = int(values.get(POSITION, 0))
        self._newest.update(values)
        texts = [
            f"{label} {_text(self._newest[name])}"
            for label, name in self._shown.items()
            if name in self._newest
        ]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(texts), refresh=False)
            # The last iteration passes its budget, and of a bar beyond its end tqdm shows no share.
            self._bar.total = max(self._total, done)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._told >= self._every_s or done >= self._total:
            self._told = time.monotonic()
            self.note(", ".join([f"PI-RL {done:,} of {self._total:,} environment steps", *texts]))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut short by a kill is left out.

    Args:
        path: `metrics.jsonl`; nothing when it does not exist.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def cut_after(path: Path, step: int) -> None:
    """Removes the lines after an iteration, so that the curves of a resumed run do not fold back.

    The evaluation of the resumed version goes, too: the resumed run makes it again.

    Args:
        path: `metrics.jsonl`; it may not exist.
        step: The last iteration to keep.
    """
    if not path.exists():
        return
    lines = [
        line for line in read(path) if line[STEP] < step or (line[STEP] == step and EVALUATION not in line)
    ]
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    aside = path.with_suffix(".part")
    aside.write_text(kept, encoding="utf-8")
    aside.replace(path)


def _number(value: float) -> float | None:
    """A number that JSON has."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _text(value: float) -> str:
    """A number as people read it: 0.83, 12.5, 1,204."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
