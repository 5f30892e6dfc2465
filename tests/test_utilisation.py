"""Model FLOP utilisation: products counted against closed forms and torch's own count, peaks against the vendors' white papers."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condot.models import registry
from condot.models.cost import count_params_and_macs, example_inputs
from condot.pipeline.tracking import mfu
from condot.pipeline.tracking.mfu import (
    DATASHEET_TFLOPS,
    MfuEstimator,
    benchmark_flops,
    count_flops,
    datasheet_flops,
    matmul_precision,
    peak_flops,
)

CPU = torch.device("cpu")

# --- what is counted


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, *rest):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_fused_attention_are_counted(dtype):
    """Projections 2 B L d 3d, scores and values 2 B L^2 d each; torch's own table lacks the CPU's fused kernel."""
    batch, length, width = 3, 80, 64
    network = Attention(width, 4).to(dtype)
    x = torch.randn(batch, length, width, dtype=dtype)
    result, found = count_flops(lambda: network(x))
    assert found == 2 * batch * length * width * 3 * width + 4 * batch * length**2 * width
    with torch.no_grad():
        assert torch.equal(result, network(x))


def test_training_is_six_a_multiply_add_and_frozen_weights_have_no_gradients():
    """Against the count of models.cost, of another kind; what encodes is counted by itself."""
    options = {"channels": 4, "resolution": 16, "num_classes": 10, "patch_size": 2, "width": 64, "depth": 3, "heads": 4}
    _, products = count_params_and_macs(registry.build("dit", device="meta", **options), (4, 16, 16))
    encoder, calls = nn.Conv2d(3, 4, 3, padding=1), []

    def see():
        calls.append(1)
        return encoder(torch.zeros(5, 3, 16, 16)), torch.zeros(5, dtype=torch.long)

    for trained in (1.0, 0.0, 0.25):
        use = MfuEstimator(registry.build("dit", device="meta", **options), trained, peak_flops=2e12)
        assert use.count(see) == "" and use.count(see) == ""
        assert use.flops_per_image == pytest.approx(2 * (2 + trained) * products) and use.encoder_flops_per_image == 2 * 27 * 4 * 16 * 16
        assert use.mfu_values(100.0)["mfu"] == pytest.approx(100 * use.flops_per_image / 2e12) and use.network is None
    assert len(calls) == 3, "counted once each"


SMALL = {"channels": 4, "resolution": 8, "patch_size": 2, "width": 32, "depth": 2, "heads": 2}
TEXT = {"text_width": 24, "pooled_width": 24}
KINDS = {
    "dit": {**SMALL, "num_classes": 10, "style": "modern", "micro_conditions": True},
    "cross_dit": {**SMALL, **TEXT},
    "mmdit": {**SMALL, **TEXT},
    "unet": {"channels": 4, "resolution": 8, "num_classes": 10, "block_channels": (32, 64), "layers_per_block": 1, "head_width": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_kind_are_counted_as_they_are_fed(kind):
    """Two samples, of text seven tokens, against one sample's cost."""
    options = KINDS[kind]
    network = registry.build(kind, device="meta", **options)
    text = {"tokens": 7, "text_width": options.get("text_width", 0), "pooled_width": options.get("pooled_width", 0)}
    x, _, *told = example_inputs(network, (4, 8, 8), batch=2, **text)
    use = MfuEstimator(network)
    assert use.count(lambda: (x, *told)) == "" and use.encoder_flops_per_image == 0
    assert use.flops_per_image == pytest.approx(6 * count_params_and_macs(network, (4, 8, 8), **text)[1])


def test_a_step_computes_what_is_counted():
    """Forward and backward of a real network; only the times, which need no gradient, make it less."""
    network = registry.build("dit", seed=0, channels=4, resolution=16, num_classes=10, patch_size=2, width=64, depth=3, heads=4)
    x, t, labels = torch.randn(3, 4, 16, 16, requires_grad=True), torch.rand(3), torch.tensor([1, 2, 3])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, t, labels).sum().backward()
    use = MfuEstimator(network.to("meta"))
    use.count(lambda: (x.detach(), labels))
    assert counter.get_total_flops() == pytest.approx(len(x) * use.flops_per_image, rel=0.01)


def test_what_is_not_known_is_null():
    """No peak, an objective that is more than one backward pass, an encoder that cannot be counted."""

    def broken():
        raise RuntimeError("no such kernel")

    assert MfuEstimator(flops_per_image=1.0, encoder_flops_per_image=1.0).mfu_values(9.0) == {"mfu": None, "mfu_with_encoders": None}
    several = MfuEstimator(None, peak_flops=1e12)
    assert several.count(lambda: (torch.zeros(1, 1),)) == "" and several.mfu_values(9.0) == {"mfu": None, "mfu_with_encoders": None}
    lost = MfuEstimator(nn.Linear(1, 1, device="meta"), peak_flops=1e12)
    assert "no such kernel" in lost.count(broken) and lost.count(broken) == "" and lost.mfu_values(9.0)["mfu"] is None


# --- what a device can do

CHIPS = {  # multiprocessors, dense half-precision FLOPs of each in a clock, boost clock in GHz: vendors' white papers
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.83),
    "NVIDIA H200": (132, 4096, 1.83),
    "NVIDIA H100 PCIe": (114, 4096, 1.62),
    "NVIDIA A100-SXM4-80GB": (108, 2048, 1.41),
    "NVIDIA A100 80GB PCIe": (108, 2048, 1.41),
    "NVIDIA A100-PCIE-40GB": (108, 2048, 1.41),
    "NVIDIA A30": (56, 2048, 1.44),
    "NVIDIA A10": (72, 1024, 1.695),
    "NVIDIA A40": (84, 1024, 1.74),
    "NVIDIA L4": (58, 1024, 2.04),
    "NVIDIA L40": (142, 512, 2.49),
    "NVIDIA L40S": (142, 1024, 2.52),
    "NVIDIA RTX A6000": (84, 1024, 1.8),
    "NVIDIA RTX 6000 Ada Generation": (142, 1024, 2.505),
    "NVIDIA GeForce RTX 3090": (82, 512, 1.695),
    "NVIDIA GeForce RTX 3090 Ti": (84, 512, 1.86),
    "NVIDIA GeForce RTX 4080": (76, 512, 2.505),
    "NVIDIA GeForce RTX 4090": (128, 512, 2.52),
    "NVIDIA GeForce RTX 5090": (170, 512, 2.407),
    "Tesla V100-SXM2-16GB": (80, 1024, 1.53),
    "Tesla T4": (40, 1024, 1.59),
    "AMD Instinct MI300X": (304, 2048, 2.1),
}


@pytest.mark.parametrize("name", CHIPS)
def test_listed_peaks_are_what_the_chip_can_do_without_sparsity(name):
    units, each, clock = CHIPS[name]
    assert datasheet_flops(name, "fp16") == pytest.approx(units * each * clock * 1e9, rel=0.015)


def test_listed_peaks_halve_and_double_with_the_width_of_a_number():
    for name, (half, eighth, tf32, single) in DATASHEET_TFLOPS.items():
        assert eighth is None or eighth == pytest.approx(2 * half, rel=0.02), name
        assert tf32 is None or tf32 == pytest.approx(half / 2, rel=0.02), name
        assert single <= half, name


def test_other_devices_than_the_listed_are_not_taken_for_them():
    strangers = (
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA H20",
    )
    assert [datasheet_flops(name, "fp16") for name in (*strangers, "NVIDIA A100-SXM4-40GB MIG 3g.20gb")] == [None] * 6
    assert datasheet_flops("Tesla V100-SXM2-32GB", "bf16") is None is datasheet_flops("NVIDIA A100-SXM4-40GB", "fp8"), (
        "no such products there"
    )
    assert datasheet_flops("NVIDIA H100 80GB HBM3", "fp8") == 1978.9e12 and datasheet_flops("NVIDIA H100 80GB HBM3", "tf32") == 494.7e12


def test_a_peak_is_asked_for_listed_or_measured(monkeypatch):
    assert peak_flops(2.5, "bf16", CPU) == (2.5e12, "log.peak_tflops")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(0, "bf16", torch.device("cuda"))[0] == 121e12
    assert matmul_precision("no", torch.device("cuda")) == "float32" and matmul_precision("fp16", CPU) == "fp16"
    monkeypatch.setattr(mfu, "BENCHMARK_SECONDS", {"cpu": 0.0})
    rate, source = peak_flops(0, "no", CPU)
    assert 1e7 < rate < 1e14 and "measured here" in source and benchmark_flops(CPU, "fp8") is None


def test_measuring_takes_the_best_of_the_sizes_within_its_time_and_no_random_numbers(monkeypatch):
    """A device of 1e9 FLOP/s up to 512 a side, and half of it beyond."""
    sizes, state, now = [], torch.get_rng_state(), [0.0]

    def product(x, y):
        sizes.append(len(x))
        now[0] += 2 * len(x) ** 3 / (1e9 if len(x) <= 512 else 5e8) * (1 if len(sizes) % 3 else 40)  # some are interrupted

    monkeypatch.setattr(torch, "matmul", product)
    assert benchmark_flops(CPU, "bf16", seconds=40.0, clock=lambda: now[0]) == pytest.approx(1e9)
    assert sorted(set(sizes)) == [256, 512, 1024] and min(map(sizes.count, sizes)) == 4 and torch.equal(torch.get_rng_state(), state)
