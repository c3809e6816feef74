"""Learners and actors on `Line` in forked processes, and what befalls them there."""

import contextlib
import importlib.util
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from forked import Forked

HOURS = 3600.0


def neighbour() -> ModuleType:
    """The conftest beside this folder. Loading it registers `test_line`, which can be done once in a process."""
    path = str(Path(__file__).parents[1] / "conftest.py")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == path:
            return module
    spec = importlib.util.spec_from_file_location("runtime_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["runtime_conftest"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What befalls a process: each is called in it before its work begins.

Fault = Callable[[], None]


def before(owner: Any, name: str, happens: Callable[..., None]) -> None:
    """Has something happen at the beginning of every call of a function."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        happens(*arguments)
        return function(*arguments, **named)

    setattr(owner, name, wrapped)


def die() -> None:
    """As by `kill -9`, at a moment that is certain."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_update(version: int) -> None:
    """Dies when the policy has taken one gradient step away from this version."""
    from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm

    taken = itertools.count()

    def happens(algorithm: PIRLAlgorithm, *_: Any) -> None:
        if algorithm.optimization_step == version and next(taken):
            die()

    before(PIRLAlgorithm, "_policy_step", happens)


def overflow_in_update(version: int) -> None:
    """The policy's first gradient step away from this version makes a weight infinite."""
    import torch

    from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm

    step = PIRLAlgorithm._policy_step

    def overflow(algorithm: PIRLAlgorithm, *arguments: Any) -> int:
        skipped = step(algorithm, *arguments)
        if algorithm.optimization_step == version:
            with torch.no_grad():
                next(algorithm.policy.parameters()).view(-1)[0] = torch.inf
        return skipped

    PIRLAlgorithm._policy_step = overflow


def die_in_checkpoint(version: int) -> None:
    """Dies when a part of this version's checkpoint is on the disk."""
    from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm

    def happens(algorithm: PIRLAlgorithm, place: Path) -> None:
        if int(place.parent.name.rpartition("-")[2]) == version:
            die()

    before(PIRLAlgorithm, "save_pretrained", happens)


def die_in_push(version: int) -> None:
    """Dies when an actor has some of this version's weights."""
    from lerobot.transport import utils

    from lerobot_policy_pi_rl.runtime import service

    utils.CHUNK_SIZE = 1024
    split, published = service.send_bytes_in_chunks, [-1]

    def chunks(payload: bytes, message: Any) -> Iterator[Any]:
        for number, chunk in enumerate(split(payload, message)):
            yield chunk
            if published[0] == version and number == 2:
                time.sleep(0.5)
                die()

    service.send_bytes_in_chunks = chunks
    before(service.PIRLLearnerService, "publish", lambda _, number, payload: published.__setitem__(0, number))


def die_in_episode(version: int) -> None:
    """Dies between two decisions of a collection with this version."""
    from lerobot_policy_pi_rl.runtime.collector import Collector

    collecting, decided = [-1], itertools.count()

    def decides(*_: Any) -> None:
        if collecting[0] == version and next(decided) == 2:
            die()

    before(Collector, "collect", lambda _, number, part=0: collecting.__setitem__(0, number))
    before(Collector, "_decide", decides)


def jump_in_time() -> None:
    """Sets the wall clock forth and back by hours, again and again, for all of the package.

    Not for gRPC: it hands times to its core, which reads the real clock.
    """
    shift, jumping = itertools.cycle([0.0, 5 * HOURS, -7 * HOURS]), ModuleType("time")
    vars(jumping).update(vars(time), time=lambda: time.time() + next(shift))
    for name, module in list(sys.modules.items()):
        if name.startswith("lerobot_policy_pi_rl.") and getattr(module, "time", None) is time:
            module.time = jumping


def slow_down(seconds: float) -> None:
    """Each of the learner's gradient steps takes this long at least, and the first says that it is being taken."""
    from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm

    def happens(*_: Any) -> None:
        logging.getLogger(__name__).info("It updates")
        time.sleep(seconds)

    before(PIRLAlgorithm, "_step", happens)


def build_slowly(seconds: float) -> None:
    """The policy takes this long to load, and says that it is being loaded."""
    from lerobot_policy_pi_rl.runtime import actor, learner

    def happens(*_: Any) -> None:
        logging.getLogger(__name__).info("It builds")
        time.sleep(seconds)

    for module in (actor, learner):
        before(module, "make_player", happens)


def save_slowly(seconds: float) -> None:
    """A checkpoint takes this long at least, and says that it is being written."""
    from lerobot_policy_pi_rl.runtime import checkpoint

    def happens(*_: Any) -> None:
        logging.getLogger(__name__).info("It saves")
        time.sleep(seconds)

    before(checkpoint, "_synchronise", happens)


def tell_quotas() -> None:
    """The learner's log has every quota that comes, taken or not."""
    from lerobot_policy_pi_rl.runtime.gather import Gatherer

    def happens(_: Gatherer, message: Any, rollout: Any, *__: Any) -> None:
        logging.getLogger(__name__).info(
            "Quota of actor %d with version %d", message.actor, rollout.header.version
        )

    before(Gatherer, "_take_quota", happens)


def tell_work() -> None:
    """The actor's log says what it does."""
    from lerobot_policy_pi_rl.runtime import actor
    from lerobot_policy_pi_rl.runtime.collector import Collector

    say = logging.getLogger(__name__).info
    before(Collector, "collect", lambda *_: say("It collects"))
    before(actor, "evaluate", lambda *_: say("It evaluates"))


def notice_silence(seconds: int) -> None:
    """Both sides give up a silent connection after twice this time, not after half a minute."""
    from lerobot_policy_pi_rl.runtime import link, server

    times = {
        "grpc.keepalive_time_ms": 1000 * seconds,
        "grpc.keepalive_timeout_ms": 1000 * seconds,
        "grpc.http2.ping_timeout_ms": 1000 * seconds,
        "grpc.http2.min_ping_interval_without_data_ms": 100 * seconds,
    }
    server.GRPC_OPTIONS = list((dict(server.GRPC_OPTIONS) | times).items())
    options = link.channel_options
    link.channel_options = lambda: list((dict(options()) | times).items())


# The processes


def work(actor: bool, arguments: Sequence[str], faults: Sequence[Fault]) -> None:
    """A process' life: as that of the command, but for LeRobot's slow parser of the command line."""
    import draccus
    import torch

    from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, parts
    from lerobot_policy_pi_rl.scripts.console import leave_on_signals, log_to, run_command, stop_on_signals

    # As the commands do: LeRobot's lines about FFmpeg are none of ours.
    logging.getLogger("lerobot.utils.import_utils").addFilter(lambda r: "torchcodec" not in r.getMessage())
    torch.set_num_threads(1)
    near, sys.argv = neighbour(), ["lerobot-pi-rl-line", *arguments]

    def run() -> None:
        from lerobot_policy_pi_rl.runtime.actor import Actor
        from lerobot_policy_pi_rl.runtime.learner import Learner

        stop = leave_on_signals()
        cfg = draccus.decode(PIRLTrainConfig, near.nested(near.latest(arguments, near.LEROBOTS_OWN)))
        cfg.is_actor = actor
        cfg.validate()
        name = f"actor_{parts(cfg)[1].collection.actor_id}" if actor else "learner"
        log_to(cfg.output_dir / "logs" / f"{name}.log")
        for fault in faults:
            fault()
        if not actor:
            learner = Learner(cfg, stop)
            stop_on_signals(stop)
            learner.run()
            return
        with contextlib.closing(Actor(cfg, stop)) as acting:
            stop_on_signals(stop)
            acting.run()

    run_command(run)


LineProcess = neighbour().Command


class LineRun(neighbour().Run):
    """A run of such processes: one output folder, one port, one set of arguments."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        super().__init__(folder, arguments)
        own = [argument for argument in self.arguments if argument not in neighbour().REACH]
        self.arguments = [*own, "--env.type=test_line"]

    def learner(self, *arguments: str, faults: Sequence[Fault] = ()) -> LineProcess:
        return self._start(False, arguments, faults)

    def actor(self, number: int = 0, *arguments: str, faults: Sequence[Fault] = ()) -> LineProcess:
        return self._start(True, [f"--algorithm.collection.actor_id={number}", *arguments], faults)

    def _start(self, actor: bool, arguments: Sequence[str], faults: Sequence[Fault]) -> Any:
        given = neighbour().latest([*self.arguments, *arguments])
        return self._add(partial(Forked, work, (actor, given, faults)))

    def await_log(self, name: str, text: str, times: int = 1, timeout: float = 90) -> None:
        """Waits until a log has a text, this often."""
        self.await_true(lambda: self.log(name).count(text) >= times, f"{name} logs {text!r}", timeout)

    def await_true(self, condition: Callable[[], Any], what: str, timeout: float = 90) -> None:
        """Waits until something becomes true; fails at once when a process reports an unexpected error."""
        self.await_rows(lambda _: condition(), what, timeout)


def at(fault: Callable[..., None], *arguments: Any) -> Fault:
    """A fault with its arguments."""
    return partial(fault, *arguments)
