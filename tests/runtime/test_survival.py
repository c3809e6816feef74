"""What a run survives: kills at the worst moments, a bad network, a full disk, a clock that jumps; and how it ends."""

import json
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from lerobot_policy_pi_rl.runtime import checkpoint

sys.path.insert(0, str(Path(__file__).parent / "processes"))

from line_processes import (
    LineProcess,
    LineRun,
    at,
    build_slowly,
    die_in_checkpoint,
    die_in_episode,
    die_in_push,
    die_in_update,
    jump_in_time,
    notice_silence,
    overflow_in_update,
    save_slowly,
    slow_down,
    tell_quotas,
    tell_work,
)
from network import Proxy

from .conftest import unused_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUOTA = 16
END_S = 10.0
"""Seconds in which a process that is asked to leave has left."""
KEEPALIVE_S = 30.0
"""Seconds after which gRPC itself gives up a connection from which nothing comes."""
GROWTH = 10e6
"""Bytes of noise in a process' memory; what the soak would pile up without bounds is many times that."""

MakeRun = Callable[..., LineRun]


@pytest.fixture
def make_line_run(tmp_path: Path) -> Iterator[MakeRun]:
    runs: list[LineRun] = []

    def make(*arguments: str) -> LineRun:
        folder = tmp_path / f"run_{len(runs)}"
        folder.mkdir()
        runs.append(LineRun(folder, arguments))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Proxy]]:
    proxies: list[Proxy] = []

    def make(port: int) -> Proxy:
        proxies.append(Proxy(port))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def finish(*processes: LineProcess) -> None:
    for process in processes:
        assert process.wait() == 0, process.shown
        assert process.errors() == []


def reproducible(run: LineRun) -> list[dict[str, Any]]:
    """What does not depend on the clock, row by row."""
    groups = ("step", "loss", "ppo", "rollout", "gradient")
    return [
        {name: value for name, value in row.items() if name.split("/")[0] in groups} for row in run.rows()
    ]


def saved(run: LineRun) -> int:
    """Version that a resume would begin from; it is whole, and nothing is left of a write that was cut short."""
    place = run.checkpoint().resolve()
    checkpoint.verify(place)
    return int(place.name)


def steadily(condition: Callable[[], bool]) -> bool:
    """Whether something is so for a second."""
    for _ in range(10):
        if not condition():
            return False
        time.sleep(0.1)
    return True


# Kills


def test_a_run_that_is_killed_at_every_worst_moment_is_the_run_that_was_not(make_line_run: MakeRun) -> None:
    """Nothing is lost and nothing trained twice: every loss and every weight would differ."""
    settings = ("--steps=6", "--save_freq=2")
    whole, run = make_line_run(*settings), make_line_run(*settings)
    undisturbed = whole.learner(), whole.actor()
    actor = run.actor(0, "--algorithm.collection.num_workers=1", faults=[at(die_in_episode, 4)])
    for fault, resumes_at in ((die_in_update, 2), (die_in_checkpoint, 2), (die_in_push, 4)):
        resume = [] if fault is die_in_update else ["--resume=true"]
        version = 2 if fault is die_in_update else 4
        learner = run.learner(*resume, faults=[at(fault, version)])
        assert learner.wait() == -signal.SIGKILL, learner.shown
        assert saved(run) == resumes_at
    workers = psutil.Process(actor.pid).children()
    learner = run.learner("--resume=true")
    assert actor.wait() == -signal.SIGKILL, actor.shown
    assert len(workers) == 1
    assert not psutil.wait_procs(workers, timeout=END_S)[1]
    finish(learner, run.actor(), *undisturbed)

    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert reproducible(run) == reproducible(whole)
    assert run.rows()[-1]["progress/decisions"] == 6 * QUOTA
    for file in ("pretrained_model/model.safetensors", "algorithm/model.safetensors"):
        one, two = (load_file(each.checkpoint() / file) for each in (whole, run))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file


def test_an_error_loses_nothing_that_was_learned(make_line_run: MakeRun) -> None:
    """The run is resumed where it broke, with the actor that has waited for it; no checkpoint was due there."""
    run = make_line_run("--steps=6", "--save_freq=0")
    learner, actor = run.learner(faults=[at(overflow_in_update, 3)]), run.actor()
    error = learner.failure()
    assert re.search(r"error: the update made policy\.\S+ not finite; lower algorithm\.lr ", error)
    assert "ends with an error; version 3 is saved, and --resume=true goes on from it" in run.log("learner")
    assert saved(run) == 3
    finish(run.learner("--resume=true"), actor)
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert run.rows()[-1]["progress/decisions"] == 6 * QUOTA


# The network


def test_an_asynchronous_learner_that_is_killed_goes_on_where_it_was(make_line_run: MakeRun) -> None:
    """Not to the bit, but with its counters, its learning rate and its best checkpoint; a second learner is refused."""
    # Every update moves the policy too far, so that the schedule lowers the rate each time.
    settings = ("--steps=8", "--save_freq=2", "--env_eval_freq=2", "--eval.n_episodes=3")
    guards = ("--algorithm.target_kl=1e-6", "--algorithm.rollback_drop=null")
    run = make_line_run(*settings, *guards, "--algorithm.collection.max_staleness=1")
    learner = run.learner(faults=[at(die_in_update, 5)])
    run.await_log("learner", "Listening")
    second = run.learner(f"--policy.actor_learner_config.learner_port={unused_port()}")
    assert "error: another learner is training in" in second.failure()
    actor = run.actor()
    assert learner.wait() == -signal.SIGKILL, learner.shown
    assert saved(run) == 4
    kept = json.loads((run.checkpoint() / "training_state/counters.json").read_text())
    assert kept["version"] == 4
    finish(run.learner("--resume=true"), actor)

    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("decisions", "env_steps", "episodes"):
        assert rows[3][f"progress/{name}"] == kept[name]
        assert rows[4][f"progress/{name}"] >= kept[name]
    assert rows[4]["progress/decisions"] == kept["decisions"] + rows[4]["rollout/decisions"]
    # The critic has warmed up, and the rate goes on falling: it does not begin anew.
    assert all("loss/policy" in row for row in rows[1:])
    rates = [row["ppo/lr"] for row in rows[1:]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
    best, version, since = -1.0, 0, 0
    validations = [row for row in run.all_rows() if "eval/success" in row]
    assert [row["step"] for row in validations] == [0, 2, 4, 6, 8]
    for row in validations:
        since = 0 if row["eval/success"] > best else since + 1
        best, version = max((best, version), (row["eval/success"], row["step"]))
        assert (row["eval/best_success"], row["eval/best_version"]) == (best, version)
    assert int(run.checkpoint("best").resolve().name) == version
    end = json.loads((run.checkpoint() / "training_state/counters.json").read_text())
    # The last validation comes after the last checkpoint.
    assert end["validations_since_best"] in (since - 1, since)


def test_an_asynchronous_run_learns_as_well_with_kills_as_without(make_line_run: MakeRun) -> None:
    settings = (
        "--steps=16",
        "--save_freq=4",
        "--env_eval_freq=16",
        "--eval.n_episodes=32",
        "--algorithm.lr=1e-3",
        "--algorithm.minibatch_size=32",
        "--algorithm.collection.max_staleness=1",
        "--algorithm.collection.num_envs=16",
        "--algorithm.collection.decisions=6",
        "--algorithm.collection.eval_envs=8",
    )
    whole, run = make_line_run(*settings), make_line_run(*settings)
    undisturbed = whole.learner(), whole.actor()
    learner, actor = run.learner(faults=[at(die_in_update, 7)]), run.actor()
    assert learner.wait() == -signal.SIGKILL, learner.shown
    assert saved(run) == 4
    learner = run.learner("--resume=true")
    run.await_rows(lambda rows: rows[-1]["step"] >= 9, "the resumed learner is further than the killed one")
    actor.kill()
    finish(learner, run.actor(), *undisturbed)
    for each in (whole, run):
        assert [row["step"] for row in each.rows()] == list(range(1, 17))
        before, after = [row["eval/success"] for row in each.all_rows() if "eval/success" in row]
        assert before < 0.6
        assert after > 0.85


def test_a_network_that_stalls_breaks_and_repeats_costs_nothing_but_time(
    make_line_run: MakeRun, make_proxy: Callable[[int], Proxy]
) -> None:
    run = make_line_run("--steps=1000000", "--algorithm.collection.num_actors=2")
    learner = run.learner(faults=[tell_quotas, at(slow_down, 0.02)])
    proxy = make_proxy(run.port)
    through = f"--policy.actor_learner_config.learner_port={proxy.port}"
    far, near = run.actor(0, through), run.actor(1)
    run.await_rows(lambda rows: len(rows) >= 2, "both work")

    proxy.stall()
    stalled = len(run.rows())
    time.sleep(2.0)
    # Synchronous actors: the learner has what had come already, and waits for both.
    assert len(run.rows()) <= stalled + 2
    proxy.go_on()
    run.await_rows(lambda rows: len(rows) >= stalled + 4, "the run goes on after a stall")
    assert run.rows()[-1]["actors/left"] == 0

    # In the middle of a handshake, of a quota, and between two of them.
    for times, size in enumerate((300, 2500, 9000), start=1):
        proxy.cut_after(size)
        run.await_log("actor_0", "is connected again", times)
    done = len(run.rows())
    run.await_rows(lambda rows: len(rows) >= done + 2, "the run goes on after the connection broke")

    # The learner has the far actor's quota when the connection breaks, and the actor, who cannot know, makes another.
    near.signal(signal.SIGSTOP)
    quota = "Quota of actor {} with version {}\n".format

    def waits_for_the_near_one() -> bool:
        version, log = len(run.rows()), run.log("learner")
        return quota(0, version) in log and quota(1, version) not in log

    # For a second, in which the learner takes what the near one had sent before.
    run.await_true(
        lambda: steadily(waits_for_the_near_one), "the far actor has delivered, the near one has not"
    )
    version = len(run.rows())
    assert run.log("learner").count(quota(0, version)) == 1
    repeated = run.rows()[-1]["dropped/repeated_decisions"]
    proxy.cut()
    run.await_log("learner", quota(0, version), 2)
    near.signal(signal.SIGCONT)
    run.await_rows(lambda rows: len(rows) > version, "the iteration is complete")
    assert run.rows()[version]["dropped/repeated_decisions"] == repeated + QUOTA

    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["rollout/decisions"] % QUOTA == 0 for row in rows)
    assert rows[version]["rollout/decisions"] == 2 * QUOTA
    assert rows[-1]["progress/decisions"] == sum(row["rollout/decisions"] for row in rows)

    # Nobody answers any more, and nobody waits for that.
    proxy.stall()
    ends_soon(run, learner, far, near)


def test_a_connection_that_falls_silent_is_given_up_and_made_anew(
    make_line_run: MakeRun, make_proxy: Callable[[int], Proxy]
) -> None:
    run = make_line_run("--steps=1000000")
    hurry = [at(notice_silence, 1)]
    learner = run.learner(faults=hurry)
    proxy = make_proxy(run.port)
    actor = run.actor(0, f"--policy.actor_learner_config.learner_port={proxy.port}", faults=hurry)
    run.await_rows(lambda rows: len(rows) >= 2, "it works")
    proxy.stall()
    run.await_log("actor_0", "lost the learner", timeout=30)
    run.await_log("learner", "Actor 0 left", timeout=30)
    proxy.go_on()
    done = len(run.rows())
    run.await_rows(lambda rows: len(rows) >= done + 2, "the run goes on")
    assert all(row["rollout/decisions"] == QUOTA for row in run.rows())
    ends_soon(run, learner, actor)


def test_an_actor_whose_machine_is_gone_is_replaced_by_another_with_its_number(
    make_line_run: MakeRun, make_proxy: Callable[[int], Proxy]
) -> None:
    run = make_line_run("--steps=1000000")
    learner = run.learner(faults=[at(slow_down, 0.02)])
    proxy = make_proxy(run.port)
    lost = run.actor(0, f"--policy.actor_learner_config.learner_port={proxy.port}")
    run.await_rows(lambda rows: len(rows) >= 2, "it works")
    proxy.stall()
    lost.kill()
    done, began = len(run.rows()), time.monotonic()
    another = run.actor(0)
    # The one that the kill interrupted may still be complete.
    run.await_rows(lambda rows: len(rows) >= done + 3, "the run goes on")
    assert time.monotonic() - began < KEEPALIVE_S
    assert re.search(r"Actor 0 at \S+ gave no sign of life for 4 s; \S+ takes its number", run.log("learner"))
    assert all(row["rollout/decisions"] == QUOTA for row in run.rows())

    # Of two that live, the second is told, and the first one works on.
    third = run.actor(0)
    assert "actor 0 is already connected from" in third.failure()
    done = len(run.rows())
    run.await_rows(lambda rows: len(rows) >= done + 2, "the first one works on")
    assert run.rows()[-1]["actors/left"] == 1
    ends_soon(run, learner, another)


# The disk


def no_room_for(process: LineProcess, size: int) -> tuple[int, int]:
    """Has a process fail to write files of this size, as on a full disk, but smaller ones; gives the limits before."""
    limits = psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (size - 1, limits[1]))
    return limits


def test_a_full_disk_costs_checkpoints_and_not_the_run(make_line_run: MakeRun) -> None:
    # A policy that is larger than logs and metrics become.
    run = make_line_run("--steps=1000000", "--save_freq=3", "--policy.base.hidden_dim=256")
    learner, actor = run.learner(faults=[at(slow_down, 0.02)]), run.actor()
    run.await_rows(lambda rows: len(rows) >= 4, "there is a checkpoint")
    largest = max(file.stat().st_size for file in run.checkpoint().rglob("*.safetensors"))
    limits = no_room_for(learner, largest)
    run.await_log("learner", "could not be written")
    before, done = saved(run), len(run.rows())
    run.await_rows(lambda rows: len(rows) > done, "training goes on")
    psutil.Process(learner.pid).rlimit(psutil.RLIMIT_FSIZE, limits)
    run.await_true(lambda: saved(run) > before, "there is a newer checkpoint")
    line = next(line for line in run.log("learner").splitlines() if "could not be written" in line)
    assert "make room there; training goes on, a resume begins at version" in line
    assert not list(run.checkpoint().parent.glob(".*"))

    # At the end there is no later milestone: the run says that it could not save, and keeps what it had.
    told = run.log("learner").count("could not be written")
    no_room_for(learner, largest)
    run.await_log("learner", "could not be written", told + 1)
    before = saved(run)
    run.await_rows(lambda rows: rows[-1]["step"] > before, "there is something to save")
    learner.signal(signal.SIGTERM)
    error = learner.failure(END_S)
    assert re.search(r"the checkpoint of version \d+ could not be written to ", error)
    assert saved(run) == before
    actor.signal(signal.SIGTERM)
    assert actor.wait(END_S) == 0


# Clocks and memory


def grows(sizes: list[int]) -> float:
    """Bytes between the second and the last quarter of some time."""
    quarter = len(sizes) // 4
    return float(np.mean(sizes[-quarter:]) - np.mean(sizes[quarter : 2 * quarter]))


def test_a_slow_learner_slows_its_actor_and_no_memory_grows_whatever_the_clocks_say(
    make_line_run: MakeRun,
) -> None:
    """A quota is a third of a megabyte, and the actor would make many while the learner makes one step."""
    run = make_line_run(
        "--steps=1000000",
        "--algorithm.collection.max_staleness=2",
        "--algorithm.collection.num_envs=64",
        "--algorithm.collection.decisions=32",
        "--algorithm.minibatch_size=1024",
        "--algorithm.epochs=1",
    )
    learner = run.learner(faults=[at(slow_down, 0.1), jump_in_time])
    actor = run.actor(faults=[tell_work, jump_in_time])
    run.await_rows(lambda rows: len(rows) >= 5, "all of it has been at work")
    sizes: dict[int, list[int]] = {learner.pid: [], actor.pid: []}
    began, first = time.monotonic(), len(run.rows())
    while time.monotonic() < began + 10 or len(run.rows()) < first + 15:
        time.sleep(0.1)
        for pid, taken in sizes.items():
            taken.append(psutil.Process(pid).memory_info().rss)
    assert grows(sizes[learner.pid]) < GROWTH
    assert grows(sizes[actor.pid]) < GROWTH

    collected, rows = run.log("actor_0").count("It collects"), run.rows()
    # The learner may have one version more than rows; the actor may be two ahead of that, and at the next one.
    assert collected <= len(rows) + 4
    assert not any(value for name, value in rows[-1].items() if name.startswith("dropped/"))
    assert 1 <= max(row["rollout/staleness_max"] for row in rows) <= 2
    for row in rows:
        assert 0 <= row["push/latency_s"] < 60
        assert all(value >= 0 for name, value in row.items() if name.startswith("speed/"))
    seconds = [row["progress/seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 240
    ends_soon(run, learner, actor)


# The end


def ends_soon(
    run: LineRun,
    learner: LineProcess,
    *actors: LineProcess,
    number: int = signal.SIGTERM,
    saves: bool = True,
) -> None:
    """Asks all to leave, as `lerobot-pi-rl-train` does: none stays, nobody listens, and all that was done is saved."""
    family = [
        child for one in (learner, *actors) for child in psutil.Process(one.pid).children(recursive=True)
    ]
    began = time.monotonic()
    learner.signal(number)
    assert learner.wait(END_S) == 0, learner.shown
    for actor in actors:
        if actor.running:
            actor.signal(number)
    for actor in actors:
        assert actor.wait(END_S) == 0, actor.shown
    assert time.monotonic() - began < END_S
    _, left = psutil.wait_procs(family, timeout=1)
    assert not left
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", run.port)) != 0
    assert all(one.errors() == [] for one in (learner, *actors))
    rows = run.rows()
    if saves:
        assert saved(run) == (rows[-1]["step"] if rows else 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_while_it_is_built(make_line_run: MakeRun, number: int) -> None:
    """With the workers that it has started; there is nothing to save, and nothing is."""
    run = make_line_run("--steps=1000000")
    slowly = [at(build_slowly, 60.0)]
    learner = run.learner(faults=slowly)
    actor = run.actor(0, "--algorithm.collection.num_workers=2", faults=slowly)
    for name in ("learner", "actor_0"):
        run.await_log(name, "It builds")
    workers = psutil.Process(actor.pid).children()
    assert len(workers) == 2
    ends_soon(run, learner, actor, number=number, saves=False)
    assert not psutil.wait_procs(workers, timeout=1)[1]
    assert all("stopped while starting" in one.shown[-1] for one in (learner, actor))
    assert not (run.output_dir / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_while_it_waits_for_actors(make_line_run: MakeRun, number: int) -> None:
    run = make_line_run("--steps=1000000")
    learner = run.learner()
    run.await_log("learner", "Waiting for 1 actor(s)")
    ends_soon(run, learner, number=number)


@pytest.mark.parametrize(
    ("state", "text", "arguments"),
    [
        ("collecting", "It collects", ["--algorithm.collection.decisions=1000000"]),
        ("evaluating", "It evaluates", ["--env_eval_freq=1", "--eval.n_episodes=1000000"]),
        ("updating", "It updates", ["--algorithm.epochs=1000000"]),
        ("saving", "It saves", ["--save_freq=1"]),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_whatever_it_is_at(
    make_line_run: MakeRun, number: int, state: str, text: str, arguments: list[str]
) -> None:
    run = make_line_run("--steps=1000000", *arguments)
    slow = at(save_slowly, 1.0) if state == "saving" else at(slow_down, 0.5)
    learner = run.learner(faults=[slow])
    actor = run.actor(0, "--algorithm.collection.num_workers=1", faults=[tell_work])
    run.await_log("learner" if state in ("updating", "saving") else "actor_0", text)
    ends_soon(run, learner, actor, number=number)
