"""Guards against collapse: what counts as one, and what is said about it."""

import math

from ..algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig

# Iterations in a row after which a run that cannot be held back is stopped.
RUNAWAY_ITERATIONS = 5
# The divergence that stops an iteration is passed by its last epoch, whatever it is. Beyond this multiple of it the
# policy is not held by stopping.
RUNAWAY_FACTOR = 2.0


def has_collapsed(success: float, best: float, drop: float | None, episodes: int) -> bool:
    """Whether a validation is so far below the best one that its policy should not be trained on.

    Of a policy that solves few starts, half of the best is enough, if chance alone does not explain it.

    Args:
        success: Of this validation.
        best: Highest so far.
        drop: Share of starts by which it must have fallen, at most; None never.
        episodes: Starts of this validation.
    """
    if drop is None:
        return False
    chance = 2 * math.sqrt(max(best * (1 - best), 0.0) / episodes)
    return success < best - min(drop, max(best / 2, chance))


def is_conclusive(episodes: int, wanted: int) -> bool:
    """Whether a validation saw enough starts to choose by: actors that have died leave theirs out.

    Args:
        episodes: Starts that were run.
        wanted: Starts of a whole validation.
    """
    return 2 * episodes >= wanted


def runaway_cause(statistics: dict[str, float], config: PIRLAlgorithmConfig) -> str | None:
    """Why an iteration's update was out of control, with what to change, or None if it was not.

    Args:
        statistics: Of the algorithm: `last_epoch_kl`, `lr`, `epochs`, `skipped_steps`, `explained_variance` and the
            gradients' norms.
        config: Its settings.
    """
    has_critic = "explained_variance" in statistics
    if statistics.get("skipped_steps") and has_critic and "critic_grad_norm" not in statistics:
        return (
            "no gradient of the critic was finite; look at the environment's rewards and observations for numbers that "
            "are not finite or very large, and lower algorithm.critic_lr"
        )
    if not statistics.get("epochs"):
        return None
    if statistics.get("skipped_steps") and "policy_grad_norm" not in statistics:
        return (
            "no gradient of the policy was finite; look at the environment's observations and the data set's "
            "statistics for numbers that are not finite, and lower algorithm.lr_max"
        )
    kl, lr = statistics.get("last_epoch_kl", 0.0), statistics.get("lr", config.lr)
    at_the_bottom = config.lr_schedule != "adaptive" or lr <= config.lr_min
    if at_the_bottom and kl > RUNAWAY_FACTOR * config.kl_stop * config.target_kl:
        return (
            f"the policy moves by {kl:.2g} nats in an iteration (algorithm.target_kl is {config.target_kl:g}) and the "
            f"learning rate {lr:.1g} is not lowered any further; lower algorithm.lr_min or algorithm.epochs, use "
            "--algorithm.lr_schedule=adaptive, or raise policy.explorer.noise_level"
        )
    return None
