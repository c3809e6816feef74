"""Settings as they were given, and those of LeRobot's that an online run does not read."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.envs import EnvConfig, env_to_policy_features
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from lerobot.utils.io_utils import load_json

from ..errors import config_error

_NO_PUSH = (
    "nothing is pushed to the hub during a run; leave it out, and afterwards push the best policy by "
    "`hf upload <user>/<name> <output_dir>/checkpoints/best/pretrained_model`"
)
_NO_LOADER = "an online run has no data loader; leave it out"
_NO_HELD_OUT = "the loss on held-out demonstrations is measured by supervised training only; leave it out"
_NO_RECORDING = "an online run records no data set; leave it out, and record with lerobot-eval afterwards"
_ADAPTERS = (
    "adapters are set by policy.trainable=lora (or expert_lora), policy.lora_rank and policy.lora_alpha"
)
_OPTIMIZERS = (
    "is of supervised training; an online run's are set by algorithm.lr, algorithm.critic_lr and their neighbours "
    "(docs/configuration.md)"
)
_NO_REPLAY = "is of LeRobot's replay buffer, and PI-RL has none; algorithm.demonstration_weight mixes demonstrations in"
_ONE_DEVICE = "is of supervised training on several devices, and a learner has one; leave it out"
_NO_JOB = "a run stays on this machine; start the command where it is to run"

UNREAD = {
    "reward_model": "an online run learns from the environment's own reward; leave it out",
    "cudnn_deterministic": "is not supported; leave it out",
    "num_workers": f"{_NO_LOADER} (algorithm.collection.num_workers steps the environments)",
    "batch_size": "is of supervised training; an online run has algorithm.minibatch_size",
    "prefetch_factor": _NO_LOADER,
    "persistent_workers": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "log_freq": "metrics are written after every iteration; leave it out",
    "eval_steps": _NO_HELD_OUT,
    "max_eval_samples": _NO_HELD_OUT,
    "use_policy_training_preset": _OPTIMIZERS,
    "optimizer": _OPTIMIZERS,
    "scheduler": _OPTIMIZERS,
    "eval.batch_size": "validation has algorithm.collection.eval_envs environments in each actor; leave it out",
    "eval.use_async_envs": "algorithm.collection.num_workers steps the environments; leave it out",
    "eval.recording": _NO_RECORDING,
    "eval.recording_repo_id": _NO_RECORDING,
    "eval.recording_private": _NO_RECORDING,
    "peft": _ADAPTERS,
    "job": _NO_JOB,
    "save_checkpoint_to_hub": _NO_PUSH,
    "sample_weighting": "is of supervised training; leave it out",
    # After LeRobot 0.6.1.
    "accelerator": _ONE_DEVICE,
    "checkpoint_format": _ONE_DEVICE,
    "ema": "is of supervised training; leave it out, or begin with a checkpoint's pretrained_model_ema folder",
    "parallelism": _ONE_DEVICE,
    "mixer": _NO_REPLAY,
    "online_ratio": _NO_REPLAY,
    "dataset.repo_type": "demonstrations are read from a data set; leave it out",
    "dataset.use_imagenet_stats": "a policy keeps the statistics that it was trained with; leave it out",
    "dataset.return_uint8": "pictures are always read as uint8; leave it out",
    "dataset.streaming": "demonstrations are drawn at random from a data set on this machine; leave it out",
    "dataset.eval_split": _NO_HELD_OUT,
    "env.max_parallel_tasks": "is lerobot-eval's; algorithm.collection.num_workers steps the environments",
    "env.multitask_eval": "nothing in LeRobot reads it; leave it out",
    "policy.n_obs_steps": "a decision has one observation; leave it out",
    "policy.use_amp": "precision is set by policy.dtype",
    "policy.use_peft": _ADAPTERS,
    "policy.push_to_hub": _NO_PUSH,
    "policy.repo_id": _NO_PUSH,
    "policy.private": _NO_PUSH,
    "policy.tags": _NO_PUSH,
    "policy.license": _NO_PUSH,
    "policy.optimizer_lr": _OPTIMIZERS,
    "policy.optimizer_weight_decay": _OPTIMIZERS,
    "policy.optimizer_grad_clip_norm": _OPTIMIZERS,
    "policy.scheduler_warmup_steps": _OPTIMIZERS,
    "policy.concurrency": "is of LeRobot's own learner and actor; those of PI-RL use threads",
    "policy.actor_learner_config.policy_parameters_push_frequency": "every version is sent; leave it out",
    "policy.actor_learner_config.queue_get_timeout": "is of LeRobot's own learner and actor; leave it out",
    "algorithm.policy_config": "is a copy of the policy's settings; set policy.* instead",
}
"""Settings that LeRobot's parser takes and an online run does not read, with what to do instead."""


def read_configuration(path: str | Path | None) -> dict[str, Any] | None:
    """Content of a configuration file; empty without one, None for one that is not on this machine or cannot be read.

    Args:
        path: As in `--config_path`: a file, or the folder of a checkpoint.
    """
    if not path:
        return {}
    file = Path(path)
    file = file / TRAIN_CONFIG_NAME if file.is_dir() else file
    if not file.is_file():
        return None
    try:
        # JSON is YAML, too, but for numbers such as 1e-4.
        content = (
            load_json(file) if file.suffix == ".json" else yaml.safe_load(file.read_text(encoding="utf-8"))
        )
    except (yaml.YAMLError, ValueError, OSError):
        # LeRobot's parser says what is wrong with it.
        return None
    return content if isinstance(content, dict) else None


def is_of_checkpoint(path: str | Path | None) -> bool:
    """Whether a configuration file is that of a checkpoint, or its folder."""
    file = Path(path or "").absolute()
    folder = file if file.is_dir() else file.parent
    return folder.name == PRETRAINED_MODEL_DIR and (folder / TRAIN_CONFIG_NAME).is_file()


def given_names(arguments: Sequence[str], config_path: str | None) -> set[str]:
    """Dotted names of the settings that a user has given, on the command line or in a file of his own.

    Args:
        arguments: The command line.
        config_path: As in `--config_path`; what a checkpoint's own file says was not given now.
    """
    names = {
        argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")
    }
    content = None if is_of_checkpoint(config_path) else read_configuration(config_path)
    return names | {*_leaves(content or {})}


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def refuse_unread(config: Any, given: set[str]) -> None:
    """Refuses settings that would have no effect.

    Args:
        config: The configuration, before LeRobot has completed it.
        given: Dotted names of what was given.

    Raises:
        ConfigError: If one of `UNREAD` was given and has another value than its default.
    """
    for name, reason in UNREAD.items():
        if any(one == name or one.startswith(f"{name}.") for one in given) and _is_changed(config, name):
            raise config_error(name, f"has no effect here: {reason}")


def _is_changed(config: Any, name: str) -> bool:
    """Whether a setting differs from its default; one of a section that is not there does not."""
    *sections, leaf = name.split(".")
    for section in sections:
        config = getattr(config, section, None)
    field = (
        next((f for f in dataclasses.fields(config) if f.name == leaf), None) if config is not None else None
    )
    if field is None:
        return False
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    if name == "eval.batch_size":
        # LeRobot writes another number in the place of 0.
        default = type(config)(n_episodes=config.n_episodes).batch_size
    return bool(getattr(config, leaf) != default)


def check_round_trip(config: Any) -> None:
    """Checks that every section is the same when it is read back from a file, as a resumed run does.

    Args:
        config: The validated configuration.

    Raises:
        ConfigError: If one is not.
    """
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if not dataclasses.is_dataclass(section):
            continue
        try:
            written = _written(section)
            read = draccus.decode(type(section), written)
            same = _written(read) == written
            if isinstance(section, EnvConfig):
                same = same and env_to_policy_features(read) == env_to_policy_features(section)
            reason = "it comes back changed"
        except Exception as error:  # Whatever a class of somebody else's raises.
            same, reason = False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if not same:
            raise config_error(
                field.name,
                f"a resumed run could not read it from its checkpoint ({reason}); annotate every field of "
                f"{type(section).__name__} with its type, such as features: dict[str, PolicyFeature]",
            )


def _written(section: Any) -> Any:
    """A section as it stands in a file, without its type, which says how to read it."""
    written = json.loads(json.dumps(draccus.encode(section)))
    return {name: value for name, value in written.items() if name != draccus.CHOICE_TYPE_KEY}
