"""One rank's part of a save under way: copied while training waits, written while it goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from .manifest import FileDigests, rank, world, write_text
from .rank_file import HostBuffer, PartSpan, find_nonfinite, write_file
from .sharding import to_write

NOT_FINITE = "holds numbers that are not finite"
"""In an error of a save that would have kept a state gone wrong; other errors are the disk's."""


class PendingSave:
    """This rank's part of a save under way.

    Args:
        folder: where all ranks write, not yet the checkpoint's name.
        state: the text of state.json, which the first rank writes.
        tensor_index: type and shape of every whole tensor, by name.
    """

    def __init__(self, folder: Path, state: str, tensor_index: dict[str, Any]) -> None:
        self.folder, self.state, self.tensor_index = folder, state, tensor_index
        self.name = f"rank-{rank():05d}.safetensors"
        self.digests: FileDigests = {}
        self.report: dict[str, Any] = {}
        """What the first rank wants to know beside the digests: how many numbers this rank writes, and what it thinks all ranks write."""
        self.error: str | None = None
        self.thread: Thread | None = None

    def start(self, buffer: HostBuffer, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's parts, and write the copies in a thread."""
        try:
            spans = buffer.copy(to_write(tensors, rank(), world()))
        except (OSError, RuntimeError, MemoryError, ValueError) as problem:  # the other ranks wait to hear of it in `finish`
            self.error = f"rank {rank()}: {problem}"
        else:
            self.thread = Thread(target=self._write, args=(buffer, spans), name="checkpoint", daemon=True)
            self.thread.start()

    def _write(self, buffer: HostBuffer, spans: list[PartSpan]) -> None:
        try:
            data = buffer.bytes(spans[-1].stop if spans else 0)
            if bad := find_nonfinite(spans, data):
                raise ValueError(f"{bad} {NOT_FINITE}")
            self.folder.mkdir(parents=True, exist_ok=True)
            if spans:
                self.digests[self.name] = write_file(self.folder / self.name, spans, data)
            self.report = {
                "numel": sum(span.part.box.numel for span in spans),
                "listed": zlib.crc32(json.dumps(self.tensor_index).encode()),
            }
            if rank() == 0:
                self.digests["state.json"] = write_text(self.folder / "state.json", self.state)
        except Exception as problem:  # whatever it is, it must be said where the ranks meet
            self.error = f"rank {rank()}: {problem}"

    def discard(self) -> None:
        """Leave nothing of it: each rank its own file, the first one the folder."""
        with contextlib.suppress(OSError):
            if rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                (self.folder / self.name).unlink(missing_ok=True)
                self.folder.rmdir()  # where a machine does not share the folder
