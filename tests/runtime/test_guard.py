"""What counts as a collapse, and what is said about it."""

import pytest

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.runtime.guard import has_collapsed, is_conclusive, runaway_cause

CONFIG = PIRLAlgorithmConfig(target_kl=0.2)


@pytest.mark.parametrize(
    ("success", "best", "drop", "episodes", "expected"),
    [
        (0.6, 0.9, 0.25, 100, True),
        (0.7, 0.9, 0.25, 100, False),
        (0.0, 0.9, None, 100, False),
        # A weak start: half of it is a collapse, where 100 starts say so and ten do not.
        (0.05, 0.2, 0.25, 100, True),
        (0.15, 0.2, 0.25, 100, False),
        (0.0, 0.2, 0.25, 10, False),
        (0.0, 0.0, 0.25, 100, False),
    ],
)
def test_collapse_is_a_large_fall_from_the_best(
    success: float, best: float, drop: float | None, episodes: int, expected: bool
) -> None:
    assert has_collapsed(success, best, drop, episodes) is expected


def test_a_validation_decides_with_at_least_half_of_its_starts() -> None:
    assert [is_conclusive(episodes, 50) for episodes in (12, 24, 25, 50)] == [False, False, True, True]


def test_a_large_divergence_is_a_runaway_only_where_nothing_can_lower_the_learning_rate() -> None:
    wild = {"last_epoch_kl": 1.3, "epochs": 1, "policy_grad_norm": 1.0}
    assert runaway_cause(wild | {"lr": 1e-4}, CONFIG) is None
    assert "1.3 nats" in (runaway_cause(wild | {"lr": CONFIG.lr_min}, CONFIG) or "")
    assert "lr_schedule=adaptive" in (
        runaway_cause(wild | {"lr": 1e-4}, PIRLAlgorithmConfig(lr_schedule="constant")) or ""
    )
    # 3 * 0.2 stops an iteration, so that its last epoch is often a little above; twice that is not held.
    assert runaway_cause(wild | {"lr": CONFIG.lr_min, "last_epoch_kl": 1.1}, CONFIG) is None


def test_an_iteration_without_any_finite_gradient_is_a_runaway() -> None:
    assert "finite" in (runaway_cause({"skipped_steps": 12, "epochs": 6, "lr": 1e-4}, CONFIG) or "")
    assert (
        runaway_cause({"skipped_steps": 1, "epochs": 6, "policy_grad_norm": 1.0, "lr": 1e-4}, CONFIG) is None
    )
    # The critic's steps alone, while it warms up: some of them, and all.
    warming_up = {"skipped_steps": 12, "epochs": 0, "lr": 1e-4, "explained_variance": 0.0}
    assert runaway_cause(warming_up | {"critic_grad_norm": 1.0}, CONFIG) is None
    assert "algorithm.critic_lr" in (runaway_cause(warming_up, CONFIG) or "")
    # Without a critic there is none to be blamed.
    assert "the policy" in (runaway_cause({"skipped_steps": 12, "epochs": 6, "lr": 1e-4}, CONFIG) or "")
