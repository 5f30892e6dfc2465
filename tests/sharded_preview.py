"""What the ranks of test_side_work.py do; a light module, since every rank imports it."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from condot.pipeline.launch import parallel
from condot.pipeline.training import preview
from condot.pipeline.training.best_effort import BestEffortError
from condot.pipeline.training.run import Run


class Tower(nn.Module):
    """Blocks one behind the other, and weights of its own before and behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


def breaks_off():
    """One rank lacks memory, in any block, for more than some images at once: all draw fewer; then for any: all give up, and go on."""
    torch.manual_seed(0)
    network = Tower()
    x = torch.randn(8, 6)
    with torch.no_grad():
        wanted = network(network(x))
    parallel.shard_model(network, network.blocks, parallel.build_mesh("full", torch.device("cpu")))
    most, where = [3], [0]

    def strike(module, given):
        if dist.get_rank() == 1 and len(given[0]) > most[0]:
            raise MemoryError("no memory")

    train = SimpleNamespace(batch_size=16, gradient_accumulation_steps=1)
    run = SimpleNamespace(config=SimpleNamespace(train=train), sharded=True, ema=SimpleNamespace(model=network))
    run.interrupt, run.accelerator = SimpleNamespace(requested=False), SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    run.check_interrupt = lambda failure=0: Run.check_interrupt(run, failure)

    def once(x):
        if failure := run.check_interrupt():
            raise preview.PeerFailure(failure)
        with parallel.finish_gathers_on_error(network):
            return network(x)

    @torch.no_grad()
    def make(count):
        where[0] = count
        return torch.cat([once(once(part)) for part in x.split(count)])

    for block in network.blocks:
        hook = block.register_forward_pre_hook(strike)
        most[0] = 3
        torch.testing.assert_close(preview.draw_within_memory(run, make), wanted)
        assert where[0] == 2
        most[0] = 0
        try:
            preview.draw_within_memory(run, make)
        except BestEffortError as error:
            assert str(error) == ("MemoryError: no memory" if dist.get_rank() == 1 else "on another rank")
        else:
            raise AssertionError("it was drawn")
        hook.remove()
        dist.barrier()
        torch.testing.assert_close(preview.draw_within_memory(run, make), wanted)
