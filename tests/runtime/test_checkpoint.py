"""A checkpoint is whole or it is not there; what is loaded continues what was saved."""

import errno
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.rl.algorithms.base import RLAlgorithm
from lerobot.rl.train_rl import TrainRLServerPipelineConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lerobot_policy_pi_rl.runtime import checkpoint
from lerobot_policy_pi_rl.runtime.checkpoint import (
    CheckpointError,
    CheckpointNotWritten,
    InUse,
    TrainingState,
)

pytestmark = pytest.mark.timeout(120)

COUNTERS = {"iteration": 3, "version": 4, "env_steps": 2048, "lr": 1.2345678901234567e-5, "kl_coef": 0.1}


class Saved:
    """Something with `save_pretrained`, as policies and processors have it."""

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.name = name
        self.tensors = tensors

    def save_pretrained(self, directory: Path, state_dict: dict | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, directory / f"{self.name}.safetensors")


class EmptyConfig:
    """The config of an algorithm without settings."""

    def _save_pretrained(self, directory: Path) -> None:
        (directory / "config.json").write_text("{}")


class Regression(RLAlgorithm):
    """LeRobot's algorithm base around a critic that regresses random targets."""

    config_class = EmptyConfig  # type: ignore[assignment]
    name = "regression"

    def __init__(self) -> None:
        self.config = EmptyConfig()  # type: ignore[assignment]
        self.critic = nn.Linear(3, 1)
        self.optimizers: dict[str, Optimizer] = {
            "critic": Adam([self.critic.weight], lr=0.1),
            "bias": Adam([self.critic.bias], lr=0.2),
        }

    def update(self, batch_iterator: Iterator[Any] | None = None) -> Any:
        """One step on data from all three global generators."""
        inputs = torch.randn(8, 3) * random.random()
        targets = torch.from_numpy(np.random.uniform(size=(8, 1))).float()  # noqa: NPY002 - what is restored
        loss = (self.critic(inputs) - targets).square().mean()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss.item()

    def make_optimizers_and_scheduler(self) -> dict[str, Optimizer]:
        return self.optimizers

    def load_weights(self, weights: dict[str, Any], device: str | torch.device = "cpu") -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return self.critic.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        self.critic.load_state_dict(state_dict)


def make_state(algorithm: Regression, step: int = 3, policy_value: float = 1.0) -> TrainingState:
    """A state with LeRobot's config and stand-ins for policy and processors."""
    return TrainingState(
        step=step,
        total_steps=100,
        config=TrainRLServerPipelineConfig(),
        policy=Saved("model", {"w": torch.tensor([policy_value])}),  # type: ignore[arg-type]
        preprocessor=Saved("pre", {"mean": torch.zeros(2)}),  # type: ignore[arg-type]
        postprocessor=Saved("post", {"mean": torch.ones(2)}),  # type: ignore[arg-type]
        algorithm=algorithm,
        optimizers=algorithm.optimizers,
        counters=COUNTERS,
    )


def saved_policy(place: Path) -> float:
    """The number that tells one checkpoint's policy from another's."""
    return load_file(checkpoint.pretrained_dir(place) / "model.safetensors")["w"].item()


def test_the_layout_is_lerobots(tmp_path: Path) -> None:
    algorithm = Regression()
    algorithm.update()
    place = checkpoint.save(tmp_path, make_state(algorithm))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    home = "checkpoints/000003"
    assert place == tmp_path / home
    assert {
        f"{home}/pretrained_model/model.safetensors",
        f"{home}/pretrained_model/pre.safetensors",
        f"{home}/pretrained_model/post.safetensors",
        f"{home}/pretrained_model/train_config.json",
        f"{home}/training_state/training_step.json",
        f"{home}/training_state/rng_state.safetensors",
        f"{home}/training_state/counters.json",
        f"{home}/training_state/pi_rl.json",
        f"{home}/training_state/checksums.json",
        f"{home}/training_state/settings.json",
        f"{home}/training_state/critic/optimizer_state.safetensors",
        f"{home}/training_state/bias/optimizer_param_groups.json",
        f"{home}/algorithm/model.safetensors",
        f"{home}/algorithm/config.json",
    } <= files
    assert (tmp_path / "checkpoints/last").readlink() == Path("000003")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"000003", "last"}


def test_a_resumed_run_continues_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    algorithm = Regression()
    for _ in range(3):
        algorithm.update()
    algorithm.optimizers["critic"].param_groups[0]["lr"] = 0.05
    checkpoint.save(tmp_path, make_state(algorithm))
    expected = [algorithm.update() for _ in range(3)]

    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    resumed = Regression()
    found = checkpoint.load(checkpoint.find_last(tmp_path), resumed, resumed.optimizers)
    assert found.step == 3
    assert found.counters == COUNTERS
    assert resumed.optimizers["critic"].param_groups[0]["lr"] == 0.05
    assert [resumed.update() for _ in range(3)] == expected


def test_last_points_at_the_newest(tmp_path: Path) -> None:
    algorithm = Regression()
    for step in (1, 2):
        checkpoint.save(tmp_path, make_state(algorithm, step, float(step)))
    assert checkpoint.find_last(tmp_path).name == "000002"
    assert (tmp_path / "checkpoints/000001").is_dir()


def test_best_stays_where_it_was_marked(tmp_path: Path) -> None:
    algorithm = Regression()
    for step in (1, 2):
        checkpoint.save(tmp_path, make_state(algorithm, step, float(step)))
        if step == 1:
            assert checkpoint.mark_best(tmp_path, make_state(algorithm, step, float(step))) is None
    assert saved_policy(tmp_path / "checkpoints/best") == 1.0
    assert checkpoint.find_last(tmp_path).name == "000002"


def test_best_is_written_where_last_is_another(tmp_path: Path) -> None:
    algorithm = Regression()
    checkpoint.save(tmp_path, make_state(algorithm, 1, 1.0))
    for step in (1, 3, 4):
        superseded = checkpoint.mark_best(tmp_path, make_state(algorithm, step, float(step)))
        assert saved_policy(tmp_path / "checkpoints/best") == step
        # The one that last points at is not to be removed.
        assert (superseded and superseded.name) == (None if step < 4 else "000003")
    assert checkpoint.find_last(tmp_path).name == "000001"


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, make_state(Regression(), policy_value=value))
    place = checkpoint.find_last(tmp_path)
    assert saved_policy(place) == 2.0
    checkpoint.verify(place)
    assert {path.name for path in place.parent.iterdir()} == {"000003", "last"}


def test_a_best_checkpoint_keeps_why_it_is_the_best(tmp_path: Path) -> None:
    """Also one that was written before its validation, and under another name when its place is taken."""
    assert checkpoint.best_counters(tmp_path) is None
    algorithm = Regression()
    checkpoint.mark_best(tmp_path, make_state(algorithm, 3, 3.0))
    assert checkpoint.best_counters(tmp_path) == COUNTERS
    checkpoint.save(tmp_path, make_state(algorithm, 4, 4.0))
    validated = COUNTERS | {"best_success": 0.9}
    checkpoint.mark_best(tmp_path, replace(make_state(algorithm, 4, 4.0), counters=validated))
    assert checkpoint.best_counters(tmp_path) == validated
    checkpoint.verify(checkpoint.find_last(tmp_path))

    checkpoint.save(tmp_path, make_state(algorithm, 4, 5.0))
    best = checkpoint.find_best(tmp_path)
    assert (best.name, saved_policy(best)) == ("000004-best", 4.0)
    assert checkpoint.best_counters(tmp_path) == validated
    checkpoint.verify(best)
    assert saved_policy(checkpoint.find_last(tmp_path)) == 5.0
    assert checkpoint.mark_best(tmp_path, make_state(algorithm, 4, 5.0)) == best
    # Another one in the same place needs no copy: it is chosen to be the best.
    checkpoint.save(tmp_path, make_state(algorithm, 6, 6.0))
    checkpoint.mark_best(tmp_path, make_state(algorithm, 5, 5.0))
    checkpoint.mark_best(tmp_path, make_state(algorithm, 5, 5.5))
    assert saved_policy(checkpoint.find_best(tmp_path)) == 5.5
    assert not list(tmp_path.glob("checkpoints/000005-best"))


def test_a_best_checkpoint_that_cannot_be_kept_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = Regression()
    checkpoint.mark_best(tmp_path, make_state(algorithm, 3, 3.0))
    for name in ("link", "copy2"):
        owner = {"link": checkpoint.os, "copy2": checkpoint.shutil}[name]
        monkeypatch.setattr(owner, name, _no_space)
    with pytest.raises(CheckpointNotWritten, match="of version 3 could not be"):
        checkpoint.save(tmp_path, make_state(algorithm, 3, 4.0))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"000003", "best"}
    assert saved_policy(checkpoint.find_best(tmp_path)) == 3.0


def test_a_best_checkpoint_is_copied_where_files_have_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = Regression()
    checkpoint.mark_best(tmp_path, make_state(algorithm, 3, 3.0))
    monkeypatch.setattr(checkpoint.os, "link", _no_space)
    checkpoint.save(tmp_path, make_state(algorithm, 3, 4.0))
    assert saved_policy(checkpoint.find_best(tmp_path)) == 3.0


@pytest.mark.parametrize("step", ["_point_at", "_note_best"])
def test_a_full_disk_leaves_the_best_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Also where `last` is the new best one, of which only the link has to be written."""
    algorithm = Regression()
    checkpoint.save(tmp_path, make_state(algorithm, 1, 1.0))
    checkpoint.mark_best(tmp_path, make_state(algorithm, 1, 1.0))
    checkpoint.save(tmp_path, make_state(algorithm, 2, 2.0))
    monkeypatch.setattr(checkpoint, step, _no_space)
    with pytest.raises(CheckpointNotWritten, match="of version 2 could not be"):
        checkpoint.mark_best(tmp_path, make_state(algorithm, 2, 2.0))
    assert checkpoint.find_best(tmp_path).name == "000001"


def test_a_superseded_checkpoint_that_cannot_be_removed_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = checkpoint.save(tmp_path, make_state(Regression()))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", _no_space)
        checkpoint.remove_superseded(place)
    assert "000003 is no longer the best checkpoint and could not be removed: OSError" in caplog.text
    checkpoint.remove_superseded(place)
    assert not place.exists()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# A kill during a write


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


CRASHES = ("_synchronise", "_move_into_place", "_point_at")


@pytest.mark.parametrize("point", CRASHES)
def test_a_kill_before_the_end_leaves_last_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    algorithm = Regression()
    checkpoint.save(tmp_path, make_state(algorithm, 1, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, point, _kill)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, make_state(algorithm, 2, 2.0))
    checkpoint.remove_unfinished(tmp_path)
    place = checkpoint.find_last(tmp_path)
    assert (place.name, saved_policy(place)) == ("000001", 1.0)
    assert checkpoint.load(place, algorithm, algorithm.optimizers).step == 1
    assert not [path.name for path in place.parent.iterdir() if path.name.startswith(".")]
    checkpoint.save(tmp_path, make_state(algorithm, 2, 2.0))
    assert saved_policy(checkpoint.find_last(tmp_path)) == 2.0


def test_a_full_disk_is_one_line_and_leaves_last_as_it_was(
    tmp_path: Path, full_disk: Callable[[], Any]
) -> None:
    """Also of the same step, whose directory a write would replace; safetensors has an error of its own."""
    algorithm = Regression()
    checkpoint.save(tmp_path, make_state(algorithm, 1, 1.0))
    for step in (1, 2):
        with (
            pytest.raises(CheckpointNotWritten, match=f"of version {step} could not be") as error,
            full_disk(),
        ):
            checkpoint.save(tmp_path, make_state(algorithm, step, 2.0))
        assert "\n" not in str(error.value)
        place = checkpoint.find_last(tmp_path)
        assert (place.name, saved_policy(place)) == ("000001", 1.0)
        assert {path.name for path in place.parent.iterdir()} == {"000001", "last"}
    checkpoint.save(tmp_path, make_state(algorithm, 2, 2.0))
    assert saved_policy(checkpoint.find_last(tmp_path)) == 2.0


def test_a_kill_half_way_through_a_replacement_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, make_state(Regression(), policy_value=1.0))
    renames = [0]
    rename = Path.rename

    def rename_once(path: Path, target: Path) -> Path:
        renames[0] += 1
        if renames[0] > 1:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, make_state(Regression(), policy_value=2.0))
    place = checkpoint.find_last(tmp_path)
    assert saved_policy(place) == 1.0
    checkpoint.verify(place)


def _kill(*_: object) -> None:
    raise Killed


def test_what_is_removed_is_named_and_nothing_else_goes(tmp_path: Path) -> None:
    assert checkpoint.remove_unfinished(tmp_path) == []
    checkpoint.save(tmp_path, make_state(Regression()))
    left = tmp_path / "checkpoints" / ".writing-000009"
    (left / "pretrained_model").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".keep-me").mkdir()
    assert checkpoint.remove_unfinished(tmp_path) == [left]
    assert {path.name for path in left.parent.iterdir()} == {"000003", "last", ".keep-me"}


def test_looking_for_the_last_one_changes_nothing(tmp_path: Path) -> None:
    """Actors look for it while the learner writes the next one, or replaces this one."""
    place = checkpoint.save(tmp_path, make_state(Regression()))
    writing, displaced = (place.with_name(name) for name in (".writing-000004", ".replaced-000003"))
    writing.mkdir()
    for _ in range(2):
        before = sorted(tmp_path.rglob("*"))
        found = checkpoint.find_last(tmp_path)
        checkpoint.verify(found)
        assert sorted(tmp_path.rglob("*")) == before
        if found == place:
            # As a kill half-way through a replacement leaves it.
            place.rename(displaced)
    assert found == displaced
    assert checkpoint.remove_unfinished(tmp_path) == [writing]
    assert checkpoint.find_last(tmp_path) == place


def test_one_learner_at_a_time_owns_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        with checkpoint.owning(folder):
            with pytest.raises(InUse, match=r"another learner is training in .*run; stop it") as error:
                checkpoint.owning(folder).__enter__()
            assert "\n" not in str(error.value)


# Missing and broken


def test_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*last: start without --resume=true"):
        checkpoint.find_last(tmp_path)


def cut_short(place: Path) -> None:
    path = place / "algorithm/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def remove_policy(place: Path) -> None:
    (place / "pretrained_model/model.safetensors").unlink()


def remove_state(place: Path) -> None:
    shutil.rmtree(place / "training_state")


def corrupt_counters(place: Path) -> None:
    path = place / "training_state/counters.json"
    path.write_bytes(b"#" * path.stat().st_size)


def corrupt_optimizer(place: Path) -> None:
    path = place / "training_state/critic/optimizer_state.safetensors"
    path.write_bytes(b"#" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"algorithm/model\.safetensors is damaged: its checksum is not that"),
        (remove_policy, r"pretrained_model/model\.safetensors is missing"),
        (remove_state, "training_state is missing"),
        (corrupt_counters, r"training_state/counters\.json is damaged"),
        (corrupt_optimizer, r"training_state/critic/optimizer_state\.safetensors is damaged"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    algorithm = Regression()
    algorithm.update()
    damage(checkpoint.save(tmp_path, make_state(algorithm)))
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.verify(checkpoint.find_last(tmp_path))
    assert "\n" not in str(error.value)
    assert "resume from an earlier one in" in str(error.value)


def as_written_by_0_1_0(place: Path) -> None:
    """Leaves the sizes of files where newer checkpoints have checksums and a copy of the settings."""
    for name in ("checksums.json", "settings.json"):
        (place / "training_state" / name).unlink()
    files = [path for path in place.rglob("*") if path.is_file()]
    sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
    (place / "training_state/file_sizes.json").write_text(json.dumps(sizes))


def test_a_checkpoint_of_0_1_0_still_loads(tmp_path: Path) -> None:
    """By its sizes; what libraries say of a file whose size is right is one line as well."""
    algorithm = Regression()
    algorithm.update()
    place = checkpoint.save(tmp_path, make_state(algorithm))
    as_written_by_0_1_0(place)
    assert checkpoint.load(place, algorithm, algorithm.optimizers).counters == COUNTERS
    assert checkpoint.changed_settings(place, make_state(algorithm).config) == {}
    config = place / "pretrained_model/train_config.json"
    config.write_text(config.read_text() + "\n")
    checkpoint.verify(place)
    for damage, said in ((corrupt_counters, "JSONDecodeError"), (corrupt_optimizer, "SafetensorError")):
        damage(place)
        with pytest.raises(CheckpointError, match=said) as error:
            checkpoint.load(place, algorithm, algorithm.optimizers)
        assert "\n" not in str(error.value)
        place = checkpoint.save(tmp_path, make_state(algorithm))
        as_written_by_0_1_0(place)
    cut_short(place)
    with pytest.raises(CheckpointError, match=r"algorithm/model\.safetensors is \d+ bytes, \d+ bytes were"):
        checkpoint.verify(place)


@pytest.mark.parametrize("name", ["pretrained_model/train_config.json", "algorithm/config.json"])
def test_settings_may_be_edited_and_must_be_settings(tmp_path: Path, name: str) -> None:
    place = checkpoint.save(tmp_path, make_state(Regression()))
    (place / name).write_text('{"steps": 5}')
    checkpoint.verify(place)
    for content in ("{", "[1]", '{"a": "\udcff"}'):
        (place / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match=re.escape(name)) as error:
            checkpoint.verify(place)
        assert "\n" not in str(error.value)


# Copies that follow links, and file systems that have none


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_copy_that_made_folders_of_links_is_mended(tmp_path: Path, name: str) -> None:
    algorithm = Regression()
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", make_state(algorithm, step, float(step)))
        checkpoint.mark_best(tmp_path / "run", make_state(algorithm, step, float(step)))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, symlinks=False)
    folder = copy / "checkpoints"
    assert (folder / name).is_dir()
    assert not (folder / name).is_symlink()
    checkpoint.verify(checkpoint.find_last(copy))
    assert checkpoint.best_counters(copy) == COUNTERS

    checkpoint.mend_links(copy)
    assert (folder / name).readlink() == Path("000002")
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002", "best", "last"]
    checkpoint.save(copy, make_state(algorithm, 3, 3.0))
    assert saved_policy(checkpoint.find_last(copy)) == 3.0
    checkpoint.mend_links(copy)
    assert (folder / "last").readlink() == Path("000003")


@pytest.mark.parametrize(("beside", "home"), [("gone", "000002"), ("another", "000002-last")])
def test_a_folder_that_is_no_copy_of_a_numbered_checkpoint_becomes_one(
    tmp_path: Path, beside: str, home: str
) -> None:
    """Nothing is lost, whichever of the two is the newer one."""
    place = checkpoint.save(tmp_path, make_state(Regression(), 2, 2.0))
    last = place.with_name("last")
    last.unlink()
    place.rename(last)
    if beside == "another":
        last.rename(tmp_path / "aside")
        checkpoint.save(tmp_path, make_state(Regression(), 2, 5.0))
        last.unlink()
        (tmp_path / "aside").rename(last)
    checkpoint.mend_links(tmp_path)
    assert last.readlink() == Path(home)
    assert saved_policy(checkpoint.find_last(tmp_path)) == 2.0
    if beside == "another":
        assert saved_policy(place) == 5.0


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/last").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"last is a folder where a link .* move it away") as error:
        checkpoint.mend_links(tmp_path)
    assert "\n" not in str(error.value)


def test_where_there_are_no_links_a_file_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT; copied to where links are, the next checkpoint has one again."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    algorithm = Regression()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        for step in (1, 2):
            checkpoint.save(tmp_path, make_state(algorithm, step, float(step)))
        checkpoint.mark_best(tmp_path, make_state(algorithm, 2, 2.0))
        # Another one in the best one's place.
        checkpoint.save(tmp_path, make_state(algorithm, 2, 2.5))
    folder = tmp_path / "checkpoints"
    assert [(folder / name).read_text() for name in ("last", "best")] == ["000002", "000002-best"]
    assert saved_policy(checkpoint.find_last(tmp_path)) == 2.5
    assert saved_policy(checkpoint.find_best(tmp_path)) == 2.0
    assert checkpoint.load(checkpoint.find_last(tmp_path), algorithm, algorithm.optimizers).step == 2
    checkpoint.mend_links(tmp_path)
    checkpoint.save(tmp_path, make_state(algorithm, 3, 3.0))
    assert (folder / "last").readlink() == Path("000003")


def test_a_copy_without_links_names_the_newest_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        place = checkpoint.save(tmp_path, make_state(Regression(), step))
    place.with_name("last").unlink()
    with pytest.raises(CheckpointError, match="which some copies of a run lose") as error:
        checkpoint.find_last(tmp_path)
    assert f"--config_path={place}/pretrained_model/train_config.json --resume=true" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_set_of_optimizers_is_refused(tmp_path: Path) -> None:
    algorithm = Regression()
    checkpoint.save(tmp_path, make_state(algorithm))
    more = {**algorithm.optimizers, "policy": Adam([nn.Parameter(torch.zeros(1))])}
    with pytest.raises(CheckpointError, match="it has no optimizer policy"):
        checkpoint.load(checkpoint.find_last(tmp_path), algorithm, more)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "format 0, written by lerobot_policy_pi_rl before 0.1.0"),
        ({"format": 99, "version": "9.9"}, "9.9"),
    ],
)
def test_a_checkpoint_of_another_format_says_what_to_do(
    tmp_path: Path, written: dict | None, said: str
) -> None:
    algorithm = Regression()
    algorithm.update()
    place = checkpoint.save(tmp_path, make_state(algorithm))
    file = place / "training_state/pi_rl.json"
    file.unlink()
    if written is not None:
        file.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        checkpoint.load(place, algorithm, algorithm.optimizers)
    assert f"--policy.path={place / 'pretrained_model'}" in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_shape_a_checkpoint_are_blamed_for_its_not_loading(tmp_path: Path) -> None:
    algorithm = Regression()
    place = checkpoint.save(tmp_path, make_state(algorithm))
    more = {**algorithm.optimizers, "policy": Adam([nn.Parameter(torch.zeros(1))])}
    with pytest.raises(checkpoint.DoesNotLoad) as error:
        checkpoint.load(place, algorithm, more)
    harmless = {"steps": "steps: 1 -> 2"}
    assert checkpoint.blame_settings(error.value, harmless, place) is error.value
    shaping = harmless | {"algorithm.kl_coef": "algorithm.kl_coef: 0.0 -> 0.1"}
    text = str(checkpoint.blame_settings(error.value, shaping, place))
    assert "have changed since (algorithm.kl_coef: 0.0 -> 0.1): put them back" in text
    assert "\n" not in text


def test_settings_that_changed_are_named(tmp_path: Path) -> None:
    algorithm = Regression()
    algorithm.update()
    state = make_state(algorithm)
    place = checkpoint.save(tmp_path, state)
    assert checkpoint.changed_settings(place, state.config) == {}
    now = TrainRLServerPipelineConfig(steps=7, output_dir=tmp_path, resume=True, job_name="other")
    assert checkpoint.changed_settings(place, now) == {"steps": f"steps: {state.config.steps} -> 7"}
