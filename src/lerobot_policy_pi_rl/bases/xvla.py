"""X-VLA: a Florence-2 encoder, read by a transformer that predicts the clean action."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import check
from .adapter import Context
from .stock import StockBase

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig


class XVLABase(StockBase):
    """Adapter of X-VLA (arXiv 2510.10274), which predicts the clean action `a_hat(x_t, t)` instead of a velocity.

    Exploration follows the ODE of the same flow: `v = (x_t - a_hat) / t`. Every denoising step begins at
    `t >= 1 / K`, so nothing is divided by zero, and the last Euler step ends at `a_hat` itself.

    Without exploration the sampler is X-VLA's own (`sample`), which is not Euler's. Both take `(1 - t') a_hat` from
    the newest prediction, but Euler adds `t' e_hat` with the noise that `x_t` now holds, X-VLA `t' x_1` with the
    initial noise. At `t = 1` these are the same, so with one or two steps both give the same chunk. X-VLA's has no
    Gaussian of its own: if `x_1` stayed as it is, the noise of an early step would be gone after the next one, and if
    it took the noise up, `(x_t', x_1')` would have no density, because one of them determines the other.

    Channels that the action space hides from the network and reads back through a sigmoid (the grippers of `ee6d`,
    `joint` and `so101_bimanual`) are logits and no part of the flow. Only the last step's are executed, so only the
    last step draws them: from a Gaussian around the logit, before the sigmoid. Until then they do not move, and
    whatever noise they hold has the same density under all weights.
    """

    expert_modules = ("transformer",)
    vlm_lora = r".*\.language_model\.encoder\.layers\..*\.self_attn\.(q|k|v|out)_proj"
    # The layers around the blocks have weights for each domain, and are no linear layers that could have an adapter.
    expert_lora = r"model\.transformer\.blocks\..*\.(qkv|proj|fc1|fc2)"
    blocks = r".*\.layers\.\d+|.*\.vision_tower\.blocks\.\d+\.\d+|model\.transformer\.blocks\.\d+"
    is_logit: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the stock policy; see `StockBase`.

        Raises:
            ConfigError: If its configuration has no sizes, or no action space that fits the actions.
        """
        check_sizes(config.base)
        super().__init__(config)
        space = self._model.action_space
        self.action_dim = self._model.dim_action
        probe = torch.ones(1, 1, self.action_dim, device="cpu")
        _, seen = space.preprocess(probe[:, 0], probe)
        width = space.postprocess(probe.clone()).shape[-1]
        check(
            self.real_action_dim <= width,
            "policy.output_features",
            f"has {self.real_action_dim} actions, but X-VLA's action space {space.name!r} has {width}; take one that "
            "fits (policy.base.action_mode)",
        )
        self.register_buffer("is_logit", seen[0, 0] == 0, persistent=False)
        self.logit_dims = tuple((seen[0, 0] == 0).nonzero()[:, 0].tolist())

    @property
    def _encoder_dim(self) -> int:
        return self._model.vlm.config.vision_config.projection_dim

    @property
    def _head(self) -> Any:
        return self._model.transformer.action_decoder

    @property
    def _feature_dim(self) -> int:
        return self._model.transformer.hidden_size

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs Florence-2 over images and instruction once; the context is what it makes of them, and the state.

        X-VLA attends to the padding of an instruction like to its words, so all of it is pooled for the critic.
        """
        policy: Any = self.policy
        model, dtype = self._model, self._dtype
        inputs = policy._build_model_inputs(batch)
        encoded = model.forward_vlm(
            inputs["input_ids"], inputs["image_input"].to(dtype), inputs["image_mask"]
        )
        tokens = torch.cat([encoded["vlm_features"], encoded["aux_visual_inputs"]], dim=1)
        own = {"domain_id": inputs["domain_id"], "proprio": inputs["proprio"].to(dtype)}
        return encoded | own | {"pooled": tokens.float().mean(1)}

    @property
    def _dtype(self) -> torch.dtype:
        return self._model._get_target_dtype()

    def _predict(self, context: Context, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean action `[B, H, D]`, and where they are the logits, in the network's own precision."""
        proprio, x_t = self._model.action_space.preprocess(context["proprio"], x_t)
        return self._model.transformer(
            domain_id=context["domain_id"],
            vlm_features=context["vlm_features"],
            aux_visual_inputs=context["aux_visual_inputs"],
            action_with_noise=x_t,
            proprio=proprio,
            t=t,
        )

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        """`(x_t - a_hat) / t`; that of logits is zero before the last step."""
        action = self._predict(context, x_t.to(self._dtype), t.to(self._dtype))
        velocity = (x_t - action.float()) / t[:, None, None]
        if not self.logit_dims:
            return velocity
        # Times are multiples of 1 / K, up to rounding.
        waits = self.is_logit & (t * self.num_steps > 1.5)[:, None, None]
        return velocity.masked_fill(waits, 0.0)

    def sample(self, context: Context, noise: Tensor, num_steps: int) -> Tensor:
        """X-VLA's own sampler: the newest prediction is mixed with the initial noise again, for every step."""
        noise = noise.to(self._dtype)
        action = torch.zeros_like(noise)
        for left in range(num_steps, 0, -1):
            t = torch.full((len(noise),), left / num_steps, dtype=noise.dtype, device=noise.device)
            share = t[:, None, None]
            action = self._predict(context, share * noise + (1 - share) * action, t)
        return action.float()

    def actions(self, x: Tensor) -> Tensor:
        """What the action space makes of denoised states: probabilities of logits, padding cut."""
        # It writes into what it is given.
        return self._model.action_space.postprocess(x.clone())[..., : self.real_action_dim]

    def optim_params(self) -> Any:
        """The trained parameters by name, by which X-VLA's optimizer tells the VLM's."""
        policy: Any = self.policy
        return policy.get_optim_params()


def check_sizes(stock: Any) -> None:
    """Checks what X-VLA's own configuration leaves to its model, in one line each.

    Raises:
        ConfigError: If it has no sizes of Florence-2, or an action space that LeRobot does not know.
    """
    from lerobot.policies.xvla.action_hub import ACTION_REGISTRY

    check(
        bool(stock.florence_config),
        "policy.base.florence_config",
        "is empty, so Florence-2 has no sizes; begin with a checkpoint (policy.base_path), which has them",
    )
    check(
        stock.action_mode.lower() in ACTION_REGISTRY,
        "policy.base.action_mode",
        f"{stock.action_mode!r} is unknown; choose one of {sorted(ACTION_REGISTRY)}",
    )
