"""Names and texts of the MetaWorld tasks, known without loading the simulator."""

import difflib
import functools
import importlib.resources
import json

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)


@functools.cache
def _lerobot_table() -> dict[str, dict[str, str]]:
    """LeRobot's own table of MetaWorld tasks (texts, expert class names)."""
    file = importlib.resources.files("lerobot.envs") / "metaworld_config.json"
    return json.loads(file.read_text(encoding="utf-8"))


def all_tasks() -> list[str]:
    """The 50 task names, sorted."""
    return sorted(_lerobot_table()["TASK_DESCRIPTIONS"])


# LeRobot gives push and push-back one text, which a policy conditioned on it could not tell apart.
OWN_TEXTS = {"push-back-v3": "Push the puck back to a goal"}


def task_text(task: str) -> str:
    """What the task asks for, in words: LeRobot's own, except `OWN_TEXTS`."""
    return OWN_TEXTS.get(task) or _lerobot_table()["TASK_DESCRIPTIONS"][task]


def expert_name(task: str) -> str:
    """Name of the class in `metaworld.policies` that solves the task by script."""
    return _lerobot_table()["TASK_POLICY_MAPPING"][task]


def expand_tasks(selection: str) -> list[str]:
    """Turns a selection into task names.

    Args:
        selection: One name, several separated by commas, or a group (`MT10`, `MT50`).

    Returns:
        Task names, in the order asked for.

    Raises:
        ValueError: A name is unknown, given twice, or the selection is empty.
    """
    groups = {"MT10": list(MT10), "MT50": all_tasks()}
    names: list[str] = []
    for entry in (part.strip() for part in selection.split(",")):
        names += groups.get(entry, [entry] if entry else [])
    if not names:
        raise ValueError(f"{selection!r} names no task; give e.g. 'peg-insert-side-v3' or 'MT10'")
    for name in names:
        if name not in groups["MT50"]:
            near = difflib.get_close_matches(name, [*groups["MT50"], *groups], n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else "see docs/environments.md for the 50 names"
            raise ValueError(f"unknown MetaWorld task {name!r}: {hint}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{selection!r} names {twice!r} twice; give each task once")
    return names
