"""Loading a checkpoint runs no code of it: checks that are made before LeRobot reads its files.

LeRobot imports whatever a processor's file names as the class of a step, and calls it, before it looks whether that is
a step. Some of its policies, and its reward classifier, let transformers run Python files that lie beside weights.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from lerobot.processor import ProcessorStep
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from ..errors import config_error

PROCESSOR_FILES = (f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json")


def check_processors(path: str | Path, setting: str) -> None:
    """Checks the steps of a checkpoint's processors; nothing is imported for it.

    A step is given by the name under which it is registered, or by its class, which must then be one that is there
    already: LeRobot's, or that of an installed plugin.

    Args:
        path: Folder, or name on the hub.
        setting: What named it, for the error.

    Raises:
        ConfigError: If a step is something else.
    """
    for name in PROCESSOR_FILES:
        file = _find(str(path), name)
        for number, step in enumerate(_steps(file) if file else ()):
            if (problem := _problem(step)) is not None:
                raise config_error(
                    setting,
                    f"step {number} of {path}/{name} {problem}; loading it could run anything, so it is refused: take "
                    "a checkpoint that you trust, or install the plugin that the step belongs to",
                )


def forbid_remote_code() -> None:
    """Has transformers refuse, in this process, Python files that come with a model, whoever asks for them."""
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import dynamic_module_utils

    setattr(dynamic_module_utils, "get_cached_module_file", _refuse_module)  # noqa: B010


def _refuse_module(source: Any, module_file: str, *_: object, **__: object) -> NoReturn:
    """Takes the place of the function through which transformers gets every such file."""
    raise ValueError(
        f"{source} comes with Python code ({module_file}), which is not run when a checkpoint is loaded; take one "
        "whose model is a part of transformers"
    )


def _find(path: str, name: str) -> Path | None:
    """A file of a checkpoint; None if it has none, which LeRobot will say."""
    if Path(path).exists():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def _steps(file: Path) -> list[Any]:
    """The steps that a file names; none where LeRobot will find that it is no processor."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return []
    steps = content.get("steps") if isinstance(content, dict) else None
    return steps if isinstance(steps, list) else []


def _problem(step: Any) -> str | None:
    """Why a step must not be loaded, or None."""
    if not isinstance(step, dict):
        return f"is {str(step)[:80]!r}, which is no step"
    if "registry_name" in step:
        # LeRobot looks it up, and imports nothing.
        return None
    name = str(step.get("class"))[:200]
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if isinstance(found, type) and issubclass(found, ProcessorStep):
        return None
    return f"is {name!r}, which is no processor step of LeRobot or of an installed plugin"
