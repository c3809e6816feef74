"""Where every random number of a run comes from.

Ranges of environment seeds never meet: evaluation starts are never trained on, and starts that choose a checkpoint
are not those that it is reported on.
"""

import numpy as np

# lerobot-eval's starts in this project's recipes and reports.
EVALUATION_SEED = 100_000
# Starts of the evaluations during training, which choose the best checkpoint.
VALIDATION_SEED = 500_000
# Starts of training episodes.
TRAINING_SEEDS = (1_000_000, 2**31 - 1)


def stream(*key: int) -> np.random.Generator:
    """A generator for one purpose.

    Args:
        *key: Non-negative numbers that name the purpose, such as run seed, actor and version. Equal keys give equal
            numbers, different ones of the same length independent ones.
    """
    return np.random.default_rng(np.random.SeedSequence(key))


def torch_seed(*key: int) -> int:
    """A seed for a torch generator, from the same kind of key."""
    return int(stream(*key).integers(2**62))
