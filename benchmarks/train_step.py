"""What one training step costs: forward, backward, AdamW and the average of the weights, beside other implementations of the same network.

Ours is `models.build` with the pipeline's optimiser and average; `stock` is
diffusers' DiTTransformer2DModel in a plain loop (unfused AdamW, average in a
loop); `textbook` is the DiT below in the plainest torch, with our optimiser and
average. The floor is the step's matrix products alone, in bf16. All take turns
in one run, on one machine, with and without the allocator's settings of
condot/core/process.py; figures are medians. CPU milliseconds with one thread,
those of the clock with more or on a GPU.

    python benchmarks/train_step.py [--preset S/2] [--batch_size 4] [--rounds 5] [--threads 1] [--compile]

On a GPU (XL/2, batch 128, compiled unless told otherwise) ours alone is held against the floor.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from condot.core.process import ALLOCATOR_ENV
from condot.models import registry
from condot.models.common.kernels import attend
from condot.models.common.layers import modulate, sincos_positions
from condot.pipeline.config.schema import EmaConfig, TrainConfig
from condot.pipeline.ema.averages import WeightAverages
from condot.pipeline.launch.precision import pick_faster_precision
from condot.pipeline.training.optimizer import adamw

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth, heads."""
CHANNELS, SIDE, CLASSES = 4, 32, 1000
SMALL = {"16 tokens": (1, 8, 128), "64 tokens": (1, 16, 32)}
"""Channels, side, batch of networks of 1.2 M parameters."""


# --- the textbook's network


class TextbookBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
        x = x + gate1 * self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class Textbook(nn.Module):
    def __init__(self, patch, width, depth, heads):
        super().__init__()
        self.patch = patch
        self.enter = nn.Conv2d(CHANNELS, width, patch, patch)
        self.register_buffer("positions", sincos_positions(width, SIDE // patch, SIDE // patch))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(TextbookBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.leave = nn.Linear(width, CHANNELS * patch**2)

    def forward(self, x, t, labels):
        angles = 1000 * t[:, None] * torch.exp(torch.linspace(0, -9.21, 128, device=t.device))
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.classes(labels)
        x = self.enter(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        x = self.leave(self.norm(x) * (1 + scale) + shift)
        return F.fold(x.transpose(1, 2), (SIDE, SIDE), self.patch, stride=self.patch)


# --- steps: each a function of nothing that trains its network once


def ours(width, depth, heads, patch, channels=CHANNELS, side=SIDE, classes=CLASSES):
    options = {"patch_size": patch, "width": width, "depth": depth, "heads": heads}
    return registry.build("dit", seed=0, channels=channels, resolution=side, num_classes=classes, **options)


def stock(width, depth, heads, patch):
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=CHANNELS, num_layers=depth,
        sample_size=SIDE, patch_size=patch, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    return network.train()


def batch(size, device, channels=CHANNELS, side=SIDE, classes=CLASSES):
    """x, t, labels and what is to be predicted."""
    draw = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, size, channels, side, side, generator=draw).to(device)
    return x, torch.rand(size, generator=draw).to(device), torch.randint(classes, (size,), generator=draw).to(device), target


def plain_update(network):
    """A loop's AdamW and average, as a user writes them."""
    optimizer, average = torch.optim.AdamW(network.parameters(), 1e-4), [p.detach().clone() for p in network.parameters()]

    def update():
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, p in zip(average, network.parameters(), strict=True):
                kept.mul_(0.9999).add_(p, alpha=1e-4)

    return update


def our_update(network):
    """The pipeline's."""
    optimizer, ema = adamw(network, TrainConfig()), WeightAverages(network, copy.deepcopy(network), EmaConfig())

    def update():
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, 10_000, 256)

    return update


def steps(network, update, inputs, call=None):
    """The step in float32, and under bf16 autocast, of one network."""
    *given, target = inputs
    call = call or network

    def step(half):
        with torch.autocast(target.device.type, torch.bfloat16, enabled=half):
            loss = F.mse_loss(call(*given).float(), target)
        loss.backward()
        update()

    return {"float32": lambda: step(False), "bf16": lambda: step(True)}


def compiled(network):
    """By block, which compiles in seconds where the whole takes minutes."""
    for block in network.blocks:
        block.compile()
    return network


def products(width, depth, heads, patch, size, device):
    """The bare bf16 products of a step, and how many multiply-adds they are, times two."""
    tokens, rows, head = (SIDE // patch) ** 2, size * (SIDE // patch) ** 2, width // heads
    linear = [(1, rows, width, n) for n in (3 * width, width, 4 * width)] + [(1, rows, 4 * width, width), (1, size, width, 6 * width)]
    shapes = [*linear, (size * heads, tokens, head, tokens), (size * heads, tokens, tokens, head)]
    made = [[torch.randn(b, *s, dtype=torch.bfloat16, device=device) for s in ((m, k), (n, k), (m, n))] for b, m, k, n in shapes]

    def run():
        for _ in range(depth):
            for x, w, g in made:  # forward, to the input, to the weight
                torch.bmm(x, w.mT), torch.bmm(g, w), torch.bmm(g.mT, x)

    return run, 6 * depth * sum(b * m * k * n for b, m, k, n in shapes)


# --- measuring


def spent(function, device, threads):
    """Milliseconds: of the CPU with one thread, of the clock otherwise."""
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    began = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - began)


def cases(options, device):
    """Every step by name."""
    letter, patch = options.preset.split("/")
    sizes = (*SIZES[letter], int(patch))
    inputs = batch(options.batch_size, device)
    found = {}

    def add(name, made, update, call=None, only=()):
        found.update(
            {f"{name}, {dtype}": step for dtype, step in steps(made, update(made), inputs, call).items() if dtype in only or not only}
        )

    if device.type == "cpu":
        network = stock(*sizes[:3], sizes[3]).to(device)
        add("stock", network, plain_update, lambda x, t, labels: network(x, 1000 * (1 - t), class_labels=labels).sample[:, :CHANNELS])
        add("textbook", Textbook(sizes[3], *sizes[:3]).to(device), our_update)
        add("ours", ours(*sizes).to(device), our_update)
    if options.compile:
        if device.type == "cpu":
            add("textbook compiled", compiled(Textbook(sizes[3], *sizes[:3])), our_update, only=("bf16",))
        add("ours compiled", compiled(ours(*sizes).to(device)), our_update, only=("bf16",))
    found["floor, bf16"], flops = products(*sizes, options.batch_size, device)
    return found, flops


def serve(link, options):
    """A process that runs the cases whose names come in."""
    torch.set_num_threads(options.threads)
    found, flops = cases(options, torch.device("cpu"))
    link.send((list(found), flops))
    for name in iter(link.recv, None):
        link.send(spent(found[name], torch.device("cpu"), options.threads))


def compare(options):
    """Two processes, one with the allocator's settings, and every case of each in turns; prints the table."""
    context, links, workers = multiprocessing.get_context("spawn"), {}, []
    for name in ALLOCATOR_ENV:
        os.environ.pop(name, None)
    for setting in ("system", "own"):
        os.environ.update(ALLOCATOR_ENV if setting == "own" else {})  # read when a process starts
        links[setting], theirs = context.Pipe()
        asked = options if setting == "own" else argparse.Namespace(**{**vars(options), "compile": False})
        workers.append(context.Process(target=serve, args=(theirs, asked), daemon=True))
        workers[-1].start()
    names = {setting: link.recv() for setting, link in links.items()}
    flops = names["own"][1]
    found = {(setting, name): [] for setting, (listed, _) in names.items() for name in listed}
    for turn in range(options.rounds + 2):
        for key, figures in found.items():
            links[key[0]].send(key[1])
            figure = links[key[0]].recv()
            if turn > 1:  # the first warm caches and compile
                figures.append(figure)
    for link, worker in zip(links.values(), workers, strict=True):
        link.send(None)
        worker.join()
    middle = {key: statistics.median(figures) for key, figures in found.items()}
    kind = "CPU" if options.threads == 1 else "wall"
    title = f"DiT-{options.preset}, batch {options.batch_size}, {flops / 1e9:.0f} GFLOP a step"
    print(f"\n{title}, {options.threads} thread(s), {options.rounds} rounds in turns")
    print(f"  {'':26}{kind} ms, system's allocator{'':4}with its settings{'':4}GFLOP/s{'':4}of the floor")
    floor = middle["own", "floor, bf16"]
    for name in names["own"][0]:
        own, system = middle["own", name], middle.get(("system", name))
        print(f"  {name:26}{f'{system:.0f}' if system else '-':>25}{own:21.0f}{flops / own / 1e6:11.0f}{floor / own:15.2f}")
    targets(middle)


def targets(middle):
    """What the issue asks, against the peer as a user runs it, without our settings, and with them."""
    best = min(figure for (_, name), figure in middle.items() if name.startswith("ours"))
    print("  targets, ours at its best:")
    for what, peer, least in (("stock in float32", "stock, float32", 2.5), ("stock in bf16", "stock, bf16", 1.3)):
        ratios = [middle[setting, peer] / best for setting in ("system", "own")]
        print(f"    at least {least} x {what}: {ratios[0]:.2f}, {ratios[1]:.2f} with the settings{_verdict(ratios[0] >= least)}")
    for name in ("float32", "bf16", "compiled, bf16"):
        mine, other = (f"{who} {name}" if name.startswith("compiled") else f"{who}, {name}" for who in ("ours", "textbook"))
        for setting in ("system", "own"):
            if (setting, mine) in middle:
                ratio = middle[setting, other] / middle[setting, mine]
                print(f"    never slower than the textbook, {name}, {setting}: {ratio:.2f}{_verdict(ratio >= 1)}")
    share = middle["own", "floor, bf16"] / best
    print(f"    at least a quarter of the bare products' rate: {share:.2f}{_verdict(share >= 0.25)}")


def _verdict(reached):
    return "" if reached else "   NOT REACHED"


def small(options):
    """Small networks in float32 and bf16, and what `train.mixed_precision: auto` would take."""
    print("\nnetworks of 1.2 M parameters (width 128, depth 4)          float32        bf16   auto takes")
    for name, (channels, side, size) in SMALL.items():
        sizes = {"channels": channels, "side": side, "classes": 10}
        network, inputs = ours(128, 4, 4, 2, **sizes), batch(size, "cpu", **sizes)
        found = steps(network, our_update(network), inputs)
        figures = {dtype: [] for dtype in found}
        for turn in range(options.rounds + 2):
            for dtype, step in found.items():
                figure = spent(step, torch.device("cpu"), options.threads)
                if turn > 1:
                    figures[dtype].append(figure)
        plain, half = (statistics.median(figures[dtype]) for dtype in ("float32", "bf16"))
        print(f"  {name}, batch {size:4}{'':31}{plain:9.1f} ms{half:9.1f} ms   {pick_faster_precision(network, inputs[:3])}")


def parts(options, device):
    """Milliseconds of a step's parts, each forward and backward by itself, for all blocks; the rest is what is left."""
    letter, patch = options.preset.split("/")
    width, depth, heads = SIZES[letter]
    rows, network = (options.batch_size, (SIDE // int(patch)) ** 2), ours(width, 1, heads, int(patch)).to(device)
    whole = ours(width, depth, heads, int(patch)).to(device)
    optimizer, ema = adamw(whole, TrainConfig()), WeightAverages(whole, copy.deepcopy(whole), EmaConfig())
    for p in whole.parameters():
        p.grad = torch.zeros_like(p)
    block = network.blocks[0]
    x = torch.randn(*rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(rows[0], width, device=device, requires_grad=True)
    qkv = torch.randn(3, rows[0], heads, rows[1], width // heads, device=device, dtype=torch.bfloat16, requires_grad=True)

    def modulated(x, c):
        m = block.modulation(c)[:, None].chunk(6, dim=2)
        return torch.addcmul(x, m[2], modulate(x, m[0], m[1])) + torch.addcmul(x, m[5], modulate(x, m[3], m[4]))

    def both_ways(function, *inputs):
        function = torch.compile(function) if options.compile else function

        def run():
            with torch.autocast(device.type, torch.bfloat16):
                y = function(*inputs)
            y.backward(torch.ones_like(y))

        return run

    found = {
        "attention (scores, softmax, values)": (both_ways(lambda a: attend(*a), qkv), depth),
        "MLP": (both_ways(lambda x: block.feed_forward(x), x), depth),
        "modulation (norms, shifts, gates)": (both_ways(modulated, x, c), depth),
        "optimiser": (optimizer.step, 1),
        "EMA": (lambda: ema.update(whole, 10_000, 256), 1),
    }
    timed = {}
    for name, (run, times) in found.items():
        figures = [spent(run, device, options.threads) for _ in range(options.rounds + 3)][3:]
        timed[name] = times * statistics.median(figures)
    return timed


def gpu(options):
    """Ours, compiled, against the products' rate of the same run, and its parts."""
    device = torch.device("cuda")
    found, flops = cases(options, device)
    found = {name: run for name, run in found.items() if name.endswith("bf16")}
    figures = {name: [] for name in found}
    for turn in range(options.rounds + 3):
        for name, run in found.items():
            figure = spent(run, device, 0)
            if turn > 2:
                figures[name].append(figure)
    middle = {name: statistics.median(values) for name, values in figures.items()}
    print(f"\nDiT-{options.preset}, batch {options.batch_size}, {torch.cuda.get_device_name()}, {flops / 1e12:.1f} TFLOP a step")
    for name, figure in middle.items():
        print(
            f"  {name:26}{figure:9.1f} ms{flops / figure / 1e9:9.0f} TFLOP/s   {middle['floor, bf16'] / figure:5.2f} of the products' rate"
        )
    share = middle["floor, bf16"] / min(figure for name, figure in middle.items() if name.startswith("ours"))
    print(f"  target: at least half of the products' rate: {share:.2f}{_verdict(share >= 0.5)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="XL/2" if cuda else "S/2", help="S, B, L, XL / 1, 2, 4, 8")
    parser.add_argument("--batch_size", type=int, default=128 if cuda else 4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="ours and the textbook's by block too")
    parser.add_argument("--parts", action="store_true", help="only the parts of our step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, AMX {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}"
    )
    if cuda and not options.parts:
        gpu(options)
    elif not options.parts:
        compare(options)
        small(options)
    timed = parts(options, torch.device("cuda" if cuda else "cpu"))
    print("\nparts of our step in bf16, ms:  " + ",  ".join(f"{name} {figure:.1f}" for name, figure in timed.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
