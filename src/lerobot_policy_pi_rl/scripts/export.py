"""`lerobot-pi-rl-export`: gives back the stock policy of a `pi_rl` checkpoint."""

import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.utils.constants import (
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
    PRETRAINED_MODEL_DIR,
)

from lerobot_pi_rl_cli.options import parse

from ..bases.configuration import load_stock_config
from ..bases.stock import StockBase, make_stock_policy
from ..bases.untrusted import check_processors, forbid_remote_code
from ..configuration_pi_rl import PIRLConfig
from ..errors import config_error
from ..modeling_pi_rl import PIRLPolicy
from .console import run_command

RELATIVE = (
    "warning: its actions are relative to the state, and it executes {steps} of them at a time; lerobot-eval adds each "
    "to the state of its own step, not to the one that they were chosen in: evaluate it with "
    "--policy.n_action_steps=1, or run it by lerobot-rollout --inference.type=rtc"
)
PROCESSORS = (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME)


def export(path: Path, output_dir: Path) -> str:
    """Writes the stock checkpoint.

    Args:
        path: Checkpoint of a `pi_rl` policy.
        output_dir: Folder to create.

    Returns:
        One line that says what was written.

    Raises:
        ConfigError: If there is no whole checkpoint of a `pi_rl` policy around a stock one, or what was written does
            not load.
        FileExistsError: If the folder exists.
    """
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already: choose another --output_dir, or remove it first")
    _check_folder(path)
    forbid_remote_code()
    # They are copied, for LeRobot's commands to load.
    check_processors(path, "policy.path")
    config = PreTrainedConfig.from_pretrained(path)
    if not isinstance(config, PIRLConfig):
        raise config_error("policy.path", f"{path} holds a {config.type!r}; only a 'pi_rl' can be exported")
    if config.stock is None:
        raise config_error(
            "policy.path",
            f"{path} has the compact base, which is a part of this package: there is no stock policy in it",
        )
    config.place_on("cpu")
    base = PIRLPolicy.from_pretrained(path, config=config).base
    assert isinstance(base, StockBase)
    stock = base.export()
    # Where it was trained, as the checkpoint says: here may be no GPU, and LeRobot keeps a "cpu" wherever it finds it.
    stock.config.device = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))["device"]
    stock.save_pretrained(output_dir)
    _copy_processors(path, output_dir)
    del base, stock
    _check_loads(output_dir)
    if getattr(config.stock, "use_relative_actions", False) and config.n_action_steps > 1:
        print(RELATIVE.format(steps=config.n_action_steps), file=sys.stderr, flush=True)
    return f"{config.stock.type} written to {output_dir}; it needs nothing of this package any more"


def _copy_processors(path: Path, output_dir: Path) -> None:
    """Copies the processors, with the folders that they read, such as LeRobot's `tokenizer`."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            shutil.copytree(entry, output_dir / entry.name, dirs_exist_ok=True)
        elif entry.name.startswith(PROCESSORS):
            shutil.copy2(entry, output_dir / entry.name)


def _check_loads(folder: Path) -> None:
    """Loads what was written as LeRobot does, policy and processors.

    Raises:
        ConfigError: If that fails. The folder stays: it may load where a tokenizer can be fetched.
    """
    try:
        config = load_stock_config(str(folder))
        # As LeRobot's commands set them; EO1 looks there for the VLM that it was built from.
        config.device, config.pretrained_path = "cpu", folder
        make_stock_policy(config, str(folder))
        # LeRobot's loaders raise any error of the libraries below them.
        overrides = {"device_processor": {"device": "cpu"}}
        make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    except Exception as error:
        problem = " ".join(str(error).split())[:300]
        raise config_error(
            "output_dir",
            f"{folder} was written, but LeRobot {version('lerobot')} cannot load it here ({problem}); "
            "check that --policy.path is whole, and that the tokenizer it names can be found",
        ) from error


def _check_folder(path: Path) -> None:
    """Looks for all that an export is made of, before anything slow starts."""
    if not (path / CONFIG_NAME).is_file():
        inside = path / PRETRAINED_MODEL_DIR
        found = f"; it is in {inside}" if (inside / CONFIG_NAME).is_file() else ""
        raise config_error(
            "policy.path",
            f"{path} is no checkpoint's `{PRETRAINED_MODEL_DIR}` folder, which has a {CONFIG_NAME}{found}",
        )
    missing = [f"{name}.json" for name in PROCESSORS if not (path / f"{name}.json").is_file()]
    if missing:
        raise config_error(
            "policy.path",
            f"{path} lacks {', '.join(missing)}, without which the stock policy cannot act; take a whole one",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = parse("export", arguments)
    run_command(lambda: print(export(options.path, options.output_dir)))


if __name__ == "__main__":
    main(sys.argv[1:])
