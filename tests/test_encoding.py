"""Every text file is read and written as UTF-8, whatever the locale of the machine says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file for folder in ("src", "benchmarks", "examples", "docs") for file in (ROOT / folder).rglob("*.py")
)
# Calls that open a text file, and at which place they take the mode; None: they take none.
OPENERS = {
    "read_text": None,
    "write_text": None,
    "FileHandler": 1,
    "LogFile": 1,
    "NamedTemporaryFile": 0,
    "fdopen": 1,
    "open": 1,
}
# What has an `open` of its own that is none of a text file.
NO_FILES = ("os", "tarfile", "zipfile", "gzip", "link")


def mode_of(call: ast.Call, place: int | None, default: str) -> str:
    """The mode that a call names, or its default."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    if place is not None and len(call.args) > place:
        given.append(call.args[place])
    return next((str(node.value) for node in given if isinstance(node, ast.Constant)), default)


def without_encoding(code: str) -> Iterator[int]:
    """Lines of calls that open a text file in the encoding of the locale."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in OPENERS or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        module = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        if name == "open" and module in NO_FILES:
            continue
        # The file is the object of `path.open`, and the first argument of `open`.
        place = 0 if name == "open" and is_method else OPENERS[name]
        if "b" not in mode_of(node, place, "w+b" if name == "NamedTemporaryFile" else "r"):
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open(mode='wb')", False),
        ("os.open(path, flags)", False),
        ("NamedTemporaryFile()", False),
        ("NamedTemporaryFile('w')", True),
        ("logging.FileHandler(path)", True),
    ],
)
def test_such_calls_are_found(code: str, found: bool) -> None:
    assert bool(list(without_encoding(code))) == found


def test_every_text_file_is_opened_as_utf_8() -> None:
    assert FILES
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in FILES
        for line in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found
