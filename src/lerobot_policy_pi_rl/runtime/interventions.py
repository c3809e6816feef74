"""What people did during a run: on the disk, in memory up to a limit, and as batches for supervised co-training."""

import bisect
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from ..algorithm.demonstrations import DemonstrationBatch, chunk_rows
from ..algorithm.pi_rl import Demonstrations
from .checkpoint import CheckpointError, replace_file
from .packing import WireError
from .wire import WireSpec, decode_demonstrations, encode_demonstrations

logger = logging.getLogger(__name__)

FOLDER = "interventions"

# Packed observations and task texts, actions `[B, H, A]` and their padding -> the batch of the base's own loss.
Prepare = Callable[[dict[str, Tensor], list[str], dict[str, Tensor]], dict[str, Any]]


class InterventionStore:
    """The newest steps that people took, in a folder beside the checkpoints.

    Each message of an actor is a file, in the wire's own format and as strictly checked when it is read again. It is
    written when it comes, not with a checkpoint: what a person has shown stays true, whatever the policy learned since.
    One thread may add while another draws.
    """

    def __init__(self, output_dir: Path, spec: WireSpec, prepare: Prepare) -> None:
        """Reads what earlier parts of the run have left, and changes nothing of it: that is for `trim` and `add`.

        Args:
            output_dir: The run's directory.
            spec: What actors may send, and how much of it is kept; files beyond that are removed, the oldest first.
            prepare: Makes the batch that the base's loss reads.

        Raises:
            CheckpointError: A file cannot be read, or belongs to another robot or policy.
        """
        self._folder, self._spec, self._prepare = output_dir / FOLDER, spec, prepare
        # Steps that made way for newer ones.
        self.forgotten = 0
        # Each part with its file. Replaced as a whole: whoever has read it once can go on with what it was.
        self._parts = tuple(self._read(file) for file in sorted(self._folder.glob("*.safetensors")))
        # Digest of each of them.
        self._known = {_digest(part) for _, part in self._parts}
        # Of whoever changes them.
        self._changing = threading.RLock()
        if self._parts:
            logger.info("Found %d steps of interventions in %s", len(self), self._folder)

    def __len__(self) -> int:
        """Steps at hand."""
        return sum(len(part) for _, part in self._parts)

    def _read(self, file: Path) -> tuple[Path, DemonstrationBatch]:
        try:
            return file, decode_demonstrations(file.read_bytes(), self._spec)
        except (OSError, WireError) as error:
            raise CheckpointError(
                f"{file} does not fit this run: {error}; move it out of the folder"
            ) from error

    def receive(self, payload: bytes) -> None:
        """Keeps what a message of an actor holds.

        Raises:
            WireError: It is not what it should be.
        """
        self.add(decode_demonstrations(payload, self._spec))

    def add(self, batch: DemonstrationBatch) -> None:
        """Keeps what a person did, in memory alone if the disk is full.

        An actor sends again what may not have arrived before its connection broke; what had arrived is not kept twice.
        """
        digest = _digest(batch)
        with self._changing:
            if digest in self._known:
                logger.info("%d steps of a person came a second time and are kept once", len(batch))
                return
            self._known.add(digest)
            number = int(self._parts[-1][0].stem) + 1 if self._parts else 0
            file = self._folder / f"{number:06d}.safetensors"
            self._write(file, batch)
            self._parts = (*self._parts, (file, batch))
            self.trim()

    def _write(self, file: Path, batch: DemonstrationBatch) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, lambda aside: aside.write_bytes(encode_demonstrations(batch)))
        except OSError as error:
            logger.error("%d steps of a person are in memory alone: %s", len(batch), error)

    def __call__(self, count: int) -> dict[str, Any] | None:
        """A batch of `count` chunks, drawn with replacement; None while nobody has shown anything."""
        parts = [part for _, part in self._parts]
        if not parts:
            return None
        ends = list(itertools.accumulate(map(len, parts)))
        drawn = [self._chunk(parts, ends, row) for row in torch.randint(ends[-1], (count,)).tolist()]
        observation, task, chunk, pad = zip(*drawn, strict=True)
        return self._prepare(
            {key: torch.stack([one[key] for one in observation]) for key in observation[0]},
            list(task),
            {ACTION: torch.stack(chunk), f"{ACTION}_is_pad": torch.stack(pad)},
        )

    def _chunk(
        self, parts: list[DemonstrationBatch], ends: list[int], row: int
    ) -> tuple[dict[str, Tensor], str, Tensor, Tensor]:
        """Observation, task, actions `[H, A]` and padding `[H]` of a step, counted over all parts."""
        number = bisect.bisect_right(ends, row)
        part = parts[number]
        row -= ends[number] - len(part)
        rows, pad = chunk_rows(part.last, torch.tensor([row]), self._spec.action[0])
        seen = {key: value[row] for key, value in part.observation.items()}
        return seen, part.task[row], part.action[rows[0]], pad[0]

    def trim(self) -> None:
        """Forgets the oldest beyond the limits, on the disk as well."""
        with self._changing:
            beyond = surplus((part for _, part in self._parts), self._spec)
            for file, part in self._parts[:beyond]:
                file.unlink(missing_ok=True)
                self._known.discard(_digest(part))
                self.forgotten += len(part)
            self._parts = self._parts[beyond:]


def surplus(parts: Iterable[DemonstrationBatch], spec: WireSpec) -> int:
    """How many of the oldest parts are beyond the limits; the newest one stays, however large it is."""
    steps = size = kept = number = 0
    for number, part in enumerate(reversed(list(parts)), 1):
        steps, size = steps + len(part), size + part.nbytes
        if number == 1 or (steps <= spec.demonstration_steps and size <= spec.demonstration_bytes):
            kept = number
    return number - kept


def _digest(batch: DemonstrationBatch) -> bytes:
    """Of the content: the bytes of a message differ from one encoding to the next."""
    found = hashlib.sha256("\0".join(batch.task).encode())
    tensors = [batch.observation[key] for key in sorted(batch.observation)]
    for tensor in (*tensors, batch.action, batch.last):
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.digest()


def either(sources: Sequence[Demonstrations]) -> Demonstrations:
    """Draws each batch from one of several sources, all equally often, that have any; None if none has."""

    def draw(count: int) -> dict[str, Tensor] | None:
        for number in torch.randperm(len(sources)).tolist():
            batch = sources[number](count)
            if batch is not None:
                return batch
        return None

    return draw
