"""Checkpoints of several ranks: each writes its shards, any other number of ranks reads them, and a fault of one is known to all."""

import json
import subprocess
from pathlib import Path

import pytest
import sharded_state as ranks_do
import torch
from ranks import outcomes, together
from safetensors import safe_open
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Replicate, Shard

from condot.pipeline.checkpoint.rank_file import METADATA_KEY
from condot.pipeline.checkpoint.sharding import Box, assign_to_ranks, overlap, shard_box, slices_within, to_write
from condot.pipeline.checkpoint.store import CheckpointManager, load_tensors

# --- boxes


@pytest.mark.parametrize(
    "sizes, dims", [((3,), (0,)), ((4,), (1,)), ((2, 3), (None, 0)), ((2, 3), (0, 0)), ((3, 2), (1, 0)), ((2, 2), (None, None))]
)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4), (1, 6), (0, 4), (12, 1)])
def test_boxes_are_those_of_torch_and_tile_the_tensor(shape, sizes, dims):
    """Shapes and offsets are torch's at every place of the mesh; copies apart, every element is in one box."""
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    count = torch.zeros(shape)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).view(-1, len(sizes)).tolist():
        box = shard_box(shape, sizes, dims, place)
        local, offset = _compute_local_shape_and_global_offset(shape, sizes, place.__getitem__, placements)
        assert box.shape == tuple(local) and (box.numel == 0 or box.offset == tuple(offset))
        count[slices_within(box, Box((0,) * len(shape), shape))] += 1
    copies = torch.tensor([n for n, dim in zip(sizes, dims, strict=True) if dim is None]).prod()
    assert (count == copies).all()


def test_what_boxes_have_in_common():
    frame = torch.arange(60).view(6, 10)
    a, b = Box((1, 2), (4, 5)), Box((3, 0), (3, 4))
    common = overlap(a, b)
    assert common == Box((3, 2), (2, 2)) == overlap(b, a)
    assert frame[1:5, 2:7][slices_within(common, a)].equal(frame[3:5, 2:4]) and frame[3:6, 0:4][slices_within(common, b)].equal(
        frame[3:5, 2:4]
    )
    assert overlap(a, Box((5, 0), (1, 10))) is None and overlap(a, Box((1, 2), (0, 5))) is None, "neither neighbours nor empty ones"
    assert overlap(Box((), ()), Box((), ())) == Box((), ()) and torch.tensor(3.0)[slices_within(Box((), ()), Box((), ()))] == 3


def test_things_are_dealt_out_evenly_and_each_once():
    sizes = {f"{i}": (i * 37) % 101 for i in range(200)}
    for ranks in (1, 2, 7, 300):
        dealt = assign_to_ranks(sizes, ranks)
        loads = [sum(sizes[name] for name, rank in dealt.items() if rank == h) for h in range(ranks)]
        assert dealt.keys() == sizes.keys() and max(loads) <= sum(sizes.values()) / ranks + max(sizes.values())
    parts = [to_write(ranks_do.whole(), rank, 3) for rank in range(3)]
    assert sorted(part.name for mine in parts for part in mine) == sorted(ranks_do.whole())


# --- any number of ranks

FEW = [("none", 1), ("full", 2), ("hybrid", 4)]
ALL = [*FEW, ("full", 1), ("none", 2), ("none", 4), ("full", 4)]


@pytest.mark.parametrize("kinds", [pytest.param(FEW, id="few"), pytest.param(ALL, id="all", marks=pytest.mark.faults)])
def test_a_checkpoint_of_any_ranks_is_read_by_any(tmp_path, kinds):
    """One process, DDP, FSDP2 and hybrid on 1, 2 and 4 ranks, each read by each: 49 pairs, the same digests; every number in one file."""
    folders = [str(tmp_path / f"{kind}-{world}") for kind, world in kinds]
    for folder, (kind, world) in zip(folders, kinds, strict=True):
        together(world, ranks_do.write, folder, kind)
        counted = {name: torch.zeros(t.shape) for name, t in ranks_do.whole().items()}
        for path in (Path(folder) / "checkpoint-2").glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                parts = json.loads(file.metadata()[METADATA_KEY])["parts"]
                for name in file.keys():  # noqa: SIM118
                    shape, offset = file.get_slice(name).get_shape(), parts.get(name, {}).get("offset")
                    counted[name][tuple(slice(o, o + n) for o, n in zip(offset or [0] * len(shape), shape, strict=True))] += 1
        assert all((count == 1).all() for count in counted.values()), (kind, world)
        assert json.loads((Path(folder) / "checkpoint-2/state.json").read_text()) == {"step": 2, "world": world}
        assert ranks_do.digest(load_tensors(Path(folder) / "checkpoint-2")) == ranks_do.digest(ranks_do.whole()), (
            "read by this process, alone"
        )
    for kind, world in kinds:
        together(world, ranks_do.read, folders, kind)


@pytest.mark.parametrize("kind, world", [("full", 2), ("hybrid", 4)])
def test_a_network_under_fsdp2_is_saved_and_goes_on(tmp_path, kind, world):
    """Weights, buffers and moments as torch gathers them; loaded in place, the next step is the same to the last bit."""
    together(world, ranks_do.write_trained, str(tmp_path), kind)
    together(world, ranks_do.read_trained, str(tmp_path), kind)


def test_ranks_write_the_same_number_of_bytes(tmp_path):
    for kind in ("none", "full", "hybrid"):
        together(4, ranks_do.balance, str(tmp_path), kind)
        assert [int((tmp_path / f"{kind}-{rank}").read_text()) for rank in range(4)] == [12 * 16 * 8 * 4 // 4] * 4


# --- faults


@pytest.mark.parametrize("what", ["full_on_one", "bad_on_one", "not_shared", "other_names", "check_together", "train_beside"])
def test_a_fault_of_one_rank_is_known_to_all(tmp_path, what):
    """What each does and expects stands beside it in sharded_state.py."""
    together(2, getattr(ranks_do, what), str(tmp_path), timeout=60)


@pytest.mark.faults
def test_a_full_file_system(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root mounts a small file system")
    try:
        together(2, ranks_do.full_for_all, str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


POINTS = ["copy", "write_file", "find_nonfinite", "finish"]
FIRST = ["check_files_visible", "_commit", "write_text", "sync", "_prune"]


@pytest.mark.faults
@pytest.mark.parametrize("point, who", [(point, who) for point in POINTS for who in (0, 1)] + [(point, 0) for point in FIRST])
def test_a_rank_killed_in_a_save_ends_the_others_and_leaves_a_good_one(tmp_path, point, who):
    """The other rank fails within the group's time-out, here at once; what was whole before is whole after."""
    found = outcomes(2, ranks_do.die, str(tmp_path), point, who, timeout=100)
    assert found[who][0] == -9 and found[1 - who][0] == 1, found
    latest = CheckpointManager(tmp_path, keep=1).latest()
    assert latest.name == ("checkpoint-2" if point == "_prune" else "checkpoint-1")
    assert ranks_do.digest(load_tensors(latest)) == ranks_do.digest(ranks_do.whole(2.0 if point == "_prune" else 1.0))
