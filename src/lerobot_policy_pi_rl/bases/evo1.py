"""EVO1: an InternVL3 prompt of images and instruction, read by an action head with cross-attention."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter import Context
from .stock import StockBase, pooled

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig


class Evo1Base(StockBase):
    """Adapter of EVO1.

    Its flow starts from noise that is uniform in `[-1, 1]`, so the score that Flow-SDE takes for granted is not that
    of its marginals: it explores by Flow-Noise. Its time runs from 0 (noise) to 1 and is looked up in a table of 1000,
    and it predicts `action - noise`. It zeroes padded dimensions wherever they are read or written. The policy itself
    tokenises its prompts, so a batch needs its `task`.
    """

    expert_modules = ("action_head",)
    vlm_lora = r".*\.language_model\.layers\..*\.self_attn\.[qkvo]_proj"
    # Not its attention: adapters beside torch's own would be passed over.
    expert_lora = r"model\.action_head\.(seq_pool_proj|.*\.ff\.[02]|.*\.(fc1|fc2|W1|W2|W3)\.linear)"
    blocks = r".*\.layers?\.\d+|model\.action_head\.transformer_blocks\.\d+"
    real: Tensor
    times: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the policy, and the times of its own sampler.

        Args:
            config: The policy's configuration, whose `base` is that of an EVO1.
        """
        stock: Any = config.base
        if config.trainable != "expert":
            # Its own loss lets gradients into the VLM in its second stage only.
            stock.training_stage = "stage2"
            stock.finetune_vlm = stock.finetune_language_model = stock.finetune_vision_model = True
        super().__init__(config)
        real = torch.arange(self.action_dim, device=config.device) < self.real_action_dim
        self.register_buffer("real", real.float(), persistent=False)
        times = [int(k / self.num_steps * 999) for k in range(self.num_steps)]
        self.register_buffer("times", torch.tensor(times, device=config.device), persistent=False)

    @property
    def _encoder_dim(self) -> int:
        return self._model.config.embed_dim

    @property
    def _feature_dim(self) -> int:
        return self._model.config.embed_dim

    @property
    def _head(self) -> Any:
        return self._model.action_head.mlp_head.fc2

    def initial_noise(
        self, rows: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform in `[-1, 1]`, zero in padded dimensions."""
        shape = (rows, self.chunk_size, self.action_dim)
        return (torch.rand(shape, device=device, generator=generator) * 2 - 1) * self.real

    def actions(self, x: Tensor) -> Tensor:
        """With padded dimensions, at zero: the policy's postprocessor cuts them off."""
        return x * self.real

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images and instruction once; the state goes along, because the action head embeds it."""
        policy: Any = self.policy
        images, views = policy._collect_image_batches(batch)
        prompts = policy._normalize_task_batch(batch)
        state, _ = policy._prepare_state(batch)
        with policy._maybe_autocast():
            tokens, real = self._model.get_vl_embeddings(images, views, prompts)
        tokens = tokens.to(policy._compute_dtype)
        context = {
            "tokens": tokens,
            "state": state,
            "embodiment": policy._get_embodiment_ids(batch, len(state)),
        }
        if real is None:
            return context | {"pooled": tokens}
        return context | {"real": real, "pooled": pooled(tokens, real)}

    def forward(self, context: Context, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and features of `velocity`, by the modules of the stock policy's own step."""
        policy: Any = self.policy
        head = self._model.action_head
        with policy._maybe_autocast():
            tokens, ignored, embodiment = head._prepare_context(
                context["tokens"], context["state"], context["embodiment"], context.get("real")
            )
            time = head.time_pos_enc(1000)[0, self.times[self._step(t)]].to(head.dtype)
            hidden = head._project_actions(x_t * self.real, embodiment).to(head.dtype)
            for block in head.transformer_blocks:
                hidden = block(hidden, tokens.to(head.dtype), time, ignored)
            hidden = head.norm_out(hidden)
            summary = head.seq_pool_proj(hidden.flatten(1)) if self.chunk_size > 1 else hidden[:, 0]
            ahead = head.mlp_head(summary, embodiment).view_as(x_t) * self.real
        return -ahead, hidden.float()
