"""The check before a run: what it measures, what it makes of it, and how its command ends."""

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from lerobot.utils.constants import OBS_STATE

import lerobot_pi_rl_launcher as launcher
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.runtime import check, findings, pool
from lerobot_policy_pi_rl.runtime.collector import make_eval_groups, make_groups
from lerobot_policy_pi_rl.runtime.evaluation import Evaluation, Turn, by_exploring, play
from lerobot_policy_pi_rl.runtime.findings import Findings, FirstLook, advise, first_impression, wilson
from lerobot_policy_pi_rl.runtime.pipeline import make_player, parts
from lerobot_policy_pi_rl.runtime.pool import ChunkStep
from lerobot_policy_pi_rl.runtime.seeds import VALIDATION_SEED
from lerobot_policy_pi_rl.scripts import check as command
from lerobot_policy_pi_rl.scripts.check import NO_SIGNAL, main, sentences, table

from .conftest import SMALL, Fate, MakeConfig, Train

FATE = "--env.fate=true"
STARTS = ("--eval.n_episodes=12",)

# What a policy looks like that is good enough: 16 starts solved 4 times in 8, 4 never, 12 always.
GOOD = Findings(
    ode_episodes=64,
    ode_successes=40,
    tries=8,
    solved=(4,) * 16 + (0,) * 4 + (8,) * 12,
    tasks=("reach",) * 32,
    ratio_error=0.0,
    ratio_tolerance=1e-3,
    non_finite=0,
    clipped=0.1,
    clipped_ode=0.1,
    time_limit=200,
    solved_length=100.0,
    late=0.05,
    policy_seconds=0.01,
    env_seconds=0.03,
    batch=16,
    groups=2,
    steps_per_s=1000.0,
    noise_setting="policy.explorer.noise_level",
    noise=0.5,
    denoising_steps=4,
)


def but(**changes: Any) -> Findings:
    """The good findings with some changes."""
    return dataclasses.replace(GOOD, **changes)


# What the numbers mean


def test_shares_of_starts_by_hand() -> None:
    assert GOOD.exploring_success == (16 * 4 + 12 * 8) / 256
    assert (GOOD.never, GOOD.sometimes, GOOD.always) == (4 / 32, 16 / 32, 12 / 32)
    assert GOOD.ode_success == 40 / 64


def test_wilson_interval() -> None:
    """The closed forms: z^2 / (n + z^2) beside 0 and 1, and 1/2 +- z / (2 sqrt(n + z^2)) around 1/2."""
    z2 = findings.Z**2
    assert wilson(0, 20) == pytest.approx((0, z2 / (20 + z2)))
    assert wilson(20, 20) == pytest.approx((20 / (20 + z2), 1))
    half = findings.Z / (2 * (50 + z2) ** 0.5)
    assert wilson(25, 50) == pytest.approx((0.5 - half, 0.5 + half))


PAGE = Path(__file__).parents[2] / "docs/check.md"
# What the page shows: a signal, a time limit that is too short, and too much noise.
SHOWN = [
    GOOD,
    but(time_limit=110, solved_length=93.0, late=0.35, solved=(0,) * 11 + (4,) * 21, ode_successes=24),
    but(noise=4.0, solved=(0,) * 32, solved_length=float("nan"), late=0.0, clipped=0.75),
]


def test_the_page_shows_what_the_command_prints() -> None:
    blocks = re.findall(r"```\n\$ lerobot-pi-rl-check [^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block, shown in zip(blocks, SHOWN, strict=True):
        printed = [*table(shown), "", *sentences(advise(shown))]
        assert set(block.splitlines()) - {"..."} <= set(printed)
    assert blocks[0].splitlines() == [*table(GOOD), "", *sentences(advise(GOOD))]


def test_a_good_policy_needs_no_change() -> None:
    advice = advise(GOOD)
    assert advice.signal
    assert advice.verdict.startswith("RL has a signal here: 50 % of the starts")
    assert advice.changes == ()


def test_what_the_ode_clips_as_well_is_not_the_noise() -> None:
    assert advise(but(clipped=0.35, clipped_ode=0.35)).changes == ()


@pytest.mark.parametrize(
    ("changes", "verdict", "first_change"),
    [
        ({"non_finite": 3}, "3 decisions were not finite", "train the policy again"),
        ({"ratio_error": 0.02}, "off by 2.0e-02", "sampling and scoring"),
        ({"ratio_error": float("nan")}, "off by nan", "sampling and scoring"),
        ({"solved": (1, 1, 1) + (0,) * 29, "ode_successes": 1}, "solved 3 of 256", "more demonstrations"),
        (
            {"solved": (0,) * 13 + (8,) * 17 + (6,) * 2},
            "41 % never, and only 6 % some",
            "more demonstrations",
        ),
        ({"solved": (0,) * 30 + (1, 0)}, "solved 1 of 256", "lower policy.explorer.noise_level (now 0.5)"),
        ({"solved": (0,) * 30 + (4, 4)}, "94 % never", "lower policy.explorer.noise_level (now 0.5)"),
        ({"solved": (8,) * 31 + (7,)}, "little left to learn", "as it is"),
    ],
)
def test_no_signal(changes: dict[str, Any], verdict: str, first_change: str) -> None:
    advice = advise(but(**changes))
    assert not advice.signal
    assert verdict in advice.verdict
    assert first_change in advice.changes[0]


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"solved": (1,) * 32}, "raise policy.num_inference_steps (now 4)"),
        ({"late": 0.25}, "raise the time limit (env.episode_length, now 200 steps): 25 %"),
        ({"clipped": 0.35}, "35 % of the actions"),
        ({"policy_seconds": 0.05}, "the environments wait for the policy"),
    ],
)
def test_a_signal_that_could_be_better(changes: dict[str, Any], change: str) -> None:
    advice = advise(but(**changes))
    assert advice.signal
    (only,) = advice.changes
    assert change in only


def test_starts_that_are_never_solved_leave_a_signal_in_the_others() -> None:
    """As the policies that docs/check.md lists: 69 % never, and PI-RL brought them to nearly all."""
    advice = advise(but(solved=(0,) * 22 + (3,) * 10, ode_successes=20))
    assert advice.signal
    assert "31 % of the starts are solved in some tries" in advice.verdict
    assert advice.verdict.endswith("69 % never. Success will rise slowly at first.")
    assert advice.changes[0].startswith("collect more demonstrations")
    assert not advise(but(solved=(0,) * 9 + (3,) * 23)).verdict.endswith("at first.")


def test_noise_is_too_large_where_a_quarter_of_the_success_is_not_left() -> None:
    kept = [findings.noise_is_too_large(exploring, 40, 64) for exploring in (0.17, 0.15)]
    assert kept == [False, True]


def test_a_slow_policy_is_hidden_behind_another_groups_environments() -> None:
    assert not advise(but(policy_seconds=0.029)).changes
    # Alone, a group waits for the policy in any case; that is no reason to change anything.
    assert not advise(but(policy_seconds=0.1, groups=1)).changes


def test_remedies_without_any_solved_episode() -> None:
    advice = advise(but(solved=(0,) * 32, ode_successes=0, solved_length=float("nan"), late=0.0))
    assert any("more noise hardly moves it" in change for change in advice.changes)
    assert any("time limit of 200 steps" in change for change in advice.changes)


def test_a_policy_that_is_always_right_and_seldom_hopeless_is_done_with() -> None:
    """Starts that are all or nothing leave nothing to compare."""
    split = advise(but(solved=(0,) * 9 + (8,) * 23))
    assert "72 % of the starts are always solved, 28 % never, and only 0 % sometimes" in split.verdict
    assert any("demonstrations" in change for change in split.changes)
    assert "little left" in advise(but(solved=(0,) * 2 + (8,) * 30)).verdict


# Measuring

Measured = tuple[Findings, int]


SEVERAL = {"tasks": ("push",) * 8 + ("reach",) * 8 + ("press",) * 8 + ("pick",) * 8}


def test_a_task_that_is_never_solved_is_named_and_keeps_rl_from_no_other() -> None:
    some = but(**SEVERAL, solved=(0,) * 8 + (4,) * 8 + (8,) * 8 + (0, *(3,) * 7))
    assert some.hopeless == ("push",)
    # 25 % of all starts belong to the hopeless task; only the others decide.
    assert (some.never, some.without(some.hopeless).never) == (9 / 32, 1 / 24)
    advice = advise(some)
    assert advice.signal
    assert "It has none for 1 of 4 tasks" in advice.verdict
    assert advice.changes[0].endswith(": push")
    assert any(
        line.split() == ["push", "0.00", "of", "8", "starts", "x", "8", "tries"] for line in table(some)
    )


def test_several_tasks_without_any_success_are_no_signal() -> None:
    advice = advise(but(**SEVERAL, solved=(0,) * 32))
    assert not advice.signal
    assert "exploring solved 0 of 256 episodes" in advice.verdict


def test_one_task_is_no_list_of_tasks() -> None:
    assert (GOOD.by_task, but(solved=(0,) * 32).hopeless) == ({}, ())
    assert len(table(GOOD)) == 9


@pytest.fixture
def measured(make_cfg: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Measures with a configuration of its own; `spoil` may change the player first."""
    groups: list[Any] = []

    def run(*arguments: str, spoil: Callable[[Any], None] = lambda player: None) -> Measured:
        cfg = make_cfg(*STARTS, *arguments)
        _, algorithm, env = parts(cfg)
        mine = make_groups(env, algorithm.collection)
        groups.extend(mine)
        own = make_eval_groups(env, algorithm.collection)
        groups.extend(own)
        player = make_player(cfg)
        spoil(player)
        ended: list[int] = []
        findings = check.measure(cfg, player, mine, own or mine, ended.append)
        assert sum(ended) == check.count_episodes(cfg, mine)
        return findings, sum(ended)

    yield run
    for group in groups:
        group.envs.close()


def test_starts_that_decide_themselves(measured: Callable[..., Measured]) -> None:
    """In `Fate`, odd starts are always solved and even ones never, after `2 + seed % 7` steps."""
    findings, episodes = measured(FATE)
    assert episodes == 12 + 32 * 8
    starts = VALIDATION_SEED + np.arange(32)
    assert findings.solved == tuple((8 * (starts % 2)).tolist())
    assert (findings.never, findings.sometimes, findings.always) == (0.5, 0.0, 0.5)
    assert findings.ode_successes == int((starts[:12] % 2).sum())
    lengths = 2 + starts % 7
    solved = np.concatenate([np.repeat(lengths[starts % 2 == 1], 8), lengths[:12][starts[:12] % 2 == 1]])
    assert findings.time_limit == 8
    assert findings.solved_length == np.median(solved)
    assert findings.late == (solved > 0.9 * 8).mean()
    # `Fate` takes any action.
    assert findings.clipped == findings.clipped_ode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_policy(measured: Callable[..., Measured], workers: int) -> None:
    findings, _ = measured(f"--algorithm.collection.num_workers={workers}")
    assert findings.ratio_error <= findings.ratio_tolerance
    assert findings.non_finite == 0
    assert 0 < findings.exploring_success < 1
    assert findings.never + findings.sometimes + findings.always == pytest.approx(1)
    assert len(findings.solved) == 32
    assert (findings.batch, findings.groups) == ((2, 2) if workers else (4, 1))
    assert min(findings.policy_seconds, findings.env_seconds, findings.steps_per_s) > 0
    assert findings.time_limit == 12
    assert (findings.noise_setting, findings.noise) == ("policy.explorer.noise_level", 1.0)


@pytest.mark.parametrize("eval_envs", [0, 3])
def test_the_ode_is_the_first_validation_of_a_run(make_cfg: MakeConfig, train: Train, eval_envs: int) -> None:
    """Also where that has fewer environments than the collection, and with them other noise."""
    settings = ("--eval.n_episodes=40", f"--algorithm.collection.eval_envs={eval_envs}")
    findings = command._measure(make_cfg(*settings))
    first = train("--steps=1", "--env_eval_freq=1", *settings)[0]
    assert findings.ode_success == first["eval/success"]


def test_every_try_has_noise_of_its_own(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[Evaluation] = []

    def spy(*arguments: Any, **options: Any) -> Evaluation:
        played.append(play(*arguments, **options))
        return played[-1]

    monkeypatch.setattr(check, "play", spy)
    measured()
    # By the ODE first, and in the end one decision alone.
    tries = [tuple(one.length.tolist()) for one in played[1:-1]]
    assert len(tries) == len(set(tries)) == 8


def test_it_never_touches_the_starts_of_a_reported_evaluation(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    reset = pool._Slot.reset

    def spy(slot: Any, seed: int) -> Any:
        seeds.append(int(seed))
        return reset(slot, seed)

    monkeypatch.setattr(pool._Slot, "reset", spy)
    measured()
    assert min(seeds) >= VALIDATION_SEED


def test_a_policy_of_nothing_but_nan(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = pool._Slot.step

    def finite(slot: Any, chunk: np.ndarray, *rest: Any) -> Any:
        assert np.isfinite(chunk).all()
        return step(slot, chunk, *rest)

    monkeypatch.setattr(pool._Slot, "step", finite)

    def spoil(player: Any) -> None:
        for parameter in player.policy.parameters():
            parameter.data.fill_(float("nan"))

    findings, _ = measured(spoil=spoil)
    assert findings.non_finite > 0
    assert not advise(findings).signal
    assert "not finite" in "\n".join(sentences(advise(findings)))
    assert table(findings)


def test_other_noise_from_the_same_starts(make_collector: Callable[..., Any]) -> None:
    collector = make_collector()
    player, groups, seeds = collector._player, collector._groups, np.arange(500, 530)
    one, again, other = (
        play(player, groups, seeds, by_exploring(player), noise=(number,)) for number in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.length, again.length)
    assert (one.length != other.length).any()


def test_only_what_was_executed_from_the_given_starts_counts_as_clipped() -> None:
    """Two environments, chunks of three steps with one component; the range is -1 to 1."""
    tally = check._Tally((np.array([-1.0]), np.array([1.0])), lambda count: None)
    none = np.zeros(2, dtype=bool)
    outcome = ChunkStep(
        np.zeros(2), np.array([4, 5]), none, none, none, {}, {}, none, np.zeros(2), *[np.array(["", ""])] * 3
    )
    action = np.array([[[1.5], [1.0], [-1.0], [-2.0], [9.0]], [[9.0]] * 5])
    tally.watch(Turn(action, outcome, np.array([True, False]), 0.0, 0.0))
    # Of the first environment's four executed steps, two are out of range, one on each side; the second has no start.
    assert tally.clipped == 0.5


def test_noise_and_ode_each_have_their_share_out_of_the_environments_range(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ODE chooses (0.5, -0.7) and exploration (0.9, -0.7), where 0.5 is the end of the range."""
    monkeypatch.setattr(Fate, "action_space", spaces.Box(-0.5, 0.5, (2,), np.float32))

    def always(*action: float) -> Callable[..., Any]:
        return lambda player: (
            lambda batch, generator: torch.tensor(action).expand(len(batch[OBS_STATE]), 5, 2)
        )

    monkeypatch.setattr(check, "by_ode", always(0.5, -0.7))
    monkeypatch.setattr(check, "by_exploring", always(0.9, -0.7))
    findings, _ = measured(FATE)
    assert (findings.clipped_ode, findings.clipped) == (0.5, 1.0)


def test_a_density_that_differs_shows_in_the_ratio(make_collector: Callable[..., Any]) -> None:
    collector = make_collector()
    collector.restart(0)
    collected = collector.collect(0)
    # Minibatches smaller than the quota.
    config = PIRLAlgorithmConfig(minibatch_size=8, policy_config=collector._player.policy.config)
    algorithm = PIRLAlgorithm(collector._player.policy, config)
    assert check.first_ratio_error(collector._player, algorithm, collected) <= algorithm.ratio_tolerance
    decisions = dataclasses.replace(collected.decisions, log_prob=collected.decisions.log_prob + 0.01)
    moved = dataclasses.replace(collected, decisions=decisions)
    error = check.first_ratio_error(collector._player, algorithm, moved)
    assert error == pytest.approx(1 - np.exp(-0.01 * int(decisions.executed.max())), abs=1e-5)
    nothing = dataclasses.replace(collected.decisions, log_prob=torch.full_like(decisions.log_prob, np.nan))
    moved = dataclasses.replace(collected, decisions=nothing)
    assert np.isnan(check.first_ratio_error(collector._player, algorithm, moved))


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the command in this process and gives its exit code; what it changes for all is put back."""
    level, threads = logging.getLogger().level, torch.get_num_threads()

    def start(*arguments: str) -> int:
        given = [*SMALL, "--env.type=test_line", *STARTS, *arguments]
        monkeypatch.setattr(sys, "argv", ["lerobot-pi-rl-check", *given])
        try:
            main()
        except SystemExit as error:
            if isinstance(error.code, str):
                # As Python itself ends.
                print(error.code, file=sys.stderr)
                return 1
            return int(error.code or 0)
        return 0

    yield start
    logging.getLogger().setLevel(level)
    torch.set_num_threads(threads)


def test_a_check_without_a_signal(run: Callable[..., int], capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # The folder of a run may be there: the check is a guest in it.
    (folder / "checkpoints").mkdir(parents=True)
    assert run(FATE, f"--output_dir={folder}") == NO_SIGNAL
    shown = capsys.readouterr()
    assert "never 50 %, sometimes 0 %, always 50 %" in shown.out
    assert (
        "RL will hardly help here: 50 % of the starts are always solved, 50 % never, and only 0 % sometimes"
        in shown.out
    )
    assert "268/268" in shown.err
    record = json.loads((folder / "check.json").read_text())
    assert record["never"] == 0.5
    assert record["solved"] == [0, 8] * 16
    assert record["signal"] is False
    assert sorted(entry.name for entry in folder.iterdir()) == ["check.json", "checkpoints"]


def test_a_check_with_a_signal_writes_nothing_unasked(
    run: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_measure", lambda cfg: GOOD)
    assert run() == 0
    assert "RL has a signal here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_bad_setting_is_one_line(run: Callable[..., int], capsys: Any) -> None:
    assert run("--eval.n_episodes=0") == 1
    (only,) = capsys.readouterr().err.splitlines()
    assert only.startswith("error: `eval.n_episodes`: must be at least 1")


def test_a_misspelling_is_an_error_and_no_verdict(run: Callable[..., int], capsys: Any) -> None:
    assert run("--env.lmit=3") == 1
    assert "--env.lmit=3" in capsys.readouterr().err.splitlines()[-1]


def test_the_launcher_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(command, "main", lambda: started.append(True))
    # It names the command there, by which errors are known to be a command's.
    given = ["--env.type=metaworld_state", "--policy.base.type=compact"]
    monkeypatch.setattr(sys, "argv", ["-m", *given])
    launcher.check()
    assert started
    assert sys.argv == ["lerobot-pi-rl-check", *given]


# The first minutes of a run


@pytest.mark.parametrize(
    ("solved", "ode", "level", "words"),
    [
        (
            30,
            (20, 64),
            logging.INFO,
            "success 0.30 exploring, 0.31 by the ODE before training: exploration finds success",
        ),
        (30, None, logging.INFO, "success 0.30 exploring: exploration finds success"),
        (1, (20, 64), logging.WARNING, "next to nothing to learn from; lerobot-pi-rl-check"),
        (1, None, logging.WARNING, "next to nothing to learn from; lerobot-pi-rl-check"),
        (10, (50, 64), logging.WARNING, "the noise is too large"),
        # A small difference, and one that few episodes make likely by chance.
        (40, (50, 64), logging.INFO, "exploration finds success"),
        (10, (1, 4), logging.INFO, "exploration finds success"),
    ],
)
def test_first_impression(solved: int, ode: tuple[int, int] | None, level: int, words: str) -> None:
    note = first_impression(solved, 100, ode)
    assert note.level == level
    assert words in note.text
    assert note.text.startswith("First 100 episodes: ")


def test_the_first_look_waits_for_enough_episodes_and_speaks_once() -> None:
    look = FirstLook(CollectionConfig(num_envs=4, num_actors=2), resumed=False)
    half = {"judged": 6, "successes": 3}
    assert look.add([{"judged": 8, "successes": 5}, {"judged": 8, "successes": 5}], [half, half]) is None
    # A later evaluation is not one from before training.
    note = look.add([{"judged": 16, "successes": 16}], [half, half])
    assert note is not None
    assert note.text.startswith("First 24 episodes: success 0.50 exploring, 0.62 by the ODE")
    assert look.add([], [half]) is None


def test_an_evaluation_after_training_has_begun_is_not_the_one_before() -> None:
    look = FirstLook(CollectionConfig(num_envs=4), resumed=False)
    assert look.add([], [{"judged": 6, "successes": 3}]) is None
    note = look.add([{"judged": 16, "successes": 16}], [{"judged": 6, "successes": 3}])
    assert note is not None
    assert "by the ODE" not in note.text


def test_a_resumed_run_had_its_first_look() -> None:
    look = FirstLook(CollectionConfig(num_envs=1), resumed=True)
    assert look.add([], [{"judged": 100, "successes": 0}]) is None
