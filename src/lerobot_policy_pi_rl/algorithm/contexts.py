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
            storage: Where they are kept. From the CPU to a GPU they go through pinned memory, some rows at a time.
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
        kept: Context = {}
        features: list[Tensor] = []
        for rows in torch.arange(count).split(rows_at_once):
            context = self._policy.encode(self._part(rows))
            if critic_source is not None:
                features.append(base.critic_features(context, critic_source))
            keeps = keeps and count * size_of(context) / len(rows) <= budget_bytes
            if keeps:
                self._put_away(kept, context, rows, count)
            elif critic_source is None:
                return
            else:
                kept.clear()
        if features:
            self.critic_features = torch.cat(features)
        if keeps:
            self._kept = kept

    @property
    def kept(self) -> bool:
        """Whether they were kept."""
        return self._kept is not None

    def rows(self, rows: Tensor) -> Context:
        """Contexts of the given rows (on the CPU), for the policy as it is now."""
        if self._kept is None:
            return self._policy.encode(self._part(rows))
        rows = rows.to(self._storage)
        return {name: self._bring(value, rows) for name, value in self._kept.items()}

    def _part(self, rows: Tensor) -> dict[str, Any]:
        return self._observations.rows(rows, self._policy.base.take)

    def _put_away(self, kept: Context, context: Context, rows: Tensor, count: int) -> None:
        """Writes rows into the tensors that hold all of them, so that nothing is in memory twice."""
        for name, value in context.items():
            if name not in kept or any(
                new > old for new, old in zip(value.shape, kept[name].shape, strict=True)
            ):
                kept[name] = _enlarged(kept.get(name), value, count, self._storage)
            kept[name][(slice(int(rows[0]), int(rows[-1]) + 1), *map(slice, value.shape[1:]))] = value

    def _bring(self, value: Tensor, rows: Tensor) -> Tensor:
        """Rows on the policy's device."""
        if self._storage.type != "cpu" or self._device.type != "cuda":
            return value[rows].to(self._device)
        # Only from pinned memory does a copy not wait. All of it pinned would be rounded up to a power of two.
        staged = torch.empty(len(rows), *value.shape[1:], dtype=value.dtype, pin_memory=True)
        return torch.index_select(value, 0, rows, out=staged).to(self._device, non_blocking=True)


def _enlarged(before: Tensor | None, value: Tensor, count: int, storage: torch.device) -> Tensor:
    """Room for `count` rows as large as those before and the new ones.

    Shorter sequences, in whichever dimension, end in zeros, which their masks leave out.
    """
    sizes = value.shape[1:] if before is None else map(max, before.shape[1:], value.shape[1:])
    room = torch.zeros(count, *sizes, dtype=value.dtype, device=storage)
    if before is not None:
        room[tuple(map(slice, before.shape))] = before
    return room


def size_of(context: Context) -> int:
    """Bytes of a context."""
    return sum(value.numel() * value.element_size() for value in context.values())
