"""LoRA: nothing changes at the start, only adapters learn, merging gives the adapted network back as a plain one."""

import sys

import pytest
import torch
from stocks import inputs, shake
from torch import nn

from condot.models import registry
from condot.models.convert import to_stock
from condot.models.lora import add_lora, merge_lora

KINDS = {
    "dit": {"kind": "dit", "num_classes": 5, "patch_size": 2, "width": 48, "depth": 2, "heads": 4},
    "dit, modern": {"kind": "dit", "num_classes": 5, "patch_size": 2, "width": 48, "depth": 2, "heads": 4, "style": "modern"},
    "dit, shared": {"kind": "dit", "num_classes": 5, "patch_size": 2, "width": 48, "depth": 2, "heads": 4, "shared_modulation": True},
    "mmdit": {"kind": "mmdit", "text_width": 20, "pooled_width": 14, "width": 48, "depth": 2, "heads": 4, "dual_attention_blocks": 1},
    "cross_dit": {"kind": "cross_dit", "text_width": 20, "pooled_width": 14, "patch_size": 2, "width": 48, "depth": 2, "heads": 4},
    "unet": {"kind": "unet", "num_classes": 5, "block_channels": (32, 64), "layers_per_block": 1},
    "unet, text": {
        "kind": "unet", "condition": "text", "text_width": 20, "pooled_width": 14, "block_channels": (32, 64), "layers_per_block": 1,
    },
}  # fmt: skip
ALL = ("attention", "feed_forward", "modulation")
COUNTS = {
    # blocks x (attention + feed-forward + modulation), and the last layer's modulation
    "dit": 2 * (2 + 2 + 1) + 1, "dit, modern": 2 * (2 + 2 + 1) + 1, "dit, shared": 2 * (2 + 2) + 1 + 1,
    # two streams, but for the text's end (no out, no feed-forward); the dual block's own attention
    "mmdit": (4 + 2 + 4 + 2) + (2 + 1 + 2 + 2) + 1,
    "cross_dit": 2 * (2 + 3 + 2) + 1,
    # attention: 1 down, 2 up, 1 middle; residual blocks: 2 down, 4 up, 2 middle
    "unet": 4 * 4 + 8, "unet, text": 4 * (8 + 2) + 8,
}  # fmt: skip


def network(name, seed=0):
    return shake(registry.build(**KINDS[name], channels=3, resolution=8, seed=seed))


def groups(name):
    return ("attention", "modulation") if name == "unet" else ALL


@pytest.fixture(autouse=True)
def with_peft(request):
    if "without" not in request.node.name:
        pytest.importorskip("peft", reason="LoRA needs the extra: pip install 'condot[lora]'")


@pytest.mark.parametrize("name", KINDS)
def test_adapters_start_silent_learn_alone_and_merge(name):
    plain, ours = network(name), network(name)
    given = inputs(labels="text_width" not in KINDS[name])
    given = given if name[:3] != "dit" and name != "unet" else given[:3]
    before = plain(*given)
    assert add_lora(ours, rank=3, alpha=6.0, targets=groups(name)) == COUNTS[name]
    assert torch.equal(ours(*given), before), "the second halves begin at zero"
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    frozen = {n: p.clone() for n, p in ours.named_parameters() if n not in trained}

    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(3):
        loss = (ours(*given) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in ours.named_parameters() if n in frozen)

    adapted = ours(*given)
    merged = merge_lora(ours)
    assert merged is ours and not any("lora_" in n or "base_layer" in n for n in ours.state_dict())
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert (ours(*given) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert (adapted - before).abs().max() > 1e-3
    assert all(p.requires_grad for p in ours.parameters())
    if "," not in name:
        to_stock(ours, 1.0)


def test_an_adapter_is_a_product_of_rank():
    """W + alpha / rank B A, and a tenth of the weights or fewer."""
    ours = network("dit")
    kept = ours.blocks[0].attention.qkv.weight.clone()
    total = sum(p.numel() for p in ours.parameters())
    add_lora(ours, rank=2, alpha=5.0)
    layer = ours.blocks[0].attention.qkv
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    delta = 2.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) < total / 10
    merged = merge_lora(ours).blocks[0].attention.qkv.weight
    assert (merged - kept - delta).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(merged - kept, atol=1e-4) == 2


def test_adapters_begin_by_the_seed_alone():
    states = []
    for noise, seed in ((1, 7), (2, 7), (1, 8)):
        ours = network("dit")
        torch.manual_seed(noise)
        rest = torch.get_rng_state()
        add_lora(ours, rank=2, alpha=2.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), rest), "the run's own noise is as it was"
        states.append(ours.blocks[1].attention.out.lora_A["default"].weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_merging_without_adapters_changes_nothing():
    ours, plain = network("mmdit"), network("mmdit")
    assert all(torch.equal(a, b) for a, b in zip(merge_lora(ours).state_dict().values(), plain.state_dict().values(), strict=True))


def test_what_takes_no_lora_is_refused():
    with pytest.raises(ValueError, match="Linear takes no LoRA"):
        add_lora(nn.Linear(2, 2), 2, 2.0)
    ours = network("unet")
    with pytest.raises(ValueError, match="target feed_forward: this UNet has no such layers"):
        add_lora(ours, 2, 2.0, ALL)
    with pytest.raises(ValueError, match="choose of attention, feed_forward, modulation"):
        add_lora(ours, 2, 2.0, ("qkv",))
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(ours, 0, 2.0)
    assert not any("lora_" in n for n, _ in ours.named_parameters()), "a refusal leaves the network alone"
    add_lora(ours, 2, 2.0)
    with pytest.raises(ValueError, match="already"):
        add_lora(ours, 2, 2.0)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install peft"):
        add_lora(network("dit"), 2, 2.0)


def test_every_kind_has_its_table():
    assert all(spec.lora_targets for spec in registry.NETWORKS.values())
