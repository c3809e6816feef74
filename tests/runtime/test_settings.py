"""Every setting that the parser takes is read, or refused in one line; and what is written can be read back."""

import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import lerobot
import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.default import JobConfig, PeftConfig
from lerobot.envs.configs import EnvConfig, HILSerlRobotEnvConfig, HubEnvConfig, MetaworldEnv
from lerobot.optim import AdamWConfig
from lerobot.optim.schedulers import DiffuserSchedulerConfig
from lerobot.rewards.classifier.configuration_classifier import RewardClassifierConfig
from lerobot.robots import RobotConfig
from lerobot.teleoperators import TeleoperatorConfig
from lerobot.utils.constants import ACTION
from lerobot.utils.sample_weighting import SampleWeightingConfig

import lerobot_policy_pi_rl
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.bases.configuration import CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.runtime.settings import (
    UNREAD,
    check_round_trip,
    given_names,
    refuse_unread,
)

from .conftest import LineConfig, MakeConfig

PACKAGE, LEROBOT = (Path(module.__file__ or "").parent for module in (lerobot_policy_pi_rl, lerobot))
# The classes that stand behind the parts of a run's configuration.
CHOSEN = {"policy": PIRLConfig, "algorithm": PIRLAlgorithmConfig, "policy.base": CompactConfig}
# What of LeRobot, called by this package, reads a part of the configuration: files below its package.
READERS = {
    "dataset": ["datasets/factory.py"],
    "dataset.image_transforms": ["transforms/transforms.py", "transforms/__init__.py", "datasets/factory.py"],
    "wandb": ["common/wandb_utils.py"],
    "env": ["envs", "rl/gym_manipulator.py"],
    "": ["common/wandb_utils.py", "datasets/factory.py"],
    "policy": ["policies/factory.py", "policies/pretrained.py"],
}
# Read, but not by a name that stands in a file.
KNOWN = {
    "env.features_map": "lerobot.envs.utils.env_to_policy_features",
    "wandb.disable_artifact": "no artifact is uploaded in any case",
    "checkpoint_path": "no argument of the parser: it is found",
}
# Parts whose fields belong to somebody else: the classes of devices, and the sections that are refused as a whole.
WHOLE = ("env.robot", "env.teleop", "optimizer", "scheduler", "reward_model", "sample_weighting")


# The walk


def part_of(annotation: Any) -> type | None:
    """The configuration class in an annotation such as `PeftConfig | None`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    options = options or typing.get_args(annotation)
    return next((one for one in options if dataclasses.is_dataclass(one)), None)


def settings(config: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings in a configuration class and its parts."""
    hints = typing.get_type_hints(config)
    for one in dataclasses.fields(config):
        name = f"{prefix}{one.name}"
        part = CHOSEN.get(name) or part_of(hints[one.name])
        if part is None or name in WHOLE or name == "algorithm.policy_config" or name == "env":
            yield name
        else:
            yield from settings(part, f"{name}.")


@functools.cache
def attributes(file: Path) -> frozenset[str]:
    """Names of attributes that a file reads; also those that it looks up by a text."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    texts = {
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "getattr"
        and len(call.args) > 1
        and isinstance(call.args[1], ast.Constant)
    }
    return frozenset(read | texts)


def is_read(name: str) -> bool:
    """Whether this package, beside its configuration classes, or what of LeRobot it calls reads a setting."""
    *parents, leaf = name.split(".")
    ours = [
        file
        for file in PACKAGE.rglob("*.py")
        # A configuration class reads a field to check it; the policy's also resolves what others read.
        if not file.name.startswith("configuration") or file.name == "configuration_pi_rl.py"
    ]
    section = ".".join(parents)
    while section and section not in READERS:
        section = section.rpartition(".")[0]
    theirs = [
        file
        for place in READERS.get(section, [])
        for file in ((LEROBOT / place).rglob("*.py") if (LEROBOT / place).is_dir() else [LEROBOT / place])
    ]
    return name in KNOWN or any(leaf in attributes(file) for file in [*ours, *theirs])


def is_refused(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in UNREAD)


NAMES = sorted(settings(PIRLTrainConfig))
# Of LeRobot's main; its release does not have them.
NEWER = {"accelerator", "checkpoint_format", "ema", "parallelism"}


def test_the_walk_finds_the_parts() -> None:
    assert {
        "seed",
        "eval.recording",
        "dataset.image_transforms.enable",
        "peft.r",
        "job.target",
        "wandb.notes",
        "policy.explorer.kind",
        "policy.base.num_blocks",
        "policy.actor_learner_config.learner_port",
        "algorithm.collection.decisions",
        "algorithm.security.token_file",
    } <= {*NAMES}
    assert len(NAMES) > 150


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_is_read_or_refused(name: str) -> None:
    assert is_refused(name) or is_read(name), f"{name} is neither read nor in UNREAD"


def test_only_settings_that_are_there_are_refused() -> None:
    sections = {name.rpartition(".")[0] for name in NAMES}
    known = {*NAMES, *sections, "env.max_parallel_tasks", "env.multitask_eval"}
    assert set(UNREAD) <= known | NEWER


# Other tests register environments of their own.
ENVIRONMENTS = sorted(
    kind for kind, config in EnvConfig.get_known_choices().items() if config.__module__.startswith("lerobot")
)


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_a_setting_of_an_environment_is_read_or_refused(kind: str) -> None:
    """By its own class, by what makes it, or by us."""
    config = EnvConfig.get_choice_class(kind)
    if issubclass(config, HubEnvConfig):
        # Read by a program on the hub, which is fetched when the environment is made.
        return
    own = attributes(Path(inspect.getfile(config)))
    for one in dataclasses.fields(config):
        name = f"env.{one.name}"
        assert name in UNREAD or one.name in own or is_read(name), name


@pytest.mark.parametrize("name", sorted(settings(HILSerlRobotEnvConfig, "env.")))
def test_a_setting_of_a_robot_is_read_or_refused(name: str) -> None:
    assert is_refused(name) or is_read(name), name


# Refusals

# Another value than the default of each.
OTHER = {
    "reward_model": RewardClassifierConfig(),
    "cudnn_deterministic": True,
    "num_workers": 1,
    "batch_size": 3,
    "prefetch_factor": 1,
    "persistent_workers": False,
    "dataloader_multiprocessing_context": "fork",
    "log_freq": 1,
    "eval_steps": 5,
    "max_eval_samples": 5,
    "use_policy_training_preset": False,
    "optimizer": AdamWConfig(),
    "scheduler": DiffuserSchedulerConfig(num_warmup_steps=3),
    "eval.batch_size": 63,
    "eval.use_async_envs": False,
    "eval.recording": True,
    "eval.recording_repo_id": "me/episodes",
    "eval.recording_private": True,
    "peft": PeftConfig(),
    "job": JobConfig(target="a10g-small"),
    "save_checkpoint_to_hub": True,
    "sample_weighting": SampleWeightingConfig(),
    "mixer": "other",
    "online_ratio": 0.25,
    "dataset.repo_type": "bucket",
    "dataset.use_imagenet_stats": False,
    "dataset.return_uint8": True,
    "dataset.streaming": True,
    "dataset.eval_split": 0.5,
    "env.max_parallel_tasks": 2,
    "env.multitask_eval": False,
    "policy.n_obs_steps": 2,
    "policy.use_amp": True,
    "policy.use_peft": True,
    "policy.push_to_hub": True,
    "policy.repo_id": "me/mine",
    "policy.private": True,
    "policy.tags": ["robot"],
    "policy.license": "mit",
    "policy.optimizer_lr": 0.5,
    "policy.optimizer_weight_decay": 0.5,
    "policy.optimizer_grad_clip_norm": 0.5,
    "policy.scheduler_warmup_steps": 5,
    "policy.concurrency": "changed below",
    "policy.actor_learner_config.policy_parameters_push_frequency": 5,
    "policy.actor_learner_config.queue_get_timeout": 5.0,
    "algorithm.policy_config": PIRLConfig(device="cpu"),
}


@pytest.fixture
def unchanged(make_cfg: MakeConfig) -> PIRLTrainConfig:
    """A configuration in which nothing is set that a run does not read."""
    from lerobot.configs.default import DatasetConfig

    cfg = make_cfg(validate=False)
    cfg.dataset, cfg.env = DatasetConfig(repo_id="me/demonstrations"), MetaworldEnv()
    return cfg


@pytest.mark.parametrize("name", UNREAD)
def test_a_setting_without_effect_is_refused_where_it_is_given(name: str, unchanged: PIRLTrainConfig) -> None:
    *sections, leaf = name.split(".")
    owner: Any = unchanged
    for section in sections:
        owner = getattr(owner, section)
    # Its default may be written down.
    refuse_unread(unchanged, {name})
    if name in NEWER - {one.name for one in dataclasses.fields(owner)}:
        return
    if name == "policy.concurrency":
        owner.concurrency.actor = "processes"
    else:
        setattr(owner, leaf, "another" if name in NEWER else OTHER[name])
    with pytest.raises(ConfigError) as error:
        refuse_unread(unchanged, {name})
    assert str(error.value) == f"`{name}`: has no effect here: {UNREAD[name]}"
    with pytest.raises(ConfigError):
        refuse_unread(unchanged, {f"{name}.something"})
    # A checkpoint's own file brings what its training was asked for.
    refuse_unread(unchanged, {"seed", f"{name}_of_another"})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--policy.push_to_hub=true", "--policy.repo_id=me/x"], "policy.push_to_hub"),
        (["--save_checkpoint_to_hub=true"], "save_checkpoint_to_hub"),
        (["--peft.method_type=LORA"], "peft"),
        (["--optimizer.type=adamw", "--optimizer.lr=1"], "optimizer"),
        (["--log_freq=10"], "log_freq"),
    ],
)
def test_it_is_said_before_lerobot_checks_anything(
    make_cfg: MakeConfig, given: list[str], named: str
) -> None:
    """Which would ask for the name of a repository."""
    with pytest.raises(ConfigError, match=f"`{named}`: has no effect here") as error:
        make_cfg(*given)
    assert "\n" not in str(error.value)


def test_names_are_those_of_the_command_line_and_of_the_user_s_own_file(tmp_path: Path) -> None:
    content = '{"eval": {"batch_size": 2}, "rename_map": {}, "peft": null}'
    own = tmp_path / "mine.json"
    own.write_text(content)
    arguments = ["--seed=3", "--wandb.enable", "true", f"--config_path={own}"]
    line = {"seed", "wandb.enable", "config_path"}
    assert given_names(arguments, str(own)) == line | {"eval.batch_size", "rename_map", "peft"}
    folder = tmp_path / "checkpoints/000010/pretrained_model"
    folder.mkdir(parents=True)
    (folder / "train_config.json").write_text(content)
    for named in (folder, folder / "train_config.json"):
        assert given_names(arguments, str(named)) == line
    assert given_names(arguments, None) == line


# The way to a file and back


@EnvConfig.register_subclass("test_plain")
@dataclass
class PlainConfig(LineConfig):
    """Its features have no type, so that they come back as dictionaries."""

    features: dict = field(default_factory=lambda: {ACTION: PolicyFeature(FeatureType.ACTION, (2,))})


class Secret:
    """Nothing that can be written to a file."""


@EnvConfig.register_subclass("test_secret")
@dataclass
class SecretConfig(LineConfig):
    """It cannot be written."""

    secret: Any = field(default_factory=Secret)


@EnvConfig.register_subclass("test_forgetful")
@dataclass
class ForgetfulConfig(LineConfig):
    """Whatever is read, its limit is doubled."""

    def __post_init__(self) -> None:
        self.limit *= 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PlainConfig, r"`env`: a resumed run could not read it .*AttributeError.*dict\[str, PolicyFeature\]"),
        (SecretConfig, r"`env`: a resumed run could not read it .*SecretConfig"),
        (ForgetfulConfig, r"`env`: a resumed run could not read it .*it comes back changed"),
    ],
)
def test_what_could_not_be_resumed_is_refused_before_training(
    make_cfg: MakeConfig, config: Callable[[], LineConfig], said: str
) -> None:
    cfg = make_cfg(validate=False)
    cfg.env = config()
    if config is PlainConfig:
        cfg.env.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (2,))
    with pytest.raises(ConfigError, match=said) as error:
        cfg.validate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", sorted(EnvConfig.get_known_choices()))
def test_lerobots_environments_can_be_resumed(make_cfg: MakeConfig, kind: str) -> None:
    if kind.startswith("test_") and kind != "test_line":
        return
    cfg = make_cfg()
    cfg.env = EnvConfig.get_choice_class(kind)()
    check_round_trip(cfg)


def test_the_walk_is_over_what_the_parser_takes() -> None:
    """A setting of a device's own class stands for all of them."""
    assert {*WHOLE} & {*NAMES} == {"optimizer", "scheduler", "reward_model", "sample_weighting"}
    for root in (RobotConfig, TeleoperatorConfig):
        assert issubclass(root, draccus.ChoiceRegistry)
