"""LeRobot's own parser and factories know pi_rl, unpatched; wrong settings and wrong commands end in one clear line."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig, parser
from lerobot.envs.factory import make_env_config
from lerobot.policies.factory import (
    get_policy_class,
    make_policy,
    make_policy_config,
    make_pre_post_processors,
)
from lerobot.rl.algorithms.factory import get_algorithm_class, make_algorithm, make_algorithm_config
from lerobot.rl.algorithms.sac.sac_algorithm import SACAlgorithm
from lerobot.rl.train_rl import TrainRLServerPipelineConfig
from lerobot.scripts import lerobot_eval, lerobot_train

from lerobot_policy_pi_rl import MetaworldStateEnv, PIRLAlgorithmConfig, PIRLConfig
from lerobot_policy_pi_rl.algorithm import factory
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

DISCOVER = "--policy.discover_packages_path=lerobot_policy_pi_rl"
TRAIN = ["--dataset.repo_id=nobody/nothing", "--policy.type=pi_rl", "--policy.push_to_hub=false"]
RL = ["--policy.type=pi_rl", "--policy.device=cpu", "--algorithm.type=pi_rl"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Calls one of LeRobot's wrapped commands with arguments, in this process."""

    def call(command: Callable[[], object], *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["lerobot-command", *arguments])
        return command()

    return call


@parser.wrap()
def parse_rl(cfg: TrainRLServerPipelineConfig) -> TrainRLServerPipelineConfig:
    """What LeRobot's learner and actor do first."""
    return cfg


@pytest.fixture
def policy() -> PIRLPolicy:
    """A policy made by LeRobot from an environment's features."""
    config = make_policy_config("pi_rl", device="cpu", push_to_hub=False)
    return make_policy(config, env_cfg=make_env_config("metaworld_state"))


# The parser


def test_policy_and_algorithm_parse_together(run: Callable[..., TrainRLServerPipelineConfig]) -> None:
    cfg = run(
        parse_rl,
        DISCOVER,
        *RL,
        "--policy.explorer.kind=flow_noise",
        "--policy.base.type=compact",
        "--policy.base.hidden_dim=64",
        "--algorithm.collection.num_envs=7",
        "--algorithm.dual_clip=3",
        "--env.type=metaworld_state",
        "--env.task=reach-v3",
    )
    assert isinstance(cfg.policy, PIRLConfig)
    assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)
    assert isinstance(cfg.env, MetaworldStateEnv)
    assert (cfg.policy.explorer.kind, cfg.policy.explorer.recording) == ("flow_noise", "joint")
    assert cfg.policy.base.hidden_dim == 64
    assert (cfg.algorithm.collection.num_envs, cfg.algorithm.dual_clip) == (7, 3.0)


def test_a_configuration_survives_a_file(
    run: Callable[..., TrainRLServerPipelineConfig], tmp_path: Path
) -> None:
    cfg = run(parse_rl, *RL, "--algorithm.gamma=0.9", "--policy.chunk_size=8", "--env.type=metaworld_state")
    cfg.save_pretrained(tmp_path)
    read = run(parse_rl, f"--config_path={tmp_path / 'train_config.json'}", "--policy.n_action_steps=6")
    cfg.policy.n_action_steps = 6
    assert (read.policy, read.algorithm, read.env) == (cfg.policy, cfg.algorithm, cfg.env)


# The factories


def test_policy_factories_return_ours(policy: PIRLPolicy) -> None:
    assert isinstance(make_policy_config("pi_rl"), PIRLConfig)
    assert get_policy_class("pi_rl") is PIRLPolicy
    assert type(policy) is PIRLPolicy
    assert policy.config.input_features["observation.state"].shape == (48,)
    assert policy.config.action_feature.shape == (4,)


def test_processor_factory_returns_ours_and_the_chain_of_evaluation_acts(policy: PIRLPolicy) -> None:
    pre, post = make_pre_post_processors(policy.config, dataset_stats=None)
    assert any(type(step).__name__ == "TaskEmbeddingProcessorStep" for step in pre.steps)
    action = post(policy.select_action(pre({"observation.state": torch.zeros(3, 48), "task": ["reach"] * 3})))
    assert action.shape == (3, 4)


def test_algorithm_factories_return_ours(policy: PIRLPolicy) -> None:
    config = make_algorithm_config("pi_rl", policy_config=policy.config)
    assert isinstance(config, PIRLAlgorithmConfig)
    assert type(make_algorithm(config, policy)) is PIRLAlgorithm
    assert PIRLAlgorithmConfig.from_policy_config(policy.config).policy_config is policy.config


def test_lerobot_s_own_algorithm_is_left_alone() -> None:
    factory.install()
    assert get_algorithm_class("sac") is SACAlgorithm
    assert make_algorithm_config("sac").type == "sac"


def test_installing_twice_changes_nothing() -> None:
    from lerobot.rl.algorithms import factory as stock

    before = stock.get_algorithm_class
    factory.install()
    assert stock.get_algorithm_class is before
    assert stock.get_algorithm_class("pi_rl") is PIRLAlgorithm
    with pytest.raises(ValueError, match="'ppo' is not available"):
        stock.get_algorithm_class("ppo")


# Settings that cannot work

POLICY_ERRORS = [
    ("--policy.explorer.kind=sde", "explorer.kind", "'sde' is unknown"),
    ("--policy.explorer.recording=all", "explorer.recording", "'all' is unknown"),
    ("--policy.explorer.noise_level=0", "explorer.noise_level", "must be above 0"),
    ("--policy.explorer.noise_std_min=0.7", "explorer.noise_std_min", "[0.7, 0.6] is upside down"),
    ("--policy.num_inference_steps=-1", "num_inference_steps", "at least 1 denoising step"),
    ("--policy.n_action_steps=6", "n_action_steps", "between 1 and chunk_size=5, got 6"),
    ("--env.type=metaworld_state --env.task=rech-v3", "task", "did you mean reach-v3"),
]
ALGORITHM_ERRORS = [
    ("--algorithm.gamma=2", "gamma", "between 0 and 1, got 2.0"),
    (
        "--algorithm.lr_schedule=linear",
        "lr_schedule",
        "'linear' is unknown; choose one of ['adaptive', 'constant', 'cosine']",
    ),
    ("--algorithm.dual_clip=0.5", "dual_clip", "above 1 or null"),
    ("--algorithm.collection.num_envs=0", "collection.num_envs", "at least 1, got 0"),
    ("--algorithm.lr=1", "lr", "between lr_min=1e-06 and lr_max=0.001"),
]


def assert_one_clear_line(left: SystemExit, setting: str, problem: str) -> None:
    """The command ends with exactly one line, which names the setting and the problem.

    Python prints a text given to `SystemExit` on stderr and leaves with code 1.
    """
    assert isinstance(left.code, str)
    assert left.code.startswith("error: `")
    assert f"{setting}`: " in left.code
    assert problem in left.code
    assert "\n" not in left.code


@pytest.mark.parametrize(("arguments", "setting", "problem"), POLICY_ERRORS)
def test_lerobot_train_names_what_is_wrong_with_the_policy(
    run: Callable[..., object], arguments: str, setting: str, problem: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(lerobot_train.train, *TRAIN, *arguments.split())
    assert_one_clear_line(left.value, setting, problem)


@pytest.mark.parametrize(("arguments", "setting", "problem"), ALGORITHM_ERRORS)
def test_the_rl_parser_names_what_is_wrong_with_the_algorithm(
    run: Callable[..., object], arguments: str, setting: str, problem: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(parse_rl, *RL, *arguments.split())
    assert_one_clear_line(left.value, setting, problem)


@pytest.mark.parametrize("base", ["act", "diffusion"])
def test_a_base_that_cannot_be_one(run: Callable[..., object], base: str) -> None:
    with pytest.raises(SystemExit) as left:
        run(lerobot_train.train, *TRAIN, f"--policy.base.type={base}")
    assert_one_clear_line(left.value, "policy.base.type", f"{base!r} is not a flow-matching policy")


def test_a_setting_of_the_default_base_needs_no_type(run: Callable[..., TrainRLServerPipelineConfig]) -> None:
    cfg = run(parse_rl, DISCOVER, *RL, "--policy.base.hidden_dim=8")
    assert isinstance(cfg.policy, PIRLConfig)
    assert (cfg.policy.base.type, cfg.policy.base.hidden_dim) == ("compact", 8)


@pytest.mark.parametrize("command", [lerobot_eval.eval_main, lerobot_train.train])
def test_loading_a_checkpoint_names_a_setting_that_cannot_work(
    run: Callable[..., object], policy: PIRLPolicy, tmp_path: Path, command: Callable[[], object]
) -> None:
    policy.save_pretrained(tmp_path)
    assert isinstance(PreTrainedConfig.from_pretrained(tmp_path), PIRLConfig)
    arguments = [f"--policy.path={tmp_path}", "--policy.num_inference_steps=-1"]
    needed = (
        "--env.type=metaworld_state" if command is lerobot_eval.eval_main else "--dataset.repo_id=no/thing"
    )
    with pytest.raises(SystemExit) as left:
        run(command, *arguments, needed)
    assert_one_clear_line(left.value, "num_inference_steps", "at least 1 denoising step, got -1")


# Processes of their own, in which nothing has imported the package


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line on stderr that is not empty. Lines before it may be LeRobot's own warnings."""
        return next(line for line in reversed(self.stderr.splitlines()) if line.strip())


COMMANDS = {
    "train": [str(Path(sys.executable).with_name("lerobot-train")), *TRAIN, "--policy.chunk_size=-1"],
    "actor": [sys.executable, "-m", "lerobot.rl.actor", DISCOVER, *RL],
    "learner without algorithm": [sys.executable, "-m", "lerobot.rl.learner", DISCOVER, *RL[:-1]],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """Runs all commands side by side, because each spends seconds importing LeRobot."""
    folder = tmp_path_factory.mktemp("commands")
    started = {
        name: subprocess.Popen(
            command,
            cwd=folder,
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, command in COMMANDS.items()
    }
    try:
        outputs = {name: process.communicate(timeout=240) for name, process in started.items()}
        yield {name: Ended(started[name].returncode, *output) for name, output in outputs.items()}
    finally:
        for process in started.values():
            process.kill()


@pytest.mark.slow
def test_lerobot_train_finds_the_package_by_itself(ended: dict[str, Ended]) -> None:
    """The policy is known, so the error is ours."""
    assert ended["train"].code == 1
    assert ended["train"].last_line == "error: `policy.chunk_size`: must be at least 1, got -1"
    assert "lerobot_policy_pi_rl" not in ended["train"].stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["actor", "learner without algorithm"])
def test_lerobot_s_own_learner_and_actor_name_ours(ended: dict[str, Ended], name: str) -> None:
    module, ours = (f"lerobot.rl.{name.split()[0]}", f"lerobot-pi-rl-{name.split()[0]}")
    assert ended[name].code == 1
    assert ended[name].last_line.startswith(f"error: {module} ")
    assert f"run {ours} with the same arguments instead" in ended[name].last_line
    assert "site-packages/lerobot/rl" not in ended[name].stderr
