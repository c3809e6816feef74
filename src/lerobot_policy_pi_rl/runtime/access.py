"""Who may use the learner's port: the access token and TLS, read from files, on both sides.

Secrets live in an `Access`, which has no text form, so that no log line or error can show them.
"""

import contextlib
import hmac
import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lerobot_pi_rl_launcher import token_path

from ..algorithm.configuration_security import TOKEN_VARIABLE, SecurityConfig
from ..errors import config_error

logger = logging.getLogger(__name__)

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 4096
PROBE_SECONDS = 5.0

# The metadata that carries the token, as in HTTP.
TOKEN_KEY, TOKEN_SCHEME = "authorization", "Bearer "

REFUSED_CERTIFICATE = (
    "it does not accept this actor's certificate; set --algorithm.security.mutual=true, with a certificate signed by "
    "the learner's authority, and its key"
)
MAKE_TOKEN = "make one with: openssl rand -hex 32"


@dataclass(frozen=True, repr=False)
class Access:
    """What one side shows to the other, and what it demands.

    Attributes:
        token: The access token.
        certificate: Own certificate, PEM.
        key: Its private key, PEM.
        authority: Who must have signed the other side's certificate, PEM.
        tls: The same for Python's `ssl`, which checked it; None without TLS.
    """

    token: str | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    authority: bytes | None = None
    tls: ssl.SSLContext | None = None

    def metadata(self) -> list[tuple[str, str]]:
        """What goes with each call."""
        return [] if self.token is None else [(TOKEN_KEY, TOKEN_SCHEME + self.token)]

    def refusal(self, metadata: Iterable[Any]) -> str | None:
        """Why a call with this metadata is refused, in a few words; None if it is not."""
        if self.token is None:
            return None
        shown = [value for key, value in metadata if key == TOKEN_KEY]
        if not shown:
            return "no token"
        wanted = (TOKEN_SCHEME + self.token).encode()
        return None if hmac.compare_digest(str(shown[0]).encode(errors="replace"), wanted) else "wrong token"

    def open_port(self, server: grpc.Server, address: str) -> int:
        """Makes a server listen; returns the port's number.

        Raises:
            RuntimeError: gRPC cannot listen there.
        """
        if self.certificate is None or self.key is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.authority, require_client_auth=self.authority is not None
        )
        return int(server.add_secure_port(address, credentials))

    def open_channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """A channel to a learner."""
        if self.authority is None:
            return grpc.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)
        return grpc.secure_channel(address, credentials, options)


# Reading


def read_learner_access(config: SecurityConfig, host: str) -> Access:
    """Reads what the learner needs.

    Args:
        config: Names the files.
        host: Where it will listen.

    Raises:
        ConfigError: A file cannot be used, or the port can be reached from other machines and there is no token.
    """
    token = read_token(config)
    if token is None and not is_loopback(host):
        raise config_error(
            "policy.actor_learner_config.learner_host",
            f"{host} is open to other machines, which needs an access token: put the same one into the environment "
            f"variable {TOKEN_VARIABLE}, or into a file named by algorithm.security.token_file, for learner and actors "
            f"({MAKE_TOKEN}), or listen on 127.0.0.1",
        )
    if config.certificate is None and config.authority is None:
        return Access(token)
    if config.certificate is None:
        raise config_error("algorithm.security.certificate", "is missing; the learner's side of TLS needs it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = _read_own(config, context)
    return Access(
        token, certificate, key, _read_authority(config, context) if config.mutual else None, context
    )


def read_actor_access(config: SecurityConfig, host: str = "", port: int = 0) -> Access:
    """Reads what an actor needs.

    Args:
        config: Names the files.
        host: Where the learner listens.
        port: Its port. Without a token of the user, that of a `lerobot-pi-rl-train` of the same user there is taken.

    Raises:
        ConfigError: A file cannot be used.
    """
    token = read_token(config)
    if token is None and is_loopback(host):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            token = token_path(port).read_text(encoding="ascii")
    if config.certificate is None and config.authority is None:
        return Access(token)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    authority = _read_authority(config, context)
    certificate, key = _read_own(config, context) if config.mutual else (None, None)
    return Access(token, certificate, key, authority, context)


def read_token(config: SecurityConfig) -> str | None:
    """The access token: that of the file, else that of the environment, else None.

    Raises:
        ConfigError: It cannot be read, or is no token.
    """
    if config.token_file is not None:
        setting, source = "algorithm.security.token_file", config.token_file
        token = _read(setting, source).decode(errors="replace").strip()
        _warn_if_open(Path(source).expanduser())
    else:
        setting = source = TOKEN_VARIABLE
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    if not re.fullmatch(rf"[!-~]{{{MIN_TOKEN_CHARACTERS},{MAX_TOKEN_CHARACTERS}}}", token):
        raise config_error(
            setting,
            f"{source} holds no token: it must be one line of at least {MIN_TOKEN_CHARACTERS} printable characters "
            f"without spaces, got {len(token)} characters; {MAKE_TOKEN}",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether every address of a host is this machine's alone; false for a name that means nothing."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)
    except (OSError, UnicodeError, ValueError):
        return False


def _read_own(config: SecurityConfig, context: ssl.SSLContext) -> tuple[bytes, bytes]:
    """Own certificate and key, which must belong together."""
    assert config.certificate is not None
    assert config.key is not None
    certificate = _read_certificates("certificate", config.certificate)
    key = _read("algorithm.security.key", config.key)
    _warn_if_open(Path(config.key).expanduser())
    try:
        # With no password, OpenSSL would ask for that of an encrypted key on the terminal.
        context.load_cert_chain(Path(config.certificate).expanduser(), Path(config.key).expanduser(), "")
    except ssl.SSLError as error:
        problem = (
            f"{config.key} is not the key of {config.certificate}; name the two that were made together"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"{config.key} holds no private key that can be used; name a PEM file with one that is not encrypted"
        )
        raise config_error("algorithm.security.key", problem) from None
    return certificate, key


def _read_authority(config: SecurityConfig, context: ssl.SSLContext) -> bytes:
    if config.authority is None:
        raise config_error(
            "algorithm.security.authority", "is missing; an actor needs it to know the learner's certificate"
        )
    authority = _read_certificates("authority", config.authority)
    context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    return authority


def _read_certificates(field: str, path: str) -> bytes:
    """A PEM file with at least one certificate."""
    data = _read(f"algorithm.security.{field}", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise config_error(
            f"algorithm.security.{field}", f"{path} holds no certificate; name a PEM file with one"
        ) from None
    return data


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise config_error(
            setting, f"{path} cannot be read: {error.strerror}; name a file that is there"
        ) from None


def _warn_if_open(path: Path) -> None:
    """A secret that every user of the machine can read is none."""
    if path.stat().st_mode & 0o077:
        logger.warning("%s can be read by other users of this machine; run chmod 600 %s", path, path)


# Checking


class Gate(grpc.ServerInterceptor):
    """Refuses every call without the access token, whatever it calls, before anything of it is read."""

    def __init__(self, access: Access, refuse: Callable[..., None]) -> None:
        """Closes the gate.

        Args:
            access: What calls must show.
            refuse: Ends a call: context, status, reason, text.
        """
        self._access, self._refuse = access, refuse

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Lets a call through, or has it end at once."""
        reason = self._access.refusal(details.invocation_metadata)
        if reason is None:
            return continuation(details)

        def end(_: Any, context: grpc.ServicerContext) -> None:
            self._refuse(
                context, grpc.StatusCode.UNAUTHENTICATED, reason, "the access token is missing or wrong"
            )

        # A handler of streams does not wait for a message that might never come, whatever the call was for.
        return grpc.stream_unary_rpc_method_handler(end)


def find_tls_fault(host: str, port: int, access: Access) -> str | None:
    """Looks why gRPC, which says little, cannot reach a learner: whether it is TLS.

    Args:
        host: Where the learner listens.
        port: Its port.
        access: What the actor has.

    Returns:
        What is wrong with the fix, in one line; None if it is not TLS, or nobody answers.
    """
    context = access.tls
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            if access.tls is None:
                return "it speaks TLS; name its authority's certificate with --algorithm.security.authority"
            # The learner judges an actor's certificate only when the actor believes that all is well. If it likes it,
            # it is the first to speak; if not, it hangs up.
            return None if secure.recv(1) else REFUSED_CERTIFICATE
    except ssl.SSLCertVerificationError as error:
        return (
            f"its certificate is not accepted: {error.verify_message}; --algorithm.security.authority must name the "
            f"authority that signed it, and it must be made out to {host}"
        )
    except ssl.SSLError as error:
        # Without TLS on this side, none on the other is as it should be.
        return None if access.tls is None else _handshake_fault(error)
    except OSError:
        return None


def _handshake_fault(error: ssl.SSLError) -> str:
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if "alert" in reason:
        return REFUSED_CERTIFICATE
    return (
        f"it does not speak TLS ({reason}); give the learner --algorithm.security.certificate and key, or leave "
        "authority out here"
    )
