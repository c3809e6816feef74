"""How an actor introduces itself to the learner, and what the metadata of a call between them means."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .packing import WireError, read_json, short

PROTOCOL = 4
"""Version of the messages (`wire`) and of the calls that carry them; actor and learner must agree."""

MAX_SESSION_CHARACTERS = 64
MAX_SETTINGS_BYTES = 64 * 2**10
MAX_DIFFERENCE_LINES = 20

OWN_METADATA = (("pi-rl-protocol", str(PROTOCOL)),)
"""What an actor knows a learner of this package by."""

NEXT_VERSION = "pi-rl-next"
"""With it the learner tells, when a stream of weights opens, the version whose iteration takes the first quota that
comes on this connection. Weights alone do not say it: they are the same while it waits for decisions and while it
trains."""

STATUS_METADATA = ("pi-rl-status", "1")
"""With it a call of `StreamParameters` asks for the learner's status instead of weights."""

HEARTBEAT_METADATA = ("pi-rl-heartbeat", "1")
"""With it a call of `SendInteractions` carries signs of life, empty chunks, instead of statistics."""
WEIGHTS_AGAIN = b"weights again"
"""A sign of life with these bytes asks for the newest weights once more: they did not arrive whole."""
HEARTBEAT_SECONDS = 1.0
"""How often an actor sends one, whatever it is at: it may collect for minutes and have nothing else to say."""


@dataclass(frozen=True)
class Handshake:
    """Who is calling; travels as metadata of each call.

    Attributes:
        actor: Number of the actor, unique among those that are connected.
        session: A random text per actor process: it tells an actor that comes back from a second one with the
            same number.
        settings: What both sides must agree on, by dotted name; sent with `Ready` only.
    """

    actor: int
    session: str
    settings: dict[str, Any] | None = None

    def to_metadata(self) -> list[Any]:
        """The pairs for gRPC's `metadata` argument.

        Raises:
            WireError: The settings are too long.
        """
        pairs: list[Any] = [
            ("pi-rl-protocol", str(PROTOCOL)),
            ("pi-rl-actor", str(self.actor)),
            ("pi-rl-session", self.session),
        ]
        if self.settings is not None:
            pairs.append(("pi-rl-settings-bin", encode_settings(self.settings)))
        return pairs

    @classmethod
    def from_metadata(cls, metadata: Iterable[Any]) -> "Handshake":
        """Reads the metadata of a call.

        Raises:
            WireError: It is not from an actor of this package and protocol version.
        """
        values = {pair[0]: pair[1] for pair in metadata}
        protocol = values.get("pi-rl-protocol")
        if protocol is None:
            raise WireError("the caller is not a PI-RL actor; start one with lerobot-pi-rl-actor")
        if protocol != str(PROTOCOL):
            raise WireError(
                f"protocol: learner {PROTOCOL}, actor {short(protocol)} (install the same version on both)"
            )
        actor, session = str(values.get("pi-rl-actor")), str(values.get("pi-rl-session"))
        if not (actor.isascii() and actor.isdecimal() and len(actor) <= 9):
            raise WireError(f"actor number {short(actor)} is not a number from 0 to 999999999")
        if not (session.isascii() and session.isprintable() and len(session) <= MAX_SESSION_CHARACTERS):
            raise WireError(f"the session must be at most {MAX_SESSION_CHARACTERS} printable characters")
        settings = values.get("pi-rl-settings-bin")
        return cls(int(actor), session, None if settings is None else _checked_settings(settings))


def encode_settings(settings: Mapping[str, Any]) -> bytes:
    """Settings as they travel.

    Raises:
        WireError: They are too long.
    """
    data = json.dumps(flat_settings(settings), sort_keys=True, separators=(",", ":")).encode()
    _check_length(data)
    return data


def _check_length(data: bytes) -> None:
    if len(data) > MAX_SETTINGS_BYTES:
        raise WireError(
            f"the settings that actor and learner compare are {len(data)} bytes, at most {MAX_SETTINGS_BYTES} are taken"
        )


def _checked_settings(data: bytes) -> dict[str, Any]:
    """Settings from the bytes of a handshake."""
    _check_length(data)
    settings = read_json(data, "the settings")
    if not isinstance(settings, dict):
        raise WireError("the settings must be a JSON object")
    return settings


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name, in the form that JSON gives back (a tuple is a list)."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": leaf for inner, leaf in flat_settings(value).items()})
        else:
            flat[str(name)] = json.loads(json.dumps(value, default=str))
    return flat


_ABSENT = "has no such setting"


def settings_differences(learner: Mapping[str, Any], actor: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs, such as `policy.num_inference_steps: learner 4, actor 5`."""
    ours, theirs = flat_settings(learner), flat_settings(actor)
    lines = [
        f"{short(name)}: learner {short(our)}, actor {short(their)}"
        for name in sorted(ours.keys() | theirs.keys())
        if (our := ours.get(name, _ABSENT)) != (their := theirs.get(name, _ABSENT))
    ]
    rest = len(lines) - MAX_DIFFERENCE_LINES
    return lines if rest <= 0 else [*lines[:MAX_DIFFERENCE_LINES], f"... and {rest} more"]
