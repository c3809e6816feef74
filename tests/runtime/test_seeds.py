"""Starts of different purposes never meet: the literal numbers are those that the reports name."""

import itertools

import numpy as np
import pytest

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.envs.demonstrations import NUM_BLOCKS, DemonstrationPlan
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.seeds import (
    EVALUATION_SEED,
    TRAINING_SEEDS,
    VALIDATION_SEED,
    recorded_start,
    stream,
    torch_seed,
)


def demonstrated(seed: int) -> range:
    return DemonstrationPlan(MetaworldStateEnv(task="reach-v3"), seed=seed).reset_seeds


def test_demonstrations_start_below_50_000() -> None:
    assert NUM_BLOCKS == 50
    assert demonstrated(0) == range(1000)
    assert demonstrated(1) == range(1000, 2000)
    assert demonstrated(49) == range(49_000, 50_000)
    for seed in (-1, 50):
        with pytest.raises(ConfigError, match=r"seed.*must be 0 to 49"):
            demonstrated(seed)


def test_evaluation_validation_and_training_start_where_the_reports_say() -> None:
    assert EVALUATION_SEED == 100_000
    assert VALIDATION_SEED == 500_000
    assert TRAINING_SEEDS == (1_000_000, 2_147_483_647)


def test_no_start_serves_two_purposes() -> None:
    """Evaluation and validation are ranges without an end of their own; each has room for 400,000 starts or more."""
    first = [
        demonstrated(0).start,
        demonstrated(49).stop,
        EVALUATION_SEED,
        VALIDATION_SEED,
        TRAINING_SEEDS[0],
        TRAINING_SEEDS[1],
    ]
    assert all(one < two for one, two in itertools.pairwise(first))
    assert VALIDATION_SEED - EVALUATION_SEED == 400_000
    assert TRAINING_SEEDS[0] - VALIDATION_SEED == 500_000


@pytest.mark.parametrize(
    ("count", "report", "validation", "training"),
    [
        (50, range(10), range(10, 20), range(20, 50)),
        (7, [0], [1], range(2, 7)),
        (4, *[range(4)] * 3),
        (1, *[[0]] * 3),
    ],
)
def test_recorded_starts_are_divided_by_purpose(
    count: int, report: range, validation: range, training: range
) -> None:
    for first, expected in (
        (0, report),
        (EVALUATION_SEED, report),
        (VALIDATION_SEED, validation),
        (TRAINING_SEEDS[0], training),
        (TRAINING_SEEDS[1] - 600, training),
    ):
        assert {recorded_start(seed, count) for seed in range(first, first + 600)} == set(expected)


def test_every_task_has_all_recorded_starts_of_a_purpose() -> None:
    """Task 3 of ten validates from every tenth seed."""
    seeds = range(VALIDATION_SEED + 3, VALIDATION_SEED + 2000, 10)
    assert {recorded_start(seed, 50) for seed in seeds} == set(range(10, 20))


def test_training_starts_cover_their_range_and_no_other() -> None:
    starts = stream(3, 1, 4).integers(*TRAINING_SEEDS, size=10_000)
    assert 1_000_000 <= starts.min() < 2_000_000
    assert 2_146_000_000 < starts.max() < 2_147_483_647


def test_equal_keys_give_equal_numbers_and_others_different_ones() -> None:
    # As long as each other: NumPy takes a key and the same one with zeros at its end for equal.
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (7, 1, 2), (7, 2, 1)]
    seeds = [torch_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [torch_seed(*key) for key in keys]
    assert np.array_equal(stream(5, 6).random(4), stream(5, 6).random(4))
