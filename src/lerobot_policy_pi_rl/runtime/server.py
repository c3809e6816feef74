"""The learner's gRPC server: its port, its threads, its end."""

import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import MAX_MESSAGE_SIZE

from .access import Access
from .service import PIRLLearnerService

logger = logging.getLogger(__name__)

STREAMS_PER_ACTOR = 4
CUT_SECONDS = 1.0
"""How long `stop` waits for gRPC after the service has ended."""

GRPC_OPTIONS = [
    # With port sharing, gRPC's default, a second learner on the same port would get half of the actors.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_SIZE),
    # Calls at once on one connection; an actor has five.
    ("grpc.max_concurrent_streams", 16),
    # The settings of `Ready` travel as metadata, whose default limit is 8 KiB.
    ("grpc.max_metadata_size", 2**20),
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
    """Hands bytes that are no protobuf to the service as a chunk of unknown state, which it rejects and counts.

    gRPC itself would end the whole stream, with a stack trace in the log, and its server may then never stop.
    """

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Replaces the parser of a handler that takes a stream."""
        handler = continuation(details)
        if handler is None or not handler.request_streaming:
            return handler
        return grpc.stream_unary_rpc_method_handler(
            handler.stream_unary, _parse_chunk, handler.response_serializer
        )


def _parse_chunk(data: bytes) -> Any:
    """One chunk of a stream; LeRobot's messages for transitions and interactions have the same fields."""
    try:
        return services_pb2.Transition.FromString(data)
    except DecodeError:
        return services_pb2.Transition()


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
        self._pool: ThreadPoolExecutor | None = None
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listens.

        Raises:
            PortUnavailable: Somebody else has the port, or the host is not this machine's.
        """
        self._check_port()
        workers = STREAMS_PER_ACTOR * self.service.actors.max_actors + 2
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pi-rl-service")
        interceptors = [self.service.gate(self._access), _Lenient()]
        self._server = grpc.server(self._pool, [], interceptors, GRPC_OPTIONS, workers)
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
