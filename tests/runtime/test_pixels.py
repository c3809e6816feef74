"""Runs in real environments with pictures, rendered in software: LeRobot's `metaworld` and `gym_hil` (EGL), `pusht`."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.envs.configs import PushtEnv
from lerobot.utils.constants import ACTION

from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv
from lerobot_policy_pi_rl.runtime.observations import ObservationPath, offered_features
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig

from .conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RunBoth = Callable[[Callable[[bool], PIRLTrainConfig]], list[dict[str, Any]]]
# A few steps in all: a picture takes up to a second.
FEW = (
    "--policy.chunk_size=2",
    "--policy.n_action_steps=2",
    "--algorithm.collection.num_envs=1",
    "--algorithm.collection.num_workers=1",
    "--algorithm.collection.decisions=4",
    "--algorithm.collection.eval_envs=0",
    "--algorithm.minibatch_size=4",
    "--algorithm.critic_warmup=0",
    "--steps=2",
    "--save_freq=2",
    "--env_eval_freq=2",
    "--eval.n_episodes=1",
)


@pytest.fixture
def run(
    make_cfg: Callable[..., PIRLTrainConfig],
    run_both: RunBoth,
    monkeypatch: pytest.MonkeyPatch,
    free_port: int,
    tmp_path: Path,
) -> Callable[..., None]:
    """Trains the compact policy for two iterations, with validation and a checkpoint."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")

    def configure(arguments: tuple[str, ...], is_actor: bool) -> PIRLTrainConfig:
        cfg = make_cfg(
            *FEW, f"--policy.actor_learner_config.learner_port={free_port}", *arguments, validate=False
        )
        cfg.is_actor = is_actor
        cfg.validate()
        return cfg

    def train(*arguments: str) -> None:
        rows = run_both(lambda is_actor: configure(arguments, is_actor))
        iterations = [row for row in rows if "rollout/decisions" in row]
        assert [row["rollout/decisions"] for row in iterations] == [4, 4]
        assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in iterations)
        assert all(row["dropped/malformed_messages"] == 0 for row in iterations)
        assert [row["step"] for row in rows if "eval/success" in row] == [0, 2]
        assert (tmp_path / "run" / "checkpoints" / "last" / "pretrained_model" / "config.json").is_file()

    return train


def test_metaworld_from_pixels(run: Callable[..., None]) -> None:
    pytest.importorskip("metaworld")
    run(
        "--env.type=metaworld",
        "--env.task=reach-v3",
        "--env.episode_length=3",
        "--algorithm.collection.reward=success",
    )


def test_pusht_from_pixels(run: Callable[..., None]) -> None:
    pytest.importorskip("gym_pusht")
    run(
        "--env.type=pusht",
        "--env.episode_length=5",
        "--env.observation_height=96",
        "--env.observation_width=96",
    )


def test_pusht_s_stated_size_is_not_its_own() -> None:
    pytest.importorskip("gym_pusht")
    cfg = PushtEnv()
    path = ObservationPath(
        {k: f for k, f in offered_features(cfg, None, {}).items() if k != ACTION}, cfg, None
    )
    with ChunkedVectorEnv(cfg, 1, 1) as vector:
        raw = vector.reset(np.array([0]))
    with pytest.raises(
        ConfigError, match=r"\(3, 384, 384\), but .* \(3, 96, 96\); set env.observation_height"
    ):
        path.from_environment(raw, vector.tasks)


def test_gym_hil_from_pixels(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's simulation of a Franka arm, two cameras, through its `gym_manipulator` environment and processors."""
    try:
        version("gym-hil")  # not imported: other tests put a stand-in in its place
    except PackageNotFoundError:
        pytest.skip("gym-hil is not installed")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    shapes = {"action": ("ACTION", [4]), "observation.state": ("STATE", [18])}
    shapes |= {f"observation.images.{name}": ("VISUAL", [3, 128, 128]) for name in ("front", "wrist")}
    features = {key: {"type": kind, "shape": shape} for key, (kind, shape) in shapes.items()}
    run = make_run(
        "--env.type=gym_manipulator",
        "--env.name=gym_hil",
        "--env.task=PandaPickCube-v0",
        "--env.fps=10",
        f"--env.features={json.dumps(features)}",
        f"--env.features_map={json.dumps({key: key for key in features})}",
        "--env.processor.control_mode=gamepad",
        "--env.processor.gripper.use_gripper=true",
        "--env.processor.reset.control_time_s=0.3",
        "--policy.chunk_size=2",
        "--policy.n_action_steps=2",
        "--algorithm.collection.num_envs=1",
        "--algorithm.collection.eval_envs=0",
        "--algorithm.collection.decisions=3",
        "--steps=2",
        "--save_freq=2",
    )
    assert run.train(without=["--env.episode_length", "--env.reward"]).wait(500) == 0
    assert [row["rollout/decisions"] for row in run.rows()] == [3, 3]
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in run.rows())
    # Cut after three steps of a tenth of a second, which is the middle of a decision.
    assert sum(row["rollout/episodes"] for row in run.rows()) > 0
    assert (run.checkpoint() / "pretrained_model" / "config.json").is_file()
