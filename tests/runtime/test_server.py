"""The learner's port: its threads, its connections, its end."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "processes"))

from forked import Forked, run_with_few_files

from lerobot_policy_pi_rl.algorithm.configuration_security import TOKEN_VARIABLE
from lerobot_policy_pi_rl.runtime.access import Access
from lerobot_policy_pi_rl.runtime.client import LearnerClient
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.link import ActorRefused
from lerobot_policy_pi_rl.runtime.server import (
    CALLS_PER_ACTOR,
    SPARE_CONNECTIONS,
    LearnerServer,
    PortUnavailable,
)
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService

HOST, SOON, ACTORS = "127.0.0.1", 10.0, 2
TOKEN = "a-token-of-many-characters"

pytestmark = pytest.mark.timeout(60)


def make_server() -> LearnerServer:
    service = PIRLLearnerService({}, ACTORS, Limits(2**20, 4, 2**20, 1000.0, 20))
    return LearnerServer(service, port=0, access=Access(TOKEN))


def connect(server: LearnerServer, actor: int = 0) -> LearnerClient:
    client = LearnerClient(HOST, server.port, actor, {}, access=Access(TOKEN))
    client.connect(SOON)
    return client


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pi-rl-service")]


def is_closed(stranger: socket.socket) -> bool:
    """Whether the other side has closed a connection on which it has said nothing but its HTTP/2 settings."""
    stranger.settimeout(0.01)
    try:
        while stranger.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_strangers_get_so_many_connections_and_actors_keep_theirs() -> None:
    most = SPARE_CONNECTIONS + 2 * ACTORS
    with make_server() as server, ExitStack() as stack:
        client = connect(server)
        stack.callback(client.close)
        strangers = [
            stack.enter_context(socket.create_connection((HOST, server.port), SOON)) for _ in range(3 * most)
        ]
        # Sooner than those are closed that say nothing.
        deadline = time.monotonic() + SOON / 2
        while sum(map(is_closed, strangers)) < 2 * most and time.monotonic() < deadline:
            pass
        assert sum(map(is_closed, strangers)) >= 2 * most
        client.send_decisions(b"still here")
        item = server.service.decisions.get(SOON)
        assert item is not None
        assert item.payload == b"still here"
        for stranger in strangers:
            stranger.close()
        connect(server, 1).close()


def test_all_threads_of_calls_are_made_at_the_start() -> None:
    with make_server() as server:
        before = own_threads()
        assert len(before) == CALLS_PER_ACTOR * ACTORS + 2
        for actor in (0, 1):
            connect(server, actor).close()
        assert own_threads() == before
    assert own_threads() == []


def test_a_machine_without_threads_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    start, made = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(made) == 5:
            raise RuntimeError("can't start new thread")
        made.append(thread)
        start(thread)

    server = make_server()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(
            PortUnavailable, match=r"12 threads .*can't start new thread; lower .*max_actors"
        ) as error:
            server.start()
    assert "\n" not in str(error.value)
    assert own_threads() == []


def test_an_actor_on_a_machine_without_threads_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with make_server() as server:
        client = LearnerClient(HOST, server.port, 0, {}, access=Access(TOKEN))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(ActorRefused, match="can't start new thread; raise this machine's limit"):
                client.connect(SOON)
        client.close()


def test_a_stream_without_a_thread_breaks_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not look connected: what it should send would wait for ever."""
    with make_server() as server:
        client = connect(server)
        link = client._link
        assert link is not None

        def call(*_: object, **__: object) -> None:
            raise RuntimeError("can't start new thread")

        link._call(call, iter([]), lambda: False)
        assert link.broken == "can't start new thread"
        client.close()


def test_the_end_waits_for_no_call_that_does_not_end() -> None:
    over = threading.Event()
    server = make_server()
    server.start()
    assert server._pool is not None
    server._pool.submit(over.wait)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5.0
    over.set()


def test_a_call_that_raises_leaves_its_thread() -> None:
    with make_server() as server:
        assert server._pool is not None
        for _ in range(CALLS_PER_ACTOR * ACTORS + 2):
            assert isinstance(server._pool.submit(lambda: 1 / 0).exception(SOON), ZeroDivisionError)
        assert server._pool.submit(lambda: 7).result(SOON) == 7


FILES = 300
"""Most open files of a process, of which half are left to begin with."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_outlives_more_connections_than_it_may_have_files(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    run = make_run("--steps=1000000", "--save_freq=5")
    given = [FILES, "lerobot-pi-rl-learner", *run.arguments]
    learner = run._add(partial(Forked, run_with_few_files, given))
    run.actor()
    run.await_rows(lambda rows: len(rows) >= 2, "the first iterations are done", 150)
    with ExitStack() as stack:
        for _ in range(3 * FILES):
            with suppress(OSError):
                stack.enter_context(socket.create_connection((HOST, run.port), SOON))
        done = len(run.rows())
        run.await_rows(lambda rows: len(rows) >= done + 12, "iterations and checkpoints go on", 150)
        assert learner.running
    folders = (run.output_dir / "checkpoints").iterdir()
    assert max(int(folder.name) for folder in folders if folder.name.isdecimal()) >= done + 5
