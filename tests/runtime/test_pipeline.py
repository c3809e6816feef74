"""One configuration for both sides, and what both build from it."""

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import registry
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.rl.algorithms.sac import SACAlgorithmConfig

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.bases.configuration import COMPACT_SIZES
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime import checkpoint, pipeline
from lerobot_policy_pi_rl.runtime.checkpoint import CheckpointError
from lerobot_policy_pi_rl.runtime.collector import Collector
from lerobot_policy_pi_rl.runtime.handshake import flat_settings, settings_differences
from lerobot_policy_pi_rl.runtime.learner import Learner
from lerobot_policy_pi_rl.runtime.pipeline import (
    PIRLTrainConfig,
    agreed_settings,
    check_checkpoint,
    check_features,
    make_player,
    parts,
    wire_spec,
)
from lerobot_policy_pi_rl.runtime.wire import RolloutHeader, decode_decisions, encode_decisions

MakeConfig = Callable[..., PIRLTrainConfig]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The text of an error, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def saved(make_cfg: MakeConfig, tmp_path: Path) -> Path:
    """Checkpoint of a run that has not begun."""
    from threading import Event

    learner = Learner(make_cfg(), Event())
    learner._save()
    return tmp_path / "run" / "checkpoints" / "000000"


# Validation


@pytest.mark.parametrize(
    ("arguments", "gamma"),
    [
        # 30 steps are 6 decisions of 5.
        (["--env.episode_length=30"], 1 - 1 / 6),
        (["--env.episode_length=200"], 0.975),
        (["--env.episode_length=200", "--algorithm.gamma=0.95"], 0.95),
    ],
)
def test_the_discount_follows_from_the_time_limit_unless_it_is_given(
    make_cfg: MakeConfig, arguments: list[str], gamma: float
) -> None:
    sizes = ["--policy.chunk_size=5", "--policy.n_action_steps=5"]
    cfg = make_cfg("--env.type=metaworld_state", "--env.task=reach-v3", *sizes, *arguments)
    assert cfg.algorithm.gamma == pytest.approx(gamma)


def test_no_data_set_is_needed(make_cfg: MakeConfig) -> None:
    cfg = make_cfg()
    assert cfg.dataset is None
    assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)
    assert cfg.algorithm.policy_config is cfg.policy


def test_the_algorithm_is_ours_when_none_is_named(make_cfg: MakeConfig) -> None:
    cfg = make_cfg(validate=False)
    cfg.algorithm = None
    cfg.validate()
    assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)


def test_a_run_that_nobody_configures_is_validated_again_and_again() -> None:
    stated = {
        "policy": {"type": "pi_rl", "device": "cpu"},
        "algorithm": {"type": "pi_rl"},
        "env": {"type": "test_line"},
    }
    cfg = draccus.decode(PIRLTrainConfig, stated)
    policy, algorithm, _ = parts(cfg)
    steps = algorithm.collection.num_envs * algorithm.collection.decisions * COMPACT_SIZES.n_action_steps
    assert 5 <= policy.online_steps / steps / cfg.env_eval_freq <= 50


SIMULATORS = [
    ("libero", "libero", "CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install 'lerobot_policy_pi_rl[libero]'"),
    ("metaworld", "metaworld", "pip install 'lerobot_policy_pi_rl[metaworld]'"),
    ("metaworld_state", "metaworld", "pip install 'lerobot_policy_pi_rl[metaworld]'"),
    ("metaworld_camera", "metaworld", "pip install 'lerobot_policy_pi_rl[metaworld]'"),
    ("pusht", "gym_pusht", "pip install 'lerobot_policy_pi_rl[pusht]'"),
    ("gym_manipulator", "gym_hil", "pip install 'lerobot_policy_pi_rl[gym_hil]'"),
    ("aloha", "gym_aloha", "pip install 'lerobot[aloha]'"),
    ("libero_plus", "libero", None),
]


@pytest.mark.parametrize(("kind", "package", "install"), SIMULATORS)
def test_a_simulator_that_is_not_installed_is_named_with_what_installs_it(
    make_cfg: MakeConfig, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, install: str | None
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # Another test may have imported it.
    for name in [name for name in registry if name.startswith(f"{package}/")]:
        monkeypatch.delitem(registry, name)
    robot = ["--env.name=gym_hil", "--algorithm.collection.num_envs=1", "--algorithm.collection.eval_envs=0"]
    given = [f"--env.type={kind}", *(robot if kind == "gym_manipulator" else [])]
    fix = install or "install it as its makers say"
    for is_actor in (True, False):
        cfg = make_cfg(*given, validate=False)
        cfg.is_actor = is_actor
        with pytest.raises(ConfigError) as error:
            cfg.validate()
        said = f"`env.type`: '{kind}' needs the package '{package}', which is not installed: {fix}"
        assert one_line(error).startswith(said)


def test_a_learner_without_actors_on_its_machine_needs_no_simulator(
    make_cfg: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gym_aloha", None)
    cfg = make_cfg(
        "--env.type=aloha", "--policy.actor_learner_config.learner_host=192.0.2.10", validate=False
    )
    cfg.validate()
    assert parts(cfg)[2].type == "aloha"


def test_a_device_that_is_not_there_is_refused_for_training_only(
    make_cfg: MakeConfig, tmp_path: Path
) -> None:
    """LeRobot would take the CPU, and days; but what was trained on a GPU can be evaluated and exported anywhere."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = "`policy.device`: 'cuda' is not on this machine; name one that is: --policy.device=cpu, if that is meant"
    for is_actor in (True, False):
        cfg = make_cfg("--policy.device=cuda", validate=False)
        cfg.is_actor = is_actor
        with pytest.raises(ConfigError) as error:
            cfg.validate()
        assert one_line(error) == said
    make_cfg("--policy.device=cpu").policy.save_pretrained(tmp_path / "trained")
    file = tmp_path / "trained" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cuda"}))
    assert PIRLConfig.from_pretrained(tmp_path / "trained").device == "cpu"
    assert (
        PIRLConfig.from_pretrained(tmp_path / "trained", cli_overrides=["--device=cpu"]).missing_device == ""
    )


def test_an_actor_needs_no_device_but_its_own(make_cfg: MakeConfig) -> None:
    cfg = make_cfg("--policy.device=cuda", "--algorithm.collection.device=cpu", validate=False)
    cfg.is_actor = True
    cfg.validate()
    assert parts(cfg)[0].device == "cpu"


def test_another_algorithm_is_refused(make_cfg: MakeConfig) -> None:
    cfg = make_cfg(validate=False)
    cfg.algorithm = SACAlgorithmConfig()
    with pytest.raises(ConfigError, match=r"algorithm.type.*'sac' is trained by lerobot.rl.learner") as error:
        cfg.validate()
    one_line(error)


def test_another_policy_is_refused(make_cfg: MakeConfig) -> None:
    from lerobot.policies.act.configuration_act import ACTConfig

    cfg = make_cfg(validate=False)
    cfg.policy = ACTConfig(push_to_hub=False)
    with pytest.raises(ConfigError, match=r"policy.type.*'act'.*'pi_rl'") as error:
        cfg.validate()
    one_line(error)


def test_an_environment_is_needed(make_cfg: MakeConfig) -> None:
    cfg = make_cfg(validate=False)
    cfg.env = None
    with pytest.raises(ConfigError, match=r"env.type.*is missing") as error:
        cfg.validate()
    one_line(error)


def test_a_folder_with_checkpoints_is_not_overwritten(make_cfg: MakeConfig, saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_dir.*--resume=true") as error:
        make_cfg()
    one_line(error)


def test_a_folder_with_logs_only_is_used(make_cfg: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    assert make_cfg().output_dir == tmp_path / "run"


def test_an_actor_works_next_to_the_checkpoints(make_cfg: MakeConfig, saved: Path) -> None:
    cfg = make_cfg(validate=False)
    cfg.is_actor = True
    cfg.validate()
    assert cfg.output_dir == saved.parents[1]


def test_actors_run_on_a_device_of_their_own(make_cfg: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "is_torch_device_available", lambda device: device == "cuda:1")
    chosen = "--algorithm.collection.device=cuda:1"
    assert parts(make_cfg(chosen))[0].device == "cpu"
    actor = make_cfg(chosen, validate=False)
    actor.is_actor = True
    actor.validate()
    assert parts(actor)[0].device == "cuda:1"


@pytest.mark.parametrize("device", ["mps", "abacus"])
def test_a_device_that_an_actor_has_not_is_refused(make_cfg: MakeConfig, device: str) -> None:
    make_cfg(f"--algorithm.collection.device={device}")  # The learner's machine need not have it.
    actor = make_cfg(f"--algorithm.collection.device={device}", validate=False)
    actor.is_actor = True
    with pytest.raises(ConfigError, match=rf"algorithm.collection.device.*'{device}' is not on") as error:
        actor.validate()
    one_line(error)


# Resuming


def test_a_run_is_resumed_from_its_last_checkpoint(make_cfg: MakeConfig, saved: Path) -> None:
    cfg = make_cfg("--resume=true")
    assert cfg.checkpoint_path == saved
    assert cfg.policy is not None
    assert Path(str(cfg.policy.pretrained_path)) == saved / "pretrained_model"


@pytest.mark.parametrize("named", ["pretrained_model", "pretrained_model/train_config.json"])
def test_a_run_is_resumed_from_a_named_checkpoint(make_cfg: MakeConfig, saved: Path, named: str) -> None:
    last = saved.parent / "last"
    cfg = make_cfg("--resume=true", f"--config_path={last / named}")
    assert cfg.checkpoint_path == saved


def test_an_actor_of_a_resumed_run_needs_only_its_checkpoint(make_cfg: MakeConfig, saved: Path) -> None:
    gone = "--policy.path=outputs/what/it/began/with"
    cfg = make_cfg(gone, "--resume=true", validate=False)
    cfg.is_actor = True
    cfg.validate()
    assert cfg.policy is not None
    assert Path(str(cfg.policy.pretrained_path)) == saved / "pretrained_model"


def test_an_actor_without_the_checkpoint_begins_as_configured(make_cfg: MakeConfig) -> None:
    cfg = make_cfg("--resume=true", validate=False)
    cfg.is_actor = True
    cfg.validate()
    assert cfg.policy is not None
    assert cfg.policy.pretrained_path is None


def test_settings_of_the_policy_can_be_changed_when_resuming(make_cfg: MakeConfig, saved: Path) -> None:
    cfg = make_cfg("--resume=true", "--policy.online_steps=5")
    assert parts(cfg)[0].online_steps == 5
    assert parts(cfg)[0].chunk_size == 5


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_settings_of_the_policy_can_be_changed_in_the_file(
    make_cfg: MakeConfig, saved: Path, tmp_path: Path, suffix: str
) -> None:
    """What the file does not say, or leaves null, is the checkpoint's; the command line wins."""
    policy = {
        "type": "pi_rl",
        "base_path": "outputs/what/it/began/with",
        "base": None,
        "online_steps": 5,
        "num_inference_steps": 3,
        "lora_alpha": 8,
        "explorer": {"noise_level": 0.25},
    }
    file = tmp_path / f"recipe{suffix}"
    # JSON is YAML, too.
    file.write_text(json.dumps({"policy": policy}))
    cfg = make_cfg("--resume=true", f"--config_path={file}", "--policy.lora_alpha=4")
    found, saved_policy = parts(cfg)[0], PreTrainedConfig.from_pretrained(saved / "pretrained_model")
    assert isinstance(saved_policy, PIRLConfig)
    assert (found.online_steps, found.lora_alpha) == (5, 4)
    assert found.explorer.noise_level == 0.25
    assert found.explorer.noise_correlation == saved_policy.explorer.noise_correlation
    assert (found.base, found.base_path) == (saved_policy.base, None)
    assert found.input_features == saved_policy.input_features
    assert Path(str(found.pretrained_path)) == saved / "pretrained_model"
    changed = checkpoint.changed_settings(saved, cfg)
    assert changed["policy.num_inference_steps"] == "policy.num_inference_steps: 4 -> 3"
    assert changed["policy.explorer.noise_level"] == "policy.explorer.noise_level: 1.0 -> 0.25"


def test_the_file_of_the_checkpoint_says_nothing_new(make_cfg: MakeConfig, saved: Path) -> None:
    cfg = make_cfg(
        "--resume=true", f"--config_path={saved.parent / 'last/pretrained_model/train_config.json'}"
    )
    assert pipeline.stated_policy() == {}
    assert checkpoint.changed_settings(saved, cfg) == {}


def test_features_that_a_file_states_are_all_there_are() -> None:
    """Others than those, of the checkpoint, are not kept beside them."""
    features = {"observation.state": {"type": "STATE", "shape": [2]}}
    saved = {"input_features": {**features, "observation.image": {}}, "base": {"type": "compact", "dim": 1}}
    stated = {"input_features": features, "base": {"dim": 2}, "online_steps": 3}
    assert pipeline.with_stated(saved, stated) == {
        "input_features": features,
        "base": {"type": "compact", "dim": 2},
        "online_steps": 3,
    }


def test_resuming_needs_a_checkpoint(make_cfg: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*run/checkpoints/last") as error:
        make_cfg("--resume=true")
    one_line(error)


def test_resuming_needs_a_place(make_cfg: MakeConfig) -> None:
    cfg = make_cfg("--resume=true", validate=False)
    cfg.output_dir = None
    with pytest.raises(ConfigError, match=r"resume.*needs the --output_dir") as error:
        cfg.validate()
    one_line(error)


def test_a_cut_checkpoint_is_not_resumed(make_cfg: MakeConfig, saved: Path) -> None:
    file = saved / "pretrained_model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"pretrained_model/model.safetensors is damaged: its checksum"
    ) as error:
        make_cfg("--resume=true")
    one_line(error)


# Settings that were edited in a checkpoint


def test_edited_settings_of_a_checkpoint_are_in_force_and_named(
    resume_by_file: MakeConfig, saved: Path
) -> None:
    """In the train config, also those of the policy, and in the policy's own file; the command line wins."""
    train_config, config = saved / OWN_FILE, saved / "pretrained_model/config.json"
    edited = json.loads(train_config.read_text())
    edited["steps"] = 77
    edited["algorithm"]["gamma"] = 0.5
    edited["policy"]["online_steps"] = 5
    edited["policy"]["explorer"]["noise_level"] = 0.25
    edited["policy"]["optimizer_lr"] = 0.5
    train_config.write_text(json.dumps(edited))
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"scheduler_warmup_steps": 9, "optimizer_lr": 0.7})
    )
    cfg = resume_by_file(train_config, "--policy.online_steps=6")
    policy, algorithm, _ = parts(cfg)
    assert (cfg.steps, algorithm.gamma) == (77, 0.5)
    assert (policy.online_steps, policy.explorer.noise_level) == (6, 0.25)
    assert (policy.optimizer_lr, policy.scheduler_warmup_steps) == (0.5, 9)
    changed = checkpoint.changed_settings(saved, cfg)
    assert changed.keys() == {
        "steps",
        "algorithm.gamma",
        "policy.online_steps",
        "policy.explorer.noise_level",
        "policy.optimizer_lr",
        "policy.scheduler_warmup_steps",
    }
    assert changed["algorithm.gamma"].endswith(" -> 0.5")


def test_a_resume_leaves_no_temporary_file(
    resume_by_file: MakeConfig, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    resume_by_file(saved / OWN_FILE)
    assert not list((tmp_path / "temporary").iterdir())
    assert tempfile.tempdir == str(tmp_path / "temporary")


# A run that was moved


@pytest.fixture
def resume_by_file(monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """Reads a checkpoint's own configuration with LeRobot's parser, as the commands do, and validates it."""

    def make(file: Path, *arguments: str, actor: bool = False) -> PIRLTrainConfig:
        given = [f"--config_path={file}", "--resume=true", *arguments]
        monkeypatch.setattr(sys, "argv", ["test", *given])
        cfg = PIRLTrainConfig.from_pretrained(file, cli_args=given[1:])
        cfg.is_actor = actor
        cfg.validate()
        return cfg

    return make


OWN_FILE = "pretrained_model/train_config.json"


@pytest.mark.parametrize("actor", [False, True])
@pytest.mark.parametrize("checkpoint", ["last", "000000"])
def test_a_run_that_was_moved_goes_on_where_its_checkpoint_lies(
    resume_by_file: MakeConfig, saved: Path, tmp_path: Path, actor: bool, checkpoint: str
) -> None:
    """Its checkpoint's configuration still names the old folder, in which another run may have begun since."""
    moved = tmp_path / "elsewhere"
    saved.parents[1].rename(moved)
    cfg = resume_by_file(moved / "checkpoints" / checkpoint / OWN_FILE, actor=actor)
    assert cfg.output_dir == moved
    assert cfg.checkpoint_path == moved / "checkpoints/000000"
    named = resume_by_file(
        moved / "checkpoints" / checkpoint / OWN_FILE, f"--output_dir={tmp_path / 'new'}", actor=actor
    )
    assert named.output_dir == tmp_path / "new"


def test_a_checkpoint_is_found_from_its_own_folder(
    resume_by_file: MakeConfig, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved / "pretrained_model")
    cfg = resume_by_file(Path("train_config.json"))
    assert (cfg.output_dir, cfg.checkpoint_path) == (saved.parents[1], saved)


def test_a_run_whose_checkpoints_are_on_another_disk_goes_on_in_its_folder(
    resume_by_file: MakeConfig, saved: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    saved.parent.rename(disk)
    saved.parent.symlink_to(disk)
    assert resume_by_file(saved.parent / "last" / OWN_FILE).output_dir == saved.parents[1]


def test_a_checkpoint_in_no_run_needs_to_be_told_where_to_go_on(
    resume_by_file: MakeConfig, saved: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "backup"
    saved.rename(alone)
    with pytest.raises(ConfigError, match=r"output_dir.*say with --output_dir=\.\.\. where") as error:
        resume_by_file(alone / OWN_FILE)
    one_line(error)
    assert resume_by_file(alone / OWN_FILE, f"--output_dir={tmp_path / 'new'}").output_dir == tmp_path / "new"
    # An actor writes nothing but its log.
    assert resume_by_file(alone / OWN_FILE, actor=True).output_dir == tmp_path / "run"


def test_a_run_is_not_written_over_another_one(
    resume_by_file: MakeConfig, saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"output_dir.*other holds the checkpoints of another run") as error:
        resume_by_file(saved / OWN_FILE, f"--output_dir={other}")
    one_line(error)


def test_stored_paths_do_not_depend_on_the_working_directory(
    make_cfg: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/meta").mkdir(parents=True)
    (tmp_path / "data/meta/info.json").write_text("{}")
    (tmp_path / "token").write_text("a" * 32)
    cfg = make_cfg(
        "--dataset.repo_id=me/data",
        "--dataset.root=data",
        "--algorithm.security.token_file=token",
        "--algorithm.security.certificate=of/the/robot.pem",
        "--algorithm.security.key=~/of/each/machine.pem",
    )
    stored = cfg.to_dict()
    assert stored["dataset"]["root"] == str(tmp_path / "data")
    assert stored["algorithm"]["security"]["token_file"] == str(tmp_path / "token")
    # One that is not there is told of as it was written.
    assert stored["algorithm"]["security"]["certificate"] == "of/the/robot.pem"
    assert stored["algorithm"]["security"]["key"] == "~/of/each/machine.pem"


def test_a_data_set_that_was_moved_is_one_line_with_the_option(make_cfg: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.root.*name the folder .* with --dataset.root=") as error:
        make_cfg("--dataset.repo_id=me/data", f"--dataset.root={tmp_path / 'gone'}")
    one_line(error)


def test_every_setting_that_names_a_file_is_known() -> None:
    """Of a run on a robot, which has the most of them; a new one is to be stored absolute, too, or named here."""
    stated = {
        "policy": {"type": "pi_rl", "device": "cpu"},
        "algorithm": {"type": "pi_rl"},
        "dataset": {"repo_id": "me/data"},
        "env": {
            "type": "gym_manipulator",
            "robot": {"type": "so101_follower", "port": "/dev/ttyACM0"},
            "teleop": {"type": "so101_leader", "port": "/dev/ttyACM1"},
            "processor": {"reward_classifier": {}},
        },
    }
    settings = flat_settings(draccus.encode(draccus.decode(PIRLTrainConfig, stated)))
    ends = ("path", "dir", "root", "file", "certificate", "key", "authority")
    found = {name for name in settings if name.endswith(ends)}
    # Where the run itself is, which is looked for anew.
    assert found == {*pipeline.STORED_PATHS, "output_dir", "checkpoint_path"}


# A policy that was trained before


@pytest.mark.parametrize("path", ["/nowhere/pretrained_model", "outputs/nowhere/pretrained_model"])
def test_a_missing_policy_is_named(make_cfg: MakeConfig, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy.path.*{path} holds no policy") as error:
        make_cfg(f"--policy.path={path}")
    one_line(error)


@pytest.mark.parametrize("named", ["--policy.path", "--policy.pretrained_path"])
def test_a_normalisation_beside_a_checkpoint_is_refused(
    make_cfg: MakeConfig, saved: Path, tmp_path: Path, named: str
) -> None:
    """Its processors are there already."""
    mapping = '--policy.normalization_mapping={"STATE": "MIN_MAX", "ACTION": "MEAN_STD"}'
    other = f"--output_dir={tmp_path / 'other'}"
    make_cfg(mapping, other)
    with pytest.raises(ConfigError, match=r"`policy.normalization_mapping`: has no effect here") as error:
        make_cfg(f"{named}={saved / 'pretrained_model'}", mapping, other)
    one_line(error)


def test_a_revision_without_a_repository_is_refused(make_cfg: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"`policy.pretrained_revision`: has no effect here") as error:
        make_cfg("--policy.pretrained_revision=main")
    one_line(error)


def test_what_may_be_a_name_on_the_hub_is_left_to_lerobot() -> None:
    for name in (None, "policy", "user/policy"):
        check_checkpoint(name)


def test_a_trained_policy_is_taken_with_its_weights(
    make_cfg: MakeConfig, saved: Path, tmp_path: Path
) -> None:
    made = make_player(make_cfg(f"--output_dir={tmp_path / 'other'}"))
    cfg = make_cfg(
        f"--policy.path={saved / 'pretrained_model'}", "--seed=99", f"--output_dir={tmp_path / 'other'}"
    )
    loaded = make_player(cfg)
    for name, value in made.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name


@pytest.mark.parametrize("changed", ["--policy.base.hidden_dim=64", "--policy.chunk_size=8"])
def test_a_policy_of_another_size_than_its_weights_is_one_line(
    make_cfg: MakeConfig, saved: Path, changed: str
) -> None:
    with pytest.raises(ConfigError, match=r"`policy`: its settings are not those that the weights") as error:
        make_player(make_cfg("--resume=true", changed))
    one_line(error)


def test_a_policy_for_another_environment_is_refused(make_cfg: MakeConfig) -> None:
    policy_cfg, _, env_cfg = parts(make_cfg())
    policy_cfg.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (39,))}
    with pytest.raises(
        ConfigError, match=r"env.type.*'observation.state' with shape \(2,\).*\(39,\)"
    ) as error:
        check_features(policy_cfg, env_cfg, {})
    one_line(error)
    policy_cfg.input_features = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 8, 8))}
    with pytest.raises(ConfigError, match=r"'test_line' does not give 'observation.images.top'") as error:
        check_features(policy_cfg, env_cfg, {})
    one_line(error)


def test_what_the_environment_calls_otherwise_can_be_renamed(make_cfg: MakeConfig) -> None:
    renames = '--rename_map={"observation.state": "observation.joints"}'
    cfg = make_cfg(renames)
    policy_cfg, _, env_cfg = parts(cfg)
    policy_cfg.input_features = {"observation.joints": PolicyFeature(FeatureType.STATE, (2,))}
    suggested = r"""--rename_map='\{"observation.state": "observation.joints"\}'"""
    with pytest.raises(ConfigError, match=suggested) as error:
        check_features(policy_cfg, env_cfg, {})
    one_line(error)
    assert cfg.rename_map == {"observation.state": "observation.joints"}
    check_features(policy_cfg, env_cfg, cfg.rename_map)
    player = make_player(cfg)
    found = player.path.from_environment({"agent_pos": np.zeros((2, 2), dtype=np.float32)}, ["a", "b"])
    assert list(found) == ["observation.joints"]


# What both sides agree on


def settings(cfg: PIRLTrainConfig, stats: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    player = make_player(cfg)
    if stats is not None:
        player.preprocessor.steps[-1].load_state_dict(stats)
    return agreed_settings(cfg, player)


def test_two_builds_agree(make_cfg: MakeConfig) -> None:
    one, two = settings(make_cfg()), settings(make_cfg("--algorithm.collection.actor_id=1"))
    assert settings_differences(one, two) == []
    # As it arrives on the other side.
    assert settings_differences(one, json.loads(json.dumps(two, default=str))) == []


def test_a_checkpoint_agrees_with_the_run_that_saved_it(
    make_cfg: MakeConfig, saved: Path, tmp_path: Path
) -> None:
    resumed = settings(make_cfg("--resume=true"))
    fresh = settings(make_cfg(f"--output_dir={tmp_path / 'other'}"))
    assert settings_differences(resumed, fresh) == []


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("--policy.num_inference_steps=5", "policy.num_inference_steps"),
        ("--policy.n_action_steps=4", "policy.n_action_steps"),
        ("--policy.explorer.noise_level=0.4", "policy.explorer.noise_level"),
        ("--policy.base.num_blocks=2", "policy.base.num_blocks"),
        ("--env.limit=13", "env.limit"),
        ("--seed=4", "seed"),
        ("--algorithm.collection.decisions=5", "algorithm.collection.decisions"),
        ("--algorithm.collection.reward=success", "algorithm.collection.reward"),
        ("--algorithm.collection.num_envs=5", "algorithm.collection.num_envs"),
        ("--algorithm.collection.num_actors=2", "algorithm.collection.num_actors"),
        ("--algorithm.collection.eval_envs=3", "algorithm.collection.eval_envs"),
        ("--env_eval_freq=7", "env_eval_freq"),
        ("--eval.n_episodes=7", "eval.n_episodes"),
    ],
)
def test_what_matters_is_compared(make_cfg: MakeConfig, argument: str, name: str) -> None:
    lines = settings_differences(settings(make_cfg()), settings(make_cfg(argument)))
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: learner ")


@pytest.mark.parametrize(
    "argument",
    ["--algorithm.lr=1e-5", "--algorithm.collection.num_workers=1", "--env.disable_env_checker=false"],
)
def test_what_one_side_decides_alone_is_not_compared(make_cfg: MakeConfig, argument: str) -> None:
    assert settings_differences(settings(make_cfg()), settings(make_cfg(argument))) == []


def test_statistics_of_the_normalisation_are_compared(make_cfg: MakeConfig) -> None:
    def stats(mean: float) -> dict[str, torch.Tensor]:
        return {"observation.state.mean": torch.full((2,), mean), "observation.state.std": torch.ones(2)}

    plain, same, other = (settings(make_cfg(), stats(mean)) for mean in (0.5, 0.5, 0.5001))
    assert settings_differences(plain, same) == []
    lines = settings_differences(plain, other)
    assert len(lines) == 1
    assert lines[0].startswith("policy.normalisation: ")


def test_one_seed_gives_one_policy(make_cfg: MakeConfig) -> None:
    one, two, other = (make_player(make_cfg(f"--seed={seed}")).policy.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "arguments", [(), ("--policy.explorer.kind=flow_noise",), ("--policy.n_action_steps=3",)]
)
def test_the_learner_accepts_what_its_actor_collects(
    make_cfg: MakeConfig, make_collector: Callable[..., Collector], arguments: tuple[str, ...]
) -> None:
    collector = make_collector(*arguments)
    collector.restart(0)
    collected = collector.collect(0).decisions
    spec = wire_spec(make_cfg(*arguments), collector._player)
    payload = encode_decisions(collected, RolloutHeader(0, 0, 0))
    assert len(decode_decisions(payload, spec).decisions) == len(collected)


@pytest.mark.parametrize("field", ["pretrained_path", "base_path"])
def test_a_checkpoint_that_names_a_program_as_a_step_runs_nothing(
    make_cfg: Callable[..., PIRLTrainConfig], tmp_path: Path, field: str
) -> None:
    """LeRobot imports and calls whatever a step's class is."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    cfg = make_cfg()
    player = make_player(cfg)
    player.policy.save_pretrained(folder)
    player.preprocessor.save_pretrained(folder)
    player.postprocessor.save_pretrained(folder)
    file = folder / "policy_postprocessor.json"
    content = json.loads(file.read_text())
    content["steps"].append({"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}})
    file.write_text(json.dumps(content))
    # It fails over what it has made, after it was made.
    with contextlib.suppress(Exception):
        PolicyProcessorPipeline.from_pretrained(folder, config_filename=file.name)
    deadline, never = time.monotonic() + 10, threading.Event()
    while not mark.exists() and time.monotonic() < deadline:
        never.wait(0.01)
    assert mark.exists()
    mark.unlink()
    setattr(cfg.policy, field, str(folder))
    with pytest.raises(ConfigError, match=r"'subprocess\.Popen', which is no processor step"):
        make_player(cfg)
    assert not mark.exists()
