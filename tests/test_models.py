"""Networks: equal to the published layouts, zero at the start, one drop of the class for all blocks."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from condot.models import registry
from condot.models.common.conditioning import FREQUENCY_CHANNELS, sinusoidal_embedding, to_timestep
from condot.models.common.layers import patchify, sincos_positions, unpatchify
from condot.models.convert import STOCK_NULL, to_stock
from condot.models.dit.convert import dit_from_stock
from condot.models.dit.model import DiT

DIT = {"kind": "dit", "channels": 3, "resolution": 12, "num_classes": 7, "patch_size": 2, "width": 48, "depth": 3, "heads": 4}
UNET = {
    "kind": "unet", "channels": 1, "resolution": 8, "num_classes": 4,
    "block_channels": (32, 64), "layers_per_block": 1, "attention_levels": 1, "head_width": 32,
}  # fmt: skip


def shaken(options, seed=0, dtype=torch.float32):
    """A network without a zero weight, so that every part shows in its output."""
    torch.manual_seed(seed)
    model = registry.build(**options).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(options, batch=5, dtype=torch.float32):
    torch.manual_seed(1)
    side = options["resolution"]
    x = torch.randn(batch, options["channels"], side, side, dtype=dtype)
    labels = torch.tensor([0, options["num_classes"], options["num_classes"] - 1, 1, options["num_classes"]])[:batch]
    return x, torch.linspace(0, 1, batch, dtype=dtype), labels


def stock_output(stock, x, t, labels, null):
    return stock(x, 1000 * (1 - t), class_labels=torch.where(labels == null, STOCK_NULL, labels)).sample


@pytest.mark.parametrize(
    "options", [DIT, {**DIT, "patch_size": 1, "resolution": 5, "channels": 1}, {**DIT, "patch_size": 4}, {**DIT, "num_classes": 0}, UNET]
)
@pytest.mark.parametrize("factor", [-1.0, 1.0, 0.5])
@torch.no_grad()
def test_the_stock_network_gives_our_output(options, factor):
    """In float64, where a wrong layout cannot hide behind rounding; a factor on the output layer is one on the output."""
    model = shaken(options, dtype=torch.float64)
    x, t, labels = inputs(options, dtype=torch.float64)
    labels = labels.clamp(0, options["num_classes"])
    theirs = stock_output(to_stock(model, factor).double(), x, t, labels, options["num_classes"])
    ours = model(x, t, labels)
    scale = ours.abs().max()
    assert (theirs - factor * ours).abs().max() < 2e-6 * scale, "positions and times are float32 in both"
    wrong = stock_output(to_stock(model, -factor).double(), x, t, labels, options["num_classes"])
    assert (wrong - factor * ours).abs().max() > 0.5 * scale


@torch.no_grad()
def test_conversion_in_float32_is_rounding():
    """Every tensor of the stock network matters: changing any one of a kind changes its output."""
    model = shaken(DIT)
    stock = to_stock(model, -1.0)
    x, t, labels = inputs(DIT)
    ours, reference = model(x, t, labels), stock_output(stock, x, t, labels, 7)
    assert (ours + reference).abs().max() <= 1e-5 * ours.abs().max()
    for name, tensor in stock.state_dict().items():
        if "transformer_blocks.1" in name or "block" not in name:
            kept = tensor.clone()
            tensor.mul_(1.5)
            key_bias = name.endswith("to_k.bias")  # adds the same to every key of a query: softmax does not see it
            assert key_bias or (stock_output(stock, x, t, labels, 7) - reference).abs().max() > 1e-4, name
            tensor.copy_(kept)


def test_conversion_there_and_back_is_exact():
    model = shaken(DIT)
    back = dit_from_stock(to_stock(model, -1.0), 7, -1.0)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert back.state_dict().keys() == model.state_dict().keys()


def test_parts_are_those_of_the_reference():
    square = sincos_positions(48, 5, 5)
    assert torch.equal(sincos_positions(48, 3, 5).view(3, 5, 48), square.view(5, 5, 48)[:3]), "a place is told by its row and column alone"
    assert torch.equal(sincos_positions(48, 5, 2).view(5, 2, 48), square.view(5, 5, 48)[:, :2])
    assert torch.equal(square, torch.as_tensor(get_2d_sincos_pos_embed(48, 5, base_size=5, output_type="pt")).float())
    clock = to_timestep(torch.rand(9))
    reference = get_timestep_embedding(clock, FREQUENCY_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=1)
    torch.testing.assert_close(sinusoidal_embedding(clock), reference)
    x = torch.randn(2, 3, 6, 6)
    weight = torch.randn(10, 3, 2, 2)
    convolved = torch.nn.functional.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, 2) @ weight.flatten(1).T, convolved)
    tokens = torch.arange(9 * 4 * 3).reshape(1, 9, 12)
    assert unpatchify(tokens, 2, 3)[0, 1, 3, 4] == tokens[0, 3 * 1 + 2, 2 * 3 + 1], (
        "row 3, column 4 is token (1, 2), its row 1, column 0, channel 1"
    )


def test_a_dit_takes_images_of_other_shapes():
    """One trained at 8 x 8 gives at 16 x 16 what one built for 16 x 16 gives with its weights; and 8 x 16 is 8 x 16."""
    options = {"channels": 3, "num_classes": 2, "patch_size": 2, "width": 32, "depth": 2, "heads": 2}
    small, large = DiT(resolution=8, **options), DiT(resolution=16, **options)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    large.load_state_dict(small.state_dict())
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(small(x, t, labels), large(x, t, labels))
        wide = small(x[:, :, :8], t, labels)
        assert wide.shape == (2, 3, 8, 16) and not torch.equal(wide, small(x, t, labels)[:, :, :8])
        moved = small(x[:, :, :8].roll(2, 3), t, labels)
        assert not torch.allclose(moved, wide.roll(2, 3), atol=1e-4), "columns are told apart"


def test_times_are_told_apart():
    """The embedding of [0, 1] unscaled has an effective rank near 1; that of the clock is far richer."""

    def rank(clock):
        p = torch.linalg.svdvals(sinusoidal_embedding(clock).double()).square()
        p = p / p.sum()
        return torch.exp(-(p * p.clamp_min(1e-300).log()).sum())

    t = torch.linspace(0, 1, 500)
    assert rank(t) < 1.5 and rank(to_timestep(t)) > 20


@pytest.mark.parametrize("options", [DIT, UNET])
def test_a_network_starts_at_zero_and_learns(options):
    torch.manual_seed(0)
    model = registry.build(**options)
    x, t, labels = inputs(options)
    assert model(x, t, labels).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = (model(x, t, labels) - x).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_the_null_class_is_a_class_of_its_own():
    model = shaken(DIT)
    x, t, _ = inputs(DIT, 3)
    outputs = [model(x, t, torch.full((3,), label)) for label in range(8)]
    assert all((outputs[7] - other).abs().max() > 1e-3 for other in outputs[:7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "model.patch_size=5 does not divide the resolution 12"),
        ({"heads": 5}, "model.width=48 must be a multiple of 4 and of model.heads=5: use 60"),
        ({"depth": 0}, "model.depth=0"),
        ({"kind": "vit"}, "model.kind='vit' is unknown"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        registry.build(**{**DIT, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_channels": (30,)}, "multiple of 32"),
        ({"block_channels": ()}, "at least one level"),
        ({"resolution": 6, "block_channels": (32, 32, 32)}, "cannot be halved 2 times"),
        ({"head_width": 48}, "of divisible channels"),
    ],
)
def test_unet_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        registry.build(**{**UNET, **change})


def test_more_classes_than_the_stock_pipeline_can_tell():
    with pytest.raises(ValueError, match="at most 1000"):
        to_stock(registry.build(**{**DIT, "num_classes": 1001, "depth": 1}), 1.0)
