"""`--dry_run`: what is estimated is what a step takes, what is counted is what is written, and every mistake is named."""

import math
import os
from dataclasses import dataclass, field, replace

import frozen
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, arguments
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from condot.cli import train
from condot.cli.dry_run import DRY_RUN_HOOKS
from condot.core.data_config import DataConfig
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.loader.survey import survey
from condot.models import registry
from condot.models.cost import count_params_and_macs, example_inputs
from condot.models.memory import Footprint, MemoryTracker, estimate_memory, fsdp_units, inference_cost, measure_memory
from condot.pipeline.checkpoint.store import CheckpointManager, load_tensors
from condot.pipeline.config.parse import config_to_mapping, is_switch_set, parse, parse_collecting_errors
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.dry_run import estimate
from condot.pipeline.dry_run.error_collector import Mistakes
from condot.pipeline.dry_run.estimate import NetworkSizes, ParallelDims
from condot.pipeline.dry_run.report import free_memory
from condot.pipeline.dry_run.resolved_recipe import ResolvedRecipe

TEXT = {"tokens": 16, "text_width": 48, "pooled_width": 32}
SMALL = {"channels": 4, "resolution": 16}
TOKENS = {**SMALL, "patch_size": 2, "width": 96, "depth": 3, "heads": 3}
SPOKEN = {"text_width": 48, "pooled_width": 32}
NETWORKS = {
    "dit": ("dit", {**TOKENS, "num_classes": 10}, {}),
    "modern": ("dit", {**TOKENS, "num_classes": 10, "style": "modern"}, {}),
    "cross_dit": ("cross_dit", {**TOKENS, **SPOKEN}, TEXT),
    "mmdit": ("mmdit", {**TOKENS, **SPOKEN}, TEXT),
    "unet": ("unet", {**SMALL, "num_classes": 10, "block_channels": (32, 64), "layers_per_block": 1, "attention_levels": 1}, {}),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def step_of(images, text, shape=(4, 16, 16)):
    """Flow matching in its plainest form."""

    def step(model, network):
        x, t, *condition = example_inputs(network, shape, batch=images, **text)
        return (model(x, t, *condition) - torch.randn_like(x)).square().mean()

    return step


# --- memory


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("name", ["dit", "modern", "mmdit", "unet"])
def test_what_is_foretold_is_what_the_allocator_gives(name, again, precision):
    """The peak of a step, on fake tensors and from torch's profiler: within 15 %, as docs/dry_run.md claims."""
    kind, options, text = NETWORKS[name]
    options, step = {**options, "gradient_checkpointing": again}, step_of(8, text)
    estimated = estimate_memory(lambda: registry.build(kind, device="meta", **options), step, precision, "cpu").peak
    found = measure_memory(registry.build(kind, seed=0, **options), step, precision)
    assert estimated == pytest.approx(found, rel=0.15), f"estimated {estimated:,}, measured {found:,}"


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_columns_of_convolutions_that_onednn_leaves_are_foretold(again, precision):
    """As of bf16 on a CPU of AVX2 alone: without oneDNN any processor goes this way, in any type. GPUs never do."""
    kind, options, text = NETWORKS["unet"]
    options, step = {**options, "gradient_checkpointing": again}, step_of(8, text)

    def estimated(device):
        return estimate_memory(lambda: registry.build(kind, device="meta", **options), step, precision, device).peak

    on_gpu = estimated("gpu")
    with torch.backends.mkldnn.flags(enabled=False):
        left, found = estimated("cpu"), measure_memory(registry.build(kind, seed=0, **options), step, precision)
        assert estimated("gpu") == on_gpu
    assert left == pytest.approx(found, rel=0.05), f"estimated {left:,}, measured {found:,}"


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(
    ("kernel", "stride", "dtype", "forth", "back"),
    [
        (3, 1, torch.float32, 9 * 4 * 8 * 8 * 4, 9 * 4 * 8 * 8 * 4),
        (3, 2, torch.float32, 9 * 4 * 4 * 4 * 4, 9 * 4 * 4 * 4 * 4),
        (1, 1, torch.float32, 0, 0),
        (1, 2, torch.float32, 4 * 4 * 4 * 4, 4 * 4 * 4 * 4),
        (3, 1, torch.bfloat16, 9 * 4 * 8 * 8 * 2, 9 * 4 * 8 * 8 * 2),
        (1, 1, torch.bfloat16, 0, 6 * 8 * 8 * 4),
    ],
)
def test_columns_in_closed_form(kernel, stride, dtype, forth, back):
    """Of images with 4 channels of 8 x 8: every patch beside the other; for a pointwise kernel none, but a gradient of bf16 widened."""
    layer = nn.Conv2d(4, 6, kernel, stride, kernel // 2, dtype=dtype)
    x = torch.randn(5, 4, 8, 8, dtype=dtype, requires_grad=True)
    with torch.backends.mkldnn.flags(enabled=False):
        with MemoryTracker([*layer.parameters(), x], "cpu") as forwards:
            y = layer(x)
        gradient = torch.ones_like(y)
        with MemoryTracker([*layer.parameters(), x, y, gradient], "cpu") as backwards:
            found = torch.autograd.grad(y, (*layer.parameters(), x), gradient)
    assert forwards.peak["activations"] == y.nbytes + 5 * forth
    assert backwards.peak["activations"] == sum(part.nbytes for part in found) + 5 * back


def chain(length, width, again=False):
    """tanh after tanh: each keeps its result."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width, device="meta"))

        def forward(self, x):
            for _ in range(length):
                x = checkpoint(torch.tanh, x, use_reentrant=False) if again else torch.tanh(x)
            return x

    return Chain


def chained(images, width):
    def step(model, network):
        return model(torch.zeros(images, width) + network.weight).sum()

    return step


def test_the_memory_tracker_in_closed_form():
    """Of n results of B x D numbers all are kept; with each computed again, only what goes in. The mean of the last is one number."""
    found = estimate_memory(chain(7, 32), chained(5, 32), "no", "cpu")
    assert found.saved == 4 * (7 * 5 * 32 + 1) and found.copies == 0
    again = estimate_memory(chain(7, 32, again=True), chained(5, 32), "no", "cpu")
    assert 7 * 4 * 5 * 32 <= again.saved <= 8 * 4 * 5 * 32 + 4
    assert found.activations <= found.saved + 4 * (2 * 5 * 32 + 64), "backwards one gradient after the other"


def test_half_precision_copies_every_matrix_once():
    """Autocast keeps a bf16 copy of each weight that a product takes; of the matrices here, and their biases, all but the class table."""
    kind, options, _ = NETWORKS["dit"]
    found = estimate_memory(lambda: registry.build(kind, device="meta", **options), step_of(2, {}), "bf16", "gpu")
    network = registry.build(kind, device="meta", **options)
    taken = sum(p.numel() for m in network.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    assert found.copies == 2 * taken


@pytest.mark.parametrize("name", ["modern", "unet"])
def test_autocast_of_a_gpu_widens_norms_in_both_passes(name):
    """CUDA's list has the norms in float32, the CPU's has not; blocks computed again must find the same types, or torch refuses them."""
    kind, options, _ = NETWORKS[name]
    once, again = ({**options, "gradient_checkpointing": flag} for flag in (False, True))
    kept = {
        device: estimate_memory(lambda: registry.build(kind, device="meta", **once), step_of(4, {}), "bf16", device).saved
        for device in ("cpu", "gpu")
    }
    if name == "unet":  # of the transformer, CPUs keep the derivative of GELU besides
        assert kept["gpu"] > 1.3 * kept["cpu"]
    assert estimate_memory(lambda: registry.build(kind, device="meta", **again), step_of(4, {}), "bf16", "gpu").saved < kept["gpu"] / 1.5


def test_memory_grows_by_the_block_and_by_the_image():
    """Blocks are alike, and images are: kept activations are a line in either, up to what time and class take."""
    kind, options, _ = NETWORKS["modern"]

    def kept(depth, images):
        return estimate_memory(
            lambda: registry.build(kind, device="meta", **{**options, "depth": depth}), step_of(images, {}), "no", "gpu"
        ).saved

    assert kept(6, 2) - kept(4, 2) == 2 * (kept(3, 2) - kept(2, 2))
    assert kept(2, 8) - kept(2, 4) == 2 * (kept(2, 4) - kept(2, 2))


def test_a_large_network_is_planned_without_its_memory():
    """DiT-XL/2: 675 M weights (2.7 GB) and 118.6 G multiply-adds as published (Peebles and Xie, table 1)."""
    options = {"preset": "XL/2", "channels": 4, "resolution": 32, "num_classes": 1000, "gradient_checkpointing": True}
    before = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024
    network = registry.build("dit", device="meta", **options)
    parameters, products = count_params_and_macs(network, (4, 32, 32))
    assert parameters == pytest.approx(675e6, rel=2e-3) and products == pytest.approx(118.64e9, rel=2e-3)
    found = estimate_memory(lambda: registry.build("dit", device="meta", **options), step_of(32, {}, (4, 32, 32)), "bf16", "gpu")
    after = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024
    assert 28 * 32 * 256 * 1152 * 4 < found.saved < 1.2 * 28 * 32 * 256 * 1152 * 4, "what goes into each block, float32"
    assert after - before < 500, "MiB"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu_it_is_what_cuda_allocates(name, again, precision):
    kind, options, text = NETWORKS[name]
    options = {**options, "gradient_checkpointing": again, **({"width": 384, "heads": 6} if "width" in options else {})}
    estimated = estimate_memory(lambda: registry.build(kind, device="meta", **options), step_of(64, text), precision, "gpu").peak
    network = registry.build(kind, seed=0, **options).cuda()
    step = step_of(64, text)

    def model(*given):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision != "no"):
            return network(*given).float()

    step(model, network).backward()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step(model, network).backward()
    assert estimated == pytest.approx(torch.cuda.max_memory_allocated() - base, rel=0.15)


def test_caches_made_before_and_after_a_trace_hold_values():
    """A path's table is the same whether a trace came first or not, and a trace leaves no fake tensors in it."""
    config = parse(Config, ["--flow.path=ddpm", "--flow.predict=noise", "--flow.time=discrete", *SHAPE])
    recipe = ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes())
    step = recipe.build_step(2, recipe.shape)
    found = recipe.hooks.estimate_memory(recipe.build_network, step, "no", "cpu")
    assert isinstance(found, Footprint) and math.isfinite(float(recipe.objective.path(torch.tensor([0.5])).a))
    assert measure_memory(recipe.build_network(device="cpu", seed=0), step, "no") == pytest.approx(found.peak, rel=0.15), (
        "the same step, with numbers"
    )


SHAPE = ("--data.resolution=16", "--data.channels=3", "--model.width=32", "--model.depth=2", "--model.heads=2")
UNUSUAL = {
    "preconditioned": ["--flow.path=edm", "--flow.predict=data", "--flow.weighting=edm"],
    "discrete": ["--flow.path=ddpm_cosine", "--flow.predict=v", "--flow.time=discrete"],
    "uniform prior": ["--flow.prior=uniform"],
    "coupled": ["--flow.coupling=optimal_transport", "--flow.coupling_group=2"],
    "sizes": ["--model.micro_conditions=true"],
    "sliced": ["--flow.path=ve", "--flow.predict=score", "--flow.objective=sliced"],
    "explicit": ["--flow.path=ve", "--flow.predict=score", "--flow.objective=explicit", "--data.resolution=4", "--data.channels=1"],
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_objective_can_be_traced(name):
    """The recipe's own loss is traced, not a stand-in: sliced score matching differentiates twice, and takes more than regression."""
    found = {}
    for which, words in (("plain", UNUSUAL[name][3:]), (name, UNUSUAL[name])):
        recipe = ResolvedRecipe(parse(Config, [*SHAPE, *words]), DRY_RUN_HOOKS, Mistakes())
        found[which] = recipe.hooks.estimate_memory(recipe.build_network, recipe.build_step(4, recipe.shape), "no", "gpu").peak
        assert not [text for text in recipe.mistakes if "flow" in text]
    if name in ("sliced", "explicit"):
        assert found[name] > 1.5 * found["plain"]
    else:
        assert found[name] == pytest.approx(found["plain"], rel=0.1)


def test_adapters_are_all_that_has_gradients_and_moments():
    pytest.importorskip("peft")
    words = [*SHAPE, "--train.lora_rank=2", "--train.lora_alpha=2"]
    recipe = ResolvedRecipe(parse(Config, words), DRY_RUN_HOOKS, Mistakes())
    held = estimate.resident_bytes(recipe.sizes, recipe.config, recipe.world, half=False)
    layers = 2 * (2 * (32 + 96) + 2 * (32 + 32))  # of two blocks: qkv and out, each a matrix in and one back
    assert held["gradients"] == 4 * layers and held["optimiser"] == 8 * layers
    assert held["weights"] == 4 * (
        estimate.count_numbers(ResolvedRecipe(parse(Config, [*SHAPE]), DRY_RUN_HOOKS, Mistakes()).sizes.weights) + layers
    )


# --- what a rank holds, and what is written


@pytest.fixture
def many_ranks():
    """A process group of 48 in which nobody else is: its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    AcceleratorState._reset_state(True)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=48)
    yield 48
    torch.distributed.destroy_process_group()


def test_shares_are_those_of_fsdp2(many_ranks):
    """48 ranks divide none of the sizes; FSDP2 itself says what the first of them holds."""
    from torch.distributed.fsdp import fully_shard

    kind, options, _ = NETWORKS["dit"]
    network = registry.build(kind, device="meta", **{**options, "width": 100, "heads": 5})
    shapes = [tuple(weight.shape) for weight in network.parameters()]
    for block in network.blocks:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (many_ranks,)))
    fully_shard(network, mesh=torch.distributed.init_device_mesh("cpu", (many_ranks,)))
    assert estimate.count_numbers(shapes, many_ranks) == sum(weight.to_local().numel() for weight in network.parameters())


def test_units_hold_every_weight_once():
    for kind, options, _ in NETWORKS.values():
        network = registry.build(kind, device="meta", **options)
        found = sorted(shape for unit in fsdp_units(network) for shape in unit)
        assert found == sorted(tuple(weight.shape) for weight in network.parameters())
        assert len(fsdp_units(network)) > 3


def test_parts_in_closed_form():
    """Two blocks of 6 x 10, and a vector; three averages; on one rank, on four, and on machines of two."""
    sizes = NetworkSizes([(6, 10), (6, 10), (7,)], [(6, 10), (6, 10), (7,)], [[(6, 10)], [(6, 10)], [(7,)]], 127)
    config = parse(Config, ["--ema.halflife", "1000", "2000", "--ema.power", "0.05"])
    one = estimate.resident_bytes(sizes, config, ParallelDims.from_sharding("none", 4, 2), half=True)
    assert one == {"weights": 508, "gradients": 508, "optimiser": 1016, "averages": 3 * 508}
    four = estimate.resident_bytes(sizes, config, ParallelDims.from_sharding("full", 4, 2), half=True)
    share = 4 * (2 * 2 * 10 + 2)
    assert four == {"weights": share, "gradients": share, "optimiser": 2 * share, "averages": 3 * share, "gathered": four["gathered"]}
    assert four["gathered"] == 2 * (7 + 2 * 60) + (2 + 4) * 60
    assert estimate.resident_bytes(sizes, config, ParallelDims.from_sharding("hybrid", 4, 2), half=True)["weights"] == 4 * (2 * 3 * 10 + 4)
    assert estimate.checkpoint_bytes(sizes, config) == 4 * (127 * 4 + 2 * 127 + 3)
    assert estimate.estimate_snapshots(sizes, config) == (64, 4 * 127)
    assert estimate.count_averages(replace(config, ema=replace(config.ema, enabled=False))) == 2, (
        "the weights themselves, and the power average"
    )
    lora = sizes._replace(trainable=[(7,)])
    assert estimate.resident_bytes(lora, config, ParallelDims.from_sharding("none", 4, 2), half=True)["averages"] == 508 + 2 * 28


def test_a_checkpoint_is_as_large_as_foretold(trained):
    """All tensors of a run's checkpoint, byte for byte; its files are larger by their headers."""
    folder = CheckpointManager(trained, 1).latest()
    config = parse(Config, ["--config", str(trained / "config.yaml")])
    estimated = estimate.checkpoint_bytes(ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes()).sizes, config)
    assert estimated == sum(tensor.nbytes for tensor in load_tensors(folder).values())


def test_hours_and_epochs_are_arithmetic():
    config = parse(Config, ["--plan.images_per_second=50", "--plan.cost_per_hour=2", "--train.max_steps=3600", "--train.batch_size=200"])
    (line,) = estimate.describe_cost(config, 4)
    assert "720,000 images" in line and ": 1 hours, 4 of one rank's; 8.00 at 2 an hour" in line
    first, second, third = estimate.describe_epochs([300, 500, 100], config, 4)
    assert first == "900 images in 3 shards of 100 to 500 images" and second == "225 images and 0.75 shards a rank and epoch"
    assert third == "4.5 steps an epoch, 800 epochs in 3,600 steps"


@pytest.mark.parametrize(
    ("number", "said"), [(999.4e6, "999 MB"), (999.6e6, "1 GB"), (1234, "1.23 kB"), (0, "0 B"), (345e9, "345 GB"), (2.5e15, "2,500 TB")]
)
def test_sizes_are_said_in_three_digits(number, said):
    assert estimate.format_bytes(number) == said


def test_memory_left_where_the_system_does_not_say(monkeypatch):
    """A Mac knows its pages and not which are free."""
    here = free_memory()
    assert 0 < here < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf_names", {name: number for name, number in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"})
    assert free_memory() == os.sysconf("SC_PHYS_PAGES") // 2 * os.sysconf("SC_PAGE_SIZE")


# --- frozen encoders


def test_encoders_are_counted_without_their_weights(tmp_path):
    """Weights as the files hold them; multiply-adds and peak as of the encoders themselves at work."""
    frozen.shards(tmp_path / "shards")
    options = DataConfig(
        shards=(str(tmp_path / "shards"),),
        autoencoder=str(frozen.kl(tmp_path / "kl")),
        text_encoder=tuple(str(frozen.text(tmp_path / kind, kind)) for kind in ("clip_projected", "t5", "bert")),
        resolution=32,
        max_tokens=(12,),
    )
    seen = survey(options, True)
    assert seen.mistakes == []
    found = {(title, number): (network, call) for number, (title, network, call) in enumerate(seen.at_work())}
    assert [title for title, _ in found] == ["autoencoder", "text encoder", "text encoder", "text encoder"]
    network, call = found["autoencoder", 0]
    with safe_open(tmp_path / "kl" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert sum(p.numel() for p in network.parameters()) == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    most, products = inference_cost(network, lambda it: call(it, 5))
    real, images = Autoencoder(options.autoencoder), torch.zeros(5, 3, 32, 32)
    with MemoryTracker(list(real.model.parameters())) as tracker:
        real.model.encode(images)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # on a CPU fused attention is not counted
        real.model.encode(images)
    assert products == counter.get_total_flops() // 2
    assert most == pytest.approx(tracker.peak["activations"], rel=0.05, abs=images.nbytes)
    for number in (1, 2, 3):
        network, call = found["text encoder", number]
        assert min(inference_cost(network, lambda it, call=call: call(it, 5))) > 0


# --- mistakes


def report(capsys, *words):
    """Exit status, mistakes and everything that a dry run prints."""
    AcceleratorState._reset_state(True)
    status = train.main([*words, "--dry_run"])
    text = capsys.readouterr().out
    return status, [line[4:] for line in text.splitlines() if line.startswith("  - ")], text


def test_a_recipe_without_mistakes(digits, tmp_path, capsys):
    words = [*arguments(digits, tmp_path / "run"), "--plan.ranks=4", "--plan.images_per_second=10", "--plan.memory=1GB"]
    status, mistakes, text = report(capsys, *words)
    assert status == 0 and mistakes == [] and text.rstrip().endswith("0 mistakes.")
    assert "1,438 images in" in text or "images in" in text
    assert "= 4 x 1 x 4" in text and "activations measured here" in text and "fits into plan.memory=1GB" in text
    assert not (tmp_path / "run").exists() and os.listdir(tmp_path) == []


WRONG = {
    "train.batch_sise": "unknown key 'train.batch_sise': did you mean 'train.batch_size'?",
    "train.max_steps=many": "--train.max_steps: invalid literal",
    "train.learning_rate=-1": "train.learning_rate=-1.0: it is positive",
    "train.condition_dropout=2": "train.condition_dropout=2.0: a probability below 1",
    "flow.time_std=0": "flow.time_std=0.0: a standard deviation is positive",
    "flow.path=vpp": "flow.path=vpp: path 'vpp' is unknown",
    "flow.objective=sliced": "flow.objective=sliced learns a score",
    "data.shuffle_block=0": "data.shuffle_block=0: at least 1 shard",
    "data.lost_shards=perhaps": "data.lost_shards=perhaps: choose `stop` or `skip`",
    "model.heads=3": "must be a multiple of 4 and of model.heads=3",
    "model.patch_size=3": "model.patch_size=3 does not divide the resolution 8",
    "train.gradient_accumulation_steps=5": "is not a multiple of ranks x accumulation = 4 x 5",
    "model.gradient_checkpointing=true": "flow.objective=sliced with model.gradient_checkpointing",
    "train.lora_rank=4": "train.lora_rank without weights to add to",
    "checkpoint.start_from=/nowhere": "checkpoint.start_from='/nowhere' holds no whole checkpoint",
    "checkpoint.resume=/nowhere/checkpoint-5": "checkpoint.resume='/nowhere/checkpoint-5' is no whole checkpoint",
    "plan.memory=1kB": "plan.memory=1kB: a rank needs",
    "init_from=/nowhere": "init_from='/nowhere'",
    "output_dir=/proc/1/run": "output_dir='/proc/1/run'",
}
ALONE = ("train.lora_rank", "init_from", "model.gradient_checkpointing")
TOGETHER = [key for key in WRONG if key.partition("=")[0] not in ALONE]


def test_every_mistake_is_named_once(digits, capsys):
    """Sixteen at once, some in one section and some that only others show."""
    kept = [
        f"--data.shards={digits}",
        "--data.resolution=8",
        "--data.channels=1",
        "--model.width=32",
        "--train.batch_size=16",
        "--plan.ranks=4",
    ]
    status, mistakes, text = report(capsys, *kept, *(f"--{key}" for key in TOGETHER))
    assert status == 2 and f"{len(mistakes)} mistakes:" in text
    for key in TOGETHER:
        if key != "output_dir=/proc/1/run" or not os.access("/proc/1", os.W_OK):
            assert sum(WRONG[key] in line for line in mistakes) == 1, f"{key}: {mistakes}"
    assert len(mistakes) <= len(TOGETHER)
    assert "weights, all trained" in text and "of one rank of 4" in text, "the rest is told"


@pytest.mark.parametrize("key", ["train.lora_rank=4", "init_from=/nowhere", "flow.objective=sliced", "model.gradient_checkpointing=true"])
def test_each_mistake_alone_is_the_only_one(key, digits, tmp_path):
    flow = ["--flow.path=ve", "--flow.predict=score", "--flow.objective=sliced"] if key.startswith("model") else []
    config, found = parse_collecting_errors(Config, [*arguments(digits, tmp_path / "run"), *flow, f"--{key}"], ALIASES)
    recipe = ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes(found))
    recipe.check_start()
    assert len(recipe.mistakes) == 1 and WRONG[key] in recipe.mistakes[0]


def test_both_beginnings_are_one_too_many(tmp_path):
    config = parse(Config, [f"--init_from={tmp_path}", f"--checkpoint.start_from={tmp_path}", f"--output_dir={tmp_path / 'run'}"])
    recipe = ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes())
    recipe.check_start()
    assert any("give one of them" in text for text in recipe.mistakes)


def test_a_launcher_against_the_recipe_is_a_mistake(digits, tmp_path, monkeypatch):
    """All that training would refuse at its start, together."""
    said = {"MIXED_PRECISION": "fp16", "GRADIENT_ACCUMULATION_STEPS": "4", "USE_FSDP": "true"}
    for name, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("FSDP_VERSION", "1")
    config = parse(Config, [*arguments(digits, tmp_path / "run"), "--train.mixed_precision=bf16", "--train.sharding=none"], ALIASES)
    recipe = ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes())
    recipe.check_start()
    words = ("MIXED_PRECISION=fp16 and", "STEPS=4 and", "FSDP_VERSION=1:", "sharding=none: leave one out")
    assert [sum(word in text for text in recipe.mistakes) for word in words] == [1, 1, 1, 1] and len(recipe.mistakes) == 4


def test_what_this_machine_lacks_is_a_note_and_no_mistake(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["--train.mixed_precision=fp8", "--log.report_to", "none"]
    recipe = ResolvedRecipe(parse(Config, [*arguments(digits, tmp_path / "run"), *words], ALIASES), DRY_RUN_HOOKS, Mistakes())
    recipe.check_start()
    assert recipe.mistakes == [] and sum("refused: mixed_precision=fp8 needs a GPU" in text for text in recipe.notes) == 1
    sharded = parse(Config, [*arguments(digits, tmp_path / "run"), *words, "--train.sharding=full"], ALIASES)
    recipe = ResolvedRecipe(sharded, DRY_RUN_HOOKS, Mistakes())
    recipe.check_start()
    assert len(recipe.mistakes) == 1 and "fp8 and train.sharding=full" in recipe.mistakes[0]


def test_absent_shards_are_a_mistake_and_the_rest_is_told(digits, tmp_path, capsys):
    status, mistakes, text = report(capsys, *arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert status == 2 and len(mistakes) == 1 and "nowhere' is no folder" in mistakes[0]
    assert "activations" in text and "a checkpoint:" in text and "the shards are not here" in text


def test_of_absent_shards_a_manifest_tells_the_number(digits, tmp_path):
    """A laptop has the manifest; every shard that it lists is missing, and counted."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "manifest.json").write_bytes((digits / "manifest.json").read_bytes())
    seen = survey(DataConfig(shards=(str(tmp_path / "here"), str(tmp_path / "none")), resolution=8, channels=1), False)
    whole = survey(DataConfig(shards=(str(digits),), resolution=8, channels=1), False)
    assert whole.mistakes == [] and seen.samples == whole.samples and seen.class_names == whole.class_names
    assert sum("missing, the manifest says" in text for text in seen.mistakes) == min(3, len(list(digits.glob("*.tar"))))
    assert any("none' is no folder" in text for text in seen.mistakes)


def test_a_checkpoint_of_another_network_is_a_mistake(trained, digits):
    words = ["--config", str(trained / "config.yaml")]
    for more, found in (
        ([], []),
        (["--model.width=64"], ["model.width is 32 there and 64 here"]),
        (["--seed=5"], ["seed is 0 there and 5 here"]),
    ):
        recipe = ResolvedRecipe(parse(Config, [*words, *more]), DRY_RUN_HOOKS, Mistakes())
        assert recipe.check_start().startswith("goes on from")
        assert len(recipe.mistakes) == len(found) and all(text in recipe.mistakes[0] for text in found)


@pytest.mark.parametrize("path", [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "stages").glob("*.yaml")], ids=lambda p: p.name)
def test_shipped_recipes_lack_nothing_but_data(path, monkeypatch, tmp_path):
    """Where no data was prepared, as here, shards, encoders and the stage before are absent; nothing else is wrong."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    config, found = parse_collecting_errors(Config, ["--config", str(path), "--plan.ranks=8"], ALIASES)
    recipe = ResolvedRecipe(config, DRY_RUN_HOOKS, Mistakes(found))
    assert recipe.check_start() == "starts afresh" and recipe.model and recipe.sizes.weights
    absent = ("is no folder", "has no config.json", "cannot be had from the Hub", "holds no whole checkpoint")
    assert [text for text in recipe.mistakes if not any(part in text for part in absent)] == []


# --- recipes read whole


def test_parse_all_is_parse_where_nothing_is_wrong():
    for path in (ROOT / "configs").glob("*.yaml"):
        words = ["--config", str(path), "--learning_rate=1e-3", "--model.kind=unet", "--model.block_channels", "32", "64"]
        wrong = parse_collecting_errors(Config, words[:3], ALIASES)
        assert wrong == (parse(Config, words[:3], ALIASES), [])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["digits", "more", "--seed=1"], ["'digits' stands alone", "'more' stands alone"]),
        (["--model.kind=vit", "--model.width=3", "--seed=x"], ["model.kind=vit is unknown", "--seed: invalid literal"]),
        (["--model.kind=unet", "--model.width=3", "--flow.pth=vp"], ["model.width is a field of model.kind=dit", "unknown key 'flow.pth'"]),
        (["--config=/nowhere.yaml", "--seed=x"], ["no such recipe", "--seed: invalid literal"]),
        (["--ema.halflife", "5", "5", "--ema.ramp=0", "--seed=3"], ["ema.halflife=[5.0, 5.0]: each once", "ema.ramp=0.0"]),
        (["--train.max_steps=x", "--train.batch_size=y"], ["--train.max_steps", "--train.batch_size"]),
    ],
)
def test_parse_all_names_all(words, found):
    config, mistakes = parse_collecting_errors(Config, words, ALIASES)
    assert len(mistakes) == len(found) and all(any(part in text for text in mistakes) for part in found), mistakes
    assert all("\n" not in text for text in mistakes)
    assert config.seed == {"--seed=1": 1, "--seed=3": 3}.get(next((w for w in words if w.startswith("--seed")), ""), 0)
    assert config_to_mapping(config)["train"]["max_steps"] == 400_000


@dataclass(frozen=True)
class Between:
    """Two values that are right, each alone."""

    low: int = 0
    high: int = 9

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"between.low={self.low} is above between.high={self.high}.")


@dataclass(frozen=True)
class Ranged:
    between: Between = field(default_factory=Between)
    seed: int = 0


def test_values_that_are_wrong_together_alone_are_named_and_the_rest_is_kept():
    assert parse_collecting_errors(Ranged, ["--between.low=5", "--seed=3"]) == (Ranged(Between(low=5), 3), [])
    found, (mistake,) = parse_collecting_errors(Ranged, ["--between.low=5", "--between.high=4", "--seed=3"])
    assert found == Ranged(Between(high=4), seed=3) and mistake.startswith("between.low=5 is above between.high=4")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--dry_run"], True),
        (["--dry_run=false"], False),
        (["--dry_run", "true", "--seed=1"], True),
        (["--seed=1"], False),
        (["--dry_run", "--help"], False),
        (["--config=RECIPE"], True),
        (["--config=RECIPE", "--dry_run=false"], False),
        (["--config=/nowhere"], False),
        (["alone", "--dry_run"], True),
    ],
)
def test_whether_a_dry_run_is_asked_for(words, answer, tmp_path):
    (tmp_path / "r.yaml").write_text("dry_run: true\n")
    assert is_switch_set([word.replace("RECIPE", str(tmp_path / "r.yaml")) for word in words], "dry_run") is answer


def test_one_rank_speaks_for_all(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert report(capsys, "--train.batch_size=0") == (0, [], "")
