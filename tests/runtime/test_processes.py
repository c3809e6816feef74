"""A run as a user starts it: the installed commands, in real processes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs import make_env
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy

from benchmarks.untrained import save_untrained
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv

from .conftest import await_true

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ITERATIONS = 4
GROUPS = (
    "loss",
    "ppo",
    "rollout",
    "gradient",
    "progress",
    "speed",
    "checkpoint",
    "push",
    "actors",
    "dropped",
)


@pytest.fixture(scope="module")
def finished(make_run: Callable[..., Any]) -> Any:
    """A run that `lerobot-pi-rl-train` took to its end."""
    run = make_run(f"--steps={ITERATIONS}", "--save_freq=2", "--env_eval_freq=2", "--eval.n_episodes=3")
    command = run.train("--algorithm.collection.num_workers=2")
    assert command.wait(120) == 0, command.shown
    assert command.errors() == []
    return run


def test_a_run_ends_by_itself_with_its_checkpoints(finished: Any) -> None:
    folder = finished.output_dir / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == ["000000", "000002", "000004", "best", "last"]
    assert (folder / "last").readlink() == Path("000004")
    for checkpoint in ("000000", "000002", "000004", "best", "last"):
        for part in ("pretrained_model", "training_state", "algorithm"):
            assert (folder / checkpoint / part).is_dir()
        for file in ("config.json", "model.safetensors", "train_config.json", "policy_preprocessor.json"):
            assert (folder / checkpoint / "pretrained_model" / file).is_file()
        assert (folder / checkpoint / "training_state" / "training_step.json").is_file()


def test_every_iteration_is_in_the_metrics(finished: Any) -> None:
    rows = finished.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {name.split("/")[0] for name in row if name != "step"} == set(GROUPS)
        assert all(value is not None for value in row.values())
        assert row["rollout/decisions"] == 16
        assert row["rollout/staleness"] == 0
        assert row["ppo/ratio_first_error"] <= 1e-3
        assert row["push/bytes"] > 0
        assert 0 <= row["push/latency_s"] < 60
        assert not any(value for name, value in row.items() if name.startswith("dropped/"))
    assert [row["step"] for row in finished.all_rows() if "eval/success" in row] == [0, 2, 4]


def test_both_sides_keep_a_log(finished: Any) -> None:
    assert "Listening on 127.0.0.1" in finished.log("learner")
    assert "Actor 0 joined" in finished.log("learner")
    assert "Actor 0 is connected" in finished.log("actor_0")


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_is_a_policy_for_stock_lerobot(finished: Any, name: str) -> None:
    env_cfg = MetaworldStateEnv(task="reach-v3", episode_length=30)
    path = finished.checkpoint(name) / "pretrained_model"
    policy_cfg = PreTrainedConfig.from_pretrained(path)
    policy_cfg.pretrained_path = path
    policy = make_policy(policy_cfg, env_cfg=env_cfg).eval()
    preprocessor, postprocessor = make_pre_post_processors(policy_cfg, pretrained_path=str(path))
    env_steps = env_cfg.get_env_processors()
    vector = make_env(env_cfg, n_envs=2)["metaworld_state"][0]
    with torch.no_grad():
        info = eval_policy(
            env=vector,
            policy=policy,
            env_preprocessor=env_steps[0],
            env_postprocessor=env_steps[1],
            preprocessor=preprocessor,
            postprocessor=postprocessor,
            n_episodes=2,
            start_seed=100_000,
        )
    vector.close()
    assert len(info["per_episode"]) == 2


def test_two_actors_deliver_and_nothing_is_left_of_them(make_run: Callable[..., Any]) -> None:
    run = make_run("--steps=2")
    command = run.train("--actors=2")

    def family() -> list[psutil.Process]:
        return psutil.Process(command.process.pid).children(recursive=True)

    # The learner waits for both.
    await_true(lambda: len(family()) == 3, 60, "learner and actors are there")
    processes = family()
    assert command.wait(150) == 0, command.shown
    assert command.errors() == []
    gone, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive, gone
    assert [row["rollout/decisions"] for row in run.rows()] == [32, 32]
    assert run.rows()[-1]["actors/joined"] == 2
    assert all(f"Actor {number} is connected" in run.log(f"actor_{number}") for number in (0, 1))


def test_ctrl_c_stops_a_resumed_run_with_a_checkpoint_and_leaves_nothing(finished: Any) -> None:
    """The run goes on from the configuration in its own checkpoint, and is then interrupted."""
    config = finished.checkpoint() / "pretrained_model" / "train_config.json"
    command = finished.start(
        "lerobot-pi-rl-train", f"--config_path={config}", "--resume=true", "--steps=100000", alone=True
    )
    finished.await_rows(lambda rows: len(rows) > ITERATIONS + 2, "the resumed run goes on")
    family = psutil.Process(command.process.pid).children(recursive=True)
    # Learner, actor, its two workers, and the two of validation.
    assert len(family) == 6
    command.signal(signal.SIGINT)
    assert command.wait(20) == 0, command.shown
    assert command.errors() == []
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, gone
    assert "Resuming at version 4" in finished.log("learner")
    rows = finished.rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert int(finished.checkpoint().resolve().name) == rows[-1]["step"]


def test_settings_of_the_policy_are_taken_beside_a_recipe_that_names_its_path(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing else is asked for: neither a type, nor a repository."""
    recipe = json.loads((Path(__file__).parents[2] / "recipes/metaworld.json").read_text())
    policy = save_untrained(tmp_path / "policy", MetaworldStateEnv(task="reach-v3"))
    del recipe["algorithm"], recipe["policy"]["push_to_hub"]
    recipe["policy"]["path"] = str(policy)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    run = make_run()
    given = [
        f"--config_path={file}",
        f"--policy.actor_learner_config.learner_port={run.port}",
        "--env.task=reach-v3",
        "--env.episode_length=30",
        "--algorithm.collection.num_envs=4",
        "--algorithm.collection.num_workers=0",
        "--algorithm.collection.decisions=4",
        "--algorithm.critic_hidden_dims=[16]",
        "--env_eval_freq=0",
        f"--output_dir={run.output_dir}",
    ]
    # An iteration is 4 x 4 decisions of 5 steps, and the recipe's budget is a million.
    for more, iterations in (
        (["--policy.online_steps=100"], 2),
        (["--policy.online_steps=200", "--resume=true"], 3),
    ):
        command = run.start("lerobot-pi-rl-train", *given, *more, alone=True)
        assert command.wait(120) == 0, command.shown
        assert command.errors() == []
        assert len(run.rows()) == iterations
    config = json.loads((run.checkpoint() / "pretrained_model/config.json").read_text())
    assert (config["online_steps"], config["push_to_hub"]) == (200, False)
