"""Measures a policy before a run, without training it."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from lerobot.envs import EnvConfig
from torch import Tensor

from ..algorithm.pi_rl import PIRLAlgorithm
from ..algorithm.storage import minibatches
from ..configuration_pi_rl import ExplorerConfig
from .collector import Collected, Collector, Group
from .evaluation import Choose, Evaluation, Turn, by_exploring, by_ode, play
from .findings import LATE, Findings
from .pipeline import PIRLTrainConfig, Player, parts
from .seeds import VALIDATION_SEED
from .workers import EnvironmentFailed

# How exploration is measured: each of the starts this often. Eight tries tell a start that is never solved from one
# that is solved every third time in 19 of 20 cases.
STARTS, TRIES = 32, 8
# With many tasks there are more starts, so many for each task.
STARTS_PER_TASK = 4


class _Tally:
    """Counts what the decisions of some episodes were like."""

    def __init__(self, limits: tuple[np.ndarray, np.ndarray], progress: Callable[[int], None]) -> None:
        self._limits, self._progress = limits, progress
        self._components = self._outside = 0
        self.non_finite = 0

    @property
    def clipped(self) -> float:
        """Share of the executed action components out of range."""
        return self._outside / max(self._components, 1)

    def guard(self, choose: Choose) -> Choose:
        """Counts decisions that are not finite, and keeps them from the environments."""

        def guarded(batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
            chunk = choose(batch, generator)
            finite = chunk.isfinite()
            self.non_finite += int((~finite.flatten(1).all(1)).sum())
            return torch.where(finite, chunk, torch.zeros_like(chunk))

        return guarded

    def watch(self, turn: Turn) -> None:
        """Takes in one decision of every environment."""
        low, high = self._limits
        executed = np.arange(turn.action.shape[1]) < turn.outcome.executed[:, None]
        action = turn.action[executed & turn.counted[:, None]]
        self._components += action.size
        self._outside += int(((action < low) | (action > high)).sum())
        self._progress(int((turn.outcome.done & turn.counted).sum()))


def count_starts(groups: list[Group]) -> int:
    """How many starts are tried with the noise of exploration."""
    tasks = {task for group in groups for task in group.envs.names}
    return max(STARTS, STARTS_PER_TASK * len(tasks))


def count_episodes(cfg: PIRLTrainConfig, groups: list[Group]) -> int:
    """Episodes that `measure` reports as progress."""
    return int(cfg.eval.n_episodes) + count_starts(groups) * TRIES


def measure(
    cfg: PIRLTrainConfig,
    player: Player,
    groups: list[Group],
    eval_groups: list[Group],
    progress: Callable[[int], None],
) -> Findings:
    """Measures a policy without training it.

    It uses the starts of validation and of training, never those of a reported evaluation.

    Raises:
        EnvironmentFailed: The environments do not tell success.

    Args:
        cfg: Validated configuration, with at least one start for the ODE (`eval.n_episodes`).
        player: The policy.
        groups: Its environments, for exploring.
        eval_groups: Those of the run's validation, for the ODE.
        progress: Told how many more episodes have ended.
    """
    policy_cfg, algorithm_cfg, env_cfg = parts(cfg)
    count, explored = int(cfg.eval.n_episodes), count_starts(groups)
    limits = action_range(env_cfg)
    ode, exploring = _Tally(limits, progress), _Tally(limits, progress)
    starts = VALIDATION_SEED + np.arange(max(count, explored))
    deployed = play(player, eval_groups, starts[:count], ode.guard(by_ode(player)), watch=ode.watch)
    if not deployed.known:
        raise EnvironmentFailed(
            "the environments do not say which starts were solved, and that is what is measured; add "
            "info['is_success'] in a wrapper"
        )
    # One round after the other, so that a start always has the same environment and with it the same task.
    choose = exploring.guard(by_exploring(player))
    rounds = [
        play(player, groups, starts[:explored], choose, noise=(number + 1,), watch=exploring.watch)
        for number in range(TRIES)
    ]
    limit, solved = _time_limit(env_cfg, [deployed, *rounds]), _solved_lengths([deployed, *rounds])
    policy_seconds, env_seconds = one_decision(player, groups[0], starts, choose)
    ratio_error = steps_per_s = math.nan
    algorithm = PIRLAlgorithm(player.policy, dataclasses.replace(algorithm_cfg, kl_coef=0.0))
    non_finite = ode.non_finite + exploring.non_finite
    if not non_finite:
        collected = _collect(cfg, player, groups)
        ratio_error = first_ratio_error(player, algorithm, collected)
        steps_per_s = collected.statistics.env_steps / collected.statistics.seconds
    setting, noise = _noise(policy_cfg.explorer)
    return Findings(
        ode_episodes=count,
        ode_successes=int(deployed.success.sum()),
        tries=TRIES,
        solved=tuple(np.sum([part.success for part in rounds], axis=0).tolist()),
        tasks=tuple(rounds[0].tasks),
        ratio_error=ratio_error,
        ratio_tolerance=algorithm.ratio_tolerance,
        non_finite=non_finite,
        clipped=exploring.clipped,
        clipped_ode=ode.clipped,
        time_limit=limit,
        solved_length=float(np.median(solved)) if len(solved) else math.nan,
        late=float((solved > LATE * limit).mean()) if len(solved) else 0.0,
        policy_seconds=policy_seconds,
        env_seconds=env_seconds,
        batch=groups[0].envs.num_envs,
        groups=len(groups),
        steps_per_s=steps_per_s,
        noise_setting=setting,
        noise=noise,
        denoising_steps=policy_cfg.num_inference_steps,
    )


def action_range(env_cfg: EnvConfig) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action that the environment tells apart, `[A]` each; infinite where it names no range."""
    vectors = [
        vector
        for by_task in env_cfg.create_envs(n_envs=1, use_async_envs=False).values()
        for vector in by_task.values()
    ]
    space = vectors[0].single_action_space
    for vector in vectors:
        vector.close()
    unbounded = np.array(np.inf)
    return getattr(space, "low", -unbounded), getattr(space, "high", unbounded)


def one_decision(player: Player, group: Group, seeds: np.ndarray, choose: Choose) -> tuple[float, float]:
    """How long policy and environments take for one decision of a group, alone, in seconds and in the median."""
    turns: list[Turn] = []
    play(player, [group], seeds[: group.envs.num_envs], choose, watch=turns.append)
    return (
        float(np.median([turn.policy_seconds for turn in turns])),
        float(np.median([turn.env_seconds for turn in turns])),
    )


def _collect(cfg: PIRLTrainConfig, player: Player, groups: list[Group]) -> Collected:
    """One actor's quota, as the first iteration of a run collects it."""
    collector = Collector(player, groups, parts(cfg)[1].collection, cfg.seed or 0)
    collector.restart(0)
    return collector.collect(0)


@torch.no_grad()
def first_ratio_error(player: Player, algorithm: PIRLAlgorithm, collected: Collected) -> float:
    """Largest distance from 1 of the ratio of decisions, scored by the weights that made them, as a learner does."""
    policy, decisions = player.policy, collected.decisions
    batch = player.preprocess_packed(decisions.observation, decisions.task)
    error = 0.0
    for rows in minibatches(
        torch.arange(len(decisions)), algorithm.config.minibatch_size, torch.Generator().manual_seed(0)
    ):
        chain, step, log_prob, scored = (
            value[rows].to(algorithm.device)
            for value in (decisions.chain, decisions.step, decisions.log_prob, decisions.scored)
        )
        score = policy.score(policy.encode(policy.base.take(batch, rows)), chain, step)
        log_ratio = algorithm.reduce(score.log_prob - log_prob, scored)
        # `max` of Python would lose what is not a number.
        error = float(np.maximum(error, float((log_ratio.exp() - 1).abs().max())))
    return error


def _solved_lengths(episodes: Sequence[Evaluation]) -> np.ndarray:
    """How many steps the solved episodes took."""
    return np.concatenate([part.length[part.success] for part in episodes])


def _time_limit(env_cfg: EnvConfig, episodes: Sequence[Evaluation]) -> int:
    """The time limit; the longest episode where the environment does not name it."""
    named = getattr(env_cfg, "episode_length", None)
    return int(named or max(part.length.max() for part in episodes))


def _noise(explorer: ExplorerConfig) -> tuple[str, float]:
    """The setting that scales the noise of an explorer, and its value."""
    name = "noise_std_max" if explorer.kind == "flow_noise" else "noise_level"
    return f"policy.explorer.{name}", float(getattr(explorer, name))
