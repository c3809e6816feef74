"""The learner's gRPC server: its port, its threads, its end."""

import contextlib
import logging
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import MAX_MESSAGE_SIZE

from .access import Access
from .handshake import MAX_SETTINGS_BYTES
from .service import PIRLLearnerService

logger = logging.getLogger(__name__)

STREAMS_PER_ACTOR = 4
CALLS_PER_ACTOR = STREAMS_PER_ACTOR + 1
"""An actor's streams, and one caller that asks for its number and waits whether it is still there."""
CUT_SECONDS = 1.0
"""How long `stop` waits for gRPC after the service has ended, and then for the threads of its calls."""

SPARE_CONNECTIONS = 64
"""Connections beyond those of actors: they may come back before the old one is gone, or ask for the status."""
CONNECTIONS_PER_ACTOR = 2
MAX_CHUNK_FIELDS_BYTES = 32
"""Most bytes of a chunk beside its data: two tags, a state and a length."""
MAX_METADATA_BYTES = MAX_SETTINGS_BYTES + 16 * 2**10
"""Settings, and the rest of a call's metadata."""

GRPC_OPTIONS = [
    # With port sharing, gRPC's default, a second learner on the same port would get half of the actors.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_SIZE),
    # Calls at once on one connection; an actor has five.
    ("grpc.max_concurrent_streams", 16),
    # The settings of `Ready` travel as metadata, whose default limit is 8 KiB.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Compressed messages are refused: before 1.74 gRPC inflates one to any size. Bit 0 is no compression.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A connection that does not begin to speak HTTP/2, or has no call, is closed: an actor always has calls.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30_000),
    # Notices an actor whose machine or network went away without closing the connection.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC would stop asking after two questions, which is before a long update has ended.
    ("grpc.http2.max_pings_without_data", 0),
    # For its other pings, behind which the one that asks has to wait; a minute by default.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


class PortUnavailable(OSError):
    """The learner cannot listen where it should; the text is one line."""


class _Lenient(grpc.ServerInterceptor):
    """Reads requests in a way that cannot fail.

    gRPC itself would end the whole call, with a stack trace in the log, and its server may then never stop. Bytes of a
    stream that are no chunk reach the service as one of unknown state, which it rejects and counts. The other calls
    have empty requests, whose bytes are not looked at.
    """

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Replaces the parser of a handler."""
        handler = continuation(details)
        if handler is None:
            return handler
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                handler.stream_unary, _parse_chunk, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                handler.unary_stream, _parse_empty, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            handler.unary_unary, _parse_empty, handler.response_serializer
        )


def _parse_chunk(data: bytes) -> Any:
    """One chunk of a stream; LeRobot's messages for transitions and interactions have the same fields.

    One with fields that it does not have, or that has its data twice, holds more memory than its data: it is none.
    """
    with contextlib.suppress(DecodeError):
        chunk = services_pb2.Transition.FromString(data)
        if len(data) <= len(chunk.data) + MAX_CHUNK_FIELDS_BYTES:
            return chunk
    return services_pb2.Transition()


def _parse_empty(_: bytes) -> Any:
    return services_pb2.Empty()


class _Threads(Executor):
    """A fixed number of threads, all made at once: where no more can be made, the learner does not start.

    `ThreadPoolExecutor` makes them when they are needed. Where it cannot, gRPC's own thread dies of it, and with it
    every call. These are daemons, so that a call that cannot be ended does not keep the process.
    """

    def __init__(self, count: int) -> None:
        """Starts them.

        Raises:
            RuntimeError: So many cannot be made.
        """
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(target=self._work, name=f"pi-rl-service_{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:
            self.shutdown()
            raise

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Has a thread call a function."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads; waits at most `CUT_SECONDS` for those that are at work."""
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + (CUT_SECONDS if wait else 0.0)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if left := sum(thread.is_alive() for thread in self._threads):
            logger.warning("%d calls did not end within %.0f s", left, CUT_SECONDS)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def raise_descriptor_limit() -> int:
    """Raises the limit of open files to what this process may have; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


class LearnerServer:
    """Owns the gRPC server around a service: its port, its threads, its end."""

    def __init__(
        self,
        service: PIRLLearnerService,
        host: str = "127.0.0.1",
        port: int = 50051,
        access: Access | None = None,
    ) -> None:
        """Prepares the server; `start` opens the port.

        Args:
            service: What it serves.
            host: Address to listen on; loopback means this machine only.
            port: Port, 0 for any free one.
            access: Token and TLS; None has neither.
        """
        self._access = access or Access()
        self.service = service
        self.host = host
        self.port = port
        self._pool: _Threads | None = None
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listens.

        Raises:
            PortUnavailable: Somebody else has the port, or the host is not this machine's.
        """
        self._check_port()
        workers = CALLS_PER_ACTOR * self.service.actors.max_actors + 2
        try:
            self._pool = _Threads(workers)
        except RuntimeError as error:
            raise PortUnavailable(
                f"cannot make the {workers} threads for the calls of actors: {error}; lower "
                "algorithm.collection.max_actors, or raise this machine's limit of processes (ulimit -u, or the "
                "container's limit of pids)"
            ) from error
        interceptors = [self.service.gate(self._access), _Lenient()]
        options = [*GRPC_OPTIONS, ("grpc.max_allowed_incoming_connections", self._most_connections())]
        self._server = grpc.server(self._pool, [], interceptors, options, workers)
        services_pb2_grpc.add_LearnerServiceServicer_to_server(self.service, self._server)
        try:
            self.port = self._access.open_port(self._server, _address(self.host, self.port))
        except RuntimeError as error:
            self._pool.shutdown()
            raise PortUnavailable(self._port_text("gRPC could not bind it")) from error
        self._server.start()

    def stop(self) -> None:
        """Delivers the newest weights, ends every stream and every thread; returns within a few seconds."""
        self.service.end()
        if self._server is not None and self._pool is not None:
            if not self._server.stop(grace=0).wait(CUT_SECONDS):
                logger.warning("gRPC did not end all its calls within %.0f s", CUT_SECONDS)
            self._pool.shutdown(wait=True)
        self._server = self._pool = None

    def __enter__(self) -> "LearnerServer":
        """Starts."""
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stops."""
        self.stop()

    def _most_connections(self) -> int:
        """Enough for all actors, and so few that the learner can still open its files."""
        wanted = SPARE_CONNECTIONS + CONNECTIONS_PER_ACTOR * self.service.actors.max_actors
        return min(wanted, max(1, raise_descriptor_limit() // 2))

    def _check_port(self) -> None:
        """Tries the port with a plain socket, which says why it fails; gRPC only says that it does."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            raise PortUnavailable(self._port_text(error.strerror or str(error))) from error

    def _port_text(self, cause: str) -> str:
        return (
            f"cannot listen on {_address(self.host, self.port)}: {cause}; stop what is running there, "
            "or choose another port with --policy.actor_learner_config.learner_port"
        )


def _address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
