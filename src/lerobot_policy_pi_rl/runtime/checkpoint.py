"""Checkpoints in LeRobot's layout, written aside and renamed into place: a killed write never costs the last one.

checkpoints/000010/pretrained_model/   policy, processors, train config
                   training_state/     optimizers, random state, counters, settings, format, checksums of all files
                   algorithm/          the algorithm's own tensors and config
checkpoints/last -> 000010
checkpoints/best -> 000008, or 000008-best if a resumed run has come to version 8 again

Where a file system has no symbolic links, `last` and `best` are text files with the name of the folder.
"""

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.rl.algorithms.base import RLAlgorithm
from lerobot.utils.constants import (
    ALGORITHM_DIR,
    CHECKPOINTS_DIR,
    LAST_CHECKPOINT_LINK,
    PRETRAINED_MODEL_DIR,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from lerobot.utils.io_utils import load_json, write_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import Optimizer

from ..lerobot_compat import load_training_state
from .finite import first_not_finite
from .handshake import flat_settings

logger = logging.getLogger(__name__)

PACKAGE = "lerobot_policy_pi_rl"
# Of what it adds to LeRobot's layout; raised whenever an older one can no longer be read.
FORMAT = 1
FORMAT_FILE = "pi_rl.json"
COUNTERS = "counters.json"
# The counters when the checkpoint became the best one, where it had been written before its validation.
BEST_COUNTERS = "counters_when_best.json"
# The train config as it was written; the one beside the weights may be edited.
SETTINGS = "settings.json"
# SHA-256 of each file by its path, null for one that may be edited.
CHECKSUMS = "checksums.json"
# What checkpoints of 0.1.0 have instead: bytes of each file.
FILE_SIZES = "file_sizes.json"
ALGORITHM_TENSORS = "model.safetensors"
BEST_CHECKPOINT_LINK = "best"
# Ends the name of a best checkpoint whose place another one of its step has taken.
KEPT = "-best"
# Held by the learner that trains in the folder; it has nothing in it and stays there.
LOCK_FILE = ".learner.lock"

# Settings that say which tensors a checkpoint of algorithm and optimizers has.
SHAPING_SETTINGS = (
    "algorithm.advantage",
    "algorithm.critic_features",
    "algorithm.critic_hidden_dims",
    "algorithm.kl_coef",
    "policy.",
)

# Settings that what is trained does not depend on.
UNTRAINED_SETTINGS = (
    # A copy of `policy`.
    "algorithm.policy_config",
    "checkpoint_path",
    "job_name",
    # LeRobot's presets for supervised training.
    "optimizer",
    "output_dir",
    "policy.actor_learner_config",
    # A checkpoint has its own weights, wherever the first ones came from.
    "policy.base_path",
    "policy.pretrained_path",
    "resume",
    "scheduler",
    "wandb",
)

# What reading a damaged file may raise, in this package and in the libraries that read it.
DAMAGE = (
    *(OSError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError),
    *(ImportError, SafetensorError),
)
PARTS = (PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR, ALGORITHM_DIR)
# How file systems without symbolic links refuse one.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

# Names that no step has, for directories of a write that has not finished.
ASIDE = ".writing-"
REPLACED = ".replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint is missing or broken; the text is one line."""


class DoesNotLoad(CheckpointError):
    """Every file of a checkpoint is there, but not what algorithm and optimizers need; the text is one line."""


class InUse(CheckpointError):
    """Another learner trains in the same folder; the text is one line."""


class CheckpointNotWritten(CheckpointError):
    """There was no room for a checkpoint, or no access; the ones before are as they were. The text is one line."""


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint holds.

    Attributes:
        step: Iteration after which it is taken; names the directory.
        total_steps: Last iteration of the run, for the width of the name.
        config: The train config.
        policy: The policy.
        preprocessor: Its preprocessor.
        postprocessor: Its postprocessor.
        algorithm: The algorithm.
        optimizers: The optimizers, by name.
        counters: Plain values by name: iteration, version, environment steps, learning rate, KL coefficient, ...
    """

    step: int
    total_steps: int
    config: TrainPipelineConfig
    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    algorithm: RLAlgorithm
    optimizers: Mapping[str, Optimizer]
    counters: Mapping[str, Any]


@dataclass(frozen=True)
class Resumed:
    """What `load` gives back beside what it loads in place.

    Attributes:
        step: Iteration after which the checkpoint was taken.
        counters: As they were saved.
    """

    step: int
    counters: dict[str, Any]


def save(output_dir: Path, state: TrainingState, link: str = LAST_CHECKPOINT_LINK) -> Path:
    """Writes a checkpoint and points a link at it.

    Args:
        output_dir: The run's directory, which this process owns.
        state: What to write.
        link: `last`, from which a run is resumed, or `best`.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointNotWritten: The disk is full, say; what was written of it is removed, and the link stays.
    """
    place = get_step_checkpoint_dir(output_dir, state.total_steps, state.step)
    aside = place.with_name(ASIDE + place.name)
    with _writing(output_dir, state.step):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output_dir)
        _write(aside, state)
        _synchronise(aside)
        if link != BEST_CHECKPOINT_LINK:
            _keep_best(place)
        _move_into_place(aside, place)
        _point_at(place, link)
    return place


@contextlib.contextmanager
def _writing(output_dir: Path, step: int) -> Iterator[None]:
    """Leaves nothing of a write that fails.

    Raises:
        CheckpointNotWritten: It failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The half that was written would keep the disk full.
        with contextlib.suppress(OSError):
            remove_unfinished(output_dir)
        raise CheckpointNotWritten(
            f"the checkpoint of version {step} could not be written to {output_dir / CHECKPOINTS_DIR} "
            f"({_line(error)}); make room there"
        ) from error


def mark_best(output_dir: Path, state: TrainingState) -> Path | None:
    """Points `best` at the checkpoint of the current step, which is written unless `last` is it.

    Args:
        output_dir: The run's directory.
        state: What the checkpoint holds, or is to hold; its counters say why it is the best.

    Returns:
        The checkpoint that was the best one before, if nothing points at it any more.

    Raises:
        CheckpointNotWritten: As `save`.
    """
    folder = output_dir / CHECKPOINTS_DIR
    before, last = (pointed_at(folder / name) for name in (BEST_CHECKPOINT_LINK, LAST_CHECKPOINT_LINK))
    had_one = before.is_dir()
    place = get_step_checkpoint_dir(output_dir, state.total_steps, state.step).resolve()
    if place == last:
        with _writing(output_dir, state.step):
            _note_best(place, state.counters)
            _point_at(place, BEST_CHECKPOINT_LINK)
    else:
        save(output_dir, state, BEST_CHECKPOINT_LINK)
    return before if had_one and before not in (place, last) else None


def best_counters(output_dir: Path) -> dict[str, Any] | None:
    """The counters with which the best checkpoint was chosen, or None if there is none that can be read."""
    state_dir = pointed_at(output_dir / CHECKPOINTS_DIR / BEST_CHECKPOINT_LINK) / TRAINING_STATE_DIR
    file = next((state_dir / name for name in (BEST_COUNTERS, COUNTERS) if (state_dir / name).exists()), None)
    try:
        return None if file is None else dict(load_json(file))
    except (OSError, ValueError, TypeError):
        return None


def remove_superseded(checkpoint_dir: Path) -> None:
    """Removes a checkpoint that was kept for being the best one; what cannot be removed stays, and is logged."""
    try:
        shutil.rmtree(checkpoint_dir)
    except OSError as error:
        logger.warning(
            "%s is no longer the best checkpoint and could not be removed: %s", checkpoint_dir, _line(error)
        )


def find_last(output_dir: Path) -> Path:
    """The checkpoint that `last` points at. Only looks: actors do so, too, while the learner writes.

    Raises:
        CheckpointError: There is none.
    """
    link = output_dir / CHECKPOINTS_DIR / LAST_CHECKPOINT_LINK
    place = pointed_at(link)
    if place.is_dir():
        return place
    # A kill in the middle of its replacement left it beside its place.
    displaced = place.with_name(REPLACED + place.name)
    if (link.is_symlink() or link.is_file()) and displaced.is_dir():
        return displaced
    numbered = sorted(path for path in link.parent.glob("*") if path.name.isdecimal() and path.is_dir())
    if numbered:
        raise CheckpointError(
            f"no checkpoint at {link}, which some copies of a run lose: go on from another one, such as "
            f"--config_path={pretrained_dir(numbered[-1]) / TRAIN_CONFIG_NAME} --resume=true"
        )
    raise CheckpointError(
        f"no checkpoint at {link}: start without --resume=true, or give the output_dir of a run that saved one"
    )


def pointed_at(link: Path) -> Path:
    """Where `last` or `best` leads, by a link or by a text file; the folder itself where a copy has made one of it."""
    if link.is_file():
        with contextlib.suppress(OSError, ValueError):
            name = link.read_text(encoding="utf-8").strip()
            if name and name == Path(name).name:
                return link.resolve().with_name(name)
    return link.resolve()


def mend_links(output_dir: Path) -> None:
    """Makes links of `last` and `best` again where a copy of the run has made folders of them (`cp -rL`, buckets).

    Args:
        output_dir: The run's directory, which this process owns.

    Raises:
        CheckpointError: Such a folder is no checkpoint.
    """
    for name in (LAST_CHECKPOINT_LINK, BEST_CHECKPOINT_LINK):
        copy = output_dir / CHECKPOINTS_DIR / name
        if copy.is_symlink() or not copy.is_dir():
            continue
        home = _home_of(copy)
        if home.exists():
            aside = copy.with_name(f"{ASIDE}{name}-folder")
            copy.rename(aside)
            _point_at(home, name)
            shutil.rmtree(aside)
        else:
            copy.rename(home)
            _point_at(home, name)
        logger.info(
            "%s was a folder, as some copies of a run make it; it is a link to %s again", copy, home.name
        )


def _home_of(copy: Path) -> Path:
    """The numbered checkpoint that a copy of one is, or a free name for it."""
    for place in sorted(copy.parent.glob("0*")):
        if place.is_dir() and _is_same(place, copy):
            return place
    try:
        step = int(load_json(copy / TRAINING_STATE_DIR / TRAINING_STEP)["step"])
    except DAMAGE as error:
        raise CheckpointError(
            f"{copy} is a folder where a link to a checkpoint belongs, and no whole checkpoint; move it away"
        ) from error
    names = (f"{step:06d}", f"{step:06d}-{copy.name}", f"{step:06d}-{copy.name}-{int(time.time())}")
    return next(place for name in names if not (place := copy.with_name(name)).exists())


def _is_same(one: Path, two: Path) -> bool:
    """Whether two folders have the same files with the same content."""
    names = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, two)
    ]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, two / name, shallow=False) for name in names[0]
    )


def verify(checkpoint_dir: Path, parts: Collection[str] = PARTS) -> None:
    """Compares format and files with what was written, before anything slow starts.

    Weights, optimizers and the rest of the training state must be what was written, by their checksums. Configurations
    may be edited, and must be JSON.

    Args:
        checkpoint_dir: The checkpoint.
        parts: Folders of it to look at.

    Raises:
        CheckpointError: A file is missing or damaged, or a version of this package wrote it that writes another format.
    """
    _check_format(checkpoint_dir)
    for name, written in _written_files(checkpoint_dir).items():
        if name.partition("/")[0] in parts:
            _check_file(checkpoint_dir, name, written)


def _written_files(checkpoint_dir: Path) -> dict[str, str | int | None]:
    """Checksum of each file of a checkpoint, or its size if 0.1.0 wrote it; null for what may be edited."""
    state_dir = checkpoint_dir / TRAINING_STATE_DIR
    name = (
        CHECKSUMS if (state_dir / CHECKSUMS).exists() or not (state_dir / FILE_SIZES).exists() else FILE_SIZES
    )
    try:
        return {
            str(file): None if _may_be_edited(file) else written
            for file, written in load_json(state_dir / name).items()
        }
    except DAMAGE as error:
        raise _broken(
            checkpoint_dir, f"{TRAINING_STATE_DIR}/{name} cannot be read ({_line(error)})"
        ) from error


def _check_file(checkpoint_dir: Path, name: str, written: str | int | None) -> None:
    """Checks one file against its checksum or its size; one that may be edited is to be JSON."""
    file = checkpoint_dir / name
    if not file.is_file():
        raise _broken(checkpoint_dir, f"{name} is missing")
    try:
        if written is None:
            problem = None if isinstance(load_json(file), dict) else "holds no settings"
        elif isinstance(written, int):
            size = file.stat().st_size
            problem = None if size == written else f"is {size} bytes, {written} bytes were written"
        else:
            problem = (
                None
                if _checksum(file) == written
                else "is damaged: its checksum is not that of what was written"
            )
    except (*DAMAGE, RecursionError) as error:
        problem = f"cannot be read ({_line(error)})"
    if problem is not None:
        raise _broken(checkpoint_dir, f"{name} {problem}")


def _check_format(checkpoint_dir: Path) -> None:
    file = checkpoint_dir / TRAINING_STATE_DIR / FORMAT_FILE
    if not file.parent.is_dir():
        raise _broken(checkpoint_dir, f"{file.parent.name} is missing")
    try:
        found: Any = load_json(file) if file.exists() else {"format": 0, "version": "before 0.1.0"}
        number, writer = int(found["format"]), str(found["version"])[:40]
    except DAMAGE as error:
        raise _broken(checkpoint_dir, f"{FORMAT_FILE} cannot be read ({_line(error)})") from error
    if number != FORMAT:
        raise CheckpointError(
            f"checkpoint {checkpoint_dir} has format {number}, written by {PACKAGE} {writer}; this is "
            f"{version(PACKAGE)}, which reads format {FORMAT}: resume with that version, or begin a new run from the "
            f"policy with --policy.path={pretrained_dir(checkpoint_dir)}"
        )


def changed_settings(checkpoint_dir: Path, config: TrainPipelineConfig) -> dict[str, str]:
    """What differs from the settings that a checkpoint was trained with, by name, such as `steps: 4 -> 8`.

    Where the run is and how it is watched is left out.

    Args:
        checkpoint_dir: The checkpoint.
        config: The settings now.
    """
    before, now = (
        flat_settings(saved_settings(checkpoint_dir)),
        flat_settings(json.loads(json.dumps(config.to_dict()))),
    )
    return {
        name: f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(UNTRAINED_SETTINGS)
    }


def saved_settings(checkpoint_dir: Path) -> dict[str, Any]:
    """The train config as it was saved. Of a checkpoint of 0.1.0 it is that which may have been edited since."""
    kept = checkpoint_dir / TRAINING_STATE_DIR / SETTINGS
    file = kept if kept.exists() else pretrained_dir(checkpoint_dir) / TRAIN_CONFIG_NAME
    try:
        return dict(load_json(file))
    except DAMAGE as error:
        raise _broken(checkpoint_dir, f"{file.name} cannot be read ({_line(error)})") from error


def blame_settings(error: DoesNotLoad, changed: Mapping[str, str], checkpoint_dir: Path) -> CheckpointError:
    """The error of a checkpoint that does not load, in terms of the settings that have changed since, if it is them.

    Args:
        error: As `load` raised it.
        changed: As `changed_settings` gave them.
        checkpoint_dir: The checkpoint.
    """
    shaping = [line for name, line in changed.items() if name.startswith(SHAPING_SETTINGS)]
    if not shaping:
        return error
    return CheckpointError(
        f"checkpoint {checkpoint_dir} does not fit settings that have changed since ({'; '.join(shaping)}): put them "
        f"back, or begin a new run from its policy with --policy.path={pretrained_dir(checkpoint_dir)}"
    )


def load(
    checkpoint_dir: Path,
    algorithm: RLAlgorithm,
    optimizers: Mapping[str, Optimizer],
    device: str | torch.device = "cpu",
) -> Resumed:
    """Restores algorithm, optimizers and random state in place; the policy is built from `pretrained_model` before.

    Call it last of all that is built: building draws random numbers, and this sets the generators.

    Args:
        checkpoint_dir: The checkpoint.
        algorithm: Gets its tensors back.
        optimizers: Get their states back; the same names as when it was saved.
        device: Where the algorithm's tensors go.

    Returns:
        Step and counters.

    Raises:
        CheckpointError: The checkpoint is broken.
        DoesNotLoad: It is, or it belongs to another configuration.
    """
    verify(checkpoint_dir, (TRAINING_STATE_DIR, ALGORITHM_DIR))
    state_dir = checkpoint_dir / TRAINING_STATE_DIR
    # LeRobot's loader would skip an optimizer that it does not find.
    missing = [name for name in optimizers if not (state_dir / name).is_dir()]
    if missing:
        raise DoesNotLoad(_refusal(checkpoint_dir, f"it has no optimizer {', '.join(missing)}"))
    try:
        counters = load_json(state_dir / COUNTERS)
        algorithm.load_state_dict(
            load_file(checkpoint_dir / ALGORITHM_DIR / ALGORITHM_TENSORS), device=device
        )
        step = load_training_state(checkpoint_dir, optimizers)
    except DAMAGE as error:
        raise DoesNotLoad(_refusal(checkpoint_dir, _line(error))) from error
    tensors = {
        **{
            f"{ALGORITHM_DIR}/{ALGORITHM_TENSORS}: {key}": value
            for key, value in algorithm.state_dict().items()
        },
        **{
            f"{TRAINING_STATE_DIR}/{name}: {key} of tensor {number}": value
            for name, optimizer in optimizers.items()
            for number, own in optimizer.state_dict()["state"].items()
            for key, value in own.items()
            if isinstance(value, torch.Tensor)
        },
    }
    if (broken := first_not_finite(tensors.items())) is not None:
        raise _broken(checkpoint_dir, f"{broken} is not finite")
    return Resumed(step, counters)


def find_best(output_dir: Path) -> Path:
    """The checkpoint that `best` points at.

    Raises:
        CheckpointError: It is gone.
    """
    link = output_dir / CHECKPOINTS_DIR / BEST_CHECKPOINT_LINK
    place = pointed_at(link)
    if not place.is_dir():
        raise CheckpointError(
            f"the policy collapsed and the best checkpoint {link} is gone: resume from an earlier one"
        )
    return place


def pretrained_dir(checkpoint_dir: Path) -> Path:
    """Where the policy of a checkpoint is, for `--policy.path`."""
    return checkpoint_dir / PRETRAINED_MODEL_DIR


@contextlib.contextmanager
def owning(output_dir: Path) -> Iterator[None]:
    """Owns a run's directory: only one learner at a time may write to it. However it ends, it owns it no more.

    Args:
        output_dir: The run's directory; it may not exist.

    Raises:
        InUse: If another learner owns it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"another learner is training in {output_dir}; stop it, or name another folder with --output_dir"
            ) from None
        yield


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file in one step: after a kill or a power cut it is as before or as it should be.

    Args:
        file: The file; it may exist.
        write: Writes its content to the path that it is given.

    Raises:
        OSError: There is no room; nothing has changed.
    """
    aside = file.with_name(f"{file.name}.part")
    try:
        write(aside)
        _fsync(aside)
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _fsync(file.parent)


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Removes what a killed write left behind, and undoes half of a replacement.

    Args:
        output_dir: The run's directory, which this process owns; it may not exist.

    Returns:
        The directories removed.
    """
    removed = []
    for path in sorted((output_dir / CHECKPOINTS_DIR).glob(".*-*")):
        if (
            path.name.startswith(REPLACED)
            and not (home := path.with_name(path.name.removeprefix(REPLACED))).exists()
        ):
            path.rename(home)
        elif path.name.startswith((ASIDE, REPLACED)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            removed.append(path)
    return removed


def _write(aside: Path, state: TrainingState) -> None:
    """Writes everything of a checkpoint, with LeRobot's own writers."""
    save_checkpoint(
        aside,
        state.step,
        state.config,
        state.policy,
        state.optimizers,
        preprocessor=state.preprocessor,
        postprocessor=state.postprocessor,
    )
    state.algorithm.save_pretrained(aside / ALGORITHM_DIR)
    state_dir = aside / TRAINING_STATE_DIR
    write_json(dict(state.counters), state_dir / COUNTERS)
    write_json({"format": FORMAT, "version": version(PACKAGE)}, state_dir / FORMAT_FILE)
    shutil.copyfile(pretrained_dir(aside) / TRAIN_CONFIG_NAME, state_dir / SETTINGS)
    write_checksums(aside)


def write_checksums(checkpoint_dir: Path) -> None:
    """Writes down what the files of a checkpoint are now."""
    state_dir = checkpoint_dir / TRAINING_STATE_DIR
    files = [path for path in sorted(checkpoint_dir.rglob("*")) if path.is_file()]
    named = {path.relative_to(checkpoint_dir).as_posix(): path for path in files if path.name != CHECKSUMS}
    sums = {name: None if _may_be_edited(name) else _checksum(path) for name, path in named.items()}
    write_json(sums, state_dir / CHECKSUMS)


def _may_be_edited(name: str) -> bool:
    """Whether a file of a checkpoint holds settings: they are in force as they are found."""
    return name.endswith(".json") and not name.startswith(f"{TRAINING_STATE_DIR}/")


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _synchronise(directory: Path) -> None:
    """Brings files and directories to the disk, so that the rename does not overtake them."""
    for path in (*directory.rglob("*"), directory):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(aside: Path, place: Path) -> None:
    """Renames; a checkpoint of the same step, from before a resume, makes way first."""
    replaced = place.with_name(REPLACED + place.name)
    if place.exists():
        place.rename(replaced)
    aside.rename(place)
    _fsync(place.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _keep_best(place: Path) -> None:
    """Keeps the best checkpoint under another name, if another one is about to take its place.

    A resumed run comes to the version of a best checkpoint a second time, and not always as good.
    """
    best = pointed_at(place.with_name(BEST_CHECKPOINT_LINK))
    if not best.is_dir() or best != place.resolve():
        return
    kept = place.with_name(place.name + KEPT)
    aside = kept.with_name(ASIDE + kept.name)
    shutil.copytree(place, aside, copy_function=_link)
    _synchronise(aside)
    # One that was left behind by a kill is not pointed at.
    shutil.rmtree(kept, ignore_errors=True)
    aside.rename(kept)
    _point_at(kept, BEST_CHECKPOINT_LINK)


def _link(source: str, target: str) -> None:
    """A second name for a file, whose content nobody changes; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _note_best(place: Path, counters: Mapping[str, Any]) -> None:
    """Writes down with which counters a checkpoint became the best one, in one step."""
    replace_file(place / TRAINING_STATE_DIR / BEST_COUNTERS, lambda aside: write_json(dict(counters), aside))


def _point_at(place: Path, name: str) -> None:
    """Swaps a link in one step; LeRobot's own removes it first, and a kill in between would lose it."""
    link = place.with_name(name)
    aside = place.with_name(ASIDE + name)
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(place.name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        aside.write_text(place.name, encoding="utf-8")
        _fsync(aside)
    aside.replace(link)
    _fsync(place.parent)


def _broken(checkpoint_dir: Path, problem: str) -> CheckpointError:
    return CheckpointError(_refusal(checkpoint_dir, problem))


def _refusal(checkpoint_dir: Path, problem: str) -> str:
    return (
        f"checkpoint {checkpoint_dir} cannot be resumed: {problem}; resume from an earlier one in "
        f"{checkpoint_dir.parent}"
    )


def _line(error: BaseException) -> str:
    """An error of a library, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
