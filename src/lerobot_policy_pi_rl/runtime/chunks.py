"""Messages that travel in chunks: what is let through of a stream that anybody may have sent."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lerobot.transport import services_pb2

CHUNK_OVERHEAD = 1024
"""Bytes that a chunk counts at least: those without data take memory, too."""

TOO_LARGE = "too large"

TransferState = services_pb2.TransferState


def whole_messages(chunks: Iterable[Any], max_bytes: int, reject: Callable[[str], None]) -> Iterator[Any]:
    """Lets only the chunks of well-formed messages through.

    LeRobot's `receive_bytes_in_chunks`, which joins them afterwards, takes any order, has no size limit,
    and raises on an unknown state. A message with a fault is dropped up to its end; the stream lives on.

    Args:
        chunks: Protobuf messages with `transfer_state` and `data`.
        max_bytes: Most bytes of one message.
        reject: Called for each dropped message, with the reason in a few words.

    Yields:
        The chunks of each message, once its last one has come.
    """
    held: list[Any] = []
    size, skipping = 0, False
    for chunk in chunks:
        state = chunk.transfer_state
        if state == TransferState.TRANSFER_BEGIN:
            if held:
                reject("unfinished")
            held, size, skipping = [], 0, False
        # Unknown fields count, too.
        size += max(chunk.ByteSize(), CHUNK_OVERHEAD)
        fault = None if skipping else _fault(state, bool(held))
        if size > max_bytes + CHUNK_OVERHEAD:
            # What is dropped is counted, too: a message that never ends is rejected again and again.
            fault = TOO_LARGE
        if fault:
            reject(fault)
            # An unknown chunk between two messages is dropped alone; its successor begins a message.
            skipping = skipping or bool(held) or fault != "unknown state"
            held, size = [], 0
        elif not skipping:
            held.append(chunk)
        if state == TransferState.TRANSFER_END:
            yield from held
            held, size, skipping = [], 0, False
    if held:
        reject("unfinished")


def _fault(state: int, begun: bool) -> str | None:
    """What is wrong with a chunk in its place, or None."""
    if state not in (TransferState.TRANSFER_BEGIN, TransferState.TRANSFER_MIDDLE, TransferState.TRANSFER_END):
        return "unknown state"
    return "no beginning" if state == TransferState.TRANSFER_MIDDLE and not begun else None
