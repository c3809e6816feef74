"""`lerobot-pi-rl-actor`: collects decisions for a learner."""

import contextlib

import torch
from lerobot.configs import parser

from ..runtime.pipeline import PIRLTrainConfig, parts
from .arguments import completed
from .console import leave_on_signals, log_to, run_command, stop_on_signals


@parser.wrap()
def act(cfg: PIRLTrainConfig) -> None:
    """Runs the actor with a parsed configuration."""
    from ..runtime.actor import Actor

    # The environments' workers are where the cores are needed.
    torch.set_num_threads(1)
    stop = leave_on_signals()
    cfg.is_actor = True
    cfg.validate()
    assert cfg.output_dir is not None
    log_to(cfg.output_dir / "logs" / f"actor_{parts(cfg)[1].collection.actor_id}.log")
    with contextlib.closing(Actor(cfg, stop)) as actor:
        stop_on_signals(stop)
        actor.run()


def main() -> None:
    """Entry point."""
    run_command(act, completed)


if __name__ == "__main__":
    main()
