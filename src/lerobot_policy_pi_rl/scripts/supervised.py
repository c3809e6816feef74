"""`lerobot-pi-rl-supervised`: LeRobot's supervised training, with an end when validation stops rising."""

import argparse
import logging
import sys
from pathlib import Path

from lerobot.configs import parser
from lerobot.configs.train import TrainPipelineConfig
from lerobot.scripts import lerobot_train

from ..bases.untrusted import check_processors, forbid_remote_code
from ..errors import config_error
from ..runtime.supervised import Converged, additions
from .arguments import with_path
from .console import run_command


def take_options() -> argparse.Namespace:
    """Takes our own options from the command line and leaves LeRobot's there."""
    own = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, add_help=False, allow_abbrev=False)
    own.add_argument("--patience", type=int)
    own.add_argument("--max_minutes", type=float)
    options, sys.argv[1:] = own.parse_known_args()
    return options


def check_validation(options: argparse.Namespace, cfg: TrainPipelineConfig) -> None:
    """Checks that there are validations to end after, and checkpoints that they choose from.

    Raises:
        ConfigError: If there are none.
    """
    if options.patience is None and options.max_minutes is None:
        return
    if cfg.env is None or cfg.env_eval_freq < 1:
        raise config_error(
            "env_eval_freq", "--patience and --max_minutes need --env.type and --env_eval_freq"
        )
    if cfg.save_freq < 1 or cfg.env_eval_freq % cfg.save_freq:
        raise config_error(
            "env_eval_freq",
            f"{cfg.env_eval_freq} must be a multiple of save_freq={cfg.save_freq}: what is validated must be saved",
        )


def train() -> None:
    """Trains as `lerobot-train` does."""
    options = take_options()

    @parser.wrap()
    def checked(cfg: TrainPipelineConfig) -> None:
        check_validation(options, cfg)
        forbid_remote_code()
        if (path := parser.get_path_arg("policy")) is not None:
            check_processors(path, "policy.path")
        if cfg.resume and (file := parser.parse_arg("config_path")) is not None:
            check_processors(Path(file).parent, "config_path")
        lerobot_train.train(cfg)

    with additions(options.patience, options.max_minutes):
        try:
            checked()
        except Converged as end:
            logging.info("Training ends: %s", end)


def main() -> None:
    """Entry point."""
    run_command(train, with_path)


if __name__ == "__main__":
    main()
