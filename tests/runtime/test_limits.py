"""How much one actor can take up: the limits by themselves, and a service that keeps them, over real gRPC."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import grpc
import psutil
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import CHUNK_SIZE

from lerobot_policy_pi_rl.runtime import limits, register
from lerobot_policy_pi_rl.runtime.chunks import CHUNK_OVERHEAD, whole_messages
from lerobot_policy_pi_rl.runtime.client import LearnerClient, LearnerLost
from lerobot_policy_pi_rl.runtime.handshake import Handshake
from lerobot_policy_pi_rl.runtime.inbox import Inbox, Received
from lerobot_policy_pi_rl.runtime.limits import Bucket, Limits
from lerobot_policy_pi_rl.runtime.link import ActorRefused
from lerobot_policy_pi_rl.runtime.register import REMEMBERED
from lerobot_policy_pi_rl.runtime.server import LearnerServer
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService
from lerobot_policy_pi_rl.runtime.wire import MAX_INTERACTION_BYTES

SOON = 10.0
BEGIN, MIDDLE, END = 1, 2, 3

pytestmark = pytest.mark.timeout(60)


def chunk(data: bytes, state: int = END) -> services_pb2.Transition:
    return services_pb2.Transition(transfer_state=state, data=data)


@contextmanager
def serving(rate: float = 1e6, rejected: int = 1000) -> Iterator[LearnerServer]:
    limits = Limits(8 * CHUNK_OVERHEAD, 4, 64 * CHUNK_OVERHEAD, rate, rejected)
    with LearnerServer(PIRLLearnerService({}, 2, limits), port=0) as server:
        yield server


@contextmanager
def calling(
    server: LearnerServer, actor: int = 1
) -> Iterator[tuple[services_pb2_grpc.LearnerServiceStub, list]]:
    """A connected stub with the metadata for its calls: for what no client would send."""
    metadata = Handshake(actor, f"session-{actor}").to_metadata()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        stub.Ready(services_pb2.Empty(), metadata=Handshake(actor, f"session-{actor}", {}).to_metadata())
        parameters = stub.StreamParameters(services_pb2.Empty(), metadata=metadata)
        parameters.initial_metadata()
        yield stub, metadata
        parameters.cancel()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline, never = time.monotonic() + SOON, threading.Event()
    while not condition() and time.monotonic() < deadline:
        never.wait(0.01)
    return condition()


# The bucket


def test_a_bucket_gives_a_burst_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    bucket = Bucket(rate=10, burst=3)
    assert [bucket.take() for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    # Two were taken ahead: after a third of a second there is one and a third.
    now[0] += 1 / 3
    assert bucket.take_now()
    assert not bucket.take_now()
    now[0] += 1000
    assert [bucket.take_now() for _ in range(4)] == [True, True, True, False]


# The inbox


def test_an_actor_that_fills_its_part_of_an_inbox_leaves_the_others_theirs() -> None:
    inbox = Inbox(messages=2, size=100)
    assert inbox.put(Received(0, b"x"), lambda: True)
    assert inbox.put(Received(0, b"x"), lambda: True)
    blocked = threading.Thread(target=inbox.put, args=(Received(0, b"third"), lambda: True), daemon=True)
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    assert inbox.put(Received(1, b"other"), lambda: True)
    assert inbox.get(SOON) == Received(0, b"x")
    blocked.join(SOON)
    assert [item.payload for item in inbox.drain()] == [b"x", b"other", b"third"]


def test_messages_of_ever_new_actors_take_no_more_room_than_actors_have_places() -> None:
    inbox = Inbox(4, 100, actors=2)
    for actor in (1, 2, 2):
        assert inbox.put(Received(actor, b"x"), lambda: True)
    # The third sender is asked twice whether it still wants to, and has left by then.
    wanted = iter([True, False, False])
    threading.Timer(0.2, inbox.wake).start()
    assert not inbox.put(Received(3, b"x"), lambda: next(wanted))
    inbox.get()
    assert inbox.put(Received(3, b"x"), lambda: True)


def test_bytes_count_but_one_message_may_always_wait() -> None:
    inbox = Inbox(messages=10, size=100)
    assert inbox.put(Received(0, bytes(500)), lambda: True)
    blocked = threading.Thread(target=inbox.put, args=(Received(0, b"next"), lambda: True), daemon=True)
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    assert inbox.get(SOON) is not None
    blocked.join(SOON)
    assert inbox.get(SOON) == Received(0, b"next")


# Chunks


def rejected_of(chunks: list, max_bytes: int) -> list[str]:
    reasons: list[str] = []
    assert list(whole_messages(iter(chunks), max_bytes, reasons.append)) == []
    return reasons


def test_chunks_without_data_take_room_too() -> None:
    endless = [chunk(b"", BEGIN)] + [chunk(b"", MIDDLE)] * 100
    assert set(rejected_of(endless, 10 * CHUNK_OVERHEAD)) == {"too large"}


def test_a_message_that_never_ends_is_rejected_again_and_again() -> None:
    endless = [chunk(b"", BEGIN)] + [chunk(bytes(CHUNK_OVERHEAD), MIDDLE)] * 100
    assert len(rejected_of(endless, 10 * CHUNK_OVERHEAD)) >= 8


# The service


def test_a_sender_in_a_hurry_is_slowed_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with serving(rate=50) as server, calling(server) as (stub, metadata):
        drain = threading.Thread(target=lambda: [server.service.decisions.get(SOON) for _ in range(150)])
        drain.start()
        began = time.monotonic()
        stub.SendTransitions(iter([chunk(b"x")] * 150), metadata=metadata)
        # Two seconds' worth at once, the rest at 50 a second.
        assert 0.9 < time.monotonic() - began < SOON
        drain.join(SOON)
        assert server.service.traffic().messages == 150
        assert 45 <= server.service.traffic().slowed <= 50
        assert server.service.traffic().rejected == {}
    assert "Slowed actor 1: it sends more than 50 messages a second" in caplog.text


def test_streams_that_begin_anew_do_not_help_a_sender_in_a_hurry() -> None:
    with serving(rate=50) as server, calling(server) as (stub, metadata):
        began = time.monotonic()
        for _ in range(150):
            stub.SendTransitions(iter([chunk(b"x")]), metadata=metadata)
            assert server.service.decisions.get(SOON) == Received(1, b"x")
        assert time.monotonic() - began > 0.9
        assert server.service.traffic().slowed > 0


def test_full_chunks_are_not_slowed() -> None:
    limits = Limits(2**30, 4, 2**30, 0.5, 1000)
    with (
        LearnerServer(PIRLLearnerService({}, 2, limits), port=0) as server,
        calling(server) as (stub, metadata),
    ):
        middle = chunk(bytes(CHUNK_SIZE), MIDDLE)
        stub.SendTransitions(
            iter([chunk(bytes(CHUNK_SIZE), BEGIN), *[middle] * 4, chunk(b"x")]), metadata=metadata
        )
        assert server.service.traffic().slowed == 0
        item = server.service.decisions.get(SOON)
        assert item is not None
        assert len(item.payload) == 5 * CHUNK_SIZE + 1


def test_a_sender_of_nonsense_is_cut_off_and_not_let_in_again(caplog: pytest.LogCaptureFixture) -> None:
    with serving(rejected=20) as server:
        client = LearnerClient("127.0.0.1", server.port, 0, {})
        client.connect(SOON)
        with calling(server) as (stub, metadata):
            nonsense = (chunk(b"x", 7) for _ in range(10_000))
            with pytest.raises(grpc.RpcError):
                stub.SendTransitions(nonsense, metadata=metadata)
            assert eventually(lambda: [info.actor for info in server.service.actors.connected()] == [0])
            with pytest.raises(grpc.RpcError) as refusal:
                stub.Ready(services_pb2.Empty(), metadata=Handshake(1, "session-1", {}).to_metadata())
            assert refusal.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "20 of its messages were rejected" in refusal.value.details()
        rejected = server.service.traffic().rejected
        assert 20 <= rejected.pop("unknown state") < 30
        assert rejected == {"cut off": 1, "cut off before": 1}
        assert "Cut off actor 1" in caplog.text
        client.send_decisions(b"still here")
        item = server.service.decisions.get(SOON)
        assert item is not None
        assert item.payload == b"still here"
        client.close()


def test_reconnecting_resets_no_limit() -> None:
    with serving(rate=2.0, rejected=11) as server:
        for number in (1, 2):
            with calling(server) as (stub, metadata):
                # No more than the burst that a new number may send.
                stub.SendTransitions((chunk(b"x") for _ in range(4)), metadata=metadata)
                for _ in range(4):
                    server.service.reject(1, "malformed")
                server.service.decisions.drain()
            assert eventually(lambda: server.service.actors.connected() == [])
            # Decoded only after its sender has left.
            server.service.reject(1, "malformed")
            assert server.service.actors._accounts[1].rejected == 5 * number
        assert server.service.traffic().slowed >= 1
        with calling(server):
            server.service.reject(1, "malformed")
            assert server.service.traffic().rejected["cut off"] == 1


def test_limits_are_remembered_for_a_while_and_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "REMEMBERED", 3)
    with serving() as server:
        accounts = server.service.actors._accounts
        for number in range(10):
            server.service.actors._open_account(number).rejected = 1
        # Twice the number of places.
        assert list(accounts) == [6, 7, 8, 9]
        accounts[7].seen -= register.ACCOUNT_SECONDS + 1
        assert server.service.actors._open_account(7).rejected == 0
        assert server.service.actors._open_account(8).rejected == 1
        assert server.service.traffic().reconnected == 2


def test_an_actor_whose_messages_cannot_be_decoded_ends_with_one_line() -> None:
    """The learner rejects what it decodes by itself."""
    with serving(rejected=3) as server:
        client = LearnerClient("127.0.0.1", server.port, 4, {})
        client.connect(SOON)
        for _ in range(3):
            server.service.reject(4, "malformed", "by the decoder")
        with pytest.raises(LearnerLost):
            client.wait_weights(-1, SOON)
        with pytest.raises(ActorRefused, match="3 of its messages were rejected; the learner's log says why"):
            client.reconnect(SOON)
        client.close()


def test_statistics_are_small_whatever_decisions_are() -> None:
    limits = Limits(2**30, 4, 2**30, 1e6, 1000)
    with (
        LearnerServer(PIRLLearnerService({}, 2, limits), port=0) as server,
        calling(server) as (stub, metadata),
    ):
        big = services_pb2.InteractionMessage(
            transfer_state=END, data=bytes(MAX_INTERACTION_BYTES + CHUNK_OVERHEAD + 1)
        )
        stub.SendInteractions(iter([big]), metadata=metadata)
        assert server.service.traffic().rejected == {"too large": 1}


def test_a_second_stream_of_a_kind_ends_the_first() -> None:
    hold = threading.Event()

    def held() -> Iterator[services_pb2.Transition]:
        yield chunk(b"one")
        hold.wait(SOON)

    with serving() as server, calling(server) as (stub, metadata):
        first = stub.SendTransitions.future(held(), metadata=metadata)
        assert server.service.decisions.get(SOON) == Received(1, b"one")
        stub.SendTransitions(iter([chunk(b"two")]), metadata=metadata)
        with pytest.raises(grpc.RpcError) as ended:
            first.result(SOON)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
        hold.set()
        assert server.service.decisions.get(SOON) == Received(1, b"two")


def test_callers_that_come_and_go_leave_nothing_behind() -> None:
    """Each names another actor and session; none opens its streams."""
    with serving() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        for number in range(REMEMBERED + 100):
            stub.Ready(services_pb2.Empty(), metadata=Handshake(number, f"s{number}", {}).to_metadata())
        assert len(server.service.actors._admitted) == REMEMBERED
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Ready(services_pb2.Empty(), metadata=Handshake(0, "s" * 65, {}).to_metadata())
        assert "at most 64 printable characters" in refusal.value.details()


def test_a_compressed_message_ends_its_stream_only() -> None:
    """Sixty-four megabytes of zeros are a few kilobytes on the wire, and gRPC below 1.74 unpacks any size."""
    with serving() as server, calling(server) as (stub, metadata):
        for size in (100, 64 * 2**20):
            with pytest.raises(grpc.RpcError) as error:
                stub.SendTransitions(
                    iter([chunk(bytes(size))]), metadata=metadata, compression=grpc.Compression.Gzip
                )
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        stub.SendTransitions(iter([chunk(b"good")]), metadata=metadata)
        assert server.service.decisions.get(SOON) == Received(1, b"good")


MEGABYTE = 2**20
UNKNOWN = b"\x7a" + b"\x80\x80\x40" + bytes(MEGABYTE)
"""Field 15, which no chunk has: a tag, a length, a megabyte."""


@pytest.mark.parametrize(
    "data",
    [
        chunk(b"", MIDDLE).SerializeToString() + UNKNOWN,
        2 * chunk(bytes(MEGABYTE), MIDDLE).SerializeToString(),
    ],
    ids=["a field that chunks do not have", "its data twice"],
)
def test_what_a_chunk_holds_beside_its_data_is_not_kept(data: bytes) -> None:
    limits = Limits(1000 * MEGABYTE, 4, 1000 * MEGABYTE, 1e6, 1000)
    with (
        LearnerServer(PIRLLearnerService({}, 2, limits), port=0) as server,
        calling(server) as (stub, metadata),
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        before = psutil.Process().memory_info().rss
        peak = 0

        def chunks() -> Iterator[bytes]:
            nonlocal peak
            yield chunk(b"begun", BEGIN).SerializeToString()
            for _ in range(300):
                peak = max(peak, psutil.Process().memory_info().rss - before)
                yield data
            yield chunk(b"", END).SerializeToString()

        channel.stream_unary("/transport.LearnerService/SendTransitions")(chunks(), metadata=metadata)
        # The message is dropped up to its end, and counted once.
        assert server.service.traffic().rejected == {"unknown state": 1}
        assert peak < 100 * MEGABYTE
        stub.SendTransitions(iter([chunk(b"good")]), metadata=metadata)
        assert server.service.decisions.get(SOON) == Received(1, b"good")


def test_bodies_that_are_not_what_a_call_takes_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """They are not looked at: the request of these calls is empty."""
    hello, garbage = Handshake(1, "session", {}).to_metadata(), b"\xff\xff\xff\xff no protobuf"
    with serving() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        ready = channel.unary_unary("/transport.LearnerService/Ready")
        assert ready(garbage, metadata=hello) == b""
        parameters = channel.unary_stream("/transport.LearnerService/StreamParameters")
        for _ in range(150):
            with pytest.raises(grpc.RpcError) as error:
                ready(garbage)
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            with pytest.raises(grpc.RpcError):
                next(parameters(garbage))
        assert server.service.traffic().rejected == {"not an actor": 300}
    assert 50 <= len(caplog.records) < 150
    assert not any(record.exc_info for record in caplog.records)


def test_those_who_ask_for_a_number_that_is_taken_wait_one_at_a_time() -> None:
    """Each that waits keeps one of the learner's calls for seconds."""
    with serving() as server, calling(server, 1):
        ask = partial(server.service.actors.admit, Handshake(1, "another"), "somebody")
        first = threading.Thread(target=lambda: suppress_refusal(ask), daemon=True)
        first.start()
        holder = server.service.actors._links[1]
        assert eventually(lambda: holder.questioned)
        began = time.monotonic()
        with pytest.raises(register.Refusal, match="already connected"):
            ask()
        assert time.monotonic() - began < 1.0
        server.service.actors.note_life(holder)
        first.join(SOON)
        assert not holder.questioned


def suppress_refusal(ask: Callable[[], None]) -> None:
    with suppress(register.Refusal):
        ask()
