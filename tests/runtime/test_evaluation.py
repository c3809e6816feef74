"""The evaluation during training: every start once, in order, by the ODE."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_pi_rl.runtime.collector import Collector, Interrupted
from lerobot_policy_pi_rl.runtime.evaluation import evaluate
from lerobot_policy_pi_rl.runtime.seeds import torch_seed

from .conftest import Fate, LineConfig

MakeCollector = Callable[..., Collector]
FATE = "--env.fate=true"


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 3, 4, 23])
def test_every_start_runs_once_and_keeps_its_place(
    make_collector: MakeCollector, workers: int, count: int
) -> None:
    collector = make_collector(FATE, f"--algorithm.collection.num_workers={workers}")
    seeds = 500 + np.random.default_rng(0).permutation(count)
    result = evaluate(collector._player, collector._groups, seeds)
    np.testing.assert_array_equal(result.success, seeds % 2 == 1)
    # Environments that wait for the others' starts to end do not count.
    assert result.env_steps == int((2 + seeds % 7).sum())


@pytest.fixture
def early_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `Fate`, an odd start reports success at its first step and goes on; nothing is reported at its end."""

    def step(self: Any, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation = super(Fate, self).step(action)[0]
        solved = self.lucky and self.state[1] == 1
        return observation, 0.0, False, bool(self.state[1] >= self.last), {"is_success": solved}

    monkeypatch.setattr(Fate, "step", step)


def test_success_counts_at_any_step(make_collector: MakeCollector, early_success: None) -> None:
    """Most of these episodes take two decisions, of which the second one knows of no success."""
    collector = make_collector(FATE)
    seeds = np.arange(500, 540)
    result = evaluate(collector._player, collector._groups, seeds)
    np.testing.assert_array_equal(result.success, seeds % 2 == 1)


@EnvConfig.register_subclass("test_limited_fate")
@dataclass
class LimitedFateConfig(LineConfig):
    fate: bool = True
    episode_length: int = 8


def test_success_of_training_counts_at_any_step(make_collector: MakeCollector, early_success: None) -> None:
    collector = make_collector("--env.type=test_limited_fate", "--algorithm.collection.num_envs=16")
    collector.restart(0)
    found = [collector.collect(version).statistics for version in range(4)]
    episodes, successes = (sum(getattr(one, name) for one in found) for name in ("episodes", "successes"))
    assert 0.3 < successes / episodes < 0.7


def test_no_start_is_no_work(make_collector: MakeCollector) -> None:
    collector = make_collector(FATE)
    result = evaluate(collector._player, collector._groups, np.arange(0))
    assert result.success.shape == (0,)
    assert result.env_steps == 0


def test_it_ends_when_it_is_asked_to(make_collector: MakeCollector) -> None:
    collector, stop = make_collector(FATE), Event()
    stop.set()
    with pytest.raises(Interrupted):
        evaluate(collector._player, collector._groups, np.arange(500, 540), stop)


def test_it_is_deterministic(make_collector: MakeCollector) -> None:
    collector = make_collector()
    seeds = np.arange(500, 540)
    first = evaluate(collector._player, collector._groups, seeds)
    collector.restart(0)
    collector.collect(0)
    again = evaluate(collector._player, collector._groups, seeds)
    np.testing.assert_array_equal(first.success, again.success)
    assert first.env_steps == again.env_steps
    assert first.success.any()
    assert not first.success.all()


def test_one_environment_is_what_a_loop_by_hand_gives(
    make_collector: MakeCollector, simulate: Callable[..., dict]
) -> None:
    collector = make_collector("--algorithm.collection.num_envs=1")
    player, seeds = collector._player, np.arange(500, 512)
    result = evaluate(player, collector._groups, seeds)

    generator = torch.Generator().manual_seed(torch_seed(500, 501, 502, 503, 12))
    success, steps = [], 0
    for seed in seeds:
        start = np.random.default_rng(int(seed)).uniform(-0.2, 0.2)
        state, over = np.array([start, 0], np.float32), False
        while not over:
            batch = player.preprocess({OBS_STATE: torch.from_numpy(state)[None]}, ["move right"])
            noise = torch.randn((1, 5, 2), generator=generator)
            chunk = player.postprocessor(player.policy.predict_action_chunk(batch, noise=noise))
            outcome = simulate(state, chunk[0].numpy())
            state, over = outcome["next"], outcome["terminated"] or outcome["truncated"]
            steps += outcome["executed"]
        success.append(outcome["success"])
    assert result.success.tolist() == success
    assert result.env_steps == steps


def test_a_start_in_which_the_environment_fails_is_run_again(
    make_collector: MakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts fail once each: in the middle, as the last one of an environment, and as the only one."""
    fails, step = {503, 507, 521}, Fate.step

    def fail_once(self: Any, action: np.ndarray) -> tuple:
        if self.state[1] == 1 and self.seed in fails:
            fails.remove(self.seed)
            raise OSError("the simulator has crashed")
        return step(self, action)

    def reset(self: Any, *, seed: int, options: dict | None = None) -> tuple[dict, dict]:
        self.seed, self.last, self.lucky = seed, 2 + seed % 7, bool(seed % 2)
        return super(Fate, self).reset(seed=seed)

    monkeypatch.setattr(Fate, "step", fail_once)
    monkeypatch.setattr(Fate, "reset", reset)
    collector = make_collector(FATE)
    for seeds in (np.arange(500, 510), np.array([520, 521])):
        result = evaluate(collector._player, collector._groups, seeds)
        np.testing.assert_array_equal(result.success, seeds % 2 == 1)
        np.testing.assert_array_equal(result.length, 2 + seeds % 7)
    assert not fails
    assert collector.failures == 3
