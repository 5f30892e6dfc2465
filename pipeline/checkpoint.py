"""Checkpoints that are whole or absent: written aside, synced, hashed, renamed; only then are old ones removed.

    checkpoint-500/
      rank-00000.safetensors ...   the tensors, shared out among the ranks
      state.json                   step, configuration, data: what is no tensor
      manifest.json                size and sha256 of every file; written last

A folder whose files do not match its manifest is named and passed over for the
one before. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
PREFIX = "checkpoint-"


class Store:
    """The checkpoints of one run.

    Args:
        root: the run's folder.
        keep: newest checkpoints that stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> list[str]:
        """Write a checkpoint; called by all ranks together.

        Args:
            step: optimiser steps done; names the folder.
            tensors: the same on every rank, by name.
            state: anything JSON keeps.

        Returns:
            What went wrong on any rank, the same list on all; empty if all
            went well. After an error nothing of it is left, and older
            checkpoints are as they were.
        """
        if _broadcast(verify(self.root / f"{PREFIX}{step}") is None if _rank() == 0 else None):
            return []  # resumed and stopped again before a step was done
        temporary = self.root / _broadcast(f".tmp-{step}-{uuid.uuid4().hex[:8]}")
        name = f"rank-{_rank():05d}.safetensors"
        files: dict[str, dict[str, Any]] = {}
        error = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            save_file(_share(tensors), temporary / name)
            files[name] = _seal(temporary / name)
        except (OSError, SafetensorError) as problem:
            error = f"rank {_rank()}: {problem}"
        gathered = _gather((files, error))
        errors = [text for _, text in gathered if text]
        if _rank() == 0:
            if not errors:
                merged = {file: seal for part, _ in gathered for file, seal in part.items()}
                errors = self._commit(step, temporary, merged, state)
            if errors:
                shutil.rmtree(temporary, ignore_errors=True)
        return _broadcast(errors)

    def _commit(self, step: int, temporary: Path, files: dict[str, Any], state: dict[str, Any]) -> list[str]:
        """Complete, rename and prune, on the first rank alone."""
        final = self.root / f"{PREFIX}{step}"
        try:
            _write_json(temporary / "state.json", state)
            files["state.json"] = _seal(temporary / "state.json")
            _write_json(temporary / "manifest.json", {"version": 1, "step": step, "files": files})
            _sync(temporary)
            if final.exists():  # a damaged one: a good one is not written again
                os.rename(final, self.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
            os.rename(temporary, final)
            _sync(self.root)
        except OSError as problem:
            return [f"rank 0: {problem}"]
        self._prune()
        return []

    def _prune(self) -> None:
        """Remove all but the newest; each is renamed first, so that none is ever half there under its name."""
        try:
            for folder in self.folders()[self.keep :]:
                os.rename(folder, self.root / f".tmp-old-{uuid.uuid4().hex[:8]}")
        except OSError as problem:
            print(f"an old checkpoint could not be removed: {problem}", flush=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove what an interrupted save or removal left behind."""
        for folder in self.root.glob(".tmp-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def folders(self) -> list[Path]:
        """Checkpoints by name, the newest first, good or not."""
        found = [p for p in self.root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)

    def latest(self) -> Path | None:
        """The newest good checkpoint, the same on all ranks; damaged ones are named and passed over."""
        good = None
        if _rank() == 0:
            for folder in self.folders():
                fault = verify(folder)
                if fault is None:
                    good = folder
                    break
                print(f"checkpoint {folder} is damaged and passed over: {fault}", flush=True)
        return _broadcast(good)


def choose(store: Store, resume: str) -> Path | None:
    """The checkpoint to go on from; None to start afresh.

    Args:
        store: of the run.
        resume: `latest`, `none` or a checkpoint's folder.

    Raises:
        ValueError: a start that newer checkpoints in the run's folder would outlive.
    """
    if resume == "latest":
        return store.latest()
    newest = next(iter(store.folders()), None)
    if resume == "none":
        if newest is not None:
            raise ValueError(f"checkpoint.resume=none, but {store.root} holds {newest.name}: resume it, or give another --output_dir.")
        return None
    chosen = Path(resume)
    step = load_state(chosen)["step"]
    if newest is not None and int(newest.name.removeprefix(PREFIX)) > step:
        raise ValueError(
            f"checkpoint.resume={resume} is older than {newest.name} in {store.root}: to branch off, give another --output_dir."
        )
    return chosen


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, seal in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != seal["bytes"]:
                return f"{name} has {size} bytes, the manifest says {seal['bytes']}"
            if _sha256(folder / name) != seal["sha256"]:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """What is no tensor of a checkpoint.

    Raises:
        ValueError: a folder that is no good checkpoint.
    """
    fault = verify(folder)
    if fault:
        raise ValueError(f"{folder} is no whole checkpoint ({fault}): give a folder checkpoint-<step>, or `latest`.")
    return json.loads((folder / "state.json").read_text())


def load_tensors(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a verified checkpoint, whatever number of ranks wrote it."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of tensors that every rank holds: the largest first, each to the rank with the least so far."""
    loads = [0] * _world()
    mine = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        rank = loads.index(min(loads))
        loads[rank] += tensor.nbytes
        if rank == _rank():
            mine[name] = tensor.detach().cpu().contiguous().clone()
    return mine


def _seal(path: Path) -> dict[str, Any]:
    """Force a file to the disk; its size and hash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _broadcast(value: T) -> T:
    """The first rank's value, on all."""
    box = [value]
    if _world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def _gather(value: T) -> list[T]:
    """Every rank's value, on all."""
    if _world() == 1:
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def find(folder: Path) -> Path:
    """A whole checkpoint to start another run from: the folder itself, or the newest of a run's.

    Raises:
        ValueError: none there, or a damaged one.
    """
    found = folder if (folder / "state.json").exists() else Store(folder, keep=1).latest()
    if found is None:
        raise ValueError(f"checkpoint.start_from={str(folder)!r} holds no whole checkpoint: name a run's folder, or a checkpoint of it.")
    load_state(found)  # verified
    return found


def averages(folder: Path, label: str = "") -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, by the network's own names.

    Args:
        folder: a verified checkpoint.
        label: of a further average, such as `width=0.05`, which has the trained weights alone; by default the first.
    """
    return _part(folder, f"ema[{label}]." if label else "ema.")


def raw_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint as they were trained, by the network's own names."""
    return _part(folder, "model.")


def _part(folder: Path, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in load_tensors(folder).items() if name.startswith(prefix)}
