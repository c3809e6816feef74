"""A copy of all that an update changes, to go back to where the update does not end."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.random_utils import get_rng_state, set_rng_state
from torch import Tensor

from ..algorithm.pi_rl import PIRLAlgorithm
from .finite import first_not_finite

# Largest part of the free memory that a copy may take, unless it is small (bytes).
MEMORY_SHARE, SMALL = 0.5, 10**8
# Where Linux tells how much memory is free, and the limit and the use of a container.
MEMORY_INFO, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class NotFinite(ValueError):
    """A weight is no finite number; the text is one line."""


class Snapshot:
    """Weights, critic, optimizers and random state between two iterations, in main memory."""

    def __init__(self, algorithm: PIRLAlgorithm) -> None:
        """Copies them."""
        self._algorithm = algorithm
        self._weights = {name: _copied(value) for name, value in _trained(algorithm).items()}
        self._optimizers = {
            name: _copied(optimizer.state_dict()) for name, optimizer in algorithm.get_optimizers().items()
        }
        self._random_state = get_rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts them back, to the bit."""
        for name, value in _trained(self._algorithm).items():
            value.copy_(self._weights[name])
        for name, optimizer in self._algorithm.get_optimizers().items():
            optimizer.zero_grad()
            optimizer.load_state_dict(self._optimizers[name])
        set_rng_state(self._random_state)


def take_snapshot(algorithm: PIRLAlgorithm) -> Snapshot | None:
    """A snapshot, or None where it would take up too much of the memory that is free."""
    optimizers = {name: optimizer.state_dict() for name, optimizer in algorithm.get_optimizers().items()}
    size = _size(_trained(algorithm)) + _size(optimizers)
    return Snapshot(algorithm) if size <= max(SMALL, MEMORY_SHARE * free_memory()) else None


def free_memory() -> float:
    """Bytes of main memory that this process may still take; infinite where the system does not tell."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = _numbers(MEMORY_INFO)["MemAvailable:"] * 1024.0
        # "max" where there is no limit, which is no number.
        limit, used = (
            int((CONTAINER / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current")
        )
        # Cached files make way.
        free = min(free, limit - used + _numbers(CONTAINER / "memory.stat")["file"])
    return free


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def check_trained(algorithm: PIRLAlgorithm, what: str, fix: str) -> None:
    """Checks that what is trained is finite.

    Args:
        algorithm: Its policy and its critic are looked at.
        what: The beginning of the error: what has done it.
        fix: What to do about it.

    Raises:
        NotFinite: A number is not.
    """
    if (name := first_not_finite(_trained(algorithm).items())) is not None:
        raise NotFinite(f"{what} {name} not finite; {fix}")


def _trained(algorithm: PIRLAlgorithm) -> dict[str, Tensor]:
    """What an update changes, but for the optimizers' own state."""
    policy = {f"policy.{name}": p for name, p in algorithm.policy.named_parameters() if p.requires_grad}
    # Its running statistics, too.
    critic = {} if algorithm.critic is None else algorithm.critic.state_dict(prefix="critic.")
    return {**policy, **critic}


def _copied(value: Any) -> Any:
    """A copy whose tensors lie in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _size(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value.values())) if isinstance(value, Mapping) else 0
