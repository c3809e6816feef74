"""`lerobot-pi-rl-learner`: trains a flow policy from what actors collect."""

import os

import torch
from lerobot.configs import parser

from ..runtime.pipeline import PIRLTrainConfig
from .arguments import completed
from .console import leave_on_signals, log_to, run_command, stop_on_signals


@parser.wrap()
def learn(cfg: PIRLTrainConfig) -> None:
    """Runs the learner with a parsed configuration."""
    from ..runtime.learner import Learner

    # The actors wait during an update, so a second core is free; small matrices gain nothing from more.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    stop = leave_on_signals()
    cfg.validate()
    assert cfg.output_dir is not None
    log_to(cfg.output_dir / "logs" / "learner.log")
    learner = Learner(cfg, stop)
    stop_on_signals(stop)
    learner.run()


def main() -> None:
    """Entry point."""
    run_command(learn, completed)


if __name__ == "__main__":
    main()
