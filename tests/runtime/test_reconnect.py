"""An actor that comes back while the learner still believes in its old connection, over real gRPC on loopback."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer

import grpc
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_policy_pi_rl.runtime.access import Access
from lerobot_policy_pi_rl.runtime.client import ConfigMismatch, LearnerClient, LinkState
from lerobot_policy_pi_rl.runtime.handshake import HEARTBEAT_METADATA, HEARTBEAT_SECONDS, Handshake
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.link import CALL_SECONDS, ActorRefused
from lerobot_policy_pi_rl.runtime.register import MISSED_HEARTBEATS
from lerobot_policy_pi_rl.runtime.server import LearnerServer
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService

sys.path.insert(0, str(Path(__file__).parent / "processes"))

from network import Proxy

HOST = "127.0.0.1"
SETTINGS = {"env.task": "reach-v3"}
TOKEN = "a-token-of-many-characters"
NUMBER = 3
SOON = 10.0
SILENCE = MISSED_HEARTBEATS * HEARTBEAT_SECONDS

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def server() -> Iterator[LearnerServer]:
    """For one actor, with no more threads than that needs."""
    service = PIRLLearnerService(SETTINGS, 1, Limits(2**23, 4, 2**30, 1000.0, 2))
    with LearnerServer(service, port=0, access=Access(TOKEN)) as server:
        yield server


@pytest.fixture
def proxy(server: LearnerServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@contextmanager
def actor(port: int, access: Access | None = None, settings: dict = SETTINGS) -> Iterator[LearnerClient]:
    """One process' client, connected."""
    client = LearnerClient(HOST, port, NUMBER, settings, access=access or Access(TOKEN))
    try:
        client.connect(SOON)
        yield client
    finally:
        client.close(flush_s=0.0)


def wait_lost(client: LearnerClient) -> None:
    deadline = time.monotonic() + SOON
    while client.state is not LinkState.LOST and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.state is LinkState.LOST


def events(server: LearnerServer) -> list[str]:
    found = []
    while (event := server.service.actors.next_event()) is not None:
        found.append(event.kind)
    return found


def arrived(server: LearnerServer) -> list[bytes]:
    """The next message, and what is there with it."""
    first = server.service.decisions.get(SOON)
    assert first is not None
    return [first.payload, *(item.payload for item in server.service.decisions.drain())]


def test_a_process_takes_its_own_place_at_once_and_its_half_message_is_dropped(
    server: LearnerServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Several times: what its dead connections hold of the learner is given back each time."""
    with actor(proxy.port) as client:
        for number in range(4):
            proxy.vanish_after(2**20)
            client.send_decisions(bytes(3 * 2**20))
            wait_lost(client)
            assert len(server.service.actors.connected()) == 1
            client.reconnect(SOON)
            client.send_decisions(b"whole %d" % number)
            assert arrived(server) == [b"whole %d" % number]
    assert events(server)[:9] == ["joined"] + ["left", "joined"] * 4
    # Nobody sent anything wrong, and nobody was waited for.
    traffic = server.service.traffic()
    assert traffic.rejected == {}
    assert (traffic.joined, traffic.reconnected, traffic.replaced) == (5, 4, 0)
    assert "no sign of life" not in caplog.text


def test_another_process_takes_the_place_of_one_that_fell_silent(
    server: LearnerServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with actor(proxy.port):
        proxy.vanish()
        began = time.monotonic()
        with actor(server.port) as another:
            assert SILENCE < time.monotonic() - began < SOON
            assert "Actor 3 at ipv4:127.0.0.1:" in caplog.text
            assert "gave no sign of life for 4 s; ipv4:127.0.0.1:" in caplog.text
            assert events(server) == ["joined", "left", "joined"]
            traffic = server.service.traffic()
            assert (traffic.joined, traffic.reconnected, traffic.replaced) == (2, 1, 1)
            another.send_decisions(b"mine")
            assert arrived(server) == [b"mine"]


def test_an_actor_that_has_nothing_to_say_lives(server: LearnerServer) -> None:
    """As a synchronous one does while it collects, for longer than a silence lasts."""
    with actor(server.port) as silent:
        time.sleep(SILENCE + HEARTBEAT_SECONDS)
        text = "actor 3 is already connected from ipv4"
        with pytest.raises(ActorRefused, match=text) as error, actor(server.port):
            pass
        assert "\n" not in str(error.value)
        assert events(server) == ["joined"]
        silent.send_decisions(b"still here")
        assert arrived(server) == [b"still here"]


def test_one_that_was_replaced_is_told_when_it_comes_back(server: LearnerServer, proxy: Proxy) -> None:
    with actor(proxy.port) as first:
        proxy.stall()
        with actor(server.port) as second:
            proxy.go_on()
            wait_lost(first)
            with pytest.raises(ActorRefused, match="actor 3 is already connected from"):
                first.reconnect(SOON)
            second.send_decisions(b"mine")
            assert arrived(server) == [b"mine"]


@pytest.mark.parametrize(
    ("access", "settings", "refusal"),
    [
        (Access(), SETTINGS, ActorRefused),
        (Access("another-token-of-many"), SETTINGS, ActorRefused),
        (Access(TOKEN), {"env.task": "push-v3"}, ConfigMismatch),
    ],
)
def test_whoever_may_not_connect_replaces_nobody(
    server: LearnerServer, proxy: Proxy, access: Access, settings: dict, refusal: type[Exception]
) -> None:
    """Not even one that has fallen silent."""
    with actor(proxy.port):
        proxy.vanish()
        with pytest.raises(refusal), actor(server.port, access, settings):
            pass
        time.sleep(SILENCE + HEARTBEAT_SECONDS)
        assert events(server) == ["joined"]


def test_a_known_session_without_the_token_replaces_nobody(server: LearnerServer) -> None:
    with actor(server.port) as client:
        hello = Handshake(NUMBER, client._handshake.session, SETTINGS).to_metadata()
        for call in calls(server, hello):
            assert call == grpc.StatusCode.UNAUTHENTICATED
        assert events(server) == ["joined"]
        client.send_decisions(b"still here")
        assert arrived(server) == [b"still here"]


def test_nobody_shows_life_for_another_process(server: LearnerServer) -> None:
    with actor(server.port):
        token = Access(TOKEN).metadata()
        stranger = [*Handshake(NUMBER, "another session").to_metadata(), *token]
        assert calls(server, stranger)[2:] == [grpc.StatusCode.FAILED_PRECONDITION]
        assert events(server) == ["joined"]


def calls(server: LearnerServer, metadata: Sequence[tuple]) -> list[grpc.StatusCode]:
    """How the calls end with which one connects and shows life."""
    beat = iter([services_pb2.InteractionMessage()])
    with grpc.insecure_channel(f"{HOST}:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        codes = []
        for call in (
            lambda: stub.Ready(services_pb2.Empty(), metadata=metadata),
            lambda: next(stub.StreamParameters(services_pb2.Empty(), metadata=metadata)),
            lambda: stub.SendInteractions(beat, metadata=[*metadata, HEARTBEAT_METADATA]),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            codes.append(refusal.value.code())
    return codes


def test_an_actor_that_reconnects_over_a_stalled_network_can_be_stopped(
    server: LearnerServer, proxy: Proxy
) -> None:
    """Its connection is accepted, and nobody says anything: an attempt and the look for a fault take ten seconds."""
    with actor(proxy.port) as client:
        proxy.stall()
        stop = Event()
        Timer(0.3, stop.set).start()
        began = time.monotonic()
        client.reconnect(60, stop)
        assert time.monotonic() - began < CALL_SECONDS / 2


def test_the_end_does_not_wait_for_a_silent_actor(server: LearnerServer, proxy: Proxy) -> None:
    with actor(proxy.port):
        proxy.vanish()
        hello = [*Handshake(NUMBER, "another", SETTINGS).to_metadata(), *Access(TOKEN).metadata()]
        with grpc.insecure_channel(f"{HOST}:{server.port}") as channel:
            asked = services_pb2_grpc.LearnerServiceStub(channel).Ready.future(
                services_pb2.Empty(), metadata=hello
            )
            time.sleep(0.5)
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < SILENCE - 0.5
            assert asked.exception(SOON) is not None
