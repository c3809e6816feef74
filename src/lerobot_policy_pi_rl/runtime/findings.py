"""What measurements of a policy before and at the start of a run mean: whether RL has something to learn from."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..algorithm.configuration_pi_rl_algorithm import CollectionConfig
from .wire import Scalar

# Below this success while exploring, almost every rollout says nothing.
HARDLY_ANY = 0.02
# A start that is never solved teaches nothing by itself. With more of them than this, success has to spread from the
# others: it did in the runs of docs/check.md, slowly at first.
MOST_NEVER = 0.3
# RL learns from starts that are solved sometimes; with fewer than this, there is nothing to compare.
LEAST_SOMETIMES = 0.1
# Noise costs some success. It is too much when less than this is left of the ODE's: runs that kept 0.4 learned faster
# than with less noise, those that kept 0.15 and less did not learn (docs/check.md).
LEAST_KEPT = 0.25
# A solved episode is late beyond this part of the time limit; with more late ones than that, the limit forbids others.
LATE, MOST_LATE = 0.9, 0.2
# Noise may push this much more of the actions out of the environment's range than the ODE does.
MOST_CLIPPED_BY_NOISE = 0.2
Z = 1.96


@dataclass(frozen=True)
class Findings:
    """What was measured, without any judgement.

    Attributes:
        ode_episodes: Starts that the ODE tried, once each.
        ode_successes: How many of them it solved.
        tries: How often each start was tried while exploring.
        solved: In how many of these tries each start was solved.
        tasks: Task text of each of these starts.
        ratio_error: Largest distance from 1 of the probability ratio of decisions that nothing has changed since.
        ratio_tolerance: What the learner allows.
        non_finite: Decisions with a number that is not finite.
        clipped: Share of action components out of the environment's range, exploring.
        clipped_ode: The same by the ODE.
        time_limit: Steps after which an episode is cut.
        solved_length: Median length of solved episodes in steps; not a number if there is none.
        late: Share of solved episodes that needed more than `LATE` of the time limit; 0 if there is none.
        policy_seconds: The policy's part of one decision of `batch` environments, in the median.
        env_seconds: The environments' part of it.
        batch: How many environments decide together.
        groups: How many such groups take turns with the policy.
        steps_per_s: Environment steps per second of a whole collection, as an actor collects.
        noise_setting: The setting that scales the noise.
        noise: Its value.
        denoising_steps: Denoising steps K.
    """

    ode_episodes: int
    ode_successes: int
    tries: int
    solved: tuple[int, ...]
    tasks: tuple[str, ...]
    ratio_error: float
    ratio_tolerance: float
    non_finite: int
    clipped: float
    clipped_ode: float
    time_limit: int
    solved_length: float
    late: float
    policy_seconds: float
    env_seconds: float
    batch: int
    groups: int
    steps_per_s: float
    noise_setting: str
    noise: float
    denoising_steps: int

    @property
    def ode_success(self) -> float:
        """Success by the ODE."""
        return self.ode_successes / self.ode_episodes

    @property
    def exploring_success(self) -> float:
        """Success while exploring."""
        return sum(self.solved) / (len(self.solved) * self.tries)

    @property
    def never(self) -> float:
        """Share of starts that no try solved."""
        return self.solved.count(0) / len(self.solved)

    @property
    def always(self) -> float:
        """Share of starts that every try solved."""
        return self.solved.count(self.tries) / len(self.solved)

    @property
    def sometimes(self) -> float:
        """Share of the other starts."""
        return 1 - self.never - self.always

    @property
    def by_task(self) -> dict[str, tuple[int, ...]]:
        """`solved` of each task's starts; empty if there is only one task."""
        pairs = list(zip(self.tasks, self.solved, strict=True))
        names = sorted(set(self.tasks))
        return (
            {name: tuple(n for task, n in pairs if task == name) for name in names} if len(names) > 1 else {}
        )

    @property
    def hopeless(self) -> tuple[str, ...]:
        """Those of several tasks that no try solved, from any start."""
        return tuple(task for task, solved in self.by_task.items() if not any(solved))

    def without(self, tasks: Collection[str]) -> "Findings":
        """The same, as if some tasks had not been tried while exploring."""
        kept = [row for row, task in enumerate(self.tasks) if task not in tasks]
        return replace(
            self,
            solved=tuple(self.solved[row] for row in kept),
            tasks=tuple(self.tasks[row] for row in kept),
        )


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate.

    Args:
        successes: How often it succeeded.
        count: Out of how many, at least 1.
    """
    rate = successes / count
    centre = rate + Z**2 / (2 * count)
    half = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    # At 0 and 1 the bound is exact; only rounding could pass it.
    return max(0.0, (centre - half) / (1 + Z**2 / count)), min(1.0, (centre + half) / (1 + Z**2 / count))


# What it means


@dataclass(frozen=True)
class Advice:
    """What findings mean for a run.

    Attributes:
        signal: Whether RL has something to learn from.
        verdict: One sentence.
        changes: What to change, most important first.
    """

    signal: bool
    verdict: str
    changes: tuple[str, ...]


def advise(findings: Findings) -> Advice:
    """Says whether RL has a signal and, if not or if it could be better, what to change.

    A task that is never solved keeps RL from none of the others: of several tasks, those that are not hopeless decide.
    """
    defect = _defect(findings)
    if defect is not None:
        return defect
    if not findings.hopeless or len(findings.hopeless) == len(findings.by_task):
        return _no_signal(findings) or _signal(findings)
    hopeful = findings.without(findings.hopeless)
    advice, hopeless = _no_signal(hopeful) or _signal(hopeful), ", ".join(findings.hopeless)
    verdict = f"{advice.verdict} It has none for {len(findings.hopeless)} of {len(findings.by_task)} tasks."
    change = f"collect more demonstrations of what exploring never solved, or leave it out: {hopeless}"
    return Advice(advice.signal, verdict, (change, *advice.changes))


def _signal(findings: Findings) -> Advice:
    """There is something to learn from."""
    verdict = (
        f"RL has a signal here: {_percent(findings.sometimes)} of the starts are solved in some tries and not in "
        f"others, and {_percent(findings.never)} never."
    )
    if findings.never > MOST_NEVER:
        return Advice(True, f"{verdict} Success will rise slowly at first.", tuple(_remedies(findings)))
    return Advice(True, verdict, tuple(_improvements(findings)))


def _defect(findings: Findings) -> Advice | None:
    """Something is broken, so that nothing else that was measured counts."""
    if findings.non_finite:
        verdict = f"RL cannot learn here: {findings.non_finite} decisions were not finite."
        change = "train the policy again, and look for constant or missing inputs in the demonstrations"
        return Advice(False, verdict, (change,))
    if not findings.ratio_error <= findings.ratio_tolerance:
        verdict = (
            f"RL would learn something wrong: the first probability ratio is off by {findings.ratio_error:.1e}, "
            f"above the tolerance of {findings.ratio_tolerance:.0e}."
        )
        change = (
            "look for what differs between sampling and scoring: chance in the base (dropout), low precision"
        )
        return Advice(False, verdict, (change,))
    return None


def _no_signal(findings: Findings) -> Advice | None:
    """Exploration works and shows too little to learn from."""
    success, tries = findings.exploring_success, len(findings.solved) * findings.tries
    if success < HARDLY_ANY:
        verdict = f"RL has no signal here: exploring solved {sum(findings.solved)} of {tries} episodes."
        return Advice(False, verdict, tuple(_remedies(findings)))
    if findings.sometimes < LEAST_SOMETIMES <= findings.never:
        verdict = (
            f"RL will hardly help here: {_percent(findings.always)} of the starts are always solved, "
            f"{_percent(findings.never)} never, and only {_percent(findings.sometimes)} sometimes."
        )
        return Advice(False, verdict, tuple(_remedies(findings)))
    if findings.sometimes < LEAST_SOMETIMES:
        verdict = (
            f"RL has little left to learn here: {_percent(findings.always)} of the starts are always solved, "
            f"and {_percent(findings.sometimes)} sometimes."
        )
        return Advice(False, verdict, ("use the policy as it is, or give it a harder task",))
    return None


def _remedies(findings: Findings) -> list[str]:
    """What makes a start solvable that is not."""
    too_noisy = noise_is_too_large(findings.exploring_success, findings.ode_successes, findings.ode_episodes)
    changes = _improvements(findings)
    if not too_noisy:
        changes += [
            "collect more demonstrations, from the starts that fail, or train longer on those you have",
            "check that the policy sees what the task needs (object, goal), in inputs that vary",
            f"more noise hardly moves it: leave {findings.noise_setting} at {findings.noise:g}",
        ]
    if math.isnan(findings.solved_length):
        changes.append(
            f"compare the time limit of {findings.time_limit} steps with your demonstrations' length"
        )
    return changes


def _improvements(findings: Findings) -> list[str]:
    """What would make the signal better, whether or not it is enough."""
    changes = []
    too_noisy = noise_is_too_large(findings.exploring_success, findings.ode_successes, findings.ode_episodes)
    if too_noisy:
        changes.append(
            f"lower {findings.noise_setting} (now {findings.noise:g}) or raise policy.num_inference_steps (now "
            f"{findings.denoising_steps}): noise leaves {findings.exploring_success:.2f} of the ODE's success of "
            f"{findings.ode_success:.2f}"
        )
    if findings.late > MOST_LATE:
        changes.append(
            f"raise the time limit (env.episode_length, now {findings.time_limit} steps): {_percent(findings.late)} "
            f"of the solved episodes needed more than {_percent(LATE)} of it"
        )
    if not too_noisy and findings.clipped - findings.clipped_ode > MOST_CLIPPED_BY_NOISE:
        changes.append(
            f"lower {findings.noise_setting} (now {findings.noise:g}): {_percent(findings.clipped)} of the actions "
            f"are out of the environment's range and clipped ({_percent(findings.clipped_ode)} by the ODE), so that "
            "the density tells apart what the environment does not"
        )
    if findings.policy_seconds * findings.groups > findings.env_seconds + findings.policy_seconds:
        changes.append(
            f"for speed, lower policy.num_inference_steps (now {findings.denoising_steps}) or raise "
            "algorithm.collection.num_envs: the environments wait for the policy"
        )
    return changes


def noise_is_too_large(exploring: float, ode_successes: int, ode_episodes: int) -> bool:
    """Whether exploring loses much of the ODE's success, by more than chance.

    Args:
        exploring: Success while exploring.
        ode_successes: Episodes that the ODE solved.
        ode_episodes: Out of how many, at least 1.
    """
    low, _ = wilson(ode_successes, ode_episodes)
    return exploring < LEAST_KEPT * ode_successes / ode_episodes and exploring < low


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# The first minutes of a run


@dataclass(frozen=True)
class Note:
    """A line for the log.

    Attributes:
        level: Of `logging`.
        text: The line.
    """

    level: int
    text: str


def first_impression(solved: int, episodes: int, ode: tuple[int, int] | None) -> Note:
    """What the first episodes of a run say about its prospects.

    Args:
        solved: Episodes solved while exploring.
        episodes: Out of how many.
        ode: Episodes that the ODE solved before training, and out of how many; None if it was not tried.
    """
    success = solved / episodes
    text = f"First {episodes} episodes: success {success:.2f} exploring"
    if ode is not None:
        text += f", {ode[0] / ode[1]:.2f} by the ODE before training"
    if success < HARDLY_ANY:
        meaning = "next to nothing to learn from; lerobot-pi-rl-check says what to change"
        return Note(logging.WARNING, f"{text}: {meaning}")
    if ode is not None and noise_is_too_large(success, *ode):
        meaning = "the noise is too large; lower it (policy.explorer), lerobot-pi-rl-check says more"
        return Note(logging.WARNING, f"{text}: {meaning}")
    meaning = "exploration finds success; lerobot-pi-rl-check tells from how many of the starts"
    return Note(logging.INFO, f"{text}: {meaning}")


class FirstLook:
    """Waits for the first episodes of a run and says once what they mean.

    It waits until there are several of each environment: fewer say little.
    """

    EPISODES_PER_ENV = 3

    def __init__(self, collection: CollectionConfig, resumed: bool) -> None:
        """Begins to wait.

        Args:
            collection: How many environments there are.
            resumed: The run has had its first episodes; nothing is said.
        """
        self._wanted = self.EPISODES_PER_ENV * collection.num_envs * collection.num_actors
        self._episodes = self._solved = 0
        self._ode: tuple[int, int] | None = None
        self._over = resumed

    def add(
        self, evaluations: Sequence[Mapping[str, Scalar]], collections: Sequence[Mapping[str, Scalar]]
    ) -> Note | None:
        """Takes in the statistics of one iteration; the note comes with the one that completes it."""
        if self._over:
            return None
        if not self._episodes and (tried := _total(evaluations, "judged")):
            self._ode = self._ode or (_total(evaluations, "successes"), tried)
        self._episodes += _total(collections, "judged")
        self._solved += _total(collections, "successes")
        if self._episodes < self._wanted:
            return None
        self._over = True
        return first_impression(self._solved, self._episodes, self._ode)


def _total(rows: Sequence[Mapping[str, Scalar]], name: str) -> int:
    return sum(int(row[name]) for row in rows)
