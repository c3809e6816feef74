"""The encoded observations of a rollout: computed once and kept, or computed again wherever they are read."""

from typing import Any

import torch
from torch import Tensor

from ..bases.adapter import Context
from ..modeling_pi_rl import PIRLPolicy
from .storage import Observations


class Contexts:
    """Encodes the observations of a rollout.

    Where nothing that encodes is trained, the contexts of a rollout stay what they are while the policy changes: they
    are computed once and serve every epoch and every denoising step, if they fit into a budget of memory. Otherwise
    they are computed again for each minibatch. The numbers are the same.

    Attributes:
        critic_features: What the critic reads, `[N, F]`; None without a critic.
    """

    def __init__(
        self,
        policy: PIRLPolicy,
        observations: Observations,
        critic_source: str | None,
        rows_at_once: int,
        budget_bytes: float,
        storage: torch.device,
    ) -> None:
        """Encodes every observation once, if a critic is to read them or they can be kept.

        Args:
            policy: The policy, in evaluation mode.
            observations: What was seen, N rows.
            critic_source: What the critic reads, one of the base's `critic_dims`; None without a critic.
            rows_at_once: How many are encoded at a time.
            budget_bytes: Largest size of the contexts that are kept.
            storage: Where they are kept; on the CPU in pinned memory if the policy is on a GPU.
        """
        self._policy = policy
        self._observations = observations
        self._storage = storage
        self._device = next(policy.parameters()).device
        self.critic_features: Tensor | None = None
        self._kept: Context | None = None
        if critic_source is not None or policy.base.context_is_fixed:
            self._encode_all(critic_source, rows_at_once, budget_bytes)

    @torch.no_grad()
    def _encode_all(self, critic_source: str | None, rows_at_once: int, budget_bytes: float) -> None:
        base = self._policy.base
        count = len(self._observations)
        keeps = base.context_is_fixed
        pieces: list[Context] = []
        features: list[Tensor] = []
        for rows in torch.arange(count).split(rows_at_once):
            context = self._policy.encode(self._part(rows))
            if critic_source is not None:
                features.append(base.critic_features(context, critic_source))
            keeps = keeps and count * size_of(context) / len(rows) <= budget_bytes
            if keeps:
                pieces.append(self._put_away(context))
            elif critic_source is None:
                return
        if features:
            self.critic_features = torch.cat(features)
        if keeps:
            self._kept = {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}

    @property
    def kept(self) -> bool:
        """Whether they were kept."""
        return self._kept is not None

    def rows(self, rows: Tensor) -> Context:
        """Contexts of the given rows (on the CPU), for the policy as it is now."""
        if self._kept is None:
            return self._policy.encode(self._part(rows))
        rows = rows.to(self._storage)
        return {name: value[rows].to(self._device, non_blocking=True) for name, value in self._kept.items()}

    def _part(self, rows: Tensor) -> dict[str, Any]:
        return self._observations.rows(rows, self._policy.base.take)

    def _put_away(self, context: Context) -> Context:
        away = {name: value.to(self._storage) for name, value in context.items()}
        pins = self._storage.type == "cpu" and self._device.type == "cuda"
        return {name: value.pin_memory() for name, value in away.items()} if pins else away


def _joined(pieces: list[Tensor]) -> Tensor:
    """Joins rows; shorter sequences, in whichever dimension, end in zeros, which their masks leave out."""
    shapes = [piece.shape[1:] for piece in pieces]
    if len(set(shapes)) == 1:
        return torch.cat(pieces)
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = pieces[0].new_zeros(sum(map(len, pieces)), *longest)
    for part, piece in zip(joined.split([len(piece) for piece in pieces]), pieces, strict=True):
        part[(slice(None), *(slice(size) for size in piece.shape[1:]))] = piece
    return joined


def size_of(context: Context) -> int:
    """Bytes of a context."""
    return sum(value.numel() * value.element_size() for value in context.values())
