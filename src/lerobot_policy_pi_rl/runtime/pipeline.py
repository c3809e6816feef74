"""One configuration for actor and learner, and what both build from it in the same way."""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import draccus
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError

# Robots, cameras and teleoperators as LeRobot's own commands know them, so that `env.robot.type` is found.
from lerobot.cameras import opencv  # noqa: F401
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig, parser
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.datasets.utils import INFO_PATH
from lerobot.envs import EnvConfig
from lerobot.envs.configs import HILSerlRobotEnvConfig, LiberoEnv, ResetConfig
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.rl.train_rl import TrainRLServerPipelineConfig
from lerobot.robots import so_follower  # noqa: F401
from lerobot.teleoperators import gamepad, keyboard, so_leader  # noqa: F401
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from lerobot.utils.device_utils import is_torch_device_available
from lerobot.utils.io_utils import load_json, write_json
from torch import Tensor

from ..algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig, discount_within
from ..bases.configuration import STOCK, has_optional_cameras, preprocessor_settings
from ..bases.untrusted import check_processors, forbid_remote_code
from ..configuration_pi_rl import PIRLConfig
from ..errors import ConfigError, check, config_error
from ..modeling_pi_rl import PIRLPolicy
from .access import is_loopback
from .checkpoint import DAMAGE, PARTS, CheckpointError, find_last, saved_settings, verify
from .finite import first_not_finite
from .observations import ObservationPath, offered_features
from .packages import missing_simulator
from .robots import SIMULATION, is_robot
from .settings import check_round_trip, given_names, is_of_checkpoint, read_configuration, refuse_unread
from .wire import WireSpec

# Settings of a policy that say where it begins, which a resumed run does not ask.
BEGINNINGS = ("type", "path", "base_path", "pretrained_path")
# Of a checkpoint, these say what was asked of the training that made it.
PUSH_DEFAULTS = {"push_to_hub": False, "repo_id": None, "private": None, "tags": None, "license": None}
# Settings of a policy that are one value, though they have names in them.
WHOLE_SETTINGS = ("input_features", "output_features", "normalization_mapping")

# Settings that name a file or a folder. A run stores them absolute, so that any working directory can resume it.
STORED_PATHS = (
    "algorithm.security.authority",
    "algorithm.security.certificate",
    "algorithm.security.key",
    "algorithm.security.token_file",
    "dataset.root",
    "env.processor.reward_classifier.pretrained_path",
    "env.robot.calibration_dir",
    "env.teleop.calibration_dir",
    "policy.base_path",
    "policy.pretrained_path",
)

# Settings of an environment that do not change what it does.
COSMETIC_ENV_SETTINGS = ("render_mode", "max_parallel_tasks", "disable_env_checker")


@draccus.encode.register(ResetConfig)
def _encode_reset(config: ResetConfig, declared_type: Any = None) -> dict[str, Any]:
    """Encodes LeRobot's settings of a robot's reset; draccus fails on the one that may be anything."""
    return asdict(config)


@dataclass(kw_only=True)
class PIRLTrainConfig(TrainRLServerPipelineConfig):
    """LeRobot's own configuration of an actor and a learner, with no field of ours beside it and one other default.

    What it adds is in `validate`: it works without a data set, never falls back to SAC, and resumes from a checkpoint
    with its weights.
    """

    # Iterations between validations. LeRobot's 20,000 are more than a run has: nothing would be compared, and no best
    # checkpoint brought back.
    env_eval_freq: int = 20
    # Set by the actor's command: it runs next to a learner that made the output folder, and never loads its
    # checkpoints. Not annotated, so it is no setting and is not saved.
    is_actor = False

    def validate(self) -> None:
        """Completes and checks the configuration.

        Raises:
            ConfigError: If a setting cannot work.
            FileExistsError: If the output folder is taken and the run is not resumed.
        """
        if self.algorithm is None:  # type: ignore[has-type]  # LeRobot's classes are not typed for mypy
            self.algorithm = PIRLAlgorithmConfig()
        if not isinstance(self.algorithm, PIRLAlgorithmConfig):
            raise config_error(
                "algorithm.type",
                f"{self.algorithm.type!r} is trained by lerobot.rl.learner; this command trains pi_rl",
            )
        if self.env is None:
            raise config_error("env.type", "is missing; online training needs an environment")
        if self.resume and self.is_actor:  # type: ignore[has-type]  # as above
            # An actor elsewhere has no checkpoint and begins as configured; its weights come from the learner.
            self.resume = self._has_checkpoint()
        if self.resume:
            self._resume_policy()
            self._resume_folder()
        self._validate_as_lerobot_does()
        assert isinstance(self.policy, PIRLConfig)
        self.algorithm.policy_config = self.policy
        self._make_paths_absolute()
        if self.is_actor and self.algorithm.collection.device is not None:
            self._check_device(self.algorithm.collection.device)
            self.policy.place_on(self.algorithm.collection.device)
        else:
            self._check_policy_device(self.policy)
        missing = missing_simulator(self.env)
        # The actors of a learner that listens on loopback are on its machine; others need no simulator on it. The name
        # of a host is looked up only where that matters.
        if missing and (self.is_actor or is_loopback(self.policy.actor_learner_config.learner_host)):
            raise config_error("env.type", missing)
        check_features(self.policy, self.env, self.rename_map)  # type: ignore[has-type]  # as above
        self._check_algorithm(self.algorithm, self.policy, self.env)
        limit = getattr(self.env, "episode_length", None)
        if self.algorithm.gamma is None and limit:
            self.algorithm.gamma = discount_within(int(limit) / self.policy.n_action_steps)
        if not self.is_actor:
            check_round_trip(self)

    def _check_algorithm(self, algorithm: PIRLAlgorithmConfig, policy: PIRLConfig, env: EnvConfig) -> None:
        """Checks what the algorithm needs of the rest."""
        self._check_lookahead(algorithm.collection.lookahead_steps, policy)
        robot = isinstance(env, HILSerlRobotEnvConfig)
        if robot:
            self._check_robot(algorithm, env)
        if algorithm.collection.task_focus > 0 and not (self.save_checkpoint and self.save_freq > 0):
            raise config_error(
                "algorithm.collection.task_focus",
                "deals the environments anew at every checkpoint, and none are saved; set save_freq",
            )
        # On a robot, people may show what to do while it learns.
        if algorithm.demonstration_weight > 0 and self.dataset is None and not robot:
            raise config_error(
                "dataset.repo_id",
                "is missing; algorithm.demonstration_weight needs demonstrations to train on",
            )
        root = self.dataset.root if self.dataset is not None and not self.is_actor else None
        if root is not None and not (Path(root) / INFO_PATH).is_file():
            raise config_error(
                "dataset.root",
                f"{root} is not a LeRobotDataset: {INFO_PATH} is missing; name the folder that holds it with "
                "--dataset.root=..., or leave dataset.root out to download dataset.repo_id",
            )
        length = getattr(env, "episode_length", None)
        if algorithm.advantage == "group" and length is not None:
            needed = -(-length // policy.n_action_steps)
            if algorithm.collection.decisions < needed:
                raise config_error(
                    "algorithm.collection.decisions",
                    f"{algorithm.collection.decisions} is too few for algorithm.advantage='group': an episode of "
                    f"{length} steps takes {needed} decisions",
                )

    @staticmethod
    def _check_device(device: str) -> None:
        """Checks that the actor's machine has the device it is to run on."""
        try:
            there = is_torch_device_available(device)
        except ValueError:
            there = False
        if not there:
            raise config_error(
                "algorithm.collection.device",
                f"{device!r} is not on this machine; name one that is, such as cpu",
            )

    @staticmethod
    def _check_policy_device(policy: PIRLConfig) -> None:
        """Checks that the device was not exchanged for a slower one: LeRobot only warns of it."""
        check(
            not policy.missing_device,
            "policy.device",
            f"{policy.missing_device!r} is not on this machine; name one that is: --policy.device={policy.device}, if "
            "that is meant",
        )

    @staticmethod
    def _check_lookahead(lookahead: int, policy: PIRLConfig) -> None:
        """Checks that chunks are long enough to be executed from their middle on."""
        executed, name = policy.n_action_steps, "algorithm.collection.lookahead_steps"
        if lookahead > executed:
            raise config_error(
                name,
                f"must be at most policy.n_action_steps={executed}, got {lookahead}: only the next chunk is computed "
                "ahead",
            )
        if lookahead + executed > policy.chunk_size:
            raise config_error(
                name,
                f"{lookahead} needs policy.chunk_size to be at least n_action_steps + lookahead_steps = "
                f"{executed + lookahead}, got {policy.chunk_size}; take a policy with longer chunks, or execute less "
                "of them",
            )

    @staticmethod
    def _check_robot(algorithm: PIRLAlgorithmConfig, env: HILSerlRobotEnvConfig) -> None:
        """Checks that there is one robot, and all that belongs to it."""
        for name, wanted in (("num_envs", 1), ("eval_envs", 0)):
            found = getattr(algorithm.collection, name)
            if found != wanted:
                raise config_error(
                    f"algorithm.collection.{name}",
                    f"must be {wanted} for env.type='gym_manipulator', got {found}: an actor has one robot; for "
                    "several, start an actor for each",
                )
        for name in ("robot", "teleop"):
            missing = getattr(env, name) is None
            if missing == (env.name != SIMULATION):
                fix = (
                    "is missing"
                    if missing
                    else f"does not fit env.name={SIMULATION!r}, which is a simulation"
                )
                raise config_error(
                    f"env.{name}", f"{fix}; a robot needs env.robot and env.teleop, {SIMULATION} neither"
                )

    def _validate_as_lerobot_does(self) -> None:
        """Runs LeRobot's own checks around assumptions that do not hold here."""
        stated, output_dir = self.dataset, self.output_dir  # type: ignore[has-type]
        # It wants a `policy.path` for it, and knows nothing of `policy.base_path`.
        renamed, self.rename_map = self.rename_map, {}  # type: ignore[has-type]
        if stated is None:
            # LeRobot reads `dataset.repo_id` whatever the training is.
            self.dataset = DatasetConfig(repo_id="none")
        # It refuses an output folder that exists, but learner and actors write their logs to the same one.
        self.output_dir = None
        if output_dir is not None and not self.is_actor and not self.resume:
            self._check_unused(Path(output_dir))
        super().validate()
        self.dataset, self.rename_map = stated, renamed
        self.output_dir = output_dir or self.output_dir

    @staticmethod
    def _check_unused(output_dir: Path) -> None:
        if (output_dir / CHECKPOINTS_DIR).exists():
            raise config_error(
                "output_dir",
                f"{output_dir} holds the checkpoints of a run; add --resume=true or name another folder",
            )

    def _resolve_pretrained_from_cli(self) -> None:
        """Takes the policy from `--policy.path`; that of a resumed run comes from its checkpoint.

        LeRobot's checks ask for it, so that what has no effect is refused before them.
        """
        if not self.resume:
            self._begin_policy()
        if not isinstance(self.policy, PIRLConfig):
            kind = self.policy and self.policy.type
            raise config_error(
                "policy.type",
                f"is {kind!r}; this command trains 'pi_rl': begin with "
                + ("it" if kind in STOCK else f"one of {sorted(STOCK)}")
                + " by --policy.type=pi_rl --policy.base_path=...",
            )
        given = given_names(sys.argv[1:], parser.parse_arg("config_path"))
        refuse_unread(self, given)
        self._check_checkpoint_settings(self.policy, given)

    @staticmethod
    def _check_checkpoint_settings(policy: PIRLConfig, given: set[str]) -> None:
        """Checks what has an effect only with a checkpoint, or only without one."""
        check(
            not (policy.pretrained_path or policy.base_path)
            or not any(name.startswith("policy.normalization_mapping") for name in given),
            "policy.normalization_mapping",
            "has no effect here: a checkpoint brings its own processors; leave it out, or train the policy again on "
            "demonstrations with it",
        )
        check(
            policy.pretrained_path is not None or policy.pretrained_revision is None,
            "policy.pretrained_revision",
            "has no effect here: it is of the repository that policy.path names; leave it out, or download that "
            "revision and name its folder",
        )

    def _begin_policy(self) -> None:
        """Takes the policy from the checkpoint that a run begins with, if any."""
        path = parser.get_path_arg("policy")
        check_checkpoint(path)
        if path is None:
            return
        stated = stated_policy()
        revision = parser.parse_arg("policy.pretrained_revision") or stated.get("pretrained_revision")
        file = Path(path) / CONFIG_NAME
        if not file.is_file():
            try:
                file = Path(hf_hub_download(path, CONFIG_NAME, revision=revision))
            except (OSError, ValueError, HfHubHTTPError) as error:
                raise config_error(
                    "policy.path",
                    f"{path!r} is no folder with a {CONFIG_NAME}, and the hub does not give it "
                    f"({' '.join(str(error).split())[:200]})",
                ) from None
        self.policy = self._read_policy(file, stated)
        self.policy.pretrained_path = Path(path)

    def _resume_policy(self) -> None:
        """Takes the policy from the checkpoint to resume from."""
        self.checkpoint_path = self.find_checkpoint()
        # An actor loads nothing but the policy.
        verify(self.checkpoint_path, (PRETRAINED_MODEL_DIR,) if self.is_actor else PARTS)
        folder = self.checkpoint_path / PRETRAINED_MODEL_DIR
        named = named_checkpoint()
        stated = stated_policy() if named is None else edited_policy(self.checkpoint_path)
        try:
            self.policy = self._read_policy(folder / CONFIG_NAME, stated)
        except DAMAGE as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(
                f"{folder / CONFIG_NAME} cannot be read ({problem}); put it back as it was, or resume from another "
                f"checkpoint in {self.checkpoint_path.parent}"
            ) from error
        self.policy.pretrained_path = folder

    def _resume_folder(self) -> None:
        """Goes on in the run's folder that holds the checkpoint, unless `--output_dir` says otherwise.

        The folder in the checkpoint's own configuration is where the run was when it was saved. It may have been moved
        or copied since, and the name may be relative to another working directory.

        Raises:
            ConfigError: If the checkpoint lies in no run's folder and none is named, or the named one has another run.
        """
        named = named_checkpoint()
        if named is None:
            return
        home = run_folder(named)
        if parser.parse_arg("output_dir") is None:
            check(
                self.is_actor or home is not None,
                "output_dir",
                f"is missing; the checkpoint {named} does not lie in a run's folder (<run>/{CHECKPOINTS_DIR}): say "
                "with --output_dir=... where the run is to go on",
            )
            self.output_dir = home or self.output_dir
            return
        output_dir = Path(self.output_dir or "")
        other = (output_dir / CHECKPOINTS_DIR).exists() and (
            home is None or home.resolve() != output_dir.resolve()
        )
        check(
            self.is_actor or not other,
            "output_dir",
            f"{output_dir} holds the checkpoints of another run than {named}; leave --output_dir out to go on where "
            "the checkpoint lies, or name a new folder",
        )

    def _make_paths_absolute(self) -> None:
        """Makes stored paths independent of the working directory.

        Names on the Hub and what does not exist stay as they are, and so does `~`, which each machine has of its own.
        """
        for name in STORED_PATHS:
            *parents, last = name.split(".")
            owner: Any = self
            for parent in parents:
                owner = getattr(owner, parent, None)
            path = getattr(owner, last, None)
            if path is not None and Path(path).exists():
                setattr(owner, last, type(path)(Path(path).absolute()))

    @staticmethod
    def _read_policy(file: Path, stated: Mapping[str, Any]) -> PreTrainedConfig:
        """Reads the configuration of a checkpoint's policy, with what the file of the run and the command line change.

        LeRobot would lose lists and nulls of that file.
        """
        given = parser.get_cli_overrides("policy") or []
        overrides = [one for one in given if one.removeprefix("--").partition("=")[0] not in BEGINNINGS]
        with tempfile.TemporaryDirectory() as aside, _temporary_files_in(aside):
            write_json(with_stated({**load_json(file), **PUSH_DEFAULTS}, stated), Path(aside) / CONFIG_NAME)
            return PreTrainedConfig.from_pretrained(aside, cli_overrides=overrides)

    def _has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        try:
            self.find_checkpoint()
        except (ConfigError, CheckpointError):
            return False
        return True

    def find_checkpoint(self) -> Path:
        """Folder of the checkpoint to resume from: that of `--config_path`, or the last one of `output_dir`.

        Raises:
            ConfigError: If neither is named.
            CheckpointError: If there is none.
        """
        if (named := named_checkpoint()) is not None:
            return named.resolve()
        if self.output_dir is None:
            raise config_error(
                "resume", "needs the --output_dir of the run, or --config_path of one of its checkpoints"
            )
        return find_last(Path(self.output_dir))


def named_checkpoint() -> Path | None:
    """The checkpoint whose configuration `--config_path` names, by the file or its folder; None if it names none."""
    given = parser.parse_arg("config_path")
    if given is None:
        return None
    place = Path(given).absolute()
    folder = place.parent if place.is_file() else place
    return folder.parent if folder.name == PRETRAINED_MODEL_DIR else None


def run_folder(checkpoint_dir: Path) -> Path | None:
    """The output folder of the run that a checkpoint belongs to; None if it lies in none.

    Args:
        checkpoint_dir: Absolute; `last` and other links are followed only where that is needed.
    """
    for place in (checkpoint_dir, checkpoint_dir.resolve()):
        if place.parent.name == CHECKPOINTS_DIR:
            return place.parent.parent
    return None


def stated_policy() -> dict[str, Any]:
    """What a configuration file says of the policy, beside where to begin; that of a checkpoint says nothing new."""
    path = parser.parse_arg("config_path")
    content = None if is_of_checkpoint(path) else read_configuration(path)
    stated = (content or {}).get("policy") or {}
    return {name: value for name, value in stated.items() if name not in BEGINNINGS}


def edited_policy(checkpoint_dir: Path) -> dict[str, Any]:
    """What was edited of the policy in the file of a checkpoint by which a run is resumed, beside where it began."""
    now = load_json(checkpoint_dir / PRETRAINED_MODEL_DIR / TRAIN_CONFIG_NAME).get("policy") or {}
    edits = _edits(saved_settings(checkpoint_dir).get("policy") or {}, now)
    return {name: value for name, value in edits.items() if name not in BEGINNINGS}


def _edits(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not what they were, section by section."""
    edits: dict[str, Any] = {}
    for name, value in now.items():
        was = before.get(name)
        if isinstance(was, Mapping) and isinstance(value, Mapping) and name not in WHOLE_SETTINGS:
            value = _edits(was, value)
            if not value:
                continue
        elif name in before and was == value:
            continue
        edits[name] = value
    return edits


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Has LeRobot put the file in which it hands settings to its parser, and which it leaves there, into a folder."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def with_stated(saved: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them changed, section by section; a section that is null is as it was.

    Args:
        saved: All settings.
        stated: Those to change.
    """
    changed = dict(saved)
    for name, value in stated.items():
        before = saved.get(name)
        if isinstance(before, Mapping) and name not in WHOLE_SETTINGS:
            if value is not None:
                changed[name] = with_stated(before, value)
        else:
            changed[name] = value
    return changed


@dataclass(frozen=True)
class Player:
    """A policy with its processors, as actor and learner both have it.

    Attributes:
        policy: On its device, in evaluation mode.
        preprocessor: The policy's own.
        postprocessor: The policy's own.
        path: Of the observations.
    """

    policy: PIRLPolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    path: ObservationPath

    def preprocess(self, observation: dict[str, Tensor], tasks: list[str]) -> dict[str, Any]:
        """What the base reads, from unpacked observations and task texts."""
        return self.preprocessor({**observation, "task": tasks})

    def preprocess_packed(self, observation: dict[str, Tensor], tasks: list[str]) -> dict[str, Any]:
        """What the base reads, from observations as they cross the wire."""
        return self.preprocess(self.path.unpack(observation), tasks)

    def normalisation(self) -> str:
        """Short fingerprint of the processors' statistics."""
        digest = hashlib.sha256()
        for pipeline in (self.preprocessor, self.postprocessor):
            for step in pipeline.steps:
                for name, value in sorted(step.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(value.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]


def parts(cfg: PIRLTrainConfig) -> tuple[PIRLConfig, PIRLAlgorithmConfig, EnvConfig]:
    """The three parts of a validated configuration, with their own types."""
    assert isinstance(cfg.policy, PIRLConfig)
    assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)
    assert cfg.env is not None
    return cfg.policy, cfg.algorithm, cfg.env


def make_player(cfg: PIRLTrainConfig) -> Player:
    """Builds or loads the policy and its processors.

    Raises:
        ConfigError: If there is no checkpoint where one is named, or it is not that of the configured policy.
    """
    policy_cfg, _, env_cfg = parts(cfg)
    check_checkpoint(policy_cfg.pretrained_path)
    forbid_remote_code()
    if policy_cfg.pretrained_path:
        check_processors(policy_cfg.pretrained_path, "policy.path")
    elif policy_cfg.base_path:
        check_processors(policy_cfg.base_path, "policy.base_path")
    if not policy_cfg.input_features:
        offered = offered_features(env_cfg, policy_cfg, cfg.rename_map)
        policy_cfg.input_features = {k: f for k, f in offered.items() if f.type != FeatureType.ACTION}
    torch.manual_seed(cfg.seed or 0)
    begins_with = policy_cfg.pretrained_path or policy_cfg.base_path
    with _reading(begins_with, SAFETENSORS_SINGLE_FILE):
        policy = _make_policy(policy_cfg, env_cfg, cfg.rename_map)
    broken = first_not_finite(policy.named_parameters())
    check(
        broken is None,
        "policy",
        f"{begins_with} has weights that are not finite, in {broken}; take another checkpoint, such as an earlier one",
    )
    with _reading(begins_with, "policy_preprocessor.json or policy_postprocessor.json"):
        preprocessor, postprocessor = make_pre_post_processors(
            policy_cfg,
            pretrained_path=str(policy_cfg.pretrained_path) if policy_cfg.pretrained_path else None,
            pretrained_revision=policy_cfg.pretrained_revision if policy_cfg.pretrained_path else None,
            preprocessor_overrides={
                "device_processor": {"device": policy_cfg.device},
                **preprocessor_settings(policy_cfg.base),
            },
        )
    path = ObservationPath(policy_cfg.input_features or {}, env_cfg, policy_cfg, cfg.rename_map)
    return Player(policy.eval(), preprocessor, postprocessor, path)


@contextlib.contextmanager
def _reading(folder: str | Path | None, file: str) -> Iterator[None]:
    """Makes one line of what libraries raise over a damaged file of a checkpoint.

    Raises:
        ConfigError: If reading fails, and there is such a folder: of the hub LeRobot tells itself.
    """
    try:
        yield
    except DAMAGE as error:
        if folder is None or not Path(folder).is_dir():
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise config_error(
            "policy",
            f"{file} of {folder} cannot be loaded ({problem}); put it back, or take another checkpoint",
        ) from error


def _make_policy(policy_cfg: PIRLConfig, env_cfg: EnvConfig, renamed: dict[str, str]) -> PIRLPolicy:
    """The policy, on its device.

    Raises:
        ConfigError: If it has other weights than its checkpoint.
    """
    if policy_cfg.base_path and not policy_cfg.pretrained_path and policy_cfg.output_features:
        # LeRobot knows nothing of a base's checkpoint, and would warn of a policy from scratch.
        return PIRLPolicy(policy_cfg).to(policy_cfg.device)
    # LeRobot prints a line when it loads weights, in the middle of whatever the command shows.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            policy = make_policy(policy_cfg, env_cfg=env_cfg, rename_map=renamed)
        except RuntimeError as error:
            # So torch begins its list of weights that have other names or sizes.
            if policy_cfg.pretrained_path is None or "in loading state_dict" not in str(error):
                raise
            raise config_error(
                "policy",
                f"its settings are not those that the weights in {policy_cfg.pretrained_path} were made with; put back "
                "those of policy.base and the sizes of chunks",
            ) from error
    assert isinstance(policy, PIRLPolicy)
    return policy


def check_checkpoint(path: str | Path | None) -> None:
    """Checks that a folder holds a policy.

    Args:
        path: As given by the user. One that can be a name on the Hub (`policy`, `user/policy`) is left to LeRobot.

    Raises:
        ConfigError: If it holds none.
    """
    if path is None or (Path(path) / "config.json").is_file():
        return
    if Path(path).is_absolute() or len(Path(path).parts) > 2:
        raise config_error(
            "policy.path", f"{path} holds no policy (no config.json); name a pretrained_model folder"
        )


def check_features(policy_cfg: PIRLConfig, env_cfg: EnvConfig, renamed: Mapping[str, str]) -> None:
    """Checks that the environment gives what a trained policy reads and takes what it does.

    Args:
        policy_cfg: The policy.
        env_cfg: The environment.
        renamed: The policy's names of the environment's features, where they differ.

    Raises:
        ConfigError: If a feature is missing or has another shape.
    """
    if isinstance(env_cfg, LiberoEnv) and isinstance(policy_cfg.base, XVLAConfig):
        raise config_error(
            "env.type",
            "LeRobot's processors between LIBERO and X-VLA normalise pictures before they can cross the wire, and are "
            "not supported; take another environment, or another base",
        )
    offered = offered_features(env_cfg, policy_cfg, renamed)
    wanted = {**(policy_cfg.input_features or {}), **(policy_cfg.output_features or {})}
    missing = [key for key in wanted if key not in offered]
    if missing:
        raise config_error(
            "env.type",
            f"{env_cfg.type!r} does not give {', '.join(map(repr, missing))}, which the policy reads; it gives "
            f"{sorted(offered)}: take another environment, or {_other_fix(policy_cfg, missing, offered)}",
        )
    for key, feature in wanted.items():
        given, read = _form(offered[key]), _form(feature)
        if given != read:
            raise config_error(
                "env.type",
                f"{env_cfg.type!r} has {key!r} with {given}, but the policy was trained with {read}; set the "
                "environment as it was in the demonstrations, or train the policy on some of this one (lerobot-train)",
            )


def _form(feature: PolicyFeature) -> str:
    """What of a feature must be alike; pictures may have any size, because the policy's base scales them."""
    shape = tuple(feature.shape)
    return f"{shape[0]} channels" if feature.type is FeatureType.VISUAL else f"shape {shape}"


def _other_fix(policy_cfg: PIRLConfig, missing: list[str], offered: Mapping[str, PolicyFeature]) -> str:
    """What helps, beside another environment, where features of the policy are missing."""
    wanted = {**(policy_cfg.input_features or {}), **(policy_cfg.output_features or {})}
    kind = wanted[missing[0]].type
    unused = sorted(key for key, feature in offered.items() if key not in wanted and feature.type is kind)
    if unused:
        return f'rename with --rename_map=\'{{"{unused[0]}": "{missing[0]}"}}\''
    left = {key: feature for key, feature in (policy_cfg.input_features or {}).items() if key not in missing}
    are_cameras = all(wanted[key].type is FeatureType.VISUAL for key in missing)
    if (
        are_cameras
        and has_optional_cameras(policy_cfg.base)
        and policy_cfg.image_features.keys() & left.keys()
    ):
        return f"let it do without by --policy.input_features='{json.dumps(draccus.encode(left))}'"
    return "train the policy on demonstrations of this one (lerobot-train)"


def agreed_settings(cfg: PIRLTrainConfig, player: Player) -> dict[str, Any]:
    """What actor and learner must agree on, for the handshake."""
    policy_cfg, algorithm, env_cfg = parts(cfg)
    env = draccus.encode(env_cfg)
    return {
        "version": package_version("lerobot_policy_pi_rl"),
        "seed": cfg.seed,
        # Each actor runs its share of the validation's starts, as many as it believes that there are actors, and the
        # learner adds them up; whether there are environments for it alone decides when episodes begin anew.
        "env_eval_freq": cfg.env_eval_freq,
        "eval": {"n_episodes": cfg.eval.n_episodes},
        "env": {"type": env_cfg.type, **{k: v for k, v in env.items() if k not in COSMETIC_ENV_SETTINGS}},
        "policy": {
            # Learner and actor may compute on different devices.
            "base": {k: v for k, v in draccus.encode(policy_cfg.base).items() if k != "device"},
            "trainable": policy_cfg.trainable,
            "lora_rank": policy_cfg.lora_rank,
            "lora_alpha": policy_cfg.lora_alpha,
            "explorer": asdict(policy_cfg.explorer),
            "chunk_size": policy_cfg.chunk_size,
            "n_action_steps": policy_cfg.n_action_steps,
            "num_inference_steps": policy_cfg.num_inference_steps,
            "input_features": draccus.encode(policy_cfg.input_features),
            "normalisation": player.normalisation(),
        },
        "algorithm": {
            "collection": {
                "num_actors": algorithm.collection.num_actors,
                "num_envs": algorithm.collection.num_envs,
                "eval_envs": algorithm.collection.eval_envs,
                "decisions": algorithm.collection.decisions,
                "reward": algorithm.collection.reward,
                "group_size": algorithm.collection.group_size,
                "lookahead_steps": algorithm.collection.lookahead_steps,
                "max_staleness": algorithm.collection.max_staleness,
            }
        },
    }


def wire_spec(cfg: PIRLTrainConfig, player: Player) -> WireSpec:
    """The decisions that a learner with this configuration accepts."""
    policy_cfg, algorithm, env_cfg = parts(cfg)
    base, collection = player.policy.base, algorithm.collection
    return WireSpec(
        observation=player.path.wire_fields(),
        chain=(player.policy.recorded_steps() + 1, base.chunk_size, base.action_dim),
        action=(policy_cfg.chunk_size, base.real_action_dim),
        denoising_steps=policy_cfg.num_inference_steps,
        max_rows=collection.num_envs * collection.decisions,
        demonstration_steps=algorithm.intervention_capacity if is_robot(env_cfg) else 0,
        demonstration_bytes=algorithm.intervention_megabytes * 10**6 if is_robot(env_cfg) else 0,
    )
