"""The DiT family: each option is its formula, starts at zero and learns; presets cost what was published; checkpointing changes no bit."""

import math

import plain_dit
import pytest
import torch

from condot.models import registry
from condot.models.common.layers import RMSNorm, SwiGLU, apply_rotary, resize_positions, rotary_tables
from condot.models.common.presets import PRESETS
from condot.models.cost import activation_rms, count_params_and_macs, example_inputs, named_blocks
from condot.models.registry import NETWORKS

SIZE = {"kind": "dit", "channels": 3, "resolution": 8, "num_classes": 5, "patch_size": 2, "width": 32, "depth": 3, "heads": 4}
OPTIONS = [
    {},
    {"qk_norm": True},
    {"rope": True, "positions": "none"},
    {"swiglu": True},
    {"rms_norm": True},
    {"registers": 3},
    {"positions": "learned"},
    {"shared_modulation": True},
    {"own_conditions": True},
    {"micro_conditions": True},
    {"gradient_checkpointing": True},
    {"clock": "original"},
    {"clock": "sit"},
    {"style": "modern"},
    {"style": "modern", "registers": 2, "positions": "learned", "shared_modulation": True, "micro_conditions": True, "clock": "sit"},
    {"style": "modern", "registers": 1, "own_conditions": True, "micro_conditions": True, "gradient_checkpointing": True},
]


def named(options):
    return "-".join(f"{name}={value}" for name, value in options.items()) or "plain"


def shaken(dtype=torch.float64, **options):
    """A network without a weight at zero or one, so that every part shows."""
    model = registry.build(**{**SIZE, **options}, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def batch(model, rows=8, columns=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, rows, columns, generator=generator, dtype=dtype)
    t = torch.tensor([0.25, 0.5, 1.0], dtype=dtype)
    more = (
        (torch.tensor([[32.0, 64, 0, 4, 8, 8], [9, 10, 1, 2, 8, 8], [500, 300, 50, 0, 8, 8]], dtype=dtype),)
        if model.micro_conditions
        else ()
    )
    return x, t, torch.tensor([0, 5, 3]), *more


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("shape", [(8, 8), (4, 12)], ids=["square", "wide"])
@torch.no_grad()
def test_every_option_is_its_formula(options, shape):
    """In float64 against a reference in plain words; frequencies of time and tables of positions are float32 in ours."""
    if options.get("positions") == "learned" and shape != (8, 8):
        pytest.skip("learned positions of another grid are resized: below")
    model = shaken(**options)
    x, t, labels, *sizes = batch(model, *shape)
    output = model(x, t, labels, *sizes)
    known = {**NETWORKS["dit"].resolve_options(options), "heads": 4, "patch_size": 2, "depth": 3}
    for i in range(3):
        reference = plain_dit.ours(model.state_dict(), x[i], t[i], labels[i], sizes[0][i] if sizes else None, **known)
        assert (output[i] - reference).abs().max() < 1e-6 * reference.abs().max(), i
    assert len({round(float(value), 6) for value in output.flatten()}) > 200


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_option_starts_at_zero_and_learns(options, precision):
    model = registry.build(**{**SIZE, **options}, seed=0)
    x, t, labels, *sizes = batch(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(x, t, labels, *sizes)
        assert step or output.abs().max() == 0
        loss = (output.float() - x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(set(losses), reverse=True), losses
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle, "every weight takes part"


def test_rotated_products_depend_on_the_way_between_places():
    """q at (r, c) and k at (r', c') meet as at any other two places as far apart; the angle of a row is its number times a frequency."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    cosine, sine = (part.double() for part in rotary_tables(16, 6, 7))
    turned_q, turned_k = (apply_rotary(x.expand(1, 1, 42, 16), cosine, sine)[0, 0].view(6, 7, 16) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=2), q.norm().expand(6, 7), rtol=1e-6, atol=0)
    near = (turned_q[1, 2] * turned_k[3, 1]).sum()
    far = (turned_q[3, 6] * turned_k[5, 5]).sum()
    assert abs(near - far) < 1e-5 and abs(near - (turned_q[1, 2] * turned_k[3, 2]).sum()) > 1e-3
    angles = torch.atan2(*(part.view(6, 7, 8) for part in (sine, cosine)))
    assert abs(angles[3, 0, 0] - 3) < 1e-6 and angles[3, 0, 4:].abs().max() == 0 and abs(angles[0, 2, 5] - 2 / 10) < 1e-6
    moved = rotary_tables(16, 6, 7, before=2)
    assert torch.equal(moved[0][2:], cosine.float()) and moved[0][:2].min() == 1 and moved[1][:2].abs().max() == 0


def test_norm_and_gate_are_their_closed_forms():
    norm = RMSNorm(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
    x = torch.tensor([[3.0, 4, 0, 0]], dtype=torch.float64)  # of root mean square 5 / 2
    torch.testing.assert_close(norm(x), torch.tensor([[1.2, 3.2, 0, 0]], dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert norm.float()(x.bfloat16()).dtype == torch.bfloat16
    assert [SwiGLU(width).leave.in_features for width in (24, 384, 768, 1024, 1152)] == [64, 1024, 2048, 2736, 3072]


def test_attention_logits_stay_bounded_with_qk_norm():
    """Tokens 1000 times as large leave the logits alone: |q| |k| / sqrt(d) <= sqrt(d)."""
    model = shaken(qk_norm=True)
    attention = model.blocks[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        attention.qkv.bias.zero_()
        attention.qkv.weight[64:] /= 1000
        small = attention(1000 * x)
        torch.testing.assert_close(attention(1e6 * x), 1000 * (small - attention.out.bias) + attention.out.bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shared_modulation_is_a_plain_dit_whose_blocks_agree():
    """One map and a table each: the same as maps of equal weights whose biases differ by the tables."""
    shared, plain = shaken(shared_modulation=True), shaken()
    state = shared.state_dict()
    for i in range(3):
        table = state.pop(f"blocks.{i}.modulation.table")
        state[f"blocks.{i}.modulation.weight"] = state["shared_modulation.weight"]
        state[f"blocks.{i}.modulation.bias"] = state["shared_modulation.bias"] + table.flatten()
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("shared_modulation")})
    torch.testing.assert_close(shared(*batch(shared)), plain(*batch(plain)), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_learned_positions_of_another_grid_are_resized():
    """Rows stay rows, the columns between lie between, mirrored about the middle; the grid they were learned for gets them as they are."""
    model = shaken(positions="learned")
    down, across = torch.arange(4.0, dtype=torch.float64), torch.tensor([-3.0, -1, 1, 3], dtype=torch.float64)
    model.positions.copy_((10 * down[:, None] + across)[..., None].expand(4, 4, 32))
    wide = resize_positions(model.positions, 4, 8)[..., 0] - 10 * down[:, None]
    assert resize_positions(model.positions, 4, 4) is model.positions
    torch.testing.assert_close(wide, wide[:1].expand(4, 8))
    torch.testing.assert_close(wide, -wide.flip(1))
    assert bool((wide.diff() > 0).all()) and -1 < wide[0, 3] < 0 and -3.5 < wide[0, 0] < -2.5
    assert model(*batch(model, 8, 16)).shape == (3, 3, 8, 16)


# --- checkpointing


def gradients(model, arguments):
    model.zero_grad()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append((x.untyped_storage().data_ptr(), x.nbytes)) or x, lambda x: x):
        output = model(*arguments)
    output.square().mean().backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    bytes_held = sum(size for place, size in dict(held).items() if place not in own)
    return [parameter.grad.clone() for parameter in model.parameters()], bytes_held


@pytest.mark.parametrize("options", [{}, {"style": "modern", "registers": 1, "own_conditions": True}], ids=named)
def test_checkpointing_changes_no_bit_and_keeps_less_than_half(options):
    """At depth 28: the same gradients; of the activations only what enters each block is kept."""
    plain = shaken(torch.float32, depth=28, **options)
    arguments = batch(plain, dtype=torch.float32)
    expected, all_bytes = gradients(plain, arguments)
    plain.gradient_checkpointing = True
    found, kept_bytes = gradients(plain, arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert kept_bytes < 0.25 * all_bytes


# --- presets and costs


def test_presets_cost_what_was_published():
    """Multiply-adds of the DiT paper's table; XL/2's parameters by closed form: the published 675,129,632 count the fixed positions and
    a predicted variance."""
    published = {
        "S/2": 6.06, "S/4": 1.41, "S/8": 0.36, "B/2": 23.01, "B/4": 5.56, "B/8": 1.42,
        "L/2": 80.71, "L/4": 19.70, "L/8": 5.01, "XL/2": 118.64, "XL/4": 29.05, "XL/8": 7.39,
    }  # fmt: skip
    for preset, giga in published.items():
        parameters, products = count_params_and_macs(
            registry.build("dit", preset=preset, channels=4, resolution=32, num_classes=1000, device="meta"), (4, 32, 32)
        )
        assert abs(products / 1e9 - giga) < 0.0055 + 3e-4 * giga, preset
        if preset == "XL/2":
            variance, positions = (1152 + 1) * 4 * 2**2, 256 * 1152
            assert parameters == 675_129_632 - variance - positions == 674_816_272


def test_costs_are_the_closed_form_wherever_the_network_lies():
    model = registry.build("dit", preset="S/4", style="modern", registers=4, channels=3, resolution=32, num_classes=10, device="meta")
    n, d, inside = 8 * 8 + 4, 384, 1024
    tokens = 12 * (n * d * (4 * d + 3 * inside) + 2 * n * n * d) + 2 * 64 * d * 48
    assert count_params_and_macs(model, (3, 32, 32))[1] == tokens + 12 * 6 * d * d + 2 * d * d + 256 * d + d * d
    small = registry.build("dit", **{k: v for k, v in SIZE.items() if k != "kind"})
    assert count_params_and_macs(small, (3, 8, 8)) == count_params_and_macs(registry.build(**SIZE, device="meta"), (3, 8, 8)), (
        "counted alike where it is computed"
    )


def test_presets_are_what_they_say_and_explicit_fields_win():
    assert NETWORKS["dit"].resolve_options({"preset": "XL/2", "style": "modern", "heads": 18, "rope": False, "width": None}) == {
        "patch_size": 2, "width": 1152, "depth": 28, "heads": 18, "qk_norm": True, "rope": False, "swiglu": True, "rms_norm": True,
    }  # fmt: skip
    assert NETWORKS["dit"].resolve_options({}) == PRESETS["S/2"] == NETWORKS["cross_dit"].resolve_options({"preset": "S/2"})
    assert NETWORKS["unet"].resolve_options({"preset": None}) == {"preset": None}
    assert len(PRESETS) == 16
    with pytest.raises(ValueError, match=r"model.preset='M/2' is unknown: choose one of S/1, S/2.*XL/8"):
        registry.build("dit", preset="M/2", channels=4, resolution=32, num_classes=10)
    with pytest.raises(ValueError, match=r"model.style='new' is unknown: choose one of dit, modern"):
        registry.build("dit", style="new", channels=4, resolution=32, num_classes=10)


@torch.no_grad()
def test_activations_are_those_of_each_block():
    """At the start every block is the identity: root mean squares are those of what enters; each branch by Xavier's rule."""
    model = registry.build("dit", seed=0, preset="S/4", channels=4, resolution=32, num_classes=10)
    assert [name for name, _ in named_blocks(model)] == [f"blocks.{i}" for i in range(12)]
    torch.manual_seed(0)
    found = activation_rms(model, *example_inputs(model, (4, 32, 32), batch=2))
    assert found[""] == 0 and len({found[f"blocks.{i}"] for i in range(12)}) == 1
    expected = math.sqrt(0.5 + 2 * 64 / (64 + 384))  # sines and cosines; Xavier's variance 2 / (in + out) times fan-in
    assert abs(found["blocks.11"] / expected - 1) < 0.05
    assert all(0.3 < found[f"blocks.{i}.attention"] < 0.8 and 0.3 < found[f"blocks.{i}.feed_forward"] < 0.8 for i in range(12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": True, "width": 36, "heads": 6}, "model.heads=6 of model.width=36 are 6 wide: with model.rope.*Use width 48"),
        ({"width": 0}, "model.width=0 must be a multiple of 4"),
        ({"registers": -1}, "model.registers=-1"),
        ({"positions": "relative"}, "model.positions='relative' is unknown"),
        ({"positions": "none"}, "model.positions='none' without model.rope"),
        ({"own_conditions": True, "shared_modulation": True}, "model.own_conditions=True with model.shared_modulation"),
    ],
)
def test_options_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        registry.build(**{**SIZE, **change})


def test_sizes_are_asked_for_and_matter():
    model = shaken(micro_conditions=True)
    x, t, labels, sizes = batch(model)
    with pytest.raises(ValueError, match=r"model.micro_conditions takes"):
        model(x, t, labels)
    with torch.no_grad():
        reference = model(x, t, labels, sizes)
        assert all((model(x, t, labels, sizes + 7 * torch.eye(6)[i]) - reference).abs().max() > 1e-3 for i in range(6))
