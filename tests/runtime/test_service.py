"""The learner's service and the actor's client, over real gRPC on loopback."""

import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import pytest
import torch
from lerobot.rl.learner_service import LearnerService
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import CHUNK_SIZE, send_bytes_in_chunks

from lerobot_policy_pi_rl.runtime import service as service_module
from lerobot_policy_pi_rl.runtime.client import (
    ConfigMismatch,
    LearnerClient,
    LearnerLost,
    LearnerUnreachable,
    LinkState,
)
from lerobot_policy_pi_rl.runtime.handshake import PROTOCOL, Handshake
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.link import MAX_DAMAGED, ActorRefused, version_of
from lerobot_policy_pi_rl.runtime.outbox import Outbox
from lerobot_policy_pi_rl.runtime.packing import WireError, pack
from lerobot_policy_pi_rl.runtime.server import LearnerServer, PortUnavailable
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService, _Incoming
from lerobot_policy_pi_rl.runtime.wire import (
    MAX_HEADER_BYTES,
    WeightsHeader,
    decode_interaction,
    encode_weights,
    max_weights_bytes,
)

SETTINGS = {"policy": {"num_inference_steps": 4, "shape": (48,)}, "env.task": "reach-v3"}
SOON = 10.0
"""Seconds within which what is awaited happens, with room for a busy machine."""

pytestmark = pytest.mark.timeout(120)


LIMITS = Limits(
    message_bytes=8 * 2**20,
    waiting_messages=4,
    waiting_bytes=2**30,
    messages_per_s=1000.0,
    rejected_messages=20,
)


def make_service(
    settings: Mapping[str, object] = SETTINGS, max_actors: int = 2, **limits: float
) -> PIRLLearnerService:
    """A service for two actors, with small limits."""
    return PIRLLearnerService(settings, max_actors, dataclasses.replace(LIMITS, **limits))  # type: ignore[arg-type]


@contextmanager
def serving(service: PIRLLearnerService, port: int = 0) -> Iterator[LearnerServer]:
    """A server on a free port, stopped at the end."""
    with LearnerServer(service, port=port) as server:
        yield server


@contextmanager
def connected(server: LearnerServer, actor: int = 0, **changes: object) -> Iterator[LearnerClient]:
    """A connected client, closed at the end."""
    client = LearnerClient("127.0.0.1", server.port, actor, **{"settings": SETTINGS, **changes})  # type: ignore[arg-type]
    try:
        client.connect(SOON)
        yield client
    finally:
        client.close()


def weights(version: int, size: int = 3, final: bool = False) -> bytes:
    """Weights whose values are their version."""
    header = WeightsHeader(version, restart=False, evaluate=False, final=final, sent_at=time.time())
    return encode_weights({"head": torch.full((size,), float(version))}, header)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether something that nobody signals becomes true soon."""
    deadline = time.monotonic() + SOON
    never = threading.Event()
    while not condition() and time.monotonic() < deadline:
        never.wait(0.01)
    return condition()


@contextmanager
def raw_stub(
    server: LearnerServer, actor: int
) -> Iterator[tuple[services_pb2_grpc.LearnerServiceStub, list]]:
    """A connected stub with the metadata for its calls: for messages that no client would send."""
    hello = Handshake(actor, f"session {actor}", SETTINGS)
    metadata = Handshake(actor, hello.session).to_metadata()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        stub.Ready(services_pb2.Empty(), metadata=hello.to_metadata())
        parameters = stub.StreamParameters(services_pb2.Empty(), metadata=metadata)
        parameters.initial_metadata()
        yield stub, metadata
        parameters.cancel()


def chunk(data: bytes, state: int) -> services_pb2.Transition:
    """One chunk of a transitions stream: state 1 begins a message, 2 continues, 3 ends it."""
    return services_pb2.Transition(transfer_state=state, data=data)


# Weights


def test_every_client_gets_every_new_version() -> None:
    with serving(make_service()) as server, connected(server, 0) as one, connected(server, 1) as two:
        for version in range(1, 6):
            server.service.publish(version, weights(version))
            for client in (one, two):
                received = client.wait_weights(version - 1, SOON)
                assert received is not None
                assert received.header.version == version
                torch.testing.assert_close(received.tensors["head"], torch.full((3,), float(version)))
        assert eventually(lambda: server.service.traffic().sent == 10)


def test_thirty_two_clients_at_once_get_every_version_and_deliver() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(make_service(max_actors=32)))
        pool = stack.enter_context(ThreadPoolExecutor(32))
        clients = [LearnerClient("127.0.0.1", server.port, number, SETTINGS) for number in range(32)]
        for client in clients:
            stack.callback(client.close)
        # All of this is one process: patience for a machine that is busy.
        list(pool.map(lambda client: client.connect(6 * SOON), clients))
        assert [info.actor for info in server.service.actors.connected()] == list(range(32))
        for version in (1, 2, 3):
            server.service.publish(version, weights(version, 100_000))
            received = list(pool.map(LearnerClient.wait_weights, clients, [version - 1] * 32, [SOON] * 32))
            assert [one and one.header.version for one in received] == [version] * 32
        quotas = [b"quota of %d" % number for number in range(32)]
        list(pool.map(LearnerClient.send_decisions, clients, quotas))
        arrived = [server.service.decisions.get(SOON) for _ in clients]
        assert sorted((one.actor, one.payload) for one in arrived if one) == list(enumerate(quotas))
        assert server.service.traffic().rejected == {}


def test_a_late_client_gets_the_newest_at_once() -> None:
    with serving(make_service()) as server:
        server.service.publish(1, weights(1))
        server.service.publish(2, weights(2))
        with connected(server) as client:
            received = client.wait_weights(-1, SOON)
            assert received is not None
            assert received.header.version == 2


def test_a_client_is_told_which_version_takes_its_first_quota() -> None:
    with serving(make_service()) as server:
        with connected(server) as client:
            assert client.next_version == 0
        server.service.actors.take_next(12)
        with connected(server) as client:
            assert client.next_version == 12
            server.service.actors.take_next(13)
            client.reconnect(SOON)
            assert client.next_version == 13


@pytest.mark.parametrize("told", [None, "", "-1", "1.5", "9" * 19, "٣"])
def test_what_is_no_version_counts_as_the_first(told: str | None) -> None:
    assert version_of(told) == 0


def test_a_slow_client_skips_to_the_newest() -> None:
    with serving(make_service()) as server, connected(server) as client:
        for version in range(1, 21):
            server.service.publish(version, weights(version))
        received = client.wait_weights(19, SOON)
        assert received is not None
        assert received.header.version == 20


def test_weights_larger_than_a_chunk_arrive_whole() -> None:
    size = CHUNK_SIZE // 4 * 3 + 5
    with serving(make_service()) as server, connected(server) as client:
        server.service.publish(7, weights(7, size))
        received = client.wait_weights(-1, SOON)
        assert received is not None
        assert torch.equal(received.tensors["head"], torch.full((size,), 7.0))


def test_weights_larger_than_an_actors_own_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    largest, limit = weights(2, 2 * CHUNK_SIZE), len(weights(2, 2 * CHUNK_SIZE))
    with serving(make_service()) as server, connected(server, max_weights_bytes=limit) as client:
        server.service.publish(1, weights(1, 3 * CHUNK_SIZE))
        assert eventually(lambda: server.service.traffic().sent == 1)
        server.service.publish(2, largest)
        received = client.wait_weights(-1, SOON)
    assert received is not None
    assert received.header.version == 2
    assert "Rejected a message of the learner: too large" in caplog.text
    assert client.counts["rejected_pushes"] == 1
    own = {"head": torch.zeros(2 * CHUNK_SIZE)}
    assert len(largest) <= max_weights_bytes(own) <= len(largest) + MAX_HEADER_BYTES


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], None]:
    """Has the next messages to actors arrive as others; an empty one is one chunk without data."""

    def broken(contents: list[bytes]) -> None:
        left = iter(contents)

        def send(payload: bytes, kind: type) -> Iterator[object]:
            if arrives := next(left, payload):
                yield from send_bytes_in_chunks(arrives, kind)
            else:
                yield kind(transfer_state=3, data=b"")

        monkeypatch.setattr(service_module, "send_bytes_in_chunks", send)

    return broken


def damaged(payload: bytes) -> bytes:
    """The same with one bit changed, in the last weight."""
    return payload[:-1] + bytes([payload[-1] ^ 1])


def test_weights_that_do_not_arrive_whole_are_asked_for_again(
    breaking: Callable[[list[bytes]], None], caplog: pytest.LogCaptureFixture
) -> None:
    whole = weights(1, 1000)
    with serving(make_service()) as server, connected(server, max_weights_bytes=len(whole)) as client:
        breaking([damaged(whole), b"", weights(1, 3 * CHUNK_SIZE)])
        server.service.publish(1, whole)
        received = client.wait_weights(-1, SOON)
        assert received is not None
        assert torch.equal(received.tensors["head"], torch.full((1000,), 1.0))
        assert client.counts["rejected_pushes"] == 3
        assert caplog.text.count("asking for it again") == 3
        # Those that come whole count from the beginning.
        breaking([damaged(whole)] * (MAX_DAMAGED - 1))
        server.service.publish(2, weights(2, 1000))
        received = client.wait_weights(1, SOON)
        assert received is not None
        assert received.header.version == 2


def test_weights_that_never_arrive_whole_end_the_actor(breaking: Callable[[list[bytes]], None]) -> None:
    with serving(make_service()) as server, connected(server) as client:
        breaking([b"no weights at all"] * 100)
        server.service.publish(1, weights(1))
        with pytest.raises(
            ActorRefused, match=r"actor 0 ends: 5 pushes in a row did not arrive .*: cut short"
        ) as error:
            client.wait_weights(-1, SOON)
        assert "\n" not in str(error.value)


def test_a_sender_is_told_of_what_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    with serving(make_service()) as server, connected(server, 0) as one, connected(server, 1) as other:
        server.service.reject(0, "malformed", "interaction: 9 of 2 episodes were solved")
        server.service.publish(1, weights(1))
        assert one.wait_weights(-1, SOON) is not None
        assert "this actor: malformed: interaction: 9 of 2 episodes were solved" in caplog.text
        assert one.counts["rejected_pushes"] == 0
        server.service.reject(0, "malformed", "wrong set of tensors", quota=True)
        with pytest.raises(
            ActorRefused, match="ends: the learner rejected its decisions: malformed: wrong set"
        ):
            one.wait_weights(1, SOON)
        assert other.wait_weights(-1, SOON) is not None
        server.service.reject(1, "malformed", "x" * 10_000)
        server.service.publish(2, weights(2))
        assert other.wait_weights(1, SOON) is not None
        assert "x" * 1000 not in caplog.records[-1].getMessage()


def test_wait_weights_gives_up_after_its_timeout_and_repeats_what_is_still_newest() -> None:
    with serving(make_service()) as server, connected(server) as client:
        assert client.wait_weights(-1, 0.05) is None
        server.service.publish(3, weights(3))
        for _ in range(2):
            received = client.wait_weights(2, SOON)
            assert received is not None
            assert received.header.version == 3
        assert client.wait_weights(3, 0.05) is None


# Decisions and interactions


def test_payloads_arrive_whole_in_order_with_their_actor() -> None:
    payloads = [b"a", b"b" * (2 * CHUNK_SIZE + 1), b"c" * CHUNK_SIZE]
    with serving(make_service()) as server, connected(server, 5) as client:
        for payload in payloads:
            client.send_decisions(payload)
        client.send_interaction({"episode/return": 1.0})
        for payload in payloads:
            item = server.service.decisions.get(SOON)
            assert item is not None
            assert (item.actor, item.payload) == (5, payload)
        item = server.service.interactions.get(SOON)
        assert item is not None
        assert decode_interaction(item.payload) == {"episode/return": 1.0}
        traffic = server.service.traffic()
        assert traffic.messages == 4
        assert traffic.bytes == sum(map(len, payloads)) + len(item.payload)


def test_a_full_inbox_holds_the_sender_back_and_close_still_returns() -> None:
    service = make_service(waiting_messages=2)
    with serving(service) as server, connected(server, outbox_capacity=1) as client:
        sender = threading.Thread(target=_send_until_lost, args=(client,), daemon=True)
        sender.start()
        # Far more than inbox, outbox and gRPC's windows hold together: without back-pressure it would end.
        sender.join(1.0)
        assert sender.is_alive()
        assert len(service.decisions.drain()) <= 2
        began = time.monotonic()
        client.close(flush_s=0.5)
        assert time.monotonic() - began < 5
        sender.join(SOON)
        assert not sender.is_alive()


def test_a_wait_for_room_ends_when_the_actor_is_asked_to_leave() -> None:
    stop = threading.Event()
    outbox = Outbox(1)
    assert outbox.put(b"first", stop)
    began = time.monotonic()
    threading.Timer(0.2, stop.set).start()
    assert not outbox.put(b"second", stop)
    assert 0.2 <= time.monotonic() - began < SOON


def _send_until_lost(client: LearnerClient) -> None:
    try:
        for _ in range(200):
            client.send_decisions(bytes(2**20))
    except LearnerLost:
        return


def test_close_sends_what_was_queued() -> None:
    with (
        serving(make_service(waiting_messages=100)) as server,
        connected(server, outbox_capacity=50) as client,
    ):
        for number in range(50):
            client.send_decisions(b"%d" % number)
        assert client.close()
        assert [item.payload for item in server.service.decisions.drain()] == [b"%d" % n for n in range(50)]
        assert client.counts["unsent_messages"] == server.service.traffic().unfinished == 0


def test_close_says_what_did_not_get_through() -> None:
    with serving(make_service(waiting_messages=1)) as server, connected(server) as client:
        # One is taken, and some are on their way or wait.
        for _ in range(6):
            client.send_decisions(bytes(6 * 2**20))
        assert not client.close(flush_s=0.5)
        assert client.counts["unsent_messages"] >= 1
        assert eventually(lambda: server.service.traffic().unfinished >= 1)


def test_a_learner_that_ends_has_not_taken_what_comes_then() -> None:
    with serving(make_service()) as server, connected(server) as client:
        server.service.shutdown_event.set()
        client.send_decisions(b"too late")
        assert not client.close()
        assert server.service.decisions.drain() == []


# Who may connect


def test_different_settings_are_refused_line_by_line() -> None:
    theirs = {"policy": {"num_inference_steps": 5, "shape": [48]}, "env.task": "reach-v3", "env.extra": 1}
    with serving(make_service()) as server:
        client = LearnerClient("127.0.0.1", server.port, 0, theirs)
        with pytest.raises(ConfigMismatch) as refusal:
            client.connect(SOON)
        assert str(refusal.value).splitlines()[1:] == [
            "env.extra: learner has no such setting, actor 1",
            "policy.num_inference_steps: learner 4, actor 5",
        ]
        assert server.service.actors.connected() == []
        assert server.service.traffic().rejected == {"settings": 1}


def test_large_settings_fit() -> None:
    settings = {f"policy.field_{number}": "x" * 50 for number in range(850)}
    with serving(make_service(settings=settings)) as server, connected(server, settings=settings):
        assert len(server.service.actors.connected()) == 1


def test_settings_beyond_the_limit_are_refused_by_both_sides() -> None:
    settings = {f"policy.field_{number}": "x" * 50 for number in range(1000)}
    with pytest.raises(WireError, match="71891 bytes, at most 65536 are taken"):
        make_service(settings=settings)
    with serving(make_service()) as server:
        with pytest.raises(WireError, match="at most 65536 are taken"), connected(server, settings=settings):
            pass
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = services_pb2_grpc.LearnerServiceStub(channel)
            hello = Handshake(1, "session").to_metadata()
            for size, code in [(70_000, "FAILED_PRECONDITION"), (900_000, "RESOURCE_EXHAUSTED")]:
                with pytest.raises(grpc.RpcError) as error:
                    stub.Ready(services_pb2.Empty(), metadata=[*hello, ("pi-rl-settings-bin", bytes(size))])
                assert error.value.code().name == code
        with connected(server) as client:
            _works(server, client)


def test_a_second_live_actor_with_the_same_number_is_refused_and_the_first_lives_on() -> None:
    with serving(make_service()) as server, connected(server, 3) as first:
        with pytest.raises(ActorRefused, match="actor 3 is already connected"), connected(server, 3):
            pass
        server.service.publish(1, weights(1))
        assert first.wait_weights(-1, SOON) is not None
        first.close()
        assert eventually(lambda: not server.service.actors.connected())
        with connected(server, 3):
            assert [info.actor for info in server.service.actors.connected()] == [3]


def test_more_actors_than_places_are_refused() -> None:
    with serving(make_service(max_actors=1)) as server, connected(server, 0):
        second = LearnerClient("127.0.0.1", server.port, 1, SETTINGS)
        with pytest.raises(ActorRefused, match="all 1 places are taken"):
            second.connect(SOON)


def test_calls_without_a_handshake_are_refused() -> None:
    with serving(make_service()) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        calls: list[Callable[[], object]] = [
            lambda: stub.Ready(services_pb2.Empty()),
            lambda: next(stub.StreamParameters(services_pb2.Empty())),
            lambda: stub.SendTransitions(iter([chunk(b"x", 3)])),
            lambda: stub.SendInteractions(iter([])),
            lambda: stub.SendTransitions(iter([chunk(b"x", 3)]), metadata=Handshake(0, "s").to_metadata()),
            lambda: next(
                stub.StreamParameters(services_pb2.Empty(), metadata=Handshake(0, "s").to_metadata())
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            assert refusal.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert server.service.decisions.drain() == []


def test_another_protocol_version_is_refused() -> None:
    hello = [
        ("pi-rl-protocol", "99") if pair[0] == "pi-rl-protocol" else pair
        for pair in Handshake(0, "s", SETTINGS).to_metadata()
    ]
    with serving(make_service()) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            services_pb2_grpc.LearnerServiceStub(channel).Ready(services_pb2.Empty(), metadata=hello)
        assert f"protocol: learner {PROTOCOL}, actor 99" in refusal.value.details()


def test_the_stock_learner_is_recognised() -> None:
    over = threading.Event()
    stock = LearnerService(over, queue.Queue(), 0, queue.Queue(), queue.Queue(), queue_get_timeout=0.01)
    with ThreadPoolExecutor(3) as pool:
        server = grpc.server(pool)
        services_pb2_grpc.add_LearnerServiceServicer_to_server(stock, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(ActorRefused, match="not a PI-RL learner"):
            LearnerClient("127.0.0.1", port, 0, SETTINGS).connect(SOON)
        over.set()
        server.stop(None).wait()


# Bad input


@pytest.mark.parametrize(
    ("chunks", "reason", "whole"),
    [
        ([chunk(b"x", 2), chunk(b"y", 3)], "no beginning", []),
        ([chunk(b"x", 1), chunk(b"y", 1), chunk(b"z", 3)], "unfinished", [b"yz"]),
        ([chunk(b"x", 1)], "unfinished", []),
        ([chunk(b"x", 0), chunk(b"y", 3)], "unknown state", [b"y"]),
        ([chunk(b"x", 1), chunk(b"y", 77), chunk(b"z", 3)], "unknown state", []),
        ([chunk(bytes(2**20), 1)] + [chunk(bytes(2**20), 2)] * 9 + [chunk(b"", 3)], "too large", []),
    ],
)
def test_malformed_streams_are_counted_and_the_learner_lives_on(
    chunks: list, reason: str, whole: list[bytes]
) -> None:
    with serving(make_service()) as server, connected(server, 0) as client:
        with raw_stub(server, 1) as (stub, metadata):
            stub.SendTransitions(iter(chunks), metadata=metadata)
            stub.SendTransitions(iter([chunk(b"good", 3)]), metadata=metadata)
        assert server.service.traffic().rejected == {reason: 1}
        assert [item.payload for item in server.service.decisions.drain()] == [*whole, b"good"]
        _works(server, client)


DEMONSTRATIONS = pack("demonstrations", {}, {"action": torch.zeros(2, 2)}, {})


def test_what_people_did_is_kept_before_its_actor_hears_that_it_has_arrived() -> None:
    kept: list[bytes] = []
    with serving(make_service()) as server, raw_stub(server, 1) as (stub, metadata):
        call = stub.SendTransitions.future(iter([chunk(DEMONSTRATIONS, 3)]), metadata=metadata)
        with pytest.raises(grpc.FutureTimeoutError):
            # Nobody keeps anything yet.
            call.result(0.3)
        with server.service.demonstrations.to(kept.append):
            call.result(SOON)
            stub.SendTransitions(iter([chunk(b"decisions", 3), chunk(DEMONSTRATIONS, 3)]), metadata=metadata)
        assert kept == [DEMONSTRATIONS] * 2
        assert [item.payload for item in server.service.decisions.drain()] == [b"decisions"]


def test_what_people_did_and_nobody_kept_is_not_said_to_have_arrived() -> None:
    """Neither when the run is over nor when the learner ends."""
    kept: list[bytes] = []
    with serving(make_service()) as server:
        with raw_stub(server, 1) as (stub, metadata):
            with server.service.demonstrations.to(kept.append):
                pass
            call = stub.SendTransitions.future(iter([chunk(DEMONSTRATIONS, 3)]), metadata=metadata)
            assert eventually(lambda: server.service.actors._links[1].heard == 1)
            server.service.end(0.0)
            assert call.exception(SOON).code() == grpc.StatusCode.UNAVAILABLE
        assert server.service.traffic().unfinished == 1
    assert kept == []


def test_what_people_did_is_rejected_where_it_does_not_fit() -> None:
    def refuse(payload: bytes) -> None:
        raise WireError("has demonstrations, but nobody can take over in this environment")

    with serving(make_service()) as server, connected(server, 0) as client:
        with raw_stub(server, 1) as (stub, metadata), server.service.demonstrations.to(refuse):
            stub.SendTransitions(iter([chunk(DEMONSTRATIONS, 3)]), metadata=metadata)
        assert server.service.traffic().rejected == {"malformed": 1}
        _works(server, client)


def test_bytes_that_are_no_protobuf_are_counted_and_the_learner_lives_on() -> None:
    with serving(make_service()) as server, connected(server, 0) as client:
        with (
            raw_stub(server, 1) as (_, metadata),
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            call = channel.stream_unary("/transport.LearnerService/SendTransitions")
            good = chunk(b"good", 3).SerializeToString()
            call(iter([b"\xff\xff\xff\xff not a protobuf", good]), metadata=metadata)
        assert server.service.traffic().rejected == {"unknown state": 1}
        assert [item.payload for item in server.service.decisions.drain()] == [b"good"]
        _works(server, client)


def test_a_chunk_above_grpcs_limit_ends_its_stream_only() -> None:
    with serving(make_service()) as server, connected(server, 0) as client:
        with raw_stub(server, 1) as (stub, metadata), pytest.raises(grpc.RpcError) as error:
            stub.SendTransitions(iter([chunk(bytes(5 * 2**20), 3)]), metadata=metadata)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        _works(server, client)


def test_a_stream_that_ends_within_a_message_broke_if_its_call_is_over() -> None:
    """gRPC ends it like a complete one when it sees the end before the break."""
    over = threading.Event()
    half, whole = [chunk(b"begun", 1)], [chunk(b"begun", 1), chunk(b"and ended", 3)]
    assert list(_Incoming().of(iter(half), over)) == half
    over.set()
    assert list(_Incoming().of(iter(whole), over)) == whole
    with pytest.raises(grpc.RpcError):
        list(_Incoming().of(iter(half), over))


@pytest.mark.parametrize("stream", ["SendTransitions", "SendInteractions"])
def test_a_stream_that_breaks_alone_is_counted(stream: str) -> None:
    over = threading.Event()

    def sent() -> Iterator[services_pb2.Transition]:
        yield chunk(b"begun", 1)
        over.wait(SOON)

    with serving(make_service()) as server, raw_stub(server, 1) as (stub, metadata):
        call = getattr(stub, stream).future(sent(), metadata=metadata)
        assert eventually(lambda: next(iter(server.service.actors._links.values())).heard == 1)
        call.cancel()
        assert eventually(lambda: server.service.traffic().rejected == {"broken stream": 1})
        assert eventually(lambda: server.service.traffic().unfinished == 1)
        over.set()


@pytest.mark.parametrize(
    "chunks",
    [[chunk(b"taken", 3), chunk(b"no room", 3)], [chunk(b"taken", 3), chunk(b"begun", 1)]],
    ids=["no room", "half"],
)
def test_what_had_come_of_a_message_when_its_actor_left_is_counted(chunks: list) -> None:
    over = threading.Event()

    def sent() -> Iterator[services_pb2.Transition]:
        yield from chunks
        over.wait(SOON)

    with serving(make_service(waiting_messages=1)) as server:
        with raw_stub(server, 1) as (stub, metadata):
            call = stub.SendTransitions.future(sent(), metadata=metadata)
            assert eventually(lambda: len(server.service.decisions) == 1)
            over.wait(0.5)
            assert server.service.traffic().unfinished == 0
        assert eventually(lambda: server.service.traffic().unfinished == 1)
        over.set()
        assert call.code() != grpc.StatusCode.OK
        assert server.service.traffic().rejected == {}


def test_a_socket_that_speaks_no_grpc_does_no_harm() -> None:
    with serving(make_service()) as server, connected(server) as client:
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(1024)
        _works(server, client)


def _works(server: LearnerServer, client: LearnerClient) -> None:
    """A client that was connected all along still sends and receives."""
    client.send_decisions(b"still here")
    item = server.service.decisions.get(SOON)
    assert item is not None
    assert item.payload == b"still here"
    server.service.publish(9, weights(9))
    assert client.wait_weights(8, SOON) is not None


# Coming and going


def test_joins_and_leaves_are_events() -> None:
    with serving(make_service()) as server:
        with connected(server, 4):
            joined = server.service.actors.next_event(SOON)
            assert server.service.actors.wait_connected(1, SOON)
        left = server.service.actors.next_event(SOON)
        assert joined is not None
        assert left is not None
        assert (joined.kind, left.kind) == ("joined", "left")
        assert joined.info == left.info
        assert left.info.actor == 4
        assert server.service.actors.next_event() is None


ACTOR = """
import sys, threading
from lerobot_policy_pi_rl.runtime.client import LearnerClient
client = LearnerClient("127.0.0.1", int(sys.argv[1]), 8, {})
client.connect(60)
client.send_decisions(b"hello")
threading.Event().wait()
"""


def test_a_killed_actor_process_is_seen_to_leave() -> None:
    with serving(make_service(settings={})) as server:
        process = subprocess.Popen([sys.executable, "-c", ACTOR, str(server.port)])
        try:
            item = server.service.decisions.get(90)
            assert item is not None
            assert item.actor == 8
            os.kill(process.pid, signal.SIGKILL)
            kinds = [
                event.kind for _ in range(2) if (event := server.service.actors.next_event(SOON)) is not None
            ]
            assert kinds == ["joined", "left"]
            assert server.service.actors.connected() == []
        finally:
            process.kill()
            process.wait()


def test_a_port_in_use_is_one_clear_line() -> None:
    with serving(make_service()) as server:
        second = LearnerServer(make_service(), port=server.port)
        with pytest.raises(PortUnavailable) as error:
            second.start()
        text = str(error.value)
        assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in text
        assert "--policy.actor_learner_config.learner_port" in text
        assert "\n" not in text
        second.stop()


def test_a_foreign_host_is_one_clear_line() -> None:
    with pytest.raises(PortUnavailable, match=r"cannot listen on 192\.0\.2\.1:50051: "):
        LearnerServer(make_service(), host="192.0.2.1").start()


def test_the_client_waits_for_a_learner_that_starts_later() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = LearnerClient("127.0.0.1", port, 0, SETTINGS)
    assert client.state is LinkState.NEW
    failure: list[Exception] = []
    waiting = threading.Thread(target=lambda: _connect(client, failure), daemon=True)
    waiting.start()
    with serving(make_service(), port) as server:
        assert server.service.actors.wait_connected(1, SOON)
        waiting.join(SOON)
        assert not failure
        assert client.state is LinkState.CONNECTED
        client.close()


def _connect(client: LearnerClient, failure: list[Exception]) -> None:
    try:
        client.connect(SOON)
    except ConnectionError as error:
        failure.append(error)


def test_no_learner_within_the_limit_is_one_clear_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    client = LearnerClient("127.0.0.1", 9, 0, SETTINGS)
    with pytest.raises(LearnerUnreachable) as error:
        client.connect(0.3)
    assert "127.0.0.1:9" in str(error.value)
    assert "lerobot-pi-rl-learner" in str(error.value)
    assert "\n" not in str(error.value)
    assert "Waiting for the learner at 127.0.0.1:9" in caplog.text
    assert client.counts["failed_attempts"] >= 1


def test_stop_delivers_the_last_weights_ends_fast_and_leaves_no_thread() -> None:
    with serving(make_service()) as server, connected(server, 0) as one, connected(server, 1) as two:
        server.service.publish(5, weights(5, final=True))
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("pi-rl-service")]
        for client in (one, two):
            received = client.wait_weights(-1, SOON)
            assert received is not None
            assert received.header.final
            with pytest.raises(LearnerLost, match="lost the learner at"):
                client.wait_weights(5, SOON)
            assert client.state is LinkState.LOST
            with pytest.raises(LearnerLost):
                client.send_decisions(b"x")
            began = time.monotonic()
            client.close()
            assert time.monotonic() - began < 3
            assert client.state is LinkState.CLOSED


def test_stop_ends_while_an_inbox_is_full() -> None:
    with serving(make_service(waiting_messages=1)) as server, connected(server) as client:
        for _ in range(6):
            client.send_decisions(bytes(2**20))
        assert server.service.decisions.get(SOON) is not None
        assert eventually(lambda: server.service.traffic().messages == 2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 3
        assert len(server.service.decisions.drain()) == 1


def test_a_client_reconnects_to_a_resumed_learner() -> None:
    with serving(make_service()) as first:
        port = first.port
        first.service.publish(7, weights(7))
        client = LearnerClient("127.0.0.1", port, 0, SETTINGS)
        client.connect(SOON)
        assert client.wait_weights(-1, SOON) is not None
    with pytest.raises(LearnerLost):
        client.wait_weights(7, SOON)
    with serving(make_service(), port) as second:
        client.reconnect(SOON)
        assert client.state is LinkState.CONNECTED
        second.service.publish(5, weights(5))
        received = client.wait_weights(-1, SOON)
        assert received is not None
        assert received.header.version == 5
        client.send_decisions(b"after")
        item = second.service.decisions.get(SOON)
        assert item is not None
        assert item.payload == b"after"
        client.close()


def test_the_same_process_may_take_its_own_place_again() -> None:
    with serving(make_service(max_actors=1)) as server, connected(server) as client:
        client.reconnect(SOON)
        assert eventually(lambda: len(server.service.actors.connected()) == 1)
        server.service.publish(1, weights(1))
        assert client.wait_weights(-1, SOON) is not None
