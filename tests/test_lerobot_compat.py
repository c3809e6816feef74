"""The private names of LeRobot that this package uses: listed in one place, and found in the installed release."""

import ast
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lerobot_policy_pi_rl
from lerobot_policy_pi_rl.lerobot_compat import NEWEST_TESTED, PRIVATE_NAMES, warn_if_untested

SOURCES = sorted(Path(lerobot_policy_pi_rl.__file__).parent.rglob("*.py"))
# Private names that are not LeRobot's: of transformers, MetaWorld and Python.
OTHERS = {
    "_attn_implementation",
    "_exit",
    "_from_config",
    "_get_pos_goal",
    "_get_pos_objects",
    "_get_quat_objects",
}


@pytest.mark.parametrize("module", PRIVATE_NAMES)
def test_lerobot_has_the_private_names_that_are_used(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"LeRobot has no module {module}"
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    missing = [name for name in PRIVATE_NAMES[module] if not re.search(rf"\b{name}\b", source)]
    assert not missing, f"{module} has no {missing}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def used_names(tree: ast.AST) -> Iterator[str]:
    """Private names that are read off something, imported from LeRobot, or looked up by `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lerobot."):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module of ours defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if getattr(node.value, "id", "") == "self" else []


def test_every_private_name_of_lerobot_is_listed() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    own = {name for tree in trees for name in own_names(tree)}
    listed = {name for names in PRIVATE_NAMES.values() for name in names}
    used = {name for tree in trees for name in used_names(tree) if private(name)}
    assert used - own - OTHERS <= listed
    # `own` has the names that a class of ours redefines.
    assert listed <= used | own


@pytest.mark.parametrize(("version", "lines"), [(str(NEWEST_TESTED), 0), ("0.6.1", 0), ("0.7.0", 1)])
def test_a_newer_lerobot_is_one_line(version: str, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_untested(version)
    assert len(caplog.records) == lines
    assert all(
        "\n" not in record.getMessage() and version in record.getMessage() for record in caplog.records
    )
