"""`lerobot-pi-rl-learner`: trains a flow policy from what actors collect."""

import torch
from lerobot.configs import parser

from ..runtime.pipeline import PIRLTrainConfig
from .console import log_to, run_command, stop_on_signals


@parser.wrap()
def learn(cfg: PIRLTrainConfig) -> None:
    """Runs the learner with a parsed configuration."""
    from ..runtime.learner import Learner

    # Small matrices gain nothing from a second thread, and it would wait for cores that the actors use.
    torch.set_num_threads(1)
    stop = stop_on_signals()
    cfg.validate()
    assert cfg.output_dir is not None
    log_to(cfg.output_dir / "logs" / "learner.log")
    Learner(cfg, stop).run()


def main() -> None:
    """Entry point."""
    run_command(learn)


if __name__ == "__main__":
    main()
