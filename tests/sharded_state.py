"""What the ranks of test_sharded_checkpoint.py and test_half.py do; a light module, since every rank imports it."""

import contextlib
import hashlib
import json
import os
import resource
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from condot.pipeline.checkpoint import manifest, saving
from condot.pipeline.checkpoint.saving import NOT_FINITE
from condot.pipeline.checkpoint.sharding import to_write
from condot.pipeline.checkpoint.store import CheckpointManager, load_into, load_tensors
from condot.pipeline.launch.parallel import shard_model
from condot.pipeline.training.optimizer import step_unless


def mesh_of(kind):
    world = dist.get_world_size()
    return (
        init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
        if kind == "hybrid"
        else init_device_mesh("cpu", (world,))
    )


def whole(scale=1.0):
    """Known tensors of awkward sizes: prime lengths, fewer rows than ranks, none, no dimensions, every width of number."""
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "model.a": (7, 5),
        "model.b": (3,),
        "model.one": (1, 6),
        "model.none": (0, 4),
        "ema.a": (13, 2, 3),
        "ema[width=0.05].a": (13, 2),
    }
    state = {name: torch.randn(shape, generator=draw) * scale for name, shape in shapes.items()}
    state |= {"optim.half": torch.randn(9, 4, generator=draw).bfloat16(), "optim.count": torch.arange(11) * int(scale)}
    return state | {"optim.step": torch.tensor(3.0 * scale), "optim.flag": torch.tensor([True, False, True]), "optim.flag.b": torch.ones(5)}


def spread(state, kind):
    """The same state as ranks of that kind hold it; some tensors are plain, as an optimiser's step is."""
    if kind == "none":
        return {name: t.clone() for name, t in state.items()}
    mesh, found = mesh_of(kind), {}
    for name, t in state.items():
        copies = [Replicate()] if kind == "hybrid" else []
        dim = 1 if name == "ema.a" else 0
        if name == "optim.step":
            found[name] = t.clone()
        else:
            found[name] = distribute_tensor(
                t.clone(), mesh, [*copies, Shard(dim)] if not name.startswith("optim.flag") else [Replicate()] * mesh.ndim
            )
    return found


def gathered(state):
    """Whole tensors, put together by torch and not by us."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def digest(state):
    return {
        name: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in sorted(state.items())
    }


def write(folder, kind):
    store = CheckpointManager(Path(folder), keep=1)
    assert store.save(1, spread(whole(2.0), kind), {"step": 1}) == []
    store.begin(2, spread(whole(), kind), {"step": 2})
    assert store.finish() == [] and not store.finish()
    assert [p.name for p in store.folders()] == ["checkpoint-2"]


def read(folders, kind):
    """Fill a state of zeros from each folder, whatever wrote it; and whole."""
    for folder in folders:
        found = CheckpointManager(Path(folder), keep=1).latest()
        state = spread({name: torch.zeros_like(t) for name, t in whole().items()}, kind)
        assert load_into(found, state) == []
        assert digest(gathered(state)) == digest(whole()), folder
        assert digest(load_tensors(found)) == digest(whole()), folder


class Net(nn.Module):
    """Odd sizes, one block, a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.out = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        return self.out(self.norm(self.inner(x)))


def trained(kind, steps=2):
    """A network sharded by FSDP2 and trained for some steps, and its optimiser: what training really saves."""
    network = Net()
    if kind != "none":
        fully_shard(network.inner, mesh=mesh_of(kind))
        fully_shard(network, mesh=mesh_of(kind))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for step in range(steps):
        network(torch.full((4, 5), step + 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def state_of(network, optimizer):
    moments = get_optimizer_state_dict(network, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    named = {f"model.{name}": t for name, t in network.state_dict().items()}
    return named | {f"optim.{name}": t for name, t in moments.items() if isinstance(t, torch.Tensor)}


def write_trained(folder, kind):
    state = state_of(*trained(kind))
    assert len(state) == 16 + 5, sorted(state)
    assert CheckpointManager(Path(folder), keep=1).save(1, state, {"step": 1}) == []
    assert digest(load_tensors(Path(folder) / "checkpoint-1")) == digest(gathered(state))


def read_trained(folder, kind):
    """Weights and moments come back in place into the running network: its next step is the one of the network that was saved."""
    network, optimizer = trained(kind, steps=1)
    state = state_of(network, optimizer)
    before = [p.to_local().data_ptr() if isinstance(p, DTensor) else p.data_ptr() for p in network.parameters()]
    load_into(Path(folder) / "checkpoint-1", state)
    assert before == [p.to_local().data_ptr() if isinstance(p, DTensor) else p.data_ptr() for p in network.parameters()]
    assert digest(gathered(state)) == digest(load_tensors(Path(folder) / "checkpoint-1"))
    other, theirs = trained(kind, steps=2)
    for one, its in ((network, optimizer), (other, theirs)):
        one(torch.full((4, 5), 9.0)).square().mean().backward()
        its.step()
    assert digest(gathered(network.state_dict())) == digest(gathered(other.state_dict()))


# --- faults


def full_on_one(folder):
    """The second rank's disk fills up half-way; both say so, nothing is left, and the next save goes well."""
    store, soft = CheckpointManager(Path(folder), keep=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    state = spread(whole(), "full") | {"big": distribute_tensor(torch.ones(200_000), mesh_of("full"), [Shard(0)])}
    assert store.save(1, state, {"step": 1}) == []
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft[1]))
    errors = store.save(2, state, {"step": 2})
    assert errors == ["rank 1: [Errno 27] File too large"]
    dist.barrier()
    assert os.listdir(folder) == ["checkpoint-1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert store.save(2, state, {"step": 2}) == [] and store.latest().name == "checkpoint-2"


def full_for_all(folder):
    """A small file system, full for both."""
    store = CheckpointManager(Path(folder), keep=1)
    assert store.save(1, spread(whole(), "full"), {"step": 1}) == []
    errors = store.save(2, spread(whole(), "full") | {"big": distribute_tensor(torch.ones(2_000_000), mesh_of("full"), [Shard(0)])}, {})
    assert errors and all("No space left on device" in error for error in errors)
    dist.barrier()
    assert os.listdir(folder) == ["checkpoint-1"]
    assert store.save(3, spread(whole(), "full"), {"step": 3}) == [] and store.latest().name == "checkpoint-3"


def bad_on_one(folder):
    """NaN in the shard of the second rank alone, and no folder for it."""
    store = CheckpointManager(Path(folder), keep=1)
    state = spread(whole(), "full")
    if dist.get_rank() == 1:
        state["ema.a"].to_local()[0, 0, 0] = float("nan")
    assert store.save(1, state, {}) == [f"rank 1: ema.a {NOT_FINITE}"]
    store = CheckpointManager(Path("/proc/nowhere") if dist.get_rank() else Path(folder), keep=1)
    errors = store.save(1, spread(whole(), "full"), {})
    assert len(errors) == 1 and errors[0].startswith("rank 1: [Errno 2]")
    dist.barrier()
    assert os.listdir(folder) == []


def not_shared(folder):
    """Each rank writes in a folder of its own, as machines without a common one do."""
    mine = Path(folder) / str(dist.get_rank())
    errors = CheckpointManager(mine, keep=1).save(1, spread(whole(), "full"), {})
    assert errors == [
        "rank 0: rank-00001.safetensors: written by other ranks and not seen by the first; output_dir must be a folder that all share"
    ]
    assert not mine.exists() or os.listdir(mine) == []


def other_names(folder):
    state = whole() | ({"more": torch.ones(3)} if dist.get_rank() else {})
    errors = CheckpointManager(Path(folder), keep=1).save(1, state, {})
    dist.barrier()
    assert len(errors) == 1 and "ranks [1] named other tensors than the first" in errors[0], errors
    assert os.listdir(folder) == []


def check_together(folder):
    """Each file is hashed by one rank; a fault that one sees is the answer of both, and its name is printed once."""
    store, hashed, fault = CheckpointManager(Path(folder), keep=3), [], manifest._fault
    for step in (1, 2):
        assert store.save(step, spread(whole(), "full"), {"step": step}) == []
    manifest._fault = lambda path, digest: (hashed.append(path.name), fault(path, digest))[1]
    said = Path(folder) / f"said-{dist.get_rank()}"
    for damage in ("rank-00001.safetensors", "rank-00000.safetensors", "state.json"):
        assert store.latest().name == "checkpoint-2"
        dist.barrier()
        body = (Path(folder) / "checkpoint-2" / damage).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(folder) / "checkpoint-2" / damage).write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        dist.barrier()
        with open(said, "a") as file, contextlib.redirect_stdout(file):
            assert store.latest().name == "checkpoint-1"
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(folder) / "checkpoint-2" / damage).write_bytes(body)
        dist.barrier()
    del hashed[:]
    assert store.latest().name == "checkpoint-2"
    box = [None, None]
    dist.all_gather_object(box, hashed)
    assert sorted(box[0] + box[1]) == ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"] and min(map(len, box)) == 1
    if dist.get_rank() == 0:
        assert said.read_text().count("damaged and passed over") == 3 and not (Path(folder) / "said-1").read_text()


def die(folder, point, who):
    """One rank is killed in a save of step 2; the other must end, not wait."""

    def kill(*_, **__):
        os.kill(os.getpid(), 9)

    store = CheckpointManager(Path(folder), keep=1)
    assert store.save(1, spread(whole(), "full"), {"step": 1}) == []
    if dist.get_rank() == who:
        where = {"copy": saving.HostBuffer, "check_files_visible": store, "sync": store}
        where |= dict.fromkeys(("finish", "_commit", "_prune"), CheckpointManager)
        setattr(where.get(point, saving), point, kill)
    store.save(2, spread(whole(2.0), "full"), {"step": 2})
    store.save(3, spread(whole(3.0), "full"), {"step": 3})


def train_beside(folder):
    """Collectives of training go on while a save is written, and nothing of the save waits for them."""
    gate, real = threading.Event(), saving.write_file
    saving.write_file = lambda *a: (gate.wait(30), real(*a))[1]
    store, state = CheckpointManager(Path(folder), keep=1), spread(whole(), "full")
    store.begin(1, state, {"step": 1})
    for _ in range(20):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size() and store.is_writing()
        for tensor in state.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    gate.set()
    assert store.finish() == [] and digest(load_tensors(Path(folder) / "checkpoint-1")) == digest(whole())


def balance(folder, kind):
    """Of even tensors each rank writes the same number of bytes, however they are spread."""
    state = {f"model.{i}": torch.zeros(16, 8) for i in range(12)}
    parts = to_write(spread(state, kind), dist.get_rank(), dist.get_world_size())
    written = sum(part.tensor.nbytes for part in parts)
    (Path(folder) / f"{kind}-{dist.get_rank()}").write_text(json.dumps(written))


class Scaled:
    """An optimiser as Accelerate wraps it for fp16."""

    def __init__(self, optimizer):
        self.optimizer, self.scaler = optimizer, torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


def overflow_on_one():
    """An infinity in one rank's share of one gradient: no rank moves its own, all halve the scale; the same of a loss that is bad."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    for weight in network.parameters():
        torch.nn.init.constant_(weight, 0.1)
    shard_model(network, list(network), init_device_mesh("cpu", (2,)))
    run = Scaled(torch.optim.AdamW(network.parameters(), lr=0.1, fused=True))
    for step, (infinite, bad, moved, scale) in enumerate([(0, 0, True, 4), (1, 0, False, 2), (0, 1, False, 2), (0, 0, True, 2)]):
        run.scaler.scale(network(torch.ones(2, 4)).square().mean()).backward()
        if infinite and dist.get_rank() == 1:
            network[0].weight.grad.to_local()[0, 0] = float("inf")
        run.scaler.unscale_(run.optimizer)
        before = [p.full_tensor().clone() for p in network.parameters()]
        step_unless(run, torch.tensor(float(bad)))
        run.optimizer.zero_grad()
        same = [torch.equal(p.full_tensor(), old) for p, old in zip(network.parameters(), before, strict=True)]
        assert same == [not moved] * 4 and run.scaler.get_scale() == scale, (step, same, run.scaler.get_scale())
