"""A run with a camera and a small stock policy: learner and actor over loopback, resumed, and exported."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from lerobot.policies.factory import get_policy_class

from lerobot_policy_pi_rl.bases.registry import make_base
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.scripts.export import export

from . import window  # noqa: F401  registers the environment
from .conftest import explorer

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(240)

ITERATIONS = 2


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, free_port: int, tmp_path: Path, run_both: Callable[..., Any]
) -> Callable[..., Any]:
    """Runs a learner and an actor to the end; returns the metrics."""

    def configure(given: dict[str, Any], is_actor: bool) -> PIRLTrainConfig:
        monkeypatch.setattr(sys, "argv", ["test"])
        cfg = draccus.decode(PIRLTrainConfig, given)
        cfg.is_actor = is_actor
        if is_actor:
            cfg.resume = False
        cfg.validate()
        return cfg

    def run(base: Path, **policy: Any) -> list[dict[str, Any]]:
        given = {
            "policy": {
                "type": "pi_rl",
                "base_path": str(base),
                "device": "cpu",
                "push_to_hub": False,
                "num_inference_steps": 2,
                "actor_learner_config": {"learner_port": free_port},
                **policy,
            },
            "env": {"type": "test_window"},
            "algorithm": {
                "type": "pi_rl",
                "critic_hidden_dims": [16],
                "critic_warmup": 0,
                "epochs": 1,
                "minibatch_size": 8,
                "micro_batch_size": 4,
                "collection": {"num_envs": 2, "num_workers": 0, "decisions": 6, "eval_envs": 1},
            },
            "output_dir": str(tmp_path / "run"),
            "steps": ITERATIONS,
            "env_eval_freq": ITERATIONS,
            "save_freq": ITERATIONS,
            "eval": {"n_episodes": 2},
            "seed": 0,
        }
        return run_both(lambda is_actor: configure(given, is_actor))

    return run


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("smolvla", "expert"),
        ("pi0", "expert_lora"),
        ("pi05", "lora"),
        ("xvla", "expert"),
        ("multi_task_dit", "expert"),
        ("multi_task_dit", "all"),
        ("eo1", "expert"),
        ("eo1", "lora"),
        ("evo1", "expert_lora"),
        ("vla_jepa", "expert"),
        ("groot", "expert"),
        ("groot", "expert_lora"),
        ("molmoact2", "expert"),
        ("molmoact2", "expert_lora"),
        ("toy", "expert"),
    ],
)
def test_a_stock_policy_is_trained_from_pictures_and_exported(
    save_stock: Callable[[str], Path],
    train: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    name: str,
    trainable: str,
) -> None:
    base = save_stock(name)
    rows = train(base, trainable=trainable, lora_rank=2, explorer={"kind": explorer(name).kind})
    iterations = [row for row in rows if "rollout/decisions" in row]
    assert [row["step"] for row in iterations] == [1, 2]
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in iterations)
    assert all(row["dropped/malformed_messages"] == 0 for row in iterations)
    assert [row["step"] for row in rows if "eval/success" in row] == [0, 2]
    weights = sum(file.stat().st_size for file in base.glob("model.safetensors"))
    assert iterations[-1]["push/bytes"] < weights
    last = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    export(last, tmp_path / "exported")
    before, after = (
        get_policy_class(name).from_pretrained(folder) for folder in (base, tmp_path / "exported")
    )
    moved = {
        key for key, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[key])
    }
    assert moved
    assert after.config.n_action_steps == 3
    if trainable == "expert":
        expert = make_base(PIRLConfig(base_path=str(base), device="cpu", explorer=explorer(name)))
        assert all(expert._is_expert(key) for key in moved)
