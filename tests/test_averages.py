"""Averages of the weights: on an image clock, of any width after the fact, and bitwise the same however they are kept."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fit, launch
from safetensors.torch import load_file
from test_card import EVALUATION

from condot.cli import evaluate as evaluate_command
from condot.cli import sample
from condot.cli.assembly.trained_model import TrainedModel
from condot.pipeline.checkpoint.store import CheckpointManager, averages, load_state, load_tensors, raw_weights, verify
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import Config, EmaConfig
from condot.pipeline.ema.averages import WeightAverages, ema_profiles
from condot.pipeline.ema.posthoc import (
    MAX_RELATIVE_ERROR,
    exponent_to_width,
    power_decay,
    profile_inner_products,
    solve_posthoc_coefficients,
    width_to_exponent,
)
from condot.pipeline.ema.snapshots import (
    count_snapshots,
    find_kept_averages,
    rebuild_average,
    remove_later_snapshots,
    snapshot_due,
    snapshot_manager,
    write_snapshot,
)
from condot.pipeline.ema.weight_selection import WeightSelection, load_selected_weights, parse_weight_selection
from condot.pipeline.export.model_card import CardFacts
from condot.pipeline.sampling.options import ImagesOptions

# --- the profiles


def profile(exponent, end, tau):
    """The weight that an average at time `end` gives to time tau."""
    return torch.where(tau <= end, (exponent + 1) / end * (tau / end) ** exponent, torch.zeros_like(tau))


def test_exponents_are_the_published_ones():
    """EDM2, section 3.1: 5 % is 16.97 and 10 % is 6.94; the plain mean, exponent 0, has the width of a uniform profile."""
    assert width_to_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert width_to_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent_to_width(0) == pytest.approx(12**-0.5, rel=1e-12)
    for width in (0.001, 0.05, 0.1, 0.15, 0.279):
        assert exponent_to_width(width_to_exponent(width)) == pytest.approx(width, rel=1e-10)
    for width in (0, -0.1, 1e-200, 0.28, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"between 1e-06 and 0\.28"):
            width_to_exponent(width)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25])
def test_a_width_is_the_standard_deviation_of_its_law(width):
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = profile(width_to_exponent(width), 1.0, tau)
    mean = (density * tau).mean()
    assert density.mean().item() == pytest.approx(1, rel=1e-6)
    assert (density * (tau - mean) ** 2).mean().sqrt().item() == pytest.approx(width, rel=1e-5)


def test_products_are_the_integrals():
    """Against a midpoint sum, for ends and exponents either way round."""
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 100_000
    for a, s, b, t in ((16.97, 1.0, 6.94, 3.0), (6.94, 3.0, 16.97, 1.0), (0.0, 2.0, 5.0, 2.0), (3.0, 4.0, 3.0, 0.5)):
        exact = profile_inner_products(*(torch.tensor(v, dtype=torch.float64) for v in (s, a, t, b)))
        summed = (profile(a, s, tau) * profile(b, t, tau)).sum() / 100_000
        assert exact.item() == pytest.approx(summed.item(), rel=1e-4, abs=1e-9)


def tracked(width, steps, weight):
    """The power average after steps of (images, batch), in float64, of a scalar `weight(images)`."""
    average, exponent = 0.0, width_to_exponent(width)
    for images, batch in steps:
        keep = power_decay(exponent, images, batch)
        average = keep * average + (1 - keep) * weight(images)
    return average


def steps_of(batch, total):
    return [(images, batch) for images in range(batch, total + 1, batch)]


@pytest.mark.parametrize("power", [0, 1, 2.5, 4])
@pytest.mark.parametrize("width", [0.05, 0.15])
def test_a_power_average_tends_to_its_integral(width, power):
    """Of theta(t) = t^k it is (gamma + 1) / (gamma + 1 + k) T^k; the error falls with the batch, to first order."""
    g, total = width_to_exponent(width), 1600
    exact = (g + 1) / (g + 1 + power)
    errors = [abs(tracked(width, steps_of(batch, total), lambda images: (images / total) ** power) - exact) for batch in (8, 4, 2)]
    if power == 0:
        assert max(errors) < 1e-13
    else:
        assert errors[2] < 0.01 * exact
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.03) and errors[1] / errors[2] == pytest.approx(2, rel=0.03)


def test_a_power_average_is_exact_for_batches_of_any_size():
    """Weights that stay as they are between updates: the integral is a sum, for steps of mixed sizes too."""
    g, images, steps = width_to_exponent(0.1), 0, []
    for batch in (5, 1, 20, 7, 7, 64, 2, 100):
        images += batch
        steps.append((images, batch))
    values = {images: math.sin(images) for images, _ in steps}
    exact = sum(values[i] * ((i / images) ** (g + 1) - ((i - b) / images) ** (g + 1)) for i, b in steps)
    assert tracked(0.1, steps, values.get) == pytest.approx(exact, rel=1e-12)
    assert tracked(0.1, steps[:1], values.get) == values[5], "the first update takes the weights"
    jump = {10: 0.0, 50: 0.0}  # weights that change at 500 images only do not know the batch size
    for batch in jump:
        jump[batch] = tracked(0.05, steps_of(batch, 1000), lambda images: float(images > 500))
    assert jump[10] == pytest.approx(1 - 0.5 ** (width_to_exponent(0.05) + 1), rel=1e-12) == jump[50]


# --- rebuilding


@pytest.mark.parametrize("end", [1000.0, 825.0])
@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15, 0.2])
def test_a_combination_has_the_integrals_of_the_law_it_replaces(width, end):
    """Kept averages of theta(t) = t^k are known in closed form: so is what they must add up to, within the error that is told."""
    kept = [(1000 * i / 40, w) for i in range(1, 41) for w in (0.05, 0.1)]
    found = solve_posthoc_coefficients(kept, width, end)
    assert found.error < MAX_RELATIVE_ERROR and sum(found.coefficients) == pytest.approx(1, abs=1e-9)
    g = width_to_exponent(width)
    norm = ((g + 1) ** 2 / (2 * g + 1) / end) ** 0.5
    for k in (1, 2, 5):
        values = [(width_to_exponent(w) + 1) / (width_to_exponent(w) + 1 + k) * t**k for t, w in kept]
        made = sum(c * v for c, v in zip(found.coefficients, values, strict=True))
        exact = (g + 1) / (g + 1 + k) * end**k
        spread = (1000.0 ** (2 * k + 1) / (2 * k + 1)) ** 0.5  # norm of theta; Cauchy and Schwarz
        assert abs(made - exact) <= (found.error + 2e-8) * norm * spread
        assert made == pytest.approx(exact, rel=2e-3)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200
    missed = sum(c * profile(width_to_exponent(w), t, tau) for c, (t, w) in zip(found.coefficients, kept, strict=True)) - profile(
        g, end, tau
    )
    assert (missed.square().sum() / 200).sqrt().item() / norm == pytest.approx(found.error, rel=1e-2, abs=1e-6)


def test_what_was_kept_is_found_again_alone():
    kept = [(250.0 * i, w) for i in range(1, 5) for w in (0.05, 0.1)]
    for place, (end, width) in enumerate(kept):
        found = solve_posthoc_coefficients(kept, width, end)
        assert found.error < 1e-6 and found.coefficients[place] == pytest.approx(1, abs=1e-6) and found.size < 1.0001


def test_combinations_stay_small_and_say_when_they_fail():
    """64 snapshots of two widths reach 0.025 to 0.22 within the bound; far outside the error says so; hundreds stay well-conditioned."""
    kept = [(i / 64, w) for i in range(1, 65) for w in (0.05, 0.1)]
    inside = [solve_posthoc_coefficients(kept, width, 1.0) for width in (0.025, 0.03, 0.07, 0.15, 0.22)]
    assert all(found.error < MAX_RELATIVE_ERROR and found.size < 40 for found in inside)
    assert (
        solve_posthoc_coefficients(kept, 0.01, 1.0).error > 5 * MAX_RELATIVE_ERROR
        and solve_posthoc_coefficients(kept, 0.27, 1.0).error > MAX_RELATIVE_ERROR
    )
    assert solve_posthoc_coefficients(kept[:8], 0.07, 1.0).error > 0.9, "nothing was kept near the end"
    many = [(i / 200, w) for i in range(1, 201) for w in (0.05, 0.1, 0.2)]
    assert all(
        solve_posthoc_coefficients(many, width, 1.0).error < 1e-3 and solve_posthoc_coefficients(many, width, 1.0).size < 200
        for width in (0.03, 0.07, 0.15)
    )
    twins = solve_posthoc_coefficients(
        [(i / 64, w) for i in range(1, 65) for w in (0.05, 0.1, 0.1 + 1e-12)], 0.07, 1.0
    )  # no profile of its own: singular without a ridge
    assert twins.error < MAX_RELATIVE_ERROR and twins.size < 3
    with pytest.raises(ValueError, match="no power average"):
        solve_posthoc_coefficients([], 0.1, 1.0)


# --- a real training of a small network


class Net(torch.nn.Module):
    """Two layers, one frozen weight and a buffer that changes."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(3, 17), torch.nn.Linear(17, 2)
        self.fixed = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x * self.fixed)))


def train_net(*configs, steps=320, batch=16, store=None):
    """Averages of one training by SGD at a rate that leaves noise in the weights; snapshots of the first as they fall due."""
    torch.manual_seed(0)
    net = Net()
    kept = [WeightAverages(net, copy.deepcopy(net), config) for config in configs]
    for step in range(steps):
        x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - torch.stack([x.prod(1), x.sum(1).sin()], 1)).square().mean()
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.2 * p.grad
            net.seen += 1
        images = (step + 1) * batch
        for one in kept:
            one.update(net, images, batch)
        if store and snapshot_due(images, batch, configs[0], steps * batch):
            run = type("Run", (), {"snapshots": store, "ema": kept[0], "step": step + 1, "images": images})
            assert write_snapshot(run) == []
    return net, kept


def named(ema, label=""):
    prefix = f"ema[{label}]." if label else "ema."
    return {name.removeprefix(prefix): value for name, value in ema.tensors().items() if name.startswith(prefix)}


def distance(a, b):
    return sum((a[name] - b[name]).double().square().sum() for name in a).sqrt().item()


def test_a_width_rebuilt_is_the_width_tracked(tmp_path, capsys):
    """Two widths kept, a third tracked beside them as the truth: rebuilt from snapshots it is a hundred times nearer than either."""
    store = snapshot_manager(tmp_path)
    net, (kept, truth) = train_net(EmaConfig(power=(0.05, 0.1)), EmaConfig(power=(0.03, 0.07, 0.15, 0.2)), store=store)
    assert len(store.folders()) == 64 and all(verify(folder) is None for folder in store.folders()[:3])
    CheckpointManager(tmp_path, 1).save(320, kept.tensors(), {})
    held = find_kept_averages(tmp_path / "checkpoint-320", 5120, (0.05, 0.1))
    assert len(held) == 128 and {one.folder for one in held if one.images == 5120} == {tmp_path / "checkpoint-320"}
    assert max(one.images for one in find_kept_averages(tmp_path / "checkpoint-320", 2000, ())) == 2000, (
        "of an older checkpoint: none later"
    )
    for width, near in ((0.07, 0.003), (0.15, 0.003), (0.2, 0.003), (0.03, 0.02)):
        made, how = rebuild_average(held, width, 5120)
        exact = named(truth, f"width={width}")
        assert made.keys() == exact.keys() and all(value.dtype == torch.float32 for value in made.values())
        control = min(distance(named(kept, f"width={w}"), exact) for w in (0.05, 0.1))
        assert distance(made, exact) < near * control, width
        assert how.error < MAX_RELATIVE_ERROR
    made, _ = rebuild_average(held, 0.08, 2000)
    _, (other,) = train_net(EmaConfig(power=(0.08,)), steps=125)
    assert distance(made, named(other, "width=0.08")) < 0.01 * distance(made, named(kept, "width=0.05"))
    with pytest.raises(ValueError, match=r"width of 0.01 at 5120 images cannot be rebuilt: .* \(ema.snapshot_every\)"):
        rebuild_average(held, 0.01, 5120)
    with pytest.raises(ValueError, match=r"from 80 to 5120 images, misses it by .* Ask for images=2000 or images=2080, where"):
        rebuild_average(held, 0.08, 2030)
    for wanted in (
        WeightSelection("width=0.05"),
        WeightSelection(width=0.07),
    ):  # weights that are not trained, and buffers, are the first average's
        whole, _ = load_selected_weights(tmp_path / "checkpoint-320", {"images": 5120}, wanted, EmaConfig(power=(0.05, 0.1)))
        assert whole.keys() == net.state_dict().keys() and whole["seen"] == 320
    damaged = store.folders()[1] / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5] + b"12345")
    made, how = rebuild_average(held, 0.07, 5120)
    assert "is damaged and passed over: rank-00000.safetensors does not match its sha256" in capsys.readouterr().out
    exact = named(truth, "width=0.07")
    assert distance(made, exact) < 0.05 * distance(named(kept, "width=0.05"), exact)


def test_the_averages_of_a_run_are_those_of_its_weights(digits, tmp_path):
    """In float64 from the weights of each step: half-lives on the image clock, ramped (Karras et al. 2022), and a power of it (2024)."""
    words = ("--checkpoint.every=1", "--checkpoint.keep=99", "--train.max_steps=8", "--ema.halflife", "12", "30", "--ema.power", "0.1")
    assert fit(digits, tmp_path / "run", *words, "--ema.ramp=0.3") == 0
    steps = [load_tensors(tmp_path / f"run/checkpoint-{step}") for step in range(9)]
    names = [name.removeprefix("model.") for name in steps[0] if name.startswith("model.")]
    power = 6.94  # of the width 0.10, as the paper gives it
    decays = {
        "ema.": lambda seen: 0.5 ** (16 / min(12, 0.3 * seen)),
        "ema[halflife=30].": lambda seen: 0.5 ** (16 / min(30, 0.3 * seen)),
        "ema[width=0.1].": lambda seen: (1 - 16 / seen) ** (power + 1),
    }
    for prefix, decay in decays.items():
        for name in names:
            average = steps[0][f"model.{name}"].double()
            for step in range(1, 9):
                kept = decay(16 * step)
                average = kept * average + (1 - kept) * steps[step][f"model.{name}"].double()
            moved = (average - steps[0][f"model.{name}"]).norm()
            assert (steps[8][f"{prefix}{name}"] - average).norm() <= 1e-3 * moved + 1e-7, f"{prefix}{name}"
            assert not torch.equal(steps[8][f"{prefix}{name}"], steps[8][f"model.{name}"]) or moved == 0


def test_several_averages_are_each_alone_bitwise():
    many = EmaConfig(halflife=(500, 5000), ramp=9, power=(0.05, 0.1))
    alone = [
        EmaConfig(halflife=(500,), ramp=9),
        EmaConfig(halflife=(5000,), ramp=9),
        EmaConfig(power=(0.05,)),
        EmaConfig(power=(0.1,), enabled=False),
    ]
    net, (all_, *each) = train_net(many, *alone, steps=60)
    assert all_.labels == ("halflife=500", "halflife=5000", "width=0.05", "width=0.1") and all_.widths == (0.05, 0.1)
    assert each[3].labels == ("raw", "width=0.1")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    for label, one, own in (("", 0, ""), ("halflife=5000", 1, ""), ("width=0.05", 2, "width=0.05"), ("width=0.1", 3, "width=0.1")):
        a, b = named(all_, label), named(each[one], own)
        assert set(a) == (set(net.state_dict()) if not label else trained), "a further average keeps what is trained"
        assert all(torch.equal(a[name], b[name]) for name in trained)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in named(each[3]).items()), "without averages: the weights"
    assert all_.model.seen == 60 and not all_.model.training and not any(p.requires_grad for p in all_.model.parameters())
    assert all_.power().keys() == {name for name in all_.tensors() if name.startswith("ema[width=")}
    gaps = {label: distance(named(all_, label), {n: net.state_dict()[n] for n in trained}) for label in all_.labels[1:]}
    assert gaps["halflife=5000"] > gaps["width=0.1"] > gaps["width=0.05"] > 0


def test_labels_tell_near_numbers_apart():
    config = EmaConfig(halflife=(1234567, 1234568, 1e30), power=(0.1, 0.1 + 1e-9))
    assert len({one.label for one in ema_profiles(config)}) == 5 and ema_profiles(config)[0].label == "halflife=1234567"


def test_halves_are_refused_as_master_weights():
    net = torch.nn.Linear(2, 2).bfloat16()
    with pytest.raises(AssertionError, match="averages need master weights"):
        WeightAverages(net, copy.deepcopy(net), EmaConfig())


def restored(config, kept):
    """Averages filled from a checkpoint that keeps these labels, each full of a number of its own: those numbers, by label."""
    net = Net()
    ema = WeightAverages(net, copy.deepcopy(net), config)
    targets, copied = ema.locate_in_checkpoint(kept, "runs/a")
    with torch.no_grad():
        for name, value in targets.items():
            value.fill_(next(i for i, label in enumerate(kept) if name.startswith("ema." if i == 0 else f"ema[{label}].")))
        for value in net.parameters():
            value.fill_(-1)
    ema.copy_averages(copied)
    ema.copy_raw(net, kept)
    trained = {name for name, value in net.named_parameters() if value.requires_grad}  # of buffers there is one set, the first average's
    found = {label: {int(v.flatten()[0]) for name, v in ema.tensors().items()
                      if name.startswith(prefix) and name.removeprefix(prefix) in trained} for label, prefix in
             ((label, "ema." if label == ema.labels[0] else f"ema[{label}].") for label in ema.labels)}  # fmt: skip
    assert all(len(values) == 1 for values in found.values()), found
    return {label: values.pop() for label, values in found.items()}


def test_averages_are_found_by_their_labels_wherever_they_stand():
    """Reordered, dropped, added and renamed half-lives; a label that was not kept begins from the checkpoint's first."""
    kept = ("halflife=100", "halflife=1000", "width=0.05")
    for halflives, expected in {
        (100, 1000): [0, 1], (1000, 100): [1, 0], (1000,): [1], (100,): [0], (50, 100): [0, 0], (50, 1000): [0, 1], (1000, 50): [1, 0],
        (50, 7, 1000, 100): [0, 0, 1, 0],
    }.items():  # fmt: skip
        for power in ((), (0.05,)):
            found = restored(EmaConfig(halflife=halflives, power=power), kept)
            assert list(found.values()) == expected + [2] * len(power), halflives
    assert restored(EmaConfig(enabled=False), kept) == {"raw": -1}, "the weights themselves, not an average under their name"
    assert restored(EmaConfig(halflife=(100,)), ("raw",)) == {"halflife=100": 0}


def test_a_power_average_cannot_begin_late():
    net = Net()
    ema = WeightAverages(net, copy.deepcopy(net), EmaConfig(halflife=(100, 1000), power=(0.05,)))
    with pytest.raises(ValueError, match=r"ema.power=0.05: runs/a was trained without it.*give --ema.power 0.1 0.2, or begin another run"):
        ema.locate_in_checkpoint(("halflife=100", "width=0.1", "width=0.2"), "runs/a")
    with pytest.raises(ValueError, match=r"leave ema\.power out"):
        ema.locate_in_checkpoint((), "runs/a")
    with torch.no_grad():
        ema.model.enter.weight.fill_(3)
    ema.copy_averages({"halflife=1000": "halflife=100"})
    assert (named(ema, "halflife=1000")["enter.weight"] == 3).all() and not (named(ema, "width=0.05")["enter.weight"] == 3).any()


# --- snapshots


@pytest.mark.parametrize(("total", "batch", "every"), [(5120, 16, 0), (100, 16, 0), (1000, 7, 100), (1000, 300, 10), (999, 1, 250.5)])
def test_snapshots_fall_due_on_the_image_clock(total, batch, every):
    """One in each interval that a step ends in or passes, and one at the end; none without power averages."""
    config, steps = EmaConfig(power=(0.1,), snapshot_every=every), -(-total // batch)
    places = [step for step in range(1, steps + 1) if snapshot_due(step * batch, batch, config, total)]
    assert places[-1] == steps and len(places) == count_snapshots(config, batch, total)
    marks = {step * batch // (every or total / 64) for step in range(1, steps)} - {0}
    assert len([place for place in places if place < steps]) == len(marks)
    assert not snapshot_due(total, batch, EmaConfig(), total) and count_snapshots(EmaConfig(), batch, total) == 0


def test_snapshots_of_a_course_that_was_left_are_forgotten(tmp_path):
    store = snapshot_manager(tmp_path)
    for step in (1, 2, 30):
        store.save(step, {"a": torch.ones(1)}, {})
    remove_later_snapshots(store, 2)
    assert [folder.name for folder in store.folders()] == ["checkpoint-2", "checkpoint-1"] and not list(store.root.glob(".tmp*"))
    remove_later_snapshots(store, 0)
    remove_later_snapshots(snapshot_manager(tmp_path / "none"), 0)
    assert not store.folders()


def test_snapshots_of_no_image_and_of_no_number_are_none(tmp_path, capsys):
    store = snapshot_manager(tmp_path)
    for step, images in ((0, 0), (1, 16), (2, 32), (3, "many"), (4, 64)):
        assert store.save(step, {"a": torch.ones(1)}, {"step": step, "images": images, "widths": [0.05]}) == []
    kept = find_kept_averages(tmp_path / "checkpoint-2", 32, (0.05,))
    assert [(one.images, one.folder) for one in kept] == [(16, store.root / "checkpoint-1"), (32, tmp_path / "checkpoint-2")]
    assert capsys.readouterr().out.count("is damaged and passed over") == 1


# --- which weights


def test_which_weights_a_word_asks_for():
    config = EmaConfig(halflife=(2e6, 5000), power=(0.05, 0.1))
    for word, wanted in {
        "": WeightSelection(), "raw": WeightSelection("raw"), "2e6": WeightSelection(), "5000": WeightSelection("halflife=5000"),
        "halflife=5100": WeightSelection("halflife=5000"),
        "0.965": WeightSelection("halflife=5000"), "decay=0.99991": WeightSelection(), "width=0.05": WeightSelection("width=0.05"),
        "width=0.08": WeightSelection(width=0.08), "width=0.1,images=1e5": WeightSelection(width=0.1, images=1e5),
    }.items():  # fmt: skip
        assert parse_weight_selection(word, config, 256) == wanted, word
    kept = (
        r"half-life 2e\+06 images \(decay 0.999911 a step\), half-life 5000 images .*width 0.05, width 0.1, other widths, rebuilt, and raw"
    )
    for word, message in {
        "100": f"a half-life of 100 images. The run kept {kept}. Leave --ema out", "0.5": "a half-life of 256 images",
        "best": "give a half-life", "nan": "give a half-life", "inf": "give a half-life", "-3": "give a half-life",
        "decay=2": "give a half-life", "width=": "give a half-life", "images=5": "give a half-life", "1,2": "give a half-life",
        "width=0.3": "between 1e-06 and 0.28", "width=1e-200": "between 1e-06 and 0.28",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_weight_selection(word, config, 256)
    with pytest.raises(
        ValueError, match=r"none was kept. The run kept half-life 2e\+06 images .*, and raw. Train with --ema.power 0.05 0.1"
    ):
        parse_weight_selection("width=0.1", EmaConfig(), 256)
    with pytest.raises(ValueError, match=r"--guide_ema 100: .* The run kept no average, and raw"):
        parse_weight_selection("100", EmaConfig(enabled=False), 256, "--guide_ema")


def test_old_recipes_open():
    """One half-life, a number, as runs of before wrote it."""
    config = config_from_mapping(Config, {"ema": {"enabled": True, "halflife": 1000.0, "ramp": 0.05}})
    assert config.ema.halflife == (1000,) and parse_weight_selection("1000", config.ema, 16) == WeightSelection()


POWER = ("--ema.halflife", "100", "1000", "--ema.ramp=2", "--ema.power", "0.05", "0.1")


@pytest.fixture(scope="module")
def powered(digits, tmp_path_factory):
    """A run of 12 steps of 16 images with four averages."""
    folder = tmp_path_factory.mktemp("powered") / "run"
    assert fit(digits, folder, *POWER) == 0
    return folder


def test_export_of_every_average_and_of_a_width_between(powered, digits, tmp_path, capsys):
    """Truth is a run that kept the width itself, to the last bit of all that both kept; the nearest width kept is the control."""
    assert fit(digits, tmp_path / "truth", "--ema.halflife", "100", "--ema.ramp=2", "--ema.power", "0.05", "0.08", "0.1") == 0
    end, truth = powered / "checkpoint-12", tmp_path / "truth/checkpoint-12"
    assert load_state(end)["averages"] == ["halflife=100", "halflife=1000", "width=0.05", "width=0.1"]
    assert [folder.name for folder in snapshot_manager(powered).folders()] == [f"checkpoint-{step}" for step in range(12, 0, -1)]
    assert distance(averages(end), averages(truth)) == 0 == distance(averages(end, "width=0.1"), averages(truth, "width=0.1"))
    words = ("", "raw", "1000", "width=0.05", "width=0.08", "width=0.1", "width=0.1,images=96")
    read = {word: TrainedModel(powered, None, word).network.state_dict() for word in words}
    out = capsys.readouterr().out
    assert out.count("rebuilt from") == 2 and out.count("at 96 images: rebuilt from 1 of the averages kept") == 1, "that of a snapshot"
    assert len({tuple(one["enter.weight"].flatten().tolist()) for one in read.values()}) == len(words)
    true = TrainedModel(tmp_path / "truth", None, "width=0.08").network.state_dict()
    control = min(distance(read[f"width={w}"], true) for w in (0.05, 0.1))
    assert 0 < distance(read["width=0.08"], true) < 0.05 * control
    for word, told in (("width=0.08", "of relative width 0.08, rebuilt from others"), ("raw", "are the weights as they were trained")):
        folder = tmp_path / word
        assert sample.main(["export", "--run", str(powered), "--output", str(folder), "--ema", word]) == 0
        assert told in (folder / "README.md").read_text()
        file = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")["pos_embed.proj.bias"]
        assert torch.equal(file, read[word]["enter.bias"])
    half = averages(snapshot_manager(powered).root / "checkpoint-6", "width=0.1")
    found, _ = load_selected_weights(end, load_state(end), WeightSelection(width=0.1, images=96), EmaConfig(power=(0.05, 0.1)))
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in half.items())


def test_images_and_figures_of_other_weights(powered, digits, tmp_path, capsys, monkeypatch):
    """--ema of the verbs that sample; a folder of images and figures remember it, an exported folder has no choice."""
    pictures = []
    for word in ("raw", "width=0.08"):
        words = ["--run", str(powered), "--ema", word, "--class_labels", "1", "--num_inference_steps", "2"]
        assert sample.main([*words, "--output", str(tmp_path / f"{word}.png")]) == 0
        pictures.append((tmp_path / f"{word}.png").read_bytes())
    assert pictures[0] != pictures[1]
    assert (
        sample.main(
            [*words, "--guide_run", str(powered), "--guide_ema", "raw", "--guidance_scale", "2", "--output", str(tmp_path / "g.png")]
        )
        == 0
    )
    assert sample.main([*words, "--output", f"{tmp_path}/folder/"]) == 0
    capsys.readouterr()
    assert sample.main([*words[:3], "raw", *words[4:], "--output", f"{tmp_path}/folder/"]) == 2
    assert "ema" in capsys.readouterr().err
    assert "ema" not in ImagesOptions().settings(["a"], "b") and ImagesOptions(ema="raw").settings(["a"], "b")["ema"] == "raw"
    assert sample.main(["--pipeline", "x", "--ema", "raw"]) == 2
    assert "--ema raw of --pipeline x, which holds one set of weights: give --run" in capsys.readouterr().err
    assert sample.main(["--run", str(powered), "--ema", "7"]) == 2
    assert "The run kept half-life 100 images" in capsys.readouterr().err
    assert sample.main(["--run", str(powered), "--ema", "width=0.1,images=1000"]) == 2
    assert "has seen 192 images. Give at most so many" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has seen 0 images"):  # as a run is saved before its first step
        load_selected_weights(powered / "checkpoint-12", {"images": 0}, WeightSelection(width=0.08), EmaConfig(power=(0.05, 0.1)))
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_: Report())
    evaluate = ["evaluate", "--run", str(powered), "--reference", str(digits), "--num_images", "10", "--num_inference_steps", "1"]
    assert sample.main([*evaluate, "--ema", "1000"]) == 0
    assert json.loads((powered / "evaluation.json").read_text())["ema"] == "halflife=1000"
    for ema, told in (("", False), ("halflife=1000", True)):
        card = CardFacts.from_run(powered, 192, 12, torch.nn.Linear(2, 3), provenance=TrainedModel(powered, ema=ema).provenance())
        assert bool(card.evaluation) == told, "a card tells figures of its own weights alone"


class Report:
    """Figures in place of measured ones."""

    def as_dict(self):
        return EVALUATION

    def meets(self, *least):
        return True


def test_averages_of_a_resumed_run_are_bitwise_those_of_one_that_was_not(powered, digits, tmp_path, capsys):
    """Stopped at step 8 with snapshots of a later course lying there; also what a recipe may change on the way."""
    run = tmp_path / "run"
    assert fit(digits, run, *POWER, "--train.max_steps=8", "--ema.snapshot_every=16") == 0
    snapshot_manager(run).save(9, {"ema[width=0.05].x": torch.zeros(2)}, {"step": 9, "images": 144, "widths": [0.05]})
    assert fit(digits, run, *POWER, "--ema.snapshot_every=16") == 0
    for name in ("checkpoint-12", "averages/checkpoint-9", "averages/checkpoint-12"):
        a, b = load_tensors(run / name), load_tensors(powered / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    capsys.readouterr()
    assert fit(digits, run, *POWER, "0.2", "--train.max_steps=13") == 2
    assert "ema.power=0.2" in capsys.readouterr().err
    assert fit(digits, run, "--ema.ramp=2", "--ema.halflife", "100", "50", "--ema.power", "0.1", "--train.max_steps=13") == 0
    last = load_tensors(run / "checkpoint-13")
    assert {name.partition(".")[0] for name in last} >= {"ema", "ema[halflife=50]", "ema[width=0"}
    raw, first = raw_weights(run / "checkpoint-13"), averages(run / "checkpoint-12")
    for name, value in averages(run / "checkpoint-13", "halflife=50").items():  # it began from the first average
        expected = torch.lerp(first[name], raw[name], 1 - 0.5 ** (16 / 50))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_a_next_stage_begins_all_averages_from_the_first(powered, digits, tmp_path):
    more = ("--train.max_steps=1", "--ema.ramp=1e30", "--ema.halflife", "1e30", "1e29")
    assert fit(digits, tmp_path / "next", *more, f"--checkpoint.start_from={powered}") == 0
    first, further = (averages(tmp_path / "next/checkpoint-1", label) for label in ("", "halflife=1e+29"))
    assert distance(further, averages(powered / "checkpoint-12")) < 1e-6 and distance(further, first) < 1e-6


# --- shares


SHARDED = """
import copy, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from condot.pipeline.config.schema import EmaConfig
from condot.pipeline.ema.averages import WeightAverages

dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(5, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3), torch.nn.Linear(3, 1))
whole = copy.deepcopy(net)
config = EmaConfig(halflife=(50, 500), ramp=0.5, power=(0.05, 0.1))
model = copy.deepcopy(net)
ranks = dist.get_world_size()
shape, names = ((2, ranks // 2), ("replicate", "shard")) if ranks > 2 else ((ranks,), ("shard",))  # hybrid on four
mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
for one in (net, model):
    for layer in (one[0], one[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(one, mesh=mesh)
sharded, plain = WeightAverages(net, model, config), WeightAverages(whole, copy.deepcopy(whole), config)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
for step in range(1, 21):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, q in zip(whole.parameters(), net.parameters()):
            p.copy_(q.full_tensor())
        if step % 5 == 0:
            sharded.model(x), net(x)  # a look at samples, and a validation loss: FSDP2 leaves parameters whole
    with CommDebugMode() as talk:
        sharded.update(net, step * 4, 4)
    assert talk.get_total_counts() == 0, talk.get_comm_counts()
    plain.update(whole, step * 4, 4)
found = sharded.tensors()
assert found.keys() == plain.tensors().keys()
assert all(isinstance(value, DTensor) for value in found.values())
empty = sum(value.to_local().numel() == 0 for value in found.values())
for name, value in plain.tensors().items():
    assert torch.equal(found[name].full_tensor(), value), name
    assert value.numel() == 0 or found[name].to_local().numel() < value.numel() or value.shape[0] == 1, name
sharded.copy_averages({"halflife=500": "halflife=50"})
assert torch.equal(sharded.tensors()["ema[halflife=500].0.weight"].full_tensor(), plain.tensors()["ema.0.weight"])
print("empty shares", empty, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 4])
def test_averages_of_shares_are_the_shares_of_averages(tmp_path, ranks):
    """FSDP2 on gloo, on four ranks hybrid, uneven and empty shares: bitwise what one process keeps, and no word between ranks."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = launch("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(tmp_path / "sharded.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "empty shares" in done.stdout


def test_what_the_documents_say_of_widths():
    """The table of docs/averages.md is what `solve_posthoc_coefficients` finds."""
    rows = [line.split("|")[1:-1] for line in Path(ROOT / "docs/averages.md").read_text().splitlines() if line.startswith("| 0.")]
    assert len(rows) >= 6
    for width, *cells in ([cell.strip() for cell in row] for row in rows):
        for n, cell in zip((16, 32, 64, 256), cells, strict=True):
            error = solve_posthoc_coefficients([(i / n, w) for i in range(1, n + 1) for w in (0.05, 0.1)], float(width), 1.0).error
            assert cell == (f"{100 * error:.3g} %" if error >= 5e-7 else "exact"), (width, n)
