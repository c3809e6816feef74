"""LeRobot's own flow policies as bases: what their adapters share."""

import io
import logging
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import check, config_error
from .adapter import Context, FlowBase, Velocity
from .checkpointing import checkpoint_method
from .lora import adapted_path, insert_adapters, is_adapter, merge_adapters, merge_checkpoint

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

    from ..configuration_pi_rl import PIRLConfig

logger = logging.getLogger(__name__)

COMPARED_TENSORS = 16
# Where LeRobot after 0.6.1 puts the weights of a sharded run, with `--checkpoint_format=dcp` nowhere else.
SHARDS = "pytorch_model_fsdp_0"
# Policies whose own loader raises an error unless every tensor fits. It knows older layouts of the file, too, whose
# names are not the policy's.
LOADED_STRICTLY = frozenset({"xvla"})


class StockBase(FlowBase):
    """Adapter of a policy of LeRobot's, which it holds and does not change.

    Attributes:
        policy: The stock policy.
        root: What the policy's names of the modules below begin with.
        expert_modules: Modules that only `velocity` uses; the others encode.
        frozen_modules: Modules that no gradient reaches in the stock policy; they are trained in no mode.
        vlm_lora: Layers of the VLM, or of what else encodes, that get an adapter: a regular expression of their names.
        expert_lora: The same of the action expert.
        encoder_source: The critic's name for what encodes.
        blocks: Modules whose activations `policy.gradient_checkpointing` does not keep: a regular expression of their
            names. They are called as modules, and give a key/value cache by its name, if any.
    """

    root: ClassVar[str] = "model."
    expert_modules: ClassVar[tuple[str, ...]]
    frozen_modules: tuple[str, ...] = ()
    encoder_source: ClassVar[str] = "vlm"
    vlm_lora: ClassVar[str]
    expert_lora: ClassVar[str]
    blocks: ClassVar[str] = ""
    policy: "PreTrainedPolicy"

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the stock policy, with the weights of `base_path` or, without one, with new ones.

        Args:
            config: The policy's configuration, whose `base` is that of the stock policy.

        Raises:
            ConfigError: If the checkpoint is not one of that policy, or is not complete.
        """
        super().__init__()
        stock: Any = config.base
        # A stock checkpoint has none when it takes them from its data.
        stock.input_features = stock.input_features or dict(config.input_features or {})
        stock.output_features = stock.output_features or dict(config.output_features or {})
        self.policy = self._make_policy(stock, config)
        self.chunk_size = config.chunk_size
        self.real_action_dim = stock.action_feature.shape[0]
        # Not every policy pads its actions.
        self.action_dim = getattr(stock, "max_action_dim", self.real_action_dim)
        self.num_steps = config.num_inference_steps
        self._insert_adapters(config)
        self.feature_dim = self._feature_dim
        self.critic_dims = {"expert": self.feature_dim, self.encoder_source: self._encoder_dim}
        self._choose_trained(config.trainable)
        self._head_inputs = _Inputs()
        self._head_hook = self._head.register_forward_pre_hook(self._head_inputs)
        if config.gradient_checkpointing:
            self._checkpoint_blocks()
        if config.compile:
            self.compile()

    def _make_policy(self, stock: Any, config: "PIRLConfig") -> "PreTrainedPolicy":
        """The stock policy, by its configuration."""
        return make_stock_policy(stock, config.base_path)

    def _insert_adapters(self, config: "PIRLConfig") -> None:
        targets = {
            "expert_lora": [self.vlm_lora],
            "lora": [self.vlm_lora, self.expert_lora],
        }.get(config.trainable, [])
        layers = [name for name, _ in self.policy.named_modules()]
        if not all(any(re.fullmatch(target, name) for name in layers) for target in targets):
            raise config_error(
                "policy.trainable",
                f"{config.trainable!r} puts adapters into layers that this {self.policy.name} does not have; "
                "choose 'expert' or 'all'",
            )
        if targets:
            insert_adapters(self.policy, targets, config.lora_rank, config.lora_alpha)

    def _choose_trained(self, mode: str) -> None:
        for name, parameter in self.policy.named_parameters():
            whole = mode == "all" or (mode in ("expert", "expert_lora") and self._is_expert(name))
            whole = whole and not self._is_one_of(self.frozen_modules, name)
            parameter.requires_grad_(whole or is_adapter(name))

    def _checkpoint_blocks(self) -> None:
        modules = self.policy.named_modules()
        blocks = [module for name, module in modules if name and re.fullmatch(self.blocks, name)]
        check(
            bool(blocks),
            "policy.gradient_checkpointing",
            f"the adapter of {self.policy.name!r} names no blocks that could be computed again; set it to false",
        )
        for block in blocks:
            checkpoint_method(block)

    def export(self) -> "PreTrainedPolicy":
        """The stock policy, with adapters merged into it; this base is not to be used afterwards."""
        self._head_hook.remove()
        merge_adapters(self.policy)
        return self.policy

    def _is_expert(self, name: str) -> bool:
        return self._is_one_of(self.expert_modules, name)

    def _is_one_of(self, modules: tuple[str, ...], name: str) -> bool:
        return name.startswith(tuple(f"{self.root}{module}." for module in modules))

    @property
    def context_is_fixed(self) -> bool:
        """Whether only the action expert is trained."""
        return all(self._is_expert(name) for name, p in self.policy.named_parameters() if p.requires_grad)

    @property
    def _model(self) -> Any:
        return self.policy.model

    @property
    @abstractmethod
    def _encoder_dim(self) -> int:
        """Width of `_encoded`."""

    def _encoded(self, context: Context) -> Tensor:
        """What the encoder made of an observation, one vector for each row, `[B, F]`."""
        return context["pooled"]

    @property
    def _feature_dim(self) -> int:
        return self._head.in_features

    @property
    def _head(self) -> Any:
        """The layer that reads the velocity off the action expert's features."""
        return self._model.action_out_proj

    def _step(self, t: Tensor) -> Tensor:
        """Number of the denoising step at times `[B]`, from 0 to K - 1.

        For samplers that run the other way: one minus a rounded time is not the time of their own grid to the bit.
        """
        return ((1 - t) * self.num_steps).round().long()

    def _encode_prefix(self, vlm: Any, embeddings: Tensor, real: Tensor, attention: Tensor) -> Context:
        """Runs the VLM over an embedded prefix once; the context is its cache.

        Args:
            vlm: The stock module that holds VLM and expert.
            embeddings: Of images and tokens, `[B, L, W]`.
            real: What is not padding, `[B, L]` bool.
            attention: Who attends to whom, as that module takes it.
        """
        (hidden, _), cache = vlm.forward(
            attention_mask=attention,
            position_ids=torch.cumsum(real, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return pack_cache(cache) | {"real": real, "pooled": pooled(hidden, real)}

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        """Velocity `[B, H, D]` by the stock policy's own step; `more` are inputs of one policy's step alone."""
        return self._model.denoise_step(
            prefix_pad_masks=context["real"],
            past_key_values=unpack_cache(context),
            x_t=x_t,
            timestep=t,
            **more,
        )

    def velocity(self, context: Context, x_t: Tensor, t: Tensor) -> Velocity:
        """Velocity of the states `[B, H, D]` at the times `[B]`, and what its head read."""
        return Velocity(*self(context, x_t, t))

    def forward(self, context: Context, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and features of `velocity`; what `policy.compile` compiles."""
        seen: list[Tensor] = []
        self._head_inputs.kept = seen
        velocity = self._velocity(context, x_t, t)
        self._head_inputs.kept = None
        return velocity, seen[-1]

    def critic_features(self, context: Context, source: str = "expert") -> Tensor:
        """Features of an encoded observation, `[B, F]` float32 of zero mean and unit deviation.

        Args:
            context: The observation.
            source: `encoder_source` (`vlm`): what the VLM made of it, pooled over its real tokens. `expert`: what the
                action expert makes of it at the start of denoising (`t = 1`, from zeros), pooled over the chunk; it
                knows the state, too.
        """
        if source == self.encoder_source:
            features = self._encoded(context)
        else:
            some = next(iter(context.values()))
            zeros = torch.zeros(len(some), self.chunk_size, self.action_dim, device=some.device)
            features = self.velocity(context, zeros, torch.ones(len(some), device=some.device)).features
            features = features[:, -self.chunk_size :].float().mean(1)
        return nn.functional.layer_norm(features, features.shape[-1:])

    def trains_for_critic(self, source: str) -> bool:
        """The expert is always trained, the encoder in some modes."""
        return source != self.encoder_source or super().trains_for_critic(source)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The stock policy's own supervised loss."""
        loss, _ = self.policy.forward(batch)
        return loss


def make_stock_policy(
    stock: Any, path: str | None, policy_class: "type[PreTrainedPolicy] | None" = None
) -> "PreTrainedPolicy":
    """Builds a stock policy.

    Args:
        stock: Its configuration.
        path: Checkpoint to load, a folder or a name on the hub; None for new weights. One of adapters (LeRobot's
            `--peft`) is loaded on top of the policy that it names, and merged.
        policy_class: Its class, if it is to be built in a way of its own.

    Raises:
        ConfigError: If the weights of the checkpoint are not those that the policy has afterwards: some stock loaders
            pass over what is missing, or give back random weights when they fail.
    """
    from lerobot.policies.factory import get_policy_class

    policy_class = policy_class or get_policy_class(stock.type)
    if path is None:
        return policy_class(stock)
    if stock.use_peft:
        stock.use_peft = False
        return merge_checkpoint(make_stock_policy(stock, adapted_path(path), policy_class), path)
    check(
        not (Path(path) / SHARDS).is_dir() or (Path(path) / SAFETENSORS_SINGLE_FILE).is_file(),
        "policy.base_path",
        f"{path} has its weights in shards only ({SHARDS}); convert it first, with LeRobot's lerobot-convert-dcp",
    )
    if hasattr(stock, "load_vlm_weights"):
        # The checkpoint has them; those on the hub would be loaded first, for nothing.
        stock.load_vlm_weights = False
    try:
        with redirect_stdout(io.StringIO()) as said:
            policy = policy_class.from_pretrained(path, config=stock)
    except RuntimeError as error:
        problem = f"{path} was not loaded as a {stock.type}: {' '.join(str(error).split())[:200]}"
        raise config_error("policy.base_path", problem) from None
    logger.info("Loaded %s from %s: %s", stock.type, path, " ".join(said.getvalue().split()))
    if stock.type not in LOADED_STRICTLY:
        _check_loaded(policy, path)
    return policy


def _check_loaded(policy: "PreTrainedPolicy", path: str) -> None:
    """Compares a policy with the file that it was loaded from."""
    file = Path(path) / SAFETENSORS_SINGLE_FILE
    if not Path(path).is_dir():
        file = Path(hf_hub_download(path, SAFETENSORS_SINGLE_FILE))
    if not file.is_file():
        raise config_error("policy.base_path", f"{path} has no {SAFETENSORS_SINGLE_FILE}")
    own = policy.state_dict()
    with safe_open(file, framework="pt") as tensors:
        names = _own_names(policy, own, list(tensors.keys()))
        missing = missing_tensors(own, names)
        found = sorted(own.keys() & names.keys())
        # A few of them tell a policy that was loaded from one that was not.
        some = found[:: max(1, len(found) // COMPARED_TENSORS)]
        wrong = [
            n for n in some if not torch.equal(own[n].cpu(), tensors.get_tensor(names[n]).to(own[n].dtype))
        ]
    if missing or wrong:
        problem = f"{missing[:3]} are missing" if missing else f"{wrong[:3]} are not what the policy has"
        raise config_error(
            "policy.base_path", f"{path} was not loaded as a {policy.name}: {problem} in {file.name}"
        )


def _own_names(policy: "PreTrainedPolicy", own: Collection[str], names: list[str]) -> dict[str, str]:
    """What the stock loader calls the tensors of a file: the file's name by the policy's.

    pi0 and pi0.5 are published without their embedding, which is their output layer's matrix.
    """
    fix: Any = getattr(policy, "_fix_pytorch_state_dict_keys", None)
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    loaded = numbers if fix is None else fix(numbers, policy.config) | numbers
    return {name if name in own else f"model.{name}": names[int(number)] for name, number in loaded.items()}


def missing_tensors(own: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
    """Which of a policy's tensors a file lacks; of several that are one in memory, it has one name."""
    here = {own[name].data_ptr() for name in names if name in own}
    return sorted(name for name, t in own.items() if name not in names and t.data_ptr() not in here)


class _Inputs:
    """A forward pre-hook that collects what a module is given, while there is a list for it.

    It stays where it is, because what is compiled does not notice hooks that come and go.
    """

    kept: list[Tensor] | None = None

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Keeps the first argument."""
        if self.kept is not None:
            self.kept.append(given[0])


def pack_cache(cache: Any) -> Context:
    """A prefix' key/value cache as two tensors `[B, layers, heads, L, dim]`, with a row for each observation."""
    keys, values = zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
    return {"keys": torch.stack(keys, 1), "values": torch.stack(values, 1)}


def unpack_cache(context: Context) -> Any:
    """The cache that `pack_cache` packed."""
    from transformers import DynamicCache

    pairs = zip(context["keys"].unbind(1), context["values"].unbind(1), strict=True)
    return DynamicCache([(keys, values) for keys, values in pairs])


def pooled(hidden: Tensor, real: Tensor) -> Tensor:
    """Mean of `[B, L, W]` over the tokens that are not padding, `[B, L]` bool, in float32."""
    weights = real[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
