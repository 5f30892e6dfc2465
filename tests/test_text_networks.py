"""Text networks and U-Nets: equal to diffusers' classes both ways, zero at the start, blind to padding; one step lowers the loss."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from stocks import PIXART, PLAIN, SD3, STOCK, TEXTUAL, inputs, setting, shake, stock_network, stock_output

from condot.core.text_states import TextStates
from condot.models import registry
from condot.models.common.layers import sincos_positions
from condot.models.convert import from_stock, to_stock
from condot.models.mmdit.convert import fit_position_line, mmdit_unused

MMDIT = {
    "kind": "mmdit", "channels": 3, "resolution": 8, "text_width": 20, "pooled_width": 14, "width": 48, "depth": 3, "heads": 4,
    "dual_attention_blocks": 1, "position_grid": 6,
}  # fmt: skip
CROSS = {
    "kind": "cross_dit", "channels": 3, "resolution": 8, "text_width": 20, "pooled_width": 14, "patch_size": 2, "width": 48, "depth": 2,
    "heads": 4, "qk_norm": True,
}  # fmt: skip
UNET = {
    "kind": "unet", "channels": 3, "resolution": 8, "condition": "text", "text_width": 20, "pooled_width": 14, "block_channels": (32, 64),
    "layers_per_block": 1,
}  # fmt: skip
LABELLED = {"kind": "unet", "channels": 3, "resolution": 8, "num_classes": 5, "block_channels": (32, 64), "layers_per_block": 1}
KINDS = {"mmdit": MMDIT, "cross_dit": CROSS, "unet": UNET, "unet on classes": LABELLED, "unet on nothing": {**LABELLED, "num_classes": 0}}
SIZED_KINDS = {name: {**KINDS[name], "micro_conditions": True} for name in ("mmdit", "cross_dit", "unet")}


SHAPES = [(name, False) for name in STOCK] + [(name, True) for name in STOCK if "unet" not in name or name == "unet, text"]


@pytest.mark.parametrize(("name", "rectangular"), SHAPES, ids=[f"{name}, {'rectangular' if wide else 'square'}" for name, wide in SHAPES])
@torch.no_grad()
def test_our_network_gives_the_published_output(name, rectangular):
    stock = stock_network(name)
    given = setting(stock, rectangular)
    theirs = stock_output(stock, *given)
    ours = from_stock(stock, -1.0, pooled_width=14)
    scale = theirs.abs().max()
    assert (ours(*given) + theirs).abs().max() <= 1e-5 * scale, "float32; the target is 1e-4"
    again = from_stock(to_stock(ours, 0.5), 1.0, num_classes=getattr(ours, "num_classes", 0), pooled_width=14)
    assert (again(*given) + 0.5 * theirs).abs().max() <= 1e-5 * scale
    assert (from_stock(stock, 1.0, pooled_width=14)(*given) + theirs).abs().max() > 0.5 * scale, "the other sign is another network"


@pytest.mark.parametrize("name", STOCK)
def test_there_and_back_is_exact(name):
    stock = stock_network(name)
    ours = from_stock(stock, 1.0, pooled_width=14)
    back = to_stock(ours, 1.0)
    dead = mmdit_unused(stock.config.num_layers) if isinstance(stock, SD3Transformer2DModel) else set()
    if name == "unet":  # the stock pipeline's table of classes is longer
        dead = {"class_embedding.weight"}
        assert torch.equal(back.class_embedding.weight[:5], stock.class_embedding.weight[:5])
        assert torch.equal(back.class_embedding.weight[5:], stock.class_embedding.weight[5:].expand(996, -1))
    for key, value in stock.state_dict().items():
        if key.startswith("proj_out.") and name.endswith("variances"):
            value = value.view(4, 6, -1)[:, :3].flatten(0, 1).view(back.state_dict()[key].shape)
        assert key in dead or torch.equal(back.state_dict()[key], value), key
    again = from_stock(back, 1.0, num_classes=ours.num_classes, pooled_width=14)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["sd3.5-medium", "pixart"])
@torch.no_grad()
def test_every_tensor_matters(name):
    """Changing any one tensor of the stock network changes its output, and ours with it."""
    stock = stock_network(name)
    given = setting(stock)
    reference = stock_output(stock, *given)
    unused = mmdit_unused(3) if name.startswith("sd3") else set()
    moved = 0
    for key, value in stock.state_dict().items():
        if "blocks.1." in key or key in unused or key.endswith("to_k.bias"):  # a key's bias is the same for all: softmax does not see it
            continue
        kept = value.clone()
        value.mul_(1.5)
        other = stock_output(stock, *given)
        assert key == "pos_embed.pos_embed" or (other - reference).abs().max() > 1e-5, key
        if moved % 4 == 0:
            assert (from_stock(stock, 1.0, pooled_width=14)(*given) - other).abs().max() < 1e-5 * other.abs().max(), key
        moved += key != "pos_embed.pos_embed"
        value.copy_(kept)
    assert moved >= 20


@torch.no_grad()
def test_queries_of_the_last_text_are_not_looked_at():
    """What conversion leaves behind changes nothing in the stock network either."""
    stock = stock_network("sd3.5-medium")
    given = setting(stock)
    reference = stock_output(stock, *given)
    for name in mmdit_unused(3) - {"pos_embed.pos_embed"}:
        stock.get_parameter(name).add_(1.0)
    assert torch.equal(stock_output(stock, *given), reference)


@pytest.mark.parametrize(("first", "way"), [(0.0, 6 / 9), (-16.0, 0.25), (-3.0, 1.0), (2.5, 1 / 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_stored_positions_are_read(first, way, dtype):
    """Published SD3 counts from -16 in quarters, where diffusers' class counts from 0; half precision tells both exactly."""
    table = sincos_positions(48, 9, 9, start=(first, first), spacing=(way, way))[None].to(dtype)
    assert fit_position_line(table, 9) == pytest.approx((first, way), abs=1e-9)
    stock = stock_network("sd3")
    stock.pos_embed.pos_embed.copy_(table)
    given = setting(stock, rectangular=True)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    assert (from_stock(stock, 1.0)(*given) - stock_output(stock, *given)).abs().max() < close * stock_output(stock, *given).abs().max()
    exported = to_stock(from_stock(stock, 1.0), 1.0)
    assert (exported.pos_embed.pos_embed - table).abs().max() < (1e-6 if dtype == torch.float32 else 1e-3), "and written again"
    stock.pos_embed.pos_embed.add_(0.1 * torch.randn(1, 81, 48))
    with pytest.raises(ValueError, match="evenly spaced places"):
        from_stock(stock, 1.0)


PUBLISHED = {
    "SD3-medium": (SD3Transformer2DModel, 2_028_328_000, {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    }),
    "SD3.5-medium": (SD3Transformer2DModel, 2_243_171_520, {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    }),
    "PixArt-alpha, 256": (PixArtTransformer2DModel, 610_856_096, {"sample_size": 32, "caption_channels": 4096}),
    "ddpm-cifar10-32": (UNet2DModel, 35_746_307, {
        "sample_size": 32, "attention_head_dim": None, "block_out_channels": (128, 256, 256, 256), "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_held(name):
    """On meta: parameters as published, and each of them ours but for those that nothing looks at and learned variances."""
    kind, published, config = PUBLISHED[name]
    with torch.device("meta"):
        stock = kind(**config)
        ours = from_stock(stock, 1.0)
    sizes = {key: value.numel() for key, value in stock.named_parameters()}
    assert sum(sizes.values()) == published
    left_out = {key for key in sizes if kind is SD3Transformer2DModel and key in mmdit_unused(24)}
    half = sizes["proj_out.weight"] // 2 + sizes["proj_out.bias"] // 2 if kind is PixArtTransformer2DModel else 0
    assert sum(p.numel() for p in ours.parameters()) == published - half - sum(sizes[key] for key in left_out)


@pytest.mark.parametrize("change", [
    (SD3Transformer2DModel, {**SD3, "dual_attention_layers": (1,)}, r"dual_attention_layers=\(1,\)"),
    (SD3Transformer2DModel, {**SD3, "out_channels": 6}, "out_channels=6"),
    (PixArtTransformer2DModel, {**PIXART, "use_additional_conditions": True, "attention_head_dim": 12}, "use_additional_conditions=True"),
    (PixArtTransformer2DModel, {**PIXART, "caption_channels": None}, "caption_channels=None"),
    (UNet2DModel, {**PLAIN, "act_fn": "gelu"}, r"act_fn='gelu' \(ours 'silu'\)"),
    (UNet2DModel, {**PLAIN, "norm_eps": 1e-6}, "norm_eps=1e-06"),
    (UNet2DConditionModel, {**TEXTUAL, "use_linear_projection": True}, "use_linear_projection=True"),
])  # fmt: skip
def test_what_ours_cannot_hold_is_refused(change):
    kind, config, says = change
    with pytest.raises(ValueError, match=says):
        from_stock(kind(**config), 1.0)


@pytest.mark.parametrize(
    "options",
    [SIZED_KINDS["mmdit"], {**SIZED_KINDS["cross_dit"], "qk_norm": False}, CROSS],
    ids=["mmdit sized", "cross_dit sized", "cross_dit qk-norm"],
)
def test_what_stock_cannot_hold_is_refused(options):
    with pytest.raises(ValueError, match=r"model\.(micro_conditions|qk_norm)=True: .* has no place"):
        to_stock(registry.build(**options), 1.0)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_output_is_zero_at_the_start(name):
    network = registry.build(**KINDS[name])
    assert (network(*inputs(labels="on" in name)) == 0).all()
    assert (shake(network)(*inputs(labels="on" in name)) != 0).any()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_lowers_the_loss(name, dtype):
    network = registry.build(**KINDS[name], seed=0)
    x, t, condition, _ = inputs(labels="on" in name)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def loss():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return (network(x, t, condition) - target).float().square().mean()

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before - 1e-3


@pytest.mark.parametrize("name", ["mmdit", "cross_dit", "unet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_padding_is_never_looked_at(name, dtype):
    """Garbage in padded states gives the same bits; in seen states, other ones."""
    network = shake(registry.build(**KINDS[name]))
    x, t, text, _ = inputs()
    garbage = torch.where(text.mask[..., None], text.states, 1e3 * torch.randn_like(text.states))
    seen = torch.where(text.mask[..., None], text.states + 0.1, text.states)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        reference = network(x, t, text)
        assert torch.equal(network(x, t, text._replace(states=garbage)), reference)
        assert not torch.equal(network(x, t, text._replace(states=seen)), reference)


@pytest.mark.parametrize("name", ["mmdit", "cross_dit", "unet"])
@torch.no_grad()
def test_padding_is_as_good_as_absent(name):
    """A caption alone and cut to its length gives what it gives beside longer ones."""
    network = shake(registry.build(**KINDS[name])).double()
    x, t, text, _ = inputs()
    x, t, text = x.double(), t.double(), TextStates(text.states.double(), text.mask, text.pooled.double())
    together = network(x, t, text)
    for i, length in enumerate((6, 3, 1, 5)):
        alone = TextStates(text.states[i : i + 1, :length], text.mask[i : i + 1, :length], text.pooled[i : i + 1])
        assert (network(x[i : i + 1], t[i : i + 1], alone) - together[i : i + 1]).abs().max() < 1e-6


@pytest.mark.parametrize("name", [*KINDS, *(f"{name}, sizes" for name in SIZED_KINDS)])
@torch.no_grad()
def test_samples_do_not_know_one_another(name):
    """Permuted samples give permuted outputs, and each alone gives its own."""
    options = SIZED_KINDS[name.removesuffix(", sizes")] if name.endswith("sizes") else KINDS[name]
    network = shake(registry.build(**options)).double()
    x, t, condition, sizes = inputs(labels="on" in name)
    condition = (
        TextStates(condition.states.double(), condition.mask, condition.pooled.double()) if isinstance(condition, TextStates) else condition
    )
    order = torch.tensor([2, 0, 3, 1])

    def output(which):
        part = TextStates(*(v[which] for v in condition)) if isinstance(condition, TextStates) else condition[which]
        return network(x[which].double(), t[which].double(), part, sizes[which])

    whole = output(torch.arange(4))
    assert (output(order) - whole[order]).abs().max() < 1e-6
    assert (output(torch.tensor([1])) - whole[1:2]).abs().max() < 1e-6


@pytest.mark.parametrize("name", SIZED_KINDS)
def test_sizes_begin_without_a_say_and_learn_one(name):
    network = registry.build(**SIZED_KINDS[name])
    last = next(p for n, p in network.named_parameters() if n.endswith(("sizes.leave.weight", "add_embedding.linear_2.weight")))
    assert (last == 0).all()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter is not last:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x, t, text, sizes = inputs()
    if name != "unet":  # there the layer's bias shows
        assert torch.equal(network(x, t, text, sizes), network(x, t, text, sizes + 100))
    network(x, t, text, sizes).square().mean().backward()
    assert last.grad.abs().max() > 0
    with pytest.raises(ValueError, match="micro_conditions takes"):
        network(x, t, text)


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_no_bit(name):
    results = []
    for checkpointing in (False, True):
        network = shake(registry.build(**KINDS[name], gradient_checkpointing=checkpointing, seed=3)).train()
        x, t, condition, _ = inputs(labels="on" in name)
        output = network(x, t, condition)
        output.square().mean().backward()
        results.append([output, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", [*KINDS])
def test_built_on_meta_begins_alike(name):
    whole = registry.build(**KINDS[name], seed=5)
    shell = registry.build(**KINDS[name], seed=5, device="meta").to_empty(device="cpu")
    registry.initialise(shell, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), shell.state_dict().values(), strict=True))
    assert not [n for n, _ in shell.named_buffers()], "a buffer would have no value"
    assert (shell.conditioning, shell.num_classes) == (("class", KINDS[name]["num_classes"]) if "on" in name else ("text", 0))


@pytest.mark.parametrize(("kind", "change", "says"), [
    (MMDIT, {"patch_size": 3}, "does not divide the resolution 8"),
    (CROSS, {"heads": 5}, "use 60"),
    (MMDIT, {"text_width": 0}, "Name an encoder"),
    (MMDIT, {"dual_attention_blocks": 4}, "of 3 blocks"),
    (MMDIT, {"position_grid": 3}, "4 tokens a side"),
    (LABELLED, {"micro_conditions": True}, "no place for sizes"),
    (LABELLED, {"condition": "sound"}, "choose class or text"),
    (UNET, {"head_width": 48}, "divisible channels"),
    (UNET, {"attention_at": (2,)}, "there are 2 levels"),
])  # fmt: skip
def test_sizes_that_do_not_fit(kind, change, says):
    with pytest.raises(ValueError, match=says):
        registry.build(**{**kind, **change})


def test_an_image_larger_than_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"model.position_grid=6: use at least 8"):
        registry.build(**MMDIT)(*inputs(side=16))
