"""Configuration of who may use the learner's port, and how much of it."""

from dataclasses import dataclass

from ..errors import check

TOKEN_VARIABLE = "LEROBOT_PI_RL_TOKEN"
"""Environment variable with the access token, where no file is named."""


@dataclass
class SecurityConfig:
    """Access token, TLS and limits of the learner's port. It names files and never holds a secret itself."""

    # File with the access token, a text of at least 16 characters, the same for learner and actors. Null: the token is
    # in the environment variable LEROBOT_PI_RL_TOKEN, or there is none, which is enough on loopback only.
    token_file: str | None = None
    # PEM file with this side's own certificate, and those between it and the authority's. The learner then speaks TLS;
    # an actor reads it only where `mutual` is set.
    certificate: str | None = None
    # PEM file with the private key of `certificate`, not encrypted.
    key: str | None = None
    # PEM file with the certificates of the authorities that must have signed the other side's. An actor then speaks
    # TLS; the learner reads it only where `mutual` is set.
    authority: str | None = None
    # The learner takes only actors with a certificate.
    mutual: bool = False
    # Messages per second that the learner takes from an actor on each stream; a faster one is slowed down.
    max_messages_per_s: float = 200.0

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        name = "algorithm.security"
        check(
            (self.certificate is None) == (self.key is None),
            f"{name}.{'key' if self.key is None else 'certificate'}",
            "is missing; a certificate and its private key go together",
        )
        check(
            not self.mutual or None not in (self.certificate, self.authority),
            f"{name}.mutual",
            "needs certificate, key and authority on both sides",
        )
        check(
            self.max_messages_per_s > 0,
            f"{name}.max_messages_per_s",
            f"must be above 0, got {self.max_messages_per_s}",
        )
