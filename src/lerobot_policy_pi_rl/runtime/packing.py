"""Bytes that hold tensors and a header: safetensors with strict JSON, taken apart without trust in any of them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

MAX_JSON_DEPTH = 16
"""Levels of lists and objects inside each other; deeper ones could exhaust the stack of whoever walks them."""


class WireError(ValueError):
    """A message is not what it should be; the text is one line."""


@dataclass(frozen=True)
class Parts:
    """A payload taken apart, nothing in it checked yet but its kind."""

    header: object
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def pack(
    kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> bytes:
    """Writes tensors, a kind and a JSON header as safetensors."""
    text = {**metadata, "kind": kind, "header": json.dumps(dict(header))}
    return save_safetensors(_independent(tensors), metadata=text)


def unpack(kind: str, data: bytes, max_header_bytes: int, names: Set[str] | None = None) -> Parts:
    """Reads what `pack` wrote.

    Args:
        kind: Kind of message that is expected.
        data: The message.
        max_header_bytes: Most bytes of its header.
        names: The tensors that must be in it, looked at before one is made; None takes any.

    Raises:
        WireError: It is no safetensors payload of this kind.
    """
    header = read_header(data, max_header_bytes)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WireError("the safetensors header has no metadata")
    if metadata.get("kind") != kind:
        raise WireError(f"a message of {short(metadata.get('kind'))} where {kind} were expected")
    if names is not None and header.keys() != names:
        missing, extra = sorted(names - header.keys()), sorted(header.keys() - names)
        raise WireError(f"wrong set of tensors: missing {short(missing)}, not expected {short(extra[:3])}")
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
        # KeyError: a dtype that torch lacks; the others: a shape or buffer that torch refuses.
        raise WireError(f"not a safetensors payload: {short(error)}") from error
    return Parts(read_json(metadata.get("header"), "the header"), metadata, tensors)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and contents, in hexadecimal; the order of the tensors does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_header(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The header of a safetensors payload, whose metadata safetensors' own `load` does not return.

    The format is eight bytes of length, little-endian, then that many bytes of JSON.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, max_bytes):
        raise WireError(f"cut short or not safetensors: {len(data)} bytes")
    header = read_json(data[8 : 8 + length], "the safetensors header")
    if not isinstance(header, dict):
        raise WireError("the safetensors header is no JSON object")
    return header


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on CPU, contiguous, none sharing memory with another, as safetensors demands."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def read_record[T](kind: type[T], values: object) -> T:
    """A header record from parsed JSON, with exactly its fields in exactly their types."""
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or values.keys() != expected.keys():
        raise WireError(f"the header must have exactly the fields {', '.join(expected)}")
    for name, value in values.items():
        if type(value) is not expected[name]:
            raise WireError(f"header field {name}: got {type(value).__name__} {short(value)}")
        if not 0 <= value < 2**63:
            raise WireError(f"header field {name}: {short(value)} is out of range")
    return kind(**values)


def read_json(text: bytes | str | None, what: str) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no half characters, not deep."""
    if text is None:
        raise WireError(f"{what} is missing")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_constant=_refuse_constant)
        _checkread_json(value)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {short(error)}") from error
    return value


def _checkread_json(value: object) -> None:
    """Every text can be written, and nothing is nested deeper than `MAX_JSON_DEPTH`.

    Raises:
        ValueError: If not.
    """
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        texts = (item for item in level if isinstance(item, str))
        # JSON can escape one half of a surrogate pair, which is no character and cannot be encoded.
        "".join(texts).encode()
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def _inside(value: object) -> Iterable[object]:
    """What a JSON value holds, names included."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    """`json` would take NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is not allowed")


def short(value: object, limit: int = 120) -> str:
    """A value for an error text: one line, printable, never long."""
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."
