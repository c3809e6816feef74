"""LeRobot's supervised training with our additions."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts import lerobot_train

from lerobot_policy_pi_rl.runtime.seeds import VALIDATION_SEED
from lerobot_policy_pi_rl.runtime.supervised import (
    Converged,
    InMemoryDataset,
    Validation,
    additions,
    in_memory,
)
from lerobot_policy_pi_rl.scripts import supervised


@pytest.fixture
def dataset(tmp_path: Path) -> LeRobotDataset:
    """Two episodes of three and four frames, with chunks of two actions."""
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    made = LeRobotDataset.create(
        "local/two", fps=10, features=features, root=tmp_path / "data", use_videos=False
    )
    for length in (3, 4):
        for step in range(length):
            made.add_frame(
                {
                    "observation.state": torch.tensor([float(step), float(length)]),
                    "action": torch.tensor([step / 10, 0.5]),
                    "task": "go",
                }
            )
        made.save_episode()
    made.finalize()
    return LeRobotDataset("local/two", root=tmp_path / "data", delta_timestamps={"action": [0.0, 0.1]})


def test_a_small_data_set_is_held_in_memory_unchanged(dataset: LeRobotDataset) -> None:
    held = in_memory(dataset)
    assert isinstance(held, InMemoryDataset)
    assert len(held) == len(dataset) == 7
    for index in range(7):
        expected, found = dataset[index], held[index]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
    assert held.meta is dataset.meta


def test_a_large_data_set_is_left_where_it_is(
    dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lerobot_policy_pi_rl.runtime.supervised.MEMORY_BYTES", 7 * 10)
    assert in_memory(dataset) is dataset


def run(validation: Validation, folder: Path, rates: list[float]) -> list[dict]:
    """Evaluations every 500 steps, as LeRobot's training asks for them; what `evaluate` was told."""
    for number in range(1, len(rates) + 1):
        (folder / f"checkpoints/{number * 500:06d}").mkdir(parents=True, exist_ok=True)
        validation("envs", videos_dir=folder / f"eval/videos_step_{number * 500:06d}", start_seed=0)
    return []


def validated(rates: list[float], told: list[dict] | None = None, **limits: float) -> Validation:
    """A validation whose evaluations give these rates of success."""
    following = iter(rates)

    def evaluate(*arguments: object, **settings: object) -> dict:
        if told is not None:
            told.append(settings)
        return {"overall": {"pc_success": 100 * next(following)}}

    return Validation(evaluate, **limits)


@pytest.mark.parametrize(
    ("rates", "ended_after", "best"),
    [
        ([0.2, 0.4, 0.3, 0.4, 0.9], 4, "001000"),  # an equal one is no new best
        ([0.2, 0.1, 0.3, 0.2, 0.4], 5, "002500"),
        ([0.0, 0.0, 0.0], 3, "000500"),
    ],
)
def test_training_ends_when_validation_stops_rising(
    tmp_path: Path, rates: list[float], ended_after: int, best: str
) -> None:
    validation = validated(rates, patience=2)
    if ended_after < len(rates) or rates[-1] == 0.0:
        with pytest.raises(Converged, match="no better validation in the last 2"):
            run(validation, tmp_path, rates)
    else:
        run(validation, tmp_path, rates)
    assert len(validation.successes) == ended_after
    assert (tmp_path / "checkpoints/best").resolve().name == best
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(line["step"], line["eval/success"]) for line in lines] == [
        (500 * number, pytest.approx(rate)) for number, rate in enumerate(rates[:ended_after], 1)
    ]


def test_training_ends_after_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 30)
    monkeypatch.setattr("lerobot_policy_pi_rl.runtime.supervised.time.monotonic", lambda: next(clock))
    validation = validated([0.1, 0.2, 0.3, 0.4], max_minutes=1.0)
    with pytest.raises(Converged, match=r"1\.0 minutes are used"):
        run(validation, tmp_path, [0.1, 0.2, 0.3, 0.4])
    assert validation.successes == [0.1, 0.2]


def test_validation_starts_are_those_of_this_project(tmp_path: Path) -> None:
    told: list[dict] = []
    run(validated([0.5], told), tmp_path, [0.5])
    assert told == [{"start_seed": VALIDATION_SEED, "max_episodes_rendered": 0, "videos_dir": None}]


def test_lerobot_is_as_it_was_afterwards() -> None:
    before = lerobot_train.eval_policy_all, lerobot_train.make_train_eval_datasets
    with additions(None, None):
        assert lerobot_train.eval_policy_all is not before[0]
    assert (lerobot_train.eval_policy_all, lerobot_train.make_train_eval_datasets) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--patience=2"], "--patience and --max_minutes need --env.type and --env_eval_freq"),
        (
            ["--patience=2", "--env.type=metaworld_state", "--env_eval_freq=3", "--save_freq=2"],
            "3 must be a multiple of save_freq=2",
        ),
    ],
)
def test_an_end_needs_validations(
    dataset: LeRobotDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", command(dataset, tmp_path, *more))
    # A text as the code: Python prints it and exits with 1.
    with pytest.raises(SystemExit, match=re.escape(message)):
        supervised.main()
    assert not (tmp_path / "out").exists()


def test_training_really_runs_on_frames_in_memory(
    dataset: LeRobotDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", command(dataset, tmp_path))
    reads: list[int] = []
    get = InMemoryDataset.__getitem__
    monkeypatch.setattr(
        InMemoryDataset, "__getitem__", lambda self, index: reads.append(index) or get(self, index)
    )
    supervised.main()
    assert sorted(set(reads)) == list(range(7))
    saved = tmp_path / "out/checkpoints/last/pretrained_model/config.json"
    assert json.loads(saved.read_text(encoding="utf-8"))["type"] == "pi_rl"


def command(dataset: LeRobotDataset, folder: Path, *more: str) -> list[str]:
    return [
        "lerobot-pi-rl-supervised",
        f"--dataset.repo_id={dataset.repo_id}",
        f"--dataset.root={dataset.root}",
        "--policy.type=pi_rl",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--policy.chunk_size=2",
        "--policy.n_action_steps=2",
        f"--output_dir={folder / 'out'}",
        "--steps=2",
        "--batch_size=7",
        "--num_workers=0",
        "--wandb.enable=false",
        *more,
    ]
