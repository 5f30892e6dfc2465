"""What a checkpoint holds, read back: whole tensors, or in place the parts that a rank needs, whatever wrote them."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condot.core.printable import one_line

from .manifest import READ_ERRORS, rank, read_bytes, read_manifest, tensor_files, verify
from .rank_file import DTYPES, TensorIndex, read_into, read_tensor_index, read_whole
from .sharding import local_part

MAX_NAMES_SHOWN = 3
"""Names that an error lists of each kind."""
STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step", "images", "cursor", "world"), int),
    **dict.fromkeys(("meter", "guard", "scaler", "config", "facts", "space"), dict),
    **dict.fromkeys(("averages", "class_names", "widths"), list),
    **{"precision": (str, type(None)), "text": (dict, list, type(None))},
}
"""What the parts of a state are, by name."""


MAX_EXTRA_ELEMENTS = 1 << 26
"""Numbers that a network may hold beyond its checkpoint: tables of positions that are computed."""


class CheckpointState(dict[str, Any]):
    """What is no tensor of a checkpoint; a part that is not there is a ValueError, which names the file.

    Raises:
        ValueError: a part is of another kind than a run writes.
    """

    def __init__(self, said: Any, path: Path) -> None:
        if not isinstance(said, dict):
            raise ValueError(f"{path} is no mapping: take another checkpoint.")
        super().__init__(said)
        self.path = path
        for name, kind in STATE_TYPES.items():
            value = said.get(name)
            if name in said and not (isinstance(value, kind) and (kind is not int or (type(value) is int and 0 <= value < 2**63))):
                raise ValueError(f"{path}: {name} is {str(value)[:40]!r}, which no run writes: take another checkpoint.")
        texts = [*said.get("averages", ()), *said.get("class_names", ())]
        if not all(isinstance(text, str) for text in texts) or not all(_are_numbers(said.get(name, {})) for name in ("meter", "guard")):
            raise ValueError(f"{path}: its names are no texts, or its figures no numbers: take another checkpoint.")

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path} says nothing of {name}, as that of a run does: take another checkpoint.")


def _are_numbers(value: Any) -> bool:
    """Return whether all that is nested in lists and mappings is a number, or nothing."""
    if isinstance(value, dict | list):
        return all(map(_are_numbers, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, int | float)


def load_state(folder: Path) -> CheckpointState:
    """Return what is no tensor of a checkpoint.

    Raises:
        ValueError: a folder that is no good checkpoint.
    """
    fault = verify(folder)
    if fault:
        raise ValueError(f"{folder} is no whole checkpoint ({fault}): give a folder checkpoint-<step>, or `latest`.")
    return read_state(folder)


def read_state(folder: Path) -> CheckpointState:
    """Return the same of a folder that may be damaged.

    Raises:
        ValueError: a state.json that cannot be read.
    """
    try:
        said = json.loads(read_bytes(folder / "state.json"))
    except READ_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{folder}/state.json cannot be read ({reason}): take another checkpoint.") from error
    return CheckpointState(said, folder / "state.json")


def tensor_index(folder: Path) -> TensorIndex:
    """Return what a verified checkpoint holds.

    Raises:
        ValueError: it cannot be read.
    """
    said = read_manifest(folder).get("tensors")
    return (
        read_tensor_index(tensor_files(folder)) if said is None else {name: (dtype, tuple(shape)) for name, (dtype, shape) in said.items()}
    )


@contextlib.contextmanager
def explain_errors(folder: Path) -> Iterator[None]:
    """Have what a state that no run of ours wrote ends in, whatever it is, be said as a ValueError of one line that names the folder."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if str(folder) in said or said.startswith("--"):  # of the command line
            raise
        raise ValueError(f"{folder}: {said}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no run that can be read ({one_line(error)[:300]}): take another checkpoint.") from error


def check_network(folder: Path, sizes: Mapping[str, Any], build: Callable[[], nn.Module]) -> None:
    """Refuse, before it takes memory, a network far larger than a checkpoint's tensors.

    Args:
        folder: the checkpoint's, verified.
        sizes: what the network is built of, by name.
        build: gives it without values, on the meta device.

    Raises:
        ValueError: more layers than there are tensors, or more numbers.
    """
    there = [shape for name, (_, shape) in tensor_index(folder).items() if name.startswith("model.")]
    counts = {name: size for name, size in sizes.items() if any(word in name for word in ("depth", "layers", "blocks"))}
    many = [f"model.{name}={size}" for name, size in counts.items() if isinstance(size, int) and size > len(there)]
    network = None if many else build()
    needed = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers())) if network else 0
    held = sum(map(math.prod, there))
    if many or needed > 2 * held + MAX_EXTRA_ELEMENTS:
        said = ", ".join(many) or f"a network of {needed:,} numbers"
        raise ValueError(
            f"{folder}: its state.json tells of {said}, and it holds {held:,} in {len(there)} tensors: take another checkpoint."
        )


def load_tensors(folder: Path, device: torch.device | str = "cpu", prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a verified checkpoint, by name.

    Args:
        folder: the checkpoint's.
        device: where they are put.
        prefix: only those whose names begin so; nothing else is read.

    Raises:
        ValueError: parts of them are not there.
    """
    whole: dict[str, Tensor] = {}
    shapes = {name: shape for name, (_, shape) in tensor_index(folder).items() if name.startswith(prefix)}
    left = {name: math.prod(shape) for name, shape in shapes.items()}
    for path in tensor_files(folder):
        for name, count in read_whole(path, device, shapes, whole).items():
            left[name] -= count
    _check_complete(folder, [name for name, count in left.items() if count] + sorted(shapes.keys() - whole.keys()))
    return whole


def load_into(
    folder: Path, tensors: dict[str, Tensor], *, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = ()
) -> list[str]:
    """Fill tensors in place from a verified checkpoint; of a DTensor only what this rank holds is read.

    Nothing is changed where names, types or shapes do not fit.

    Args:
        folder: the checkpoint's.
        tensors: by name; plain tensors are filled whole.
        allow_missing: beginnings of names that the checkpoint need not have; those stay as they are.
        allow_unexpected: beginnings of names that it may have beside; they are not read.

    Returns:
        The names that were allowed to be missing, and were.

    Raises:
        ValueError: tensors that are missing, unexpected, or of another shape or type, each listed; or parts that are not there.
    """
    there = tensor_index(folder)
    _check_matches(folder, there, tensors, tuple(allow_missing), tuple(allow_unexpected))
    wanted = {name: part for name, t in tensors.items() if name in there and (part := local_part(name, t)) and part.box.numel}
    left = {name: part.box.numel for name, part in wanted.items()}
    files = tensor_files(folder)
    mine = rank() % len(files) if files else 0
    for path in files[mine:] + files[:mine]:  # written by as many ranks, all that this one needs is most often in its own file
        if not left:
            break
        for name, count in read_into(path, {name: wanted[name] for name in left}).items():
            left[name] -= count
        left = {name: count for name, count in left.items() if count}
    _check_complete(folder, list(left))
    return [name for name in tensors if name not in there]


def _check_complete(folder: Path, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{folder} lacks parts of {_shorten(missing)}: take another checkpoint.")


def _check_matches(
    folder: Path, there: TensorIndex, tensors: dict[str, Tensor], missing: tuple[str, ...], unexpected: tuple[str, ...]
) -> None:
    """Raises ValueError with all that differs between what is there and what is to be filled."""
    here = {name: (DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
    absent = [name for name in here if name not in there and not name.startswith(missing)]
    beside = [name for name in there if name not in here and not name.startswith(unexpected)]
    other = [
        f"{name} is {_format_tensor(there[name])} there and {_format_tensor(here[name])} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    faults = [f"it lacks {_shorten(absent)}"] * bool(absent) + [f"it has {_shorten(beside)} beside"] * bool(beside)
    faults += [_shorten(other, "; ")] * bool(other)
    if faults:
        raise ValueError(
            f"{folder} is of another network or optimiser: {'; '.join(faults)}. Give it the settings of the run that wrote it."
        )


def _format_tensor(one: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = one
    return f"{dtype} ({', '.join(map(str, shape))})"


def _shorten(names: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return between.join(names[:MAX_NAMES_SHOWN]) + more


def averages(folder: Path, label: str = "") -> dict[str, Tensor]:
    """Averaged weights of a checkpoint, by the network's own names.

    Args:
        folder: the checkpoint's.
        label: of one of the further averages, such as `halflife=5000`; the main one by default.

    Raises:
        ValueError: it has no such average; those it has are listed.
    """
    prefix = f"ema[{label}]." if label else "ema."
    found = _load_prefix(folder, prefix)
    if not found:
        kept = sorted({match[1] for name in tensor_index(folder) if (match := re.match(r"ema\[(.*?)\]\.", name))})
        raise ValueError(f"{folder} holds no average {label!r}: {', '.join(kept) or 'none beside the main one'}. Name one of them.")
    return found


def raw_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint as they were trained, by the network's own names."""
    return _load_prefix(folder, "model.")


def _load_prefix(folder: Path, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in load_tensors(folder, prefix=prefix).items()}
