"""EO1: a Qwen2.5-VL whose layers read the noisy actions behind the prompt, with a key/value cache of the prompt."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ..errors import check, config_error
from .adapter import Context
from .qwen import GRIDS, PATCHES, QwenBase
from .stock import pack_cache, pooled, unpack_cache

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

    from ..configuration_pi_rl import PIRLConfig

# Numbers of a preprocessed batch that hold for all of its observations: which tokens stand for state and actions.
TOKEN_IDS = ("state_token_id", "action_token_id")


class EO1Base(QwenBase):
    """Adapter of EO1.

    It has no action expert: the same layers read prompt and actions. What only the velocity uses are the projections
    around them, of actions and time, and of the velocity. Attention is causal, so that the prompt knows nothing of the
    actions behind it, and its cache serves every step. The state is a token of the prompt.
    """

    expert_modules = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")
    # Words are read off it, by neither acting nor the loss. Weights that it shares with the embeddings have their name.
    frozen_modules = ("vlm_backbone.lm_head",)
    vlm_lora = r".*\.language_model\.layers\..*\.self_attn\.[qkvo]_proj"
    # Between the layers of `action_out_proj` there are activations.
    expert_lora = r"model\.(action_in_proj|action_time_mlp_(in|out)|action_out_proj\.\d*[02468])"
    blocks = r".*\.language_model\.layers\.\d+|.*\.visual\.blocks\.\d+"

    def _make_policy(self, stock: Any, config: "PIRLConfig") -> "PreTrainedPolicy":
        """The stock policy; weights of its VLM alone are not read where a checkpoint has all of them.

        Raises:
            ConfigError: If they are to be read, and cannot be.
        """
        if config.base_path is None and not config.weights_follow:
            try:
                return super()._make_policy(stock, config)
            except OSError as error:
                problem = (
                    f"{stock.vlm_base!r} cannot be loaded ({' '.join(str(error).split())[:120]}); name the folder, or "
                    "the hub's name, of a Qwen2.5-VL"
                )
                raise config_error("policy.base.vlm_base", problem) from None
        # With a path, the stock class builds its VLM from its configuration.
        given, stock.pretrained_path = stock.pretrained_path, Path(config.base_path or stock.vlm_base)
        try:
            return super()._make_policy(stock, config)
        finally:
            stock.pretrained_path = given

    @property
    def _backbone(self) -> Any:
        return self._model.vlm_backbone.model

    @property
    def _head(self) -> Any:
        return self._model.action_out_proj[0]

    @property
    def _encoder_dim(self) -> int:
        return self._model.hidden_size

    def take(self, batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The given observations (int64) of a preprocessed batch, with their pictures."""
        return super().take(batch, rows) | {name: batch[name] for name in TOKEN_IDS}

    def encode(self, batch: dict[str, Any]) -> Context:
        """Runs the VLM over images, instruction and state once; the context is its cache, and where actions begin."""
        policy: Any = self.policy
        tokens, mask, begin = batch["input_ids"], batch["attention_mask"], self._actions_begin(batch)
        positions, _ = self._backbone.get_rope_index(
            tokens, batch["mm_token_type_ids"], image_grid_thw=batch[GRIDS], attention_mask=mask
        )
        tokens, real = tokens[:, :begin], mask[:, :begin]
        state = policy.prepare_state(batch[OBS_STATE])
        seen = self._backbone(
            input_ids=tokens,
            attention_mask=real,
            position_ids=positions[..., :begin],
            inputs_embeds=self._model.embed_prefix(
                tokens, state, **{name: batch[name] for name in TOKEN_IDS}
            ),
            pixel_values=batch[PATCHES],
            image_grid_thw=batch[GRIDS],
            use_cache=True,
        )
        return pack_cache(seen.past_key_values) | {
            "real": real.bool(),
            "pooled": pooled(seen.last_hidden_state, real),
            "position": positions[0, :, begin],
        }

    def _actions_begin(self, batch: dict[str, Any]) -> int:
        """Where the tokens of actions begin, in all prompts alike.

        Raises:
            ConfigError: If the preprocessor has written another number of them than a chunk has.
            ValueError: If they begin in several places.
        """
        is_action = batch["input_ids"] == batch["action_token_id"]
        written = is_action.sum(1).unique().tolist()
        check(
            written == [self.chunk_size],
            "policy.chunk_size",
            f"is {self.chunk_size}, and the preprocessor writes {written} tokens of actions; set both alike",
        )
        begins = is_action.int().argmax(1).unique().tolist()
        if len(begins) > 1:
            raise ValueError(
                f"the actions of these prompts begin at {begins}: EO1 acts on prompts that are padded on the left"
            )
        return begins[0]

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        model, real = self._model, context["real"]
        steps = torch.arange(self.chunk_size, device=x_t.device)
        hidden = self._backbone(
            inputs_embeds=model.embed_suffix(t, x_t).to(context["keys"].dtype),
            attention_mask=torch.cat([real, real.new_ones(len(x_t), self.chunk_size)], 1),
            # Those of words have the same number in time, height and width.
            position_ids=(context["position"][:, None] + steps).expand(3, -1, -1),
            past_key_values=unpack_cache(context),
            use_cache=True,
        ).last_hidden_state
        with model.flow_head_autocast_context():
            velocity = model.action_out_proj(hidden.to(model.action_out_proj.dtype))
        return velocity.to(x_t.dtype)
