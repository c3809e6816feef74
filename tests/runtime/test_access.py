"""Token and certificates: how they are read, and who gets in with them, over real gRPC on loopback."""

import logging
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc

import lerobot_pi_rl_launcher as launcher
from lerobot_policy_pi_rl.algorithm.configuration_security import TOKEN_VARIABLE, SecurityConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.access import (
    Access,
    is_loopback,
    read_actor_access,
    read_learner_access,
    read_token,
)
from lerobot_policy_pi_rl.runtime.client import LearnerClient
from lerobot_policy_pi_rl.runtime.handshake import Handshake
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.link import ActorRefused
from lerobot_policy_pi_rl.runtime.server import LearnerServer
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService

TOKEN, OTHER = "a token of many characters".replace(" ", "-"), "another-token-of-many"
HOST = "127.0.0.1"
SOON = 10.0

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@contextmanager
def serving(access: Access) -> Iterator[LearnerServer]:
    limits = Limits(2**20, 4, 2**20, 1000.0, 20)
    with LearnerServer(PIRLLearnerService({}, 2, limits), port=0, access=access) as server:
        yield server


def connect(server: LearnerServer, access: Access | None) -> None:
    """Connects and leaves."""
    client = LearnerClient(HOST, server.port, 0, {}, access=access)
    try:
        client.connect(SOON)
    finally:
        client.close()


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Reading the token


def token_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_the_token_is_in_a_file_or_in_the_environment_and_the_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_token(SecurityConfig()) is None
    monkeypatch.setenv(TOKEN_VARIABLE, OTHER)
    assert read_token(SecurityConfig()) == OTHER
    assert read_token(SecurityConfig(token_file=token_file(tmp_path, f"{TOKEN}\n"))) == TOKEN


def test_a_file_in_the_home_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token_file(tmp_path, TOKEN)
    assert read_token(SecurityConfig(token_file="~/token")) == TOKEN


@pytest.mark.parametrize(
    "text", ["", "too-short", "two words are no token", "a-token-\x00-of-many-characters"]
)
def test_what_is_no_token_is_one_line_that_does_not_show_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32") as error:
        read_token(SecurityConfig(token_file=token_file(tmp_path, text)))
    assert not text or text not in one_line(error)


def test_a_token_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "too-short")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as error:
        read_token(SecurityConfig())
    assert "too-short" not in one_line(error)


def test_a_token_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_file.*nowhere cannot be read: No such file") as error:
        read_token(SecurityConfig(token_file=str(tmp_path / "nowhere")))
    one_line(error)


def test_a_token_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_token(SecurityConfig(token_file=token_file(tmp_path, TOKEN)))
    assert caplog.text == ""
    read_token(SecurityConfig(token_file=token_file(tmp_path, TOKEN, 0o644)))
    assert "can be read by other users of this machine; run chmod 600" in caplog.text


def test_secrets_have_no_text_form() -> None:
    access = Access(TOKEN, key=b"private")
    assert TOKEN not in f"{access} {access!r}"
    assert "private" not in f"{access} {access!r}"


# Where a token is needed


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("", False),
        ("192.0.2.10", False),
        ("[::]", False),
        ("unix:/tmp/x", False),
        ("no.such.host.invalid", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_learner_open_to_others_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_learner_access(SecurityConfig(), HOST).token is None
    with pytest.raises(ConfigError, match=r"learner_host.*0\.0\.0\.0 is open to other machines") as error:
        read_learner_access(SecurityConfig(), "0.0.0.0")
    for fix in (TOKEN_VARIABLE, "algorithm.security.token_file", "openssl rand", "or listen on 127.0.0.1"):
        assert fix in one_line(error)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_learner_access(SecurityConfig(), "0.0.0.0").token == TOKEN


def test_tls_does_not_replace_the_token(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="access token"):
        read_learner_access(own(certificates, "learner", mutual=True), "0.0.0.0")


# The gate


def test_the_right_token_gets_in() -> None:
    with serving(Access(TOKEN)) as server:
        connect(server, Access(TOKEN))
        assert server.service.traffic().rejected == {}


@pytest.mark.parametrize(
    ("access", "reason", "text"),
    [
        (None, "no token", "wants an access token, and this actor has none"),
        (Access(OTHER), "wrong token", "has another access token"),
        (Access(TOKEN[:-1]), "wrong token", "has another access token"),
    ],
)
def test_any_other_is_refused_at_once_in_one_line(access: Access | None, reason: str, text: str) -> None:
    with serving(Access(TOKEN)) as server:
        began = time.monotonic()
        with pytest.raises(ActorRefused, match=text) as error:
            connect(server, access)
        assert time.monotonic() - began < SOON / 2
        assert TOKEN_VARIABLE in one_line(error)
        assert "algorithm.security.token_file" in one_line(error)
        assert server.service.traffic().rejected == {reason: 1}


def test_every_call_is_checked_and_none_waits_for_a_message(caplog: pytest.LogCaptureFixture) -> None:
    """A good handshake does not help, and a call that never sends anything does not keep a thread."""
    hello = Handshake(0, "session", {}).to_metadata()
    with serving(Access(TOKEN)) as server, grpc.insecure_channel(f"{HOST}:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        calls: list[Callable[[], object]] = [
            lambda: stub.Ready(services_pb2.Empty(), metadata=hello),
            lambda: next(stub.StreamParameters(services_pb2.Empty(), metadata=hello)),
            lambda: stub.SendTransitions(iter([]), metadata=hello),
            lambda: stub.SendInteractions(iter([]), metadata=[*hello, ("authorization", OTHER)]),
            lambda: stub.Ready(services_pb2.Empty(), metadata=[("authorization", f"Bearer {OTHER}")]),
            lambda: channel.unary_unary("/transport.LearnerService/NoSuchCall")(b"", metadata=hello),
        ]
        # A stream from which nothing ever comes, for a call that expects one message.
        silent = channel.stream_unary("/transport.LearnerService/Ready").future(_never(), metadata=hello)
        assert silent.exception(SOON).code() == grpc.StatusCode.UNAUTHENTICATED
        for call in calls:
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert sum(server.service.traffic().rejected.values()) == 7
        assert server.service.actors.connected() == []
    assert TOKEN not in caplog.text
    assert OTHER not in caplog.text


def _never() -> Iterator[bytes]:
    time.sleep(1.0)
    yield b""


def test_refused_calls_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with serving(Access(TOKEN)) as server, grpc.insecure_channel(f"{HOST}:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        for _ in range(300):
            with pytest.raises(grpc.RpcError):
                stub.Ready(services_pb2.Empty())
        assert server.service.traffic().rejected == {"no token": 300}
    assert 50 <= caplog.text.count("Refused") < 150


def test_other_commands_of_the_same_user_find_the_token_of_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with launcher.own_token([f"--{launcher.PORT}=50123"]):
        token = os.environ.pop(TOKEN_VARIABLE)
        assert read_actor_access(SecurityConfig(), HOST, 50123).token == token
        for host, port in [("192.0.2.10", 50123), (HOST, 50124)]:
            assert read_actor_access(SecurityConfig(), host, port).token is None
        monkeypatch.setenv(TOKEN_VARIABLE, OTHER)
        assert read_actor_access(SecurityConfig(), HOST, 50123).token == OTHER


# Reading certificates


def own(folder: Path, name: str, *, authority: bool = True, mutual: bool = False) -> SecurityConfig:
    """The files of one side."""
    return SecurityConfig(
        certificate=str(folder / f"{name}.pem"),
        key=str(folder / f"{name}.key"),
        authority=str(folder / "authority.pem") if authority else None,
        mutual=mutual,
    )


def changed(config: SecurityConfig, **values: object) -> SecurityConfig:
    return SecurityConfig(**{**vars(config), **values})


@pytest.mark.parametrize("field", ["certificate", "key", "authority"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory; name a file that is there"),
        (b"", "name a PEM file"),
        (b"\xff\x00 no PEM", "name a PEM file"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "name a PEM file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    certificates: Path, tmp_path: Path, field: str, content: bytes | None, text: str
) -> None:
    path = tmp_path / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    config = changed(own(certificates, "learner", mutual=True), **{field: str(path)})
    readers: list[Callable[[], Access]] = [
        lambda: read_learner_access(config, HOST),
        lambda: read_actor_access(config),
    ]
    for read in readers:
        with pytest.raises(ConfigError, match=rf"algorithm\.security\.{field}") as error:
            read()
        assert str(path) in one_line(error)
        assert text in one_line(error)


def test_the_key_of_another_certificate_is_one_line(certificates: Path) -> None:
    config = changed(own(certificates, "learner"), key=str(certificates / "actor.key"))
    with pytest.raises(ConfigError, match=r"actor\.key is not the key of .*learner\.pem") as error:
        read_learner_access(config, HOST)
    one_line(error)


def test_an_encrypted_key_is_one_line_and_asks_nobody(certificates: Path, tmp_path: Path) -> None:
    key = tmp_path / "encrypted.key"
    command = ["openssl", "pkey", "-in", certificates / "learner.key", "-aes256", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", key], check=True, capture_output=True, timeout=60)
    with pytest.raises(ConfigError, match="one that is not encrypted"):
        read_learner_access(changed(own(certificates, "learner"), key=str(key)), HOST)


def test_what_a_side_does_not_need_is_not_read(certificates: Path) -> None:
    """One configuration serves both sides, though neither has the other's files."""
    alone = changed(own(certificates, "learner"), authority="/nowhere/authority.pem")
    assert read_learner_access(alone, HOST).authority is None
    actor = SecurityConfig("/nowhere/token", "/nowhere/a.pem", "/nowhere/a.key")
    actor = changed(actor, token_file=None, authority=str(certificates / "authority.pem"))
    assert read_actor_access(actor).certificate is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"certificate": "a.pem"}, r"security\.key.*is missing"),
        ({"key": "a.key"}, r"security\.certificate.*is missing"),
        ({"mutual": True}, r"security\.mutual.*needs certificate, key and authority"),
        ({"mutual": True, "certificate": "a", "key": "b"}, r"security\.mutual"),
        ({"max_messages_per_s": 0}, "must be above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SecurityConfig(**values)


def test_each_side_says_what_it_lacks(certificates: Path) -> None:
    with pytest.raises(ConfigError, match=r"security\.certificate.*is missing"):
        read_learner_access(SecurityConfig(authority=str(certificates / "authority.pem")), HOST)
    with pytest.raises(ConfigError, match=r"security\.authority.*is missing"):
        read_actor_access(own(certificates, "actor", authority=False))


# TLS


def test_tls_and_mutual_tls_connect(certificates: Path) -> None:
    for mutual in (False, True):
        learner = read_learner_access(own(certificates, "learner", mutual=mutual), HOST)
        actor = read_actor_access(own(certificates, "actor", mutual=mutual))
        with serving(learner) as server:
            connect(server, actor)
            context = ssl.create_default_context(cafile=certificates / "authority.pem")
            assert (
                ssl.get_server_certificate((HOST, server.port)) in (certificates / "learner.pem").read_text()
            )
            assert context.verify_mode == ssl.CERT_REQUIRED


def test_over_tls_a_token_is_still_needed(certificates: Path) -> None:
    learner = read_learner_access(own(certificates, "learner"), HOST)
    with (
        serving(Access(TOKEN, learner.certificate, learner.key)) as server,
        pytest.raises(ActorRefused) as error,
    ):
        connect(server, read_actor_access(own(certificates, "actor")))
    assert "wants an access token" in str(error.value)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("plain actor", "it speaks TLS; name its authority's certificate"),
        ("plain learner", "it does not speak TLS"),
        ("strange learner", "its certificate is not accepted"),
        ("actor without certificate", "it does not accept this actor's certificate"),
        ("strange actor", "it does not accept this actor's certificate"),
    ],
)
def test_a_mistake_with_tls_is_named_at_once(
    certificates: Path, strange_certificates: Path, tmp_path: Path, case: str, text: str
) -> None:
    mixed = changed(
        own(strange_certificates, "actor", mutual=True), authority=str(certificates / "authority.pem")
    )
    plain, own_actor = SecurityConfig(), own(certificates, "actor")
    learner, actor = {
        "plain actor": (own(certificates, "learner"), plain),
        "plain learner": (plain, own_actor),
        "strange learner": (own(strange_certificates, "learner"), own_actor),
        "actor without certificate": (own(certificates, "learner", mutual=True), own_actor),
        "strange actor": (own(certificates, "learner", mutual=True), mixed),
    }[case]
    with serving(read_learner_access(learner, HOST)) as server:
        began = time.monotonic()
        with pytest.raises(ActorRefused, match=text) as error:
            connect(server, read_actor_access(actor))
        assert time.monotonic() - began < SOON
        assert "--algorithm.security." in one_line(error)
        assert server.service.actors.connected() == []


def test_a_certificate_made_out_to_another_address_is_named(certificates: Path) -> None:
    with serving(read_learner_access(own(certificates, "learner"), HOST)) as server:
        client = LearnerClient(
            "localhost", server.port, 0, {}, access=read_actor_access(own(certificates, "actor"))
        )
        with pytest.raises(ActorRefused, match="it must be made out to localhost"):
            client.connect(SOON)
        client.close()
