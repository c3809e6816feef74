"""Where every random number of a run comes from.

Ranges of environment seeds never meet: evaluation starts are never trained on, and starts that choose a checkpoint
are not those that it is reported on. An environment that has a list of recorded starts deals them out by these ranges
(`recorded_start`).
"""

import numpy as np

# lerobot-eval's starts in this project's recipes and reports.
EVALUATION_SEED = 100_000
# Starts of the evaluations during training, which choose the best checkpoint.
VALIDATION_SEED = 500_000
# Starts of training episodes.
TRAINING_SEEDS = (1_000_000, 2**31 - 1)
# Part of an environment's recorded starts that reports have, and as large a one that validations have.
HELD_OUT = 5


def stream(*key: int) -> np.random.Generator:
    """A generator for one purpose.

    Args:
        *key: Non-negative numbers that name the purpose, such as run seed, actor and version. Equal keys give equal
            numbers, different ones of the same length independent ones.
    """
    return np.random.default_rng(np.random.SeedSequence(key))


def recorded_start(seed: int, count: int) -> int:
    """Which of an environment's recorded starts the episode of a seed begins from.

    The first fifth is for reports, because `lerobot-eval` begins with it; the second one for validations, and the
    others for training. Fewer than five are shared. Seeds are dealt to the tasks in turn, so a start that followed from
    the last digits of the seed would be the same for all episodes of a task.

    Args:
        seed: Of the episode.
        count: How many starts are recorded.
    """
    held_out = count // HELD_OUT
    if not held_out:
        parts = [range(count)] * 3
    else:
        parts = [range(held_out), range(held_out, 2 * held_out), range(2 * held_out, count)]
    part = parts[(seed >= VALIDATION_SEED) + (seed >= TRAINING_SEEDS[0])]
    return part[int(stream(seed).integers(len(part)))]


def torch_seed(*key: int) -> int:
    """A seed for a torch generator, from the same kind of key."""
    return int(stream(*key).integers(2**62))
