"""`lerobot-pi-rl-status`: asks a running learner how it stands, and shows the answer on one screen."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_pi_rl_cli.options import parse

from ..algorithm.configuration_security import SecurityConfig
from ..runtime.access import read_actor_access
from ..runtime.client import ask_status
from .console import run_command


def describe(status: Mapping[str, Any]) -> str:
    """One screen about a learner.

    Args:
        status: What it answered.
    """
    progress, success, now = status["progress"], status["success"], status["now"]
    lines = [
        f"{status['state']}, version {progress['version']:,} of {progress['steps']:,}, "
        f"up {duration(now - status['started_at'])}, lerobot_policy_pi_rl {status['package']}",
        f"environment steps  {progress['env_steps']:,} of {progress['online_steps']:,} "
        f"({progress['env_steps_per_s']:,.0f}/s)",
        f"learned from       {progress['decisions']:,} decisions, {progress['episodes']:,} episodes",
        f"success            exploring {share(success['exploring'])}, validation {share(success['validation'])}, "
        f"best {share(success['best'])} (version {success['best_version']:,})",
        f"age of decisions   mean {status['staleness']['mean']:.1f}, oldest {status['staleness']['max']:.0f} versions",
        f"last checkpoint    {status['last_checkpoint'] or 'none'}",
        f"actors             {len(status['actors'])} of at most {status['max_actors']}; since the start "
        f"{status['actors_joined']} joined ({status['actors_reconnected']} again, {status['actors_replaced']} in place "
        f"of a silent one), {status['actors_left']} left",
    ]
    lines += [describe_actor(actor, now) for actor in status["actors"]]
    lines += [
        f"waiting messages   decisions {status['waiting']['decisions']}, interactions "
        f"{status['waiting']['interactions']}",
        f"dropped            {counts(status['dropped'])}",
        f"refused            {counts(status['refused'])}",
    ]
    return "\n".join(lines)


def describe_actor(actor: Mapping[str, Any], now: float) -> str:
    """One line about an actor."""
    line = f"  {actor['actor']:>3}  {actor['peer']}, joined {duration(now - actor['joined_at'])} ago"
    if actor["version"] is None:
        return f"{line}, nothing sent yet"
    rate = f", {actor['env_steps_per_s']:,.0f} steps/s" if actor["env_steps_per_s"] else ""
    return f"{line}, last sent {duration(now - actor['sent_at'])} ago with version {actor['version']:,}{rate}"


def duration(seconds: float) -> str:
    """Such as `3 h 5 min`, `12 min 4 s`, `7 s`."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def share(value: float | None) -> str:
    """A success rate, or that there is none yet."""
    return "-" if value is None or value < 0 else f"{value:.2f}"


def counts(values: Mapping[str, int]) -> str:
    """Counters that are not zero, by name."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(values.items()) if count) or "nothing"


def status(arguments: Sequence[str] | None = None) -> str:
    """Asks and describes; see `lerobot_pi_rl_cli.options`.

    Raises:
        ConfigError: If an argument is wrong.
        ConnectionError: If no learner answers, or it refuses.
    """
    given = parse("status", arguments)
    host, port = given.learner
    security = SecurityConfig(given.token_file, given.certificate, given.key, given.authority, given.mutual)
    answer = ask_status(host, port, read_actor_access(security, host, port))
    return json.dumps(answer, indent=2) if given.json else describe(answer)


def main() -> None:
    """Entry point."""
    run_command(lambda: print(status()))
