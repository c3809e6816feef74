"""MolmoAct2: a Molmo prompt with a key/value cache, each layer of which a layer of the action expert reads."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import config_error
from .adapter import Context, take
from .stock import StockBase, pack_cache, pooled

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

    from ..configuration_pi_rl import PIRLConfig

# Tensors of a preprocessed batch that have no row for each observation but one for each crop, each token of a picture,
# or each picture of all observations, one after the other.
CROPS, POOLING, GRIDS, COUNTS = "pixel_values", "image_token_pooling", "image_grids", "image_num_crops"


class MolmoAct2Base(StockBase):
    """Adapter of MolmoAct2's continuous actions.

    Time runs from 0 (noise) to 1, and the policy predicts `action - noise`. Its state has 32 dimensions; what of them
    is padding it zeroes wherever they are read or written. The robot's state is a part of its prompt.

    In evaluation mode the stock sampler takes what modulates its layers from a cache whose key knows nothing of the
    weights, so that after an update it would go on with the old ones. Here it is computed for every velocity, and
    nothing is kept. The stock sampler also counts the positions of a prompt from its padding on, and the expert reads
    keys that were turned by their positions: what it makes of an observation depends on the prompts that it is batched
    with. A density must not: here positions are counted from the first real token, as they are for a prompt alone.
    """

    expert_modules = ("model.action_expert",)
    vlm_lora = r"model\.model\.transformer\.blocks\.\d+\.self_attn\.(att_proj|attn_out)"
    expert_lora = (
        r"model\.model\.action_expert\.(action_embed|context_[kv]_proj|final_layer\.(modulation\.)?linear"
        r"|blocks\.\d+\.(self_attn\.(qkv|out_proj)|cross_attn\.(q|out)_proj|mlp\.(up|gate|down)_proj"
        r"|modulation\.linear))"
    )
    blocks = r"model\.model\.(transformer|action_expert|vision_backbone\.image_vit\.transformer)\.(res)?blocks\.\d+"
    times: Tensor
    padding: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the policy, and the times of its own sampler.

        Args:
            config: The policy's configuration, whose `base` is that of a MolmoAct2.
        """
        stock: Any = config.base
        # Without it what is exported would not act.
        stock.inference_action_mode = "continuous"
        super().__init__(config)
        self.action_dim = self._backbone.config.max_action_dim
        times = [k / self.num_steps for k in range(self.num_steps)]
        self.register_buffer("times", torch.tensor(times, device=config.device), persistent=False)
        padding = torch.arange(self.action_dim, device=config.device) >= self.real_action_dim
        self.register_buffer("padding", padding, persistent=False)

    def _make_policy(self, stock: Any, config: "PIRLConfig") -> "PreTrainedPolicy":
        """The stock policy, which needs its checkpoint in the hub's format even where another one has all weights.

        Raises:
            ConfigError: If that cannot be loaded.
        """
        # Its language head does not act. LeRobot's own training leaves the embeddings as they are, unless told.
        frozen = ("model.transformer.wte",) if stock.freeze_embedding else ()
        self.frozen_modules = ("lm_head", *frozen)
        # The stock class would set the tag's sizes again, in place of those that were chosen.
        tag, stock.norm_tag = stock.norm_tag, None
        try:
            return super()._make_policy(stock, config)
        except (OSError, ValueError) as error:
            problem = (
                f"{stock.checkpoint_path!r} cannot be loaded ({' '.join(str(error).split())[:120]}); name the "
                "folder, or the hub's name, of a MolmoAct2 in the hub's format"
            )
            raise config_error("policy.base.checkpoint_path", problem) from None
        finally:
            stock.norm_tag = tag

    def export(self) -> "PreTrainedPolicy":
        """The stock policy, with adapters merged into it; this base is not to be used afterwards."""
        policy: Any = super().export()
        # Its processors have the tag's statistics; its sizes would take the place of those of training.
        policy.config.norm_tag = None
        # In case that the policy's own sampler was called before the last update.
        self._expert._modulation_cache_key = None
        return policy

    @property
    def _backbone(self) -> Any:
        return self._model.model

    @property
    def _expert(self) -> Any:
        return self._backbone.action_expert

    @property
    def _head(self) -> Any:
        return self._expert.final_layer.linear

    @property
    def _encoder_dim(self) -> int:
        return self._backbone.config.hidden_size

    @property
    def _dtype(self) -> torch.dtype:
        return self._expert.action_embed.weight.dtype

    def _autocast(self) -> torch.autocast:
        """The precision that the stock policy acts in."""
        dtype = self._dtype
        return torch.autocast(self._backbone.device.type, dtype, enabled=dtype != torch.float32)

    def rows(self, batch: dict[str, Any]) -> int:
        """Number of observations of a preprocessed batch."""
        return len(batch["input_ids"])

    def take(self, batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The given observations (int64) of a preprocessed batch, with their pictures."""
        packed = (CROPS, POOLING, GRIDS, COUNTS)
        part = take({key: value for key, value in batch.items() if key not in packed}, rows)
        # Every observation has one picture of each camera.
        grids, counts = (batch[key].unflatten(0, (self.rows(batch), -1)) for key in (GRIDS, COUNTS))
        tokens = grids[..., :2].prod(-1) + grids[..., 2:].prod(-1)
        crops = batch[CROPS].split(counts.sum(-1).tolist())
        pooling = batch[POOLING].split(tokens.sum(-1).tolist())
        here = rows.to(grids.device)
        return part | {
            CROPS: torch.cat([crops[row] for row in rows.tolist()]),
            POOLING: torch.cat([pooling[row] for row in rows.tolist()]),
            GRIDS: grids[here].flatten(0, 1),
            COUNTS: counts[here].flatten(0, 1),
        }

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images, instruction and state once; the context is its cache."""
        policy: Any = self.policy
        mask = batch["attention_mask"]
        inputs = policy._model_inputs(batch) | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with self._autocast():
            seen = self._backbone(**inputs, use_cache=True)
        # What the expert may read; not all that the VLM does.
        real = self._backbone._get_encoder_attention_mask(batch["input_ids"], mask)
        return pack_cache(seen.past_key_values) | {
            "real": real,
            "pooled": pooled(seen.last_hidden_state, real),
        }

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        backbone, expert, x = self._backbone, self._expert, self._without_padding(x_t.to(self._dtype))
        layers = zip(context["keys"].unbind(1), context["values"].unbind(1), strict=True)
        with self._autocast():
            prompt = expert.prepare_context(
                encoder_kv_states=[
                    tuple(backbone._cache_to_sequence(states) for states in pair) for pair in layers
                ],
                encoder_attention_mask=context["real"],
                batch_size=len(x),
                seq_len=self.chunk_size,
                device=x.device,
                dtype=x.dtype,
            )
            ahead = expert.forward_with_context(x, self.times[self._step(t)], context=prompt)
        return -self._without_padding(ahead).to(x_t.dtype)

    def _without_padding(self, x: Tensor) -> Tensor:
        """States `[B, H, D]` with zeros in padded dimensions, if the model was trained so."""
        masks = self._backbone.config.mask_action_dim_padding
        return self._backbone._mask_action_dim_tensor(x, action_dim_is_pad=self.padding, enabled=masks)

    def forward(self, context: Context, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and features of `velocity`."""
        velocity, features = super().forward(context, x_t, t)
        return velocity, features.float()

    def sample(self, context: Context, noise: Tensor, num_steps: int) -> Tensor:
        """The stock policy's own sampler, whose state has the dtype of its weights."""
        x = noise.to(self._dtype)
        for k in range(num_steps):
            t = torch.full((len(x),), 1 - k / num_steps, device=x.device)
            x = x - (1 / num_steps) * self.velocity(context, x, t).velocity
        return x.float()
