"""Published DiT weights come in and go out: diffusers' class with any weights, the original's and SiT's checkpoints."""

import plain_dit
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding

from condot.models import registry
from condot.models.common.conditioning import sinusoidal_embedding
from condot.models.common.layers import sincos_positions
from condot.models.convert import to_stock
from condot.models.dit.convert import dit_from_stock
from condot.models.dit.original import dit_from_original

STOCK = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 3, "sample_size": 8, "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}  # fmt: skip


def stock_of(seed=3, **options):
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**{**STOCK, **options}).eval()


def outputs(stock, ours, classes):
    """Both for the same noise, times (whole steps of 1000, as published) and labels; the last is null."""
    side = stock.config.sample_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, stock.config.in_channels, side, side, generator=generator)
    ticks = torch.tensor([0.0, 999.0, 250.0, 731.0])
    theirs = torch.tensor([0, classes - 1, stock.config.num_embeds_ada_norm, 1])
    labels = torch.where(theirs == stock.config.num_embeds_ada_norm, ours.num_classes, theirs)
    with torch.no_grad():
        return stock(x, ticks, class_labels=theirs).sample, ours(x, 1 - ticks / 1000, labels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 1, "sample_size": 5},
        {"patch_size": 4, "sample_size": 12},
        {"sample_size": 14, "num_layers": 1},
        {"patch_size": 8, "sample_size": 24, "in_channels": 3, "num_attention_heads": 3},
        {"out_channels": 8},
        {"num_embeds_ada_norm": 10, "norm_eps": 1e-6, "in_channels": 1, "out_channels": 2},
    ],
    ids=str,
)
def test_a_stock_dit_with_random_weights_comes_in(options):
    """Float32, each block with an embedding of its own; with norm_eps as stock has it by default, and ours."""
    stock = stock_of(**options)
    ours = dit_from_stock(stock, stock.config.num_embeds_ada_norm, 1.0)
    theirs, found = outputs(stock, ours, stock.config.num_embeds_ada_norm)
    theirs = theirs[:, : stock.config.in_channels]
    assert ours.own_conditions == (stock.config.num_layers > 1) and theirs.std() > 0.1
    assert (theirs - found).abs().max() <= (2e-6 if stock.config.norm_eps == 1e-6 else 1e-4)
    twice = dit_from_stock(stock, stock.config.num_embeds_ada_norm, -2.0)
    assert torch.equal(outputs(stock, twice, stock.config.num_embeds_ada_norm)[1], -2 * found)


def test_every_tensor_of_it_matters():
    """Negative control: a stock tensor changed by a half shows in ours, and in ours as in the stock."""
    stock = stock_of(norm_eps=1e-6)
    reference = outputs(stock, dit_from_stock(stock, 1000, 1.0), 1000)[1]
    for name, tensor in stock.state_dict().items():
        kept = tensor.clone()
        tensor.mul_(1.5)
        theirs, found = outputs(stock, dit_from_stock(stock, 1000, 1.0), 1000)
        assert (theirs - found).abs().max() <= 3e-6, name
        assert name.endswith("to_k.bias") or (found - reference).abs().max() > 1e-5, name
        tensor.copy_(kept)


def test_weights_that_the_blocks_share_need_no_own_conditions():
    stock = stock_of(norm_eps=1e-6)
    for block in stock.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(stock.transformer_blocks[0].norm1.emb.state_dict())
    ours = dit_from_stock(stock, 7, 1.0)
    assert not ours.own_conditions and ours.classes.weight.shape == (8, 32)
    theirs, found = outputs(stock, ours, 7)
    assert (theirs - found).abs().max() < 2e-6


@pytest.mark.parametrize("own", [False, True])
def test_there_and_back_is_exact(own):
    ours = registry.build(
        "dit", seed=0, channels=3, resolution=12, num_classes=7, patch_size=2, width=48, depth=3, heads=4, own_conditions=own
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    stock = to_stock(ours, -1.0)
    back = dit_from_stock(stock, 7, -1.0)
    assert back.own_conditions == own and back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in back.state_dict().items())
    again = to_stock(dit_from_stock(stock, 7, -1.0), -1.0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in stock.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn=geglu"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"out_channels": 3}, "4 channels in and 3 out"),
    ],
)
def test_stock_dits_that_ours_cannot_hold(options, message):
    with pytest.raises(ValueError, match=message):
        dit_from_stock(stock_of(**options), 1000, 1.0)


def test_more_classes_than_the_weights_have():
    with pytest.raises(ValueError, match="num_classes=11: these weights know 10 classes"):
        dit_from_stock(stock_of(num_embeds_ada_norm=10), 11, 1.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"style": "modern"}, ["qk_norm", "rope", "swiglu", "rms_norm"]),
        ({"registers": 2, "clock": "sit"}, ["registers", "clock"]),
        ({"positions": "learned", "micro_conditions": True}, ["positions", "micro_conditions"]),
        ({"shared_modulation": True}, ["shared_modulation"]),
    ],
)
def test_options_without_a_stock_class_are_named(options, named):
    model = registry.build("dit", channels=1, resolution=4, num_classes=2, width=16, depth=1, heads=2, **options)
    with pytest.raises(ValueError, match="^" + ", ".join(f"model.{name}" for name in named) + ": diffusers"):
        to_stock(model, 1.0)


# --- the original's checkpoints


def checkpoint(width=24, depth=2, channels=4, out=8, patch_size=2, rows=5, classes=6):
    """A state dictionary as the original's published files hold it, of random numbers."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {"pos_embed": sincos_positions(width, rows, rows)[None]}
    state["x_embedder.proj.weight"], state["x_embedder.proj.bias"] = random(width, channels, patch_size, patch_size), random(width)
    state["y_embedder.embedding_table.weight"] = random(classes + 1, width)
    maps = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        for name, shape in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
            "adaLN_modulation.1": (6 * width, width),
        }.items():  # fmt: skip
            maps[f"blocks.{i}.{name}"] = shape
    maps |= {"final_layer.linear": (patch_size**2 * out, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for name, shape in maps.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = random(*shape), random(shape[0])
    return state


@pytest.mark.parametrize(("clock", "out", "patch_size"), [("original", 8, 2), ("sit", 8, 2), ("original", 4, 3), ("sit", 4, 1)])
@torch.no_grad()
def test_the_originals_checkpoints_come_in(clock, out, patch_size):
    """Against its forward pass in plain words: DiT's time is 1000 at the noise, SiT's is 1 at the data; a variance is dropped."""
    state = checkpoint(out=out, patch_size=patch_size)
    ours = dit_from_original(state, clock=clock, heads=3).double()
    double = {name: value.double() for name, value in state.items()}
    generator = torch.Generator().manual_seed(1)
    for t, label in [(0.0, 0), (0.25, 6), (0.75, 3), (1.0, 5)]:
        x = torch.randn(4, 5 * patch_size, 5 * patch_size, generator=generator, dtype=torch.float64)
        ticks = torch.tensor(t if clock == "sit" else 1000 * (1 - t))
        reference = plain_dit.original(double, x, ticks, label, heads=3)[:4]
        found = ours(x[None], torch.tensor([t], dtype=torch.float64), torch.tensor([label]))[0]
        assert (found - reference).abs().max() < 1e-6 * reference.abs().max()
        other = dit_from_original(state, clock="diffusers", heads=3).double()(x[None], torch.tensor([t]), torch.tensor([label]))[0]
        # at the data both clocks of DiT read 0, and every frequency agrees
        assert (other - reference).abs().max() > 1e-3 * reference.abs().max() or (clock, t) == ("original", 1.0)


def test_published_sizes_know_their_heads_and_fewer_classes_are_cut():
    state = checkpoint(width=384, depth=1, rows=2)
    ours = dit_from_original(state, num_classes=2, factor=2.0)
    assert ours.head_width == 64 and ours.resolution == 4
    table = state["y_embedder.embedding_table.weight"]
    assert torch.equal(ours.classes.weight, table[[0, 1, 6]])
    assert torch.equal(ours.leave.bias.view(4, 4), 2 * state["final_layer.linear.bias"].view(4, 8)[:, :4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), r"missing \['blocks.1.attn.proj.bias'\], unexpected nothing"),
        (lambda s: s.update({"blocks.1.attn.q_norm.weight": torch.ones(8)}), r"unexpected \['blocks.1.attn.q_norm.weight'\]"),
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.ones(8, 24)}), r"blocks.0.feed_forward.enter.weight \(8, 24\)"),
        (lambda s: s.update({"final_layer.linear.weight": torch.ones(7, 24)}), r"leave.weight \(7, 24\)"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 25, 24)}), "pos_embed: these positions are not the fixed ones"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 24, 24)}), r"are not \(D, C, p, p\) and \(1, N \* N, D\)"),
        (lambda s: s.clear(), "missing .*x_embedder.proj.weight"),
    ],
)
def test_other_checkpoints_are_refused(change, message):
    state = checkpoint()
    change(state)
    with pytest.raises(ValueError, match=message):
        dit_from_original(state, heads=3)


def test_unknown_widths_ask_for_heads():
    with pytest.raises(ValueError, match="heads=None: a width of 24 is none of the published"):
        dit_from_original(checkpoint())


@pytest.mark.parametrize(("clock", "shift"), [("diffusers", 1), ("original", 0), ("sit", 0)])
def test_clocks_are_those_of_diffusers_embedding(clock, shift):
    """`downscale_freq_shift` 1 in its DiT, 0 in the original: told apart by more than a hundredth at 999."""
    values = torch.tensor([0.0, 1.0, 37.5, 999.0])
    reference = get_timestep_embedding(values, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoidal_embedding(values, clock), reference, rtol=0, atol=2e-4)  # of angles to 1000 in float32
    assert (sinusoidal_embedding(values, "original" if shift else "diffusers") - reference)[3].abs().max() > 0.01
