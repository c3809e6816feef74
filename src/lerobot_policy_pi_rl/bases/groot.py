"""GR00T N1.7: tokens of a Qwen3-VL prompt, read by a diffusion transformer with cross-attention."""

from typing import TYPE_CHECKING, Any

import torch
from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import check, config_error
from .adapter import Context
from .qwen import GRIDS, PATCHES, QwenBase
from .stock import make_stock_policy, pooled

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

    from ..configuration_pi_rl import PIRLConfig

# Tensors of a preprocessed batch with a row of tokens for each observation.
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
# What the policy's configuration changes in that of its model; None leaves it.
MODEL_SETTINGS = (
    "tune_llm",
    "tune_visual",
    "tune_projector",
    "tune_diffusion_model",
    "tune_vlln",
    "tune_top_llm_layers",
    "use_flash_attention",
    "num_inference_timesteps",
    "rtc_ramp_rate",
)


class GrootBase(QwenBase):
    """Adapter of GR00T N1.7.

    Time runs from 0 (noise) to 1, in buckets, and the policy predicts `action - noise`. The state that it denoises has
    the length and the width of its model, of which `config.chunk_size` actions are used.

    The layers that its head puts behind the VLM (`vl_self_attention`) attend to the padding of a prompt like to its
    words, so that what the stock policy makes of an observation depends on the prompts that it is batched with. A
    density must not: here only prompts of the same length are encoded together, and none is padded.
    """

    root = "_groot_model.action_head."
    expert_modules = ("model", "state_encoder", "action_encoder", "action_decoder", "position_embedding")
    vlm_lora = r".*\.language_model\.layers\..*\.self_attn\.[qkvo]_proj"
    # Not the layers with weights for each embodiment.
    expert_lora = (
        r"_groot_model\.action_head\.model\.transformer_blocks\."
        r".*(\.attn1\.to_(q|k|v|out\.0)|\.ff\.net\.(0\.proj|2))"
    )
    blocks = (
        r".*\.language_model\.layers\.\d+|.*\.visual\.blocks\.\d+"
        r"|_groot_model\.action_head\.(model|vl_self_attention)\.transformer_blocks\.\d+"
    )
    buckets: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the policy, and the time buckets of its own sampler.

        Args:
            config: The policy's configuration, whose `base` is that of a GR00T.

        Raises:
            ConfigError: If its model gives fewer actions, or cannot be told which tokens are padding.
        """
        super().__init__(config)
        head = self._action_head
        self.predicted = config.chunk_size
        self.chunk_size, self.action_dim = head.action_horizon, head.action_dim
        check(
            self.predicted <= self.chunk_size,
            "policy.chunk_size",
            f"{self.predicted} is more than the {self.chunk_size} actions of this GR00T's model; set it to "
            f"{self.chunk_size}",
        )
        check(
            head.config.use_alternate_vl_dit,
            "policy.base.base_model_path",
            "this GR00T's action head (use_alternate_vl_dit=false) attends to padding; take a model of N1.7's own kind",
        )
        buckets = [int(k / self.num_steps * head.num_timestep_buckets) for k in range(self.num_steps)]
        self.register_buffer("buckets", torch.tensor(buckets, device=config.device), persistent=False)

    def _make_policy(self, stock: Any, config: "PIRLConfig") -> "PreTrainedPolicy":
        """The stock policy; weights of its base model are not read where a checkpoint has all of them."""
        is_whole = config.base_path is not None or config.weights_follow
        return make_stock_policy(stock, config.base_path, UnloadedGroot if is_whole else GrootPolicy)

    @property
    def is_float32(self) -> bool:
        """Whether it is in float32 and runs without bfloat16 autocast."""
        return super().is_float32 and not self.policy.config.use_bf16

    @property
    def _model(self) -> Any:
        return self.policy._groot_model

    @property
    def _action_head(self) -> Any:
        return self._model.action_head

    @property
    def _head(self) -> Any:
        return self._action_head.action_decoder.layer2

    @property
    def _feature_dim(self) -> int:
        return self._action_head.hidden_size

    @property
    def _encoder_dim(self) -> int:
        return self._action_head.config.backbone_embedding_dim

    def _autocast(self) -> torch.autocast:
        """The precision that the stock policy runs in."""
        return torch.autocast(
            self._model.device.type, torch.bfloat16, enabled=bool(self.policy.config.use_bf16)
        )

    def actions(self, x: Tensor) -> Tensor:
        """The real dimensions of those actions that are used."""
        return x[:, : self.predicted, : self.real_action_dim]

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images and instruction once; the state goes along, because the action head embeds it."""
        lengths = batch["attention_mask"].sum(1)
        encoded: list[Any] = [None] * len(lengths)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            for row, *made in zip(rows.tolist(), *self._encode_equal(self.take(batch, rows)), strict=True):
                encoded[row] = made
        tokens, is_image = (pad_sequence(list(rows), batch_first=True) for rows in zip(*encoded, strict=True))
        real = torch.arange(tokens.shape[1], device=lengths.device) < lengths[:, None]
        return {
            "tokens": tokens,
            "is_image": is_image,
            "real": real,
            "pooled": pooled(tokens, real),
            "state": batch["state"].to(self._model.dtype),
            "embodiment": batch["embodiment_id"],
        }

    def _encode_equal(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens `[B, L, W]` of prompts with L real tokens each, and which of them are of images, `[B, L]` bool."""
        real = batch["attention_mask"].bool()
        inputs = {key: batch[key][real].view(len(real), -1) for key in TOKENS if key in batch}
        inputs |= {PATCHES: batch[PATCHES].to(self._model.dtype), GRIDS: batch[GRIDS]}
        with self._autocast():
            seen = self._model.backbone(inputs)
            tokens = self._action_head.process_backbone_output(seen)["backbone_features"]
        return tokens, seen["image_mask"]

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        head, bucket, embodiment = self._action_head, self.buckets[self._step(t)], context["embodiment"]
        with self._autocast():
            state = head.state_encoder(context["state"].flatten(1)[:, None], embodiment)
            actions = head.action_encoder(x_t.to(context["tokens"].dtype), bucket, embodiment)
            if head.config.add_pos_embed:
                actions = actions + head.position_embedding.weight[: self.chunk_size]
            hidden = head.model(
                hidden_states=torch.cat([state, actions], 1),
                encoder_hidden_states=context["tokens"],
                timestep=bucket,
                image_mask=context["is_image"],
                backbone_attention_mask=context["real"],
            )
            ahead = head.action_decoder(hidden, embodiment)
        return -ahead[:, -self.chunk_size :].float()

    def forward(self, context: Context, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and features of `velocity`; the decoder reads the state's token, too."""
        velocity, features = super().forward(context, x_t, t)
        return velocity, features[:, -self.chunk_size :].float()


class UnloadedGroot(GrootPolicy):
    """GR00T with new weights: built from the configuration of its base model, for a checkpoint that has them all.

    The stock class reads the base model's own weights first, whatever is loaded afterwards.
    """

    def _create_groot_model(self) -> GR00TN17:
        """Builds the model.

        Raises:
            ConfigError: If the configuration of the base model cannot be read.
        """
        given = {name: getattr(self.config, name) for name in MODEL_SETTINGS}
        try:
            config = GR00TN17Config.from_pretrained(
                self.config.base_model_path,
                **{name: value for name, value in given.items() if value is not None},
            )
        except OSError as error:
            problem = f"has no configuration of GR00T's model ({' '.join(str(error).split())[:120]}); name its folder"
            raise config_error(
                "policy.base.base_model_path", f"{self.config.base_model_path!r} {problem}"
            ) from None
        model = GR00TN17._from_config(config)
        if self.config.model_params_fp32:
            self._cast_model_parameters_to_fp32(model)
        return model
