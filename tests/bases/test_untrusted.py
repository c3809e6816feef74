"""A checkpoint's files are data: loading one imports and runs nothing that it names."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot.configs import parser
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry

from lerobot_policy_pi_rl.bases.untrusted import PROCESSOR_FILES, check_processors, forbid_remote_code
from lerobot_policy_pi_rl.errors import ConfigError

PREPROCESSOR, POSTPROCESSOR = PROCESSOR_FILES


class OfAPlugin(ObservationProcessorStep):
    """A step as an installed plugin may have it: imported, and not registered."""

    def observation(self, observation: dict) -> dict:
        return observation

    def transform_features(self, features: dict) -> dict:
        return features


def write(folder: Path, *steps: Any, name: str = PREPROCESSOR) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"name": "processor", "steps": steps}))
    return folder


@pytest.mark.parametrize(
    "step",
    [
        {"class": "subprocess.Popen", "config": {"args": ["touch", "mark"]}},
        {"class": "os.system", "config": {"command": "touch mark"}},
        {"class": "antigravity.fly"},
        {"class": "lerobot.processor.pipeline.importlib"},
        {"class": "builtins.exec"},
        {"class": "no_dot"},
        {"class": 3},
        {"config": {}},
        "a text",
    ],
    ids=lambda step: str(step)[:30],
)
@pytest.mark.parametrize("name", PROCESSOR_FILES)
def test_what_is_no_processor_step_is_refused_and_not_imported(tmp_path: Path, step: Any, name: str) -> None:
    good = {"registry_name": "rename_observations_processor", "config": {}}
    folder = write(tmp_path / "checkpoint", good, step, name=name)
    with pytest.raises(ConfigError, match=rf"policy.path`: step 1 of .*{name}.* is refused") as error:
        check_processors(folder, "policy.path")
    assert "\n" not in str(error.value)
    assert "antigravity" not in sys.modules


def test_steps_that_are_registered_or_of_an_installed_plugin_are_taken(tmp_path: Path) -> None:
    of_plugin = {"class": f"{OfAPlugin.__module__}.OfAPlugin"}
    assert OfAPlugin.__module__ in sys.modules
    registered = [{"registry_name": name} for name in ProcessorStepRegistry.list()]
    assert len(registered) > 10
    check_processors(write(tmp_path / "checkpoint", *registered, of_plugin), "policy.path")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"steps": 3}', "\x00"])
def test_what_is_no_processor_at_all_is_left_to_lerobot(tmp_path: Path, content: str) -> None:
    (tmp_path / PREPROCESSOR).write_text(content)
    check_processors(tmp_path, "policy.path")
    check_processors(tmp_path / "nowhere" / "at" / "all", "policy.path")


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose configuration and tokenizer name Python files beside them."""
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Mine: pass\n"
    (folder / "mine.py").write_text(code)
    names = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoProcessor": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    processor = {"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    tokenizer = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"])
def test_code_beside_a_model_is_not_run_even_where_lerobot_trusts_it(
    with_code: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers import dynamic_module_utils as utils

    monkeypatch.setattr(utils, "get_cached_module_file", utils.get_cached_module_file)
    forbid_remote_code()
    with pytest.raises(ValueError, match="comes with Python code"):
        getattr(transformers, kind).from_pretrained(str(with_code), trust_remote_code=True)
    assert not (with_code.parent / "mark").exists()


def test_a_registered_step_cannot_run_code_beside_its_model(
    with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeRobot's own step for action tokens trusts what it is given by default."""
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils as utils

    monkeypatch.setattr(utils, "get_cached_module_file", utils.get_cached_module_file)
    forbid_remote_code()
    step = ProcessorStepRegistry.get("action_tokenizer_processor")
    with pytest.raises(ValueError, match="comes with Python code"):
        step(action_tokenizer_name=str(with_code))
    assert not (with_code.parent / "mark").exists()


@pytest.fixture
def marking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A package that can be imported; tells whether it was."""
    (tmp_path / "marking_package.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda: "marking_package" in sys.modules


def test_a_stored_configuration_discovers_no_packages(
    tmp_path: Path, marking: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the command line has LeRobot import a package."""
    from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig

    stored = tmp_path / "train_config.json"
    stored.write_text(json.dumps({"policy": {"type": "pi_rl", "discover_packages_path": "marking_package"}}))
    monkeypatch.setattr(sys, "argv", ["test", f"--config_path={stored}"])

    @parser.wrap()
    def read(cfg: PIRLTrainConfig) -> None:
        """Reads a configuration."""

    with pytest.raises((Exception, SystemExit)):
        read()
    assert not marking()


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_yaml_tags_of_a_configuration_make_no_objects(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig

    stored = tmp_path / f"train_config{suffix}"
    stored.write_text(f"job_name: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    monkeypatch.setattr(sys, "argv", ["test", f"--config_path={stored}"])

    @parser.wrap()
    def read(cfg: PIRLTrainConfig) -> None:
        """Reads a configuration."""

    with pytest.raises((Exception, SystemExit)):
        read()
    assert not (tmp_path / "mark").exists()
