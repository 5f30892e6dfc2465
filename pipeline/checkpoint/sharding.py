"""Which part of a tensor a rank holds, and which parts it writes, so that all is written and nothing twice.

A part is a box in the whole tensor. Tensors that every rank holds are dealt
out among the ranks; of a DTensor each rank has its shard, and where a hybrid
mesh has several copies of a shard, the copies' holders share the tensors out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class Box(NamedTuple):
    """Where a part lies in its whole tensor: where it begins and how long it is, by dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside; 1 without dimensions."""
        return math.prod(self.shape)


class TensorPart(NamedTuple):
    """What one rank holds of one tensor."""

    name: str
    tensor: Tensor
    """(*box.shape), of this rank alone."""
    box: Box
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    replica: int = 0
    """Which of the copies of this box this rank has."""
    replicas: int = 1


def shard_box(shape: Sequence[int], sizes: Sequence[int], dims: Sequence[int | None], place: Sequence[int]) -> Box:
    """The box at one place of a mesh, cut as torch.chunk cuts: equal lengths, rounded up, the last ones shorter or empty.

    Args:
        shape: of the whole tensor.
        sizes: of the mesh, by its dimensions.
        dims: for each of them, which dimension of the tensor it cuts; None where it holds copies.
        place: coordinates in the mesh.
    """
    offset, extent = [0] * len(shape), list(shape)
    for size, dim, at in zip(sizes, dims, place, strict=True):
        if dim is not None:
            length = -(-extent[dim] // size)
            begin = min(at * length, extent[dim])
            offset[dim] += begin
            extent[dim] = min(length, extent[dim] - begin)
    return Box(tuple(offset), tuple(extent))


def local_part(name: str, tensor: Tensor) -> TensorPart | None:
    """What this rank holds of a tensor, all of one that is no DTensor; None outside a DTensor's mesh."""
    tensor = tensor.detach()
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return TensorPart(name, tensor, Box((0,) * tensor.ndim, whole), whole)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if place is None:
        return None
    assert all(type(p) in (Shard, Replicate) for p in tensor.placements), f"{name}: {tensor.placements} is no plain shard"
    dims = [p.dim % tensor.ndim if isinstance(p, Shard) else None for p in tensor.placements]
    box, local = shard_box(whole, mesh.shape, dims, place), tensor.to_local()
    assert tuple(local.shape) == box.shape, f"{name}: holds {tuple(local.shape)}, not {box.shape}"
    replica, replicas = 0, 1
    for size, dim, at in zip(mesh.shape, dims, place, strict=True):
        if dim is None:
            replica, replicas = replica * size + at, replicas * size
    return TensorPart(name, local, box, whole, replica, replicas)


def assign_to_ranks(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Share things out, the largest first, each to the rank with the least so far; the same on every rank.

    Args:
        sizes: bytes by name.
        ranks: how many there are.

    Returns:
        The rank, from 0, by name.
    """
    loads, assigned = [(0, rank) for rank in range(ranks)], {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + size, rank))
        assigned[name] = rank
    return assigned


def to_write(tensors: dict[str, Tensor], rank: int, world: int) -> list[TensorPart]:
    """The parts that this rank writes; those of all ranks together are all there is, each once.

    Args:
        tensors: by name, the same names on every rank; plain ones hold the same on each.
        rank: this one.
        world: ranks in all.
    """
    plain = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
    owner = assign_to_ranks({name: t.nbytes for name, t in plain.items()}, world)
    mine = [part for name, t in plain.items() if owner[name] == rank and (part := local_part(name, t))]
    parts = [part for name, t in tensors.items() if name not in plain and (part := local_part(name, t))]
    for replicas in sorted({part.replicas for part in parts}):
        same_replicas = [part for part in parts if part.replicas == replicas]
        owner = assign_to_ranks({part.name: math.prod(part.whole) * part.tensor.element_size() for part in same_replicas}, replicas)
        mine += [part for part in same_replicas if owner[part.name] == part.replica and _is_written(part)]
    return mine


def _is_written(part: TensorPart) -> bool:
    """Whether a shard holds something; of a tensor without elements the first one counts, so that its name is kept."""
    return part.box.numel > 0 or (math.prod(part.whole) == 0 and not any(part.box.offset))


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes of the same tensor have in common, or None."""
    offset = tuple(map(max, a.offset, b.offset))
    end = tuple(min(i + n, j + m) for i, n, j, m in zip(*a, *b, strict=True))
    shape = tuple(e - o for o, e in zip(offset, end, strict=True))
    return Box(offset, shape) if all(n > 0 for n in shape) else None


def slices_within(box: Box, frame: Box) -> tuple[slice, ...]:
    """The slices that cut `box` out of a tensor that holds `frame`."""
    return tuple(slice(o - f, o - f + n) for o, n, f in zip(box.offset, box.shape, frame.offset, strict=True))
