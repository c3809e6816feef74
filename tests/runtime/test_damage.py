"""A checkpoint with a damaged file: the run is resumed, or ends with one line that names the file."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime import checkpoint
from lerobot_policy_pi_rl.runtime.checkpoint import CheckpointError
from lerobot_policy_pi_rl.runtime.learner import Learner
from lerobot_policy_pi_rl.runtime.pipeline import make_player
from lerobot_policy_pi_rl.scripts.console import EXPECTED_ERRORS, one_line

from .conftest import MakeConfig, Train

pytestmark = pytest.mark.timeout(240)

POLICY, CRITIC = "pretrained_model/model.safetensors", "algorithm/model.safetensors"
MOMENTS = "training_state/critic/optimizer_state.safetensors"
KINDS: dict[str, Callable[[bytes, float], bytes]] = {
    "empty": lambda content, _: b"",
    "truncated": lambda content, where: content[: int(where * len(content))],
    "zeros": lambda content, _: bytes(len(content)),
    "garbage": lambda content, _: bytes(range(256)) * (len(content) // 256 + 1),
    "another magic": lambda content, _: b"PK\x03\x04" + content[4:],
    "a large number": lambda content, _: b"\xff" * 8 + content[8:],
    "longer": lambda content, _: content + b"\x00",
}


def flip(content: bytes, where: float, bit: int) -> bytes:
    """Content with one bit changed."""
    position = min(int(where * len(content)), len(content) - 1)
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def ended_by(work: Callable[[], Any]) -> str | None:
    """The line with which a command would end; None if it would not. Any other error is a stack trace, and fails."""
    try:
        work()
    except EXPECTED_ERRORS as error:
        return one_line(error)
    return None


@pytest.fixture
def trained(train: Train, tmp_path: Path) -> Path:
    """Checkpoint of a run whose policy and critic have moments."""
    train("--steps=2", "--algorithm.critic_warmup=0")
    return tmp_path / "run/checkpoints/000002"


@pytest.fixture
def resume(make_cfg: MakeConfig) -> Callable[[], Any]:
    """Builds the learner of the resumed run."""
    return lambda: Learner(make_cfg("--resume=true", "--algorithm.critic_warmup=0"), Event())


@pytest.mark.slow
def test_no_damage_is_a_stack_trace(trained: Path, resume: Callable[[], Any]) -> None:
    """Of weights, optimizers and training state none is overlooked; an edited configuration may do no harm."""
    files = sorted(path for path in trained.rglob("*") if path.is_file())
    names = [path.relative_to(trained).as_posix() for path in files]
    assert {POLICY, CRITIC, MOMENTS, "training_state/counters.json"} <= set(names)

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(names), st.sampled_from(["flip", *KINDS]), st.floats(0, 0.999), st.integers(0, 7))
    def damage(name: str, kind: str, where: float, bit: int) -> None:
        file = trained / name
        content = file.read_bytes()
        damaged = flip(content, where, bit) if kind == "flip" else KINDS[kind](content, where)
        file.write_bytes(damaged)
        said = ended_by(resume)
        file.write_bytes(content)
        if checkpoint._may_be_edited(name):
            return
        assert said is not None or damaged == content, f"{kind} of {name} was overlooked"
        # These two say what the others are to be: another number in them is another format or another checksum.
        judges = file.name in (checkpoint.CHECKSUMS, checkpoint.FORMAT_FILE)
        assert said is None or file.name in said or judges, said

    damage()
    resume()


def spoil(file: Path, number: float) -> str:
    """Puts a number into the first tensor of a file that has floats, and the checksum in order; returns its name."""
    tensors = load_file(file)
    name = next(key for key, value in sorted(tensors.items()) if value.is_floating_point() and value.ndim)
    tensors[name].view(-1)[0] = number
    save_file(tensors, file)
    checkpoint.write_checksums(file.parents[2 if "optimizer" in file.name else 1])
    return name


@pytest.mark.parametrize("number", [math.nan, -math.inf])
@pytest.mark.parametrize("file", [POLICY, CRITIC, MOMENTS])
def test_weights_that_are_not_finite_are_not_resumed_from(
    trained: Path, resume: Callable[[], Any], file: str, number: float
) -> None:
    """A checkpoint that is as it was written, by a version that did not look."""
    spoil(trained / file, number)
    with pytest.raises((CheckpointError, ConfigError), match="not finite") as error:
        resume()
    assert "\n" not in str(error.value)


def test_a_policy_that_is_not_finite_is_not_begun_with(
    make_cfg: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    name = spoil(trained / POLICY, math.nan)
    folder = trained / "pretrained_model"
    cfg = make_cfg(f"--policy.path={folder}", f"--output_dir={tmp_path / 'other'}")
    said = f"{folder} has weights that are not finite, in {name}; take another checkpoint"
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_player(cfg)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"]
)
def test_a_damaged_file_of_a_policy_to_begin_with_is_one_line(
    make_cfg: MakeConfig, trained: Path, tmp_path: Path, name: str
) -> None:
    """Which has no checksums: it may be that of supervised training."""
    folder = tmp_path / "supervised"
    shutil.copytree(trained / "pretrained_model", folder)
    cfg = make_cfg(f"--policy.path={folder}", f"--output_dir={tmp_path / 'other'}")
    for damaged in (b"", b"{}", b"\xff" * 64, (folder / name).read_bytes()[:-9]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(
            ConfigError, match=f"{name}.* of {re.escape(str(folder))} cannot be loaded"
        ) as error:
            make_player(cfg)
        assert "\n" not in str(error.value)
