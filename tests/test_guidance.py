"""Guidance: on mixtures with classes the ends are known, the middle is linear."""

import math
from dataclasses import replace

import oracles
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from condot.pipeline.flow import CondOT, autoguide, convert, guide, widen
from condot.pipeline.flow.linear_path import UniformPrior
from condot.pipeline.sampling.flow_model import with_autoguidance
from condot.pipeline.sampling.generate import check_sampler, generate, guided_field
from condot.pipeline.sampling.sampler import Sampler
from condot.pipeline.sampling.solve import initial_point

MIXTURE = oracles.three()
CLASSES = [oracles.gaussian(m.tolist(), s.tolist()) for m, s in zip(MIXTURE.means, MIXTURE.covariances, strict=True)]
NULL = 3
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((6,), 0.6, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
NONE = torch.full_like(LABELS, NULL)


def field(x, t, labels):
    """The velocity of each sample's class, or of the whole mixture for the null class."""
    rows = []
    for i, label in enumerate(labels.tolist()):
        law = MIXTURE if label == NULL else CLASSES[label]
        rows.append(law.velocity(x[i : i + 1], *oracles.condot(t[i].item())))
    return torch.cat(rows)


def counted():
    sizes = []
    return sizes, lambda x, t, c: sizes.append(len(x)) or field(x, t, c)


def test_scale_one_is_the_conditional_field_and_zero_the_unconditional_one():
    for scale, labels in ((1.0, LABELS), (0.0, NONE)):
        sizes, watched = counted()
        assert torch.equal(guide(watched, LABELS, NONE, scale)(X, T), field(X, T, labels))
        assert sizes == [6]


@pytest.mark.parametrize("scale", [-1.0, 0.3, 1.5, 4.0])
def test_guidance_is_linear_in_one_evaluation_of_two_batches(scale):
    sizes, watched = counted()
    got = guide(watched, LABELS, NONE, scale)(X, T)
    torch.testing.assert_close(got, field(X, T, NONE) + scale * (field(X, T, LABELS) - field(X, T, NONE)))
    assert sizes == [12]


def test_a_negative_condition_takes_the_place_of_none():
    away = (LABELS + 1) % 3
    got = guide(field, LABELS, away, 2.0)(X, T)
    torch.testing.assert_close(got, 2 * field(X, T, LABELS) - field(X, T, away))


def test_guidance_in_an_interval_acts_inside_and_saves_outside():
    sizes, watched = counted()
    guided_field = guide(watched, LABELS, NONE, 3.0, interval=(0.2, 0.7))
    always = guide(field, LABELS, NONE, 3.0)
    torch.testing.assert_close(guided_field(X, T), always(X, T))
    late = torch.full_like(T, 0.71)
    assert torch.equal(guided_field(X, late), field(X, late, LABELS))
    assert sizes == [12, 6]
    mixed = torch.tensor([0.1, 0.2, 0.5, 0.7, 0.8, 0.9], dtype=torch.float64)
    inside = torch.tensor([False, True, True, True, False, False])[:, None]
    torch.testing.assert_close(guided_field(X, mixed), torch.where(inside, always(X, mixed), field(X, mixed, LABELS)))


def test_rescaling_brings_back_the_conditional_deviation():
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    good, lesser = images, images.roll(1, 0) * 0.5
    net = lambda x, t, c: torch.cat([good, lesser])  # noqa: E731
    t, c = torch.full((4,), 0.5, dtype=torch.float64), torch.zeros(4)
    plain = guide(net, c, c + 1, 4.0)(images, t)
    full = guide(net, c, c + 1, 4.0, rescale=1.0)(images, t)
    torch.testing.assert_close(full.flatten(1).std(1), good.flatten(1).std(1))
    half = guide(net, c, c + 1, 4.0, rescale=0.5)(images, t)
    torch.testing.assert_close(half, (plain + full) / 2)


def test_autoguidance_pushes_away_from_the_weak_model():
    strong, weak = (lambda x, t: field(x, t, LABELS)), (lambda x, t: 0.5 * field(x, t, LABELS) + 1)
    torch.testing.assert_close(autoguide(strong, weak, 2.0)(X, T), 1.5 * strong(X, T) - 1)
    torch.testing.assert_close(autoguide(strong, weak, 1.0)(X, T), strong(X, T))
    late = autoguide(strong, None, 2.0, interval=(0.0, 0.5))  # the weak model is not asked outside
    torch.testing.assert_close(late(X, T), strong(X, T))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 2.5])
def test_autoguidance_is_linear_between_two_mixtures(scale):
    """Two laws of one path: u_weak + w (u - u_weak), in every combination with interval and rescale that ends in one of them."""
    wide = oracles.gaussian([0.3, -0.2], [[2.0, 0.3], [0.3, 1.5]])
    good = lambda x, t: field(x, t, LABELS)  # noqa: E731
    weak = lambda x, t: wide.velocity(x, *oracles.condot(t[0].item()))  # noqa: E731
    expected = weak(X, T) + scale * (good(X, T) - weak(X, T))
    torch.testing.assert_close(autoguide(good, weak, scale)(X, T), expected)
    torch.testing.assert_close(autoguide(good, good, scale)(X, T), good(X, T))
    torch.testing.assert_close(autoguide(good, weak, scale, interval=(0.6, 1.0))(X, T), expected)
    assert torch.equal(autoguide(good, weak, scale, interval=(0.61, 1.0))(X, T), good(X, T))
    full = autoguide(good, weak, scale, rescale=1.0)(X, T)
    torch.testing.assert_close(full, expected * (good(X, T).std(1) / expected.std(1))[:, None])


def test_a_source_is_led_by_a_weaker_one():
    """Gaussian fields are linear: guided by a law of mean m, one of mean 0.3 flows to 0.3 + (w - 1) (0.3 - m), of the same spread."""
    from test_methods import gaussian_source

    source = gaussian_source("condot", "velocity")
    shifted = lambda x, t, c: source.field(x - 0.5 * t[:, None, None, None], t, c) + 0.5  # noqa: E731  mean 0.8
    led = with_autoguidance(source, replace(source, field=shifted))
    labels = torch.zeros(300, dtype=torch.int64)
    plain = generate(source, labels, Sampler("heun", 40), seed=1).images
    guided_field = generate(led, labels, Sampler("heun", 40, 2.0), seed=1).images
    torch.testing.assert_close(guided_field, plain - 0.5, atol=2e-3, rtol=0)
    late = generate(led, labels, Sampler("heun", 40, 2.0, guidance_interval=(0.99, 1.0)), seed=1).images
    assert (late - plain).abs().max() < 0.05, "outside the interval the model alone"


def test_both_get_the_condition_and_no_class_is_each_ones_own():
    from test_methods import gaussian_source

    told = {"good": [], "weak": []}
    base = gaussian_source("condot", "velocity")
    note = lambda name: lambda x, t, c: told[name].append(c.tolist()) or base.field(x, t, c)  # noqa: E731
    source = replace(base, field=note("good"), num_classes=3, null=3)
    weak = replace(base, field=note("weak"), num_classes=3, null=1000)
    generate(with_autoguidance(source, weak), torch.tensor([2, 0]), Sampler("euler", 1, 2.0), seed=0)
    assert told == {"good": [[2, 0]], "weak": [[2, 0]]}
    told["weak"].clear()
    with_autoguidance(source, weak).weak(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([3, 1]))
    assert told["weak"] == [[1000, 1]]


def test_a_guide_of_other_data_is_refused():
    from test_methods import gaussian_source

    source = gaussian_source("condot", "velocity")
    text = {"encode_text": lambda texts: (torch.ones(len(texts), 2),), "null": (torch.ones(1, 2),)}
    latent = replace(source, pixels=(3, 16, 16), decode=lambda z: z)
    for good, weak, message in (
        (source, replace(source, shape=(1, 4, 4)), "samples of shape"),
        (source, replace(source, num_classes=10), "number of classes 10, the model 0"),
        (source, replace(source, pixels=(3, 16, 16)), "images of shape"),
        (source, replace(source, **text), "text as a condition True"),
        (source, replace(source, prior=UniformPrior(-1, 1)), "the start UniformPrior"),
        (source, gaussian_source("cosine", "velocity"), "follows another path"),
        (source, gaussian_source("condot", "noise"), "at t=0 only the model has a finite velocity"),
        (replace(source, **text), replace(source, **text | {"null": (torch.zeros(1, 2),)}), "other text encoders"),
        (latent, replace(latent, decode=lambda z: 1.1 * z), "decodes a latent to another image"),
    ):
        with pytest.raises(ValueError, match=message):
            with_autoguidance(good, weak)
    for same in (source, replace(source, **text), latent, gaussian_source("condot", "noise")):
        assert with_autoguidance(same, same).weak is not None


# --- from a sampler's options to the field


def classes_of(predict="velocity"):
    """Gaussian data whose mean is 0.3 for class 0 and -0.2 for none, exactly."""
    from test_methods import gaussian_source

    base = gaussian_source("condot", predict)

    def field(x, t, labels):
        shift = torch.where(labels == 0, 0.0, -0.5).double()[:, None, None, None]
        return base.field(x - shift * t[:, None, None, None], t, labels) + shift

    return replace(base, field=field, num_classes=1, null=1)


ASKED = torch.zeros(6, dtype=torch.int64)


def test_apg_reaches_the_samples_and_is_of_one_solve():
    """eta = 1 is plain guidance; momentum does not depend on the batch, nor on an animation that looks on."""
    source, plain = classes_of(), Sampler("euler", 10, 3.0)
    made = lambda sampler, **more: generate(source, ASKED, sampler, seed=1, **more).images  # noqa: E731
    torch.testing.assert_close(made(replace(plain, guidance="apg", apg_eta=1.0)), made(plain), atol=1e-5, rtol=1e-5)
    moving = replace(plain, guidance="apg", apg_momentum=-0.6, apg_norm_threshold=2.0)
    whole = made(moving)
    assert (whole - made(replace(moving, apg_momentum=0.0))).abs().max() > 0.01
    torch.testing.assert_close(made(moving, batch_size=2), whole)
    looked = []
    torch.testing.assert_close(made(moving, on_step=lambda x, t, field: looked.append(field(x, torch.full((6,), t)))), whole)
    assert len(looked) == 10


def test_zero_init_steps_are_steps_of_the_samplers_grid():
    """Two of eight steps stand still: the same as beginning with them left out, on any grid."""
    source, sampler = classes_of(), Sampler("euler", 8, 3.0, grid="shifted", guidance="cfg_zero_star", zero_init_steps=2)
    images = generate(source, ASKED, sampler, seed=1).images
    later = replace(sampler, zero_init_steps=0, given_times=tuple(sampler.times(source)[2:].tolist()))
    begun = initial_point(source, 1, torch.arange(6), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("condot.pipeline.sampling.generate.initial_point", lambda *given: begun)
        torch.testing.assert_close(images, generate(source, ASKED, later, seed=1).images)


@pytest.mark.parametrize(("predict", "share"), [("data", 0.7), ("noise", 1.0), ("v", 0.5)])
def test_rescaling_in_samples_is_of_the_prediction(predict, share):
    """The velocity of the prediction that `rescale_noise_cfg` gives; of the velocities themselves it is another."""
    base, t = classes_of(predict), torch.full((6,), 0.25)
    wide = torch.where(torch.arange(8) < 4, 1.0, 0.4).double()  # else both have one deviation, and so has what is guided
    source = replace(base, field=lambda x, t, labels: base.field(x, t, labels) * torch.where((labels == 0)[:, None, None, None], 1, wide))
    sampler = Sampler("euler", given_times=(0.25, 0.75), guidance_scale=5.0, guidance_rescale=share, clip="off")
    x = initial_point(source, 1, torch.arange(6), 0.25).double()
    c = CondOT()(widen(t, x))
    mine, its = (convert(source.field(x, t, ASKED + k), "velocity", predict, x, c) for k in (0, 1))
    velocity = convert(rescale_noise_cfg(its + 5 * (mine - its), mine, share), predict, "velocity", x, c)
    torch.testing.assert_close(guided_field(source, ASKED, sampler)(x, t), velocity, rtol=1e-5, atol=1e-5)
    other = guided_field(replace(source, predict="velocity"), ASKED, sampler)(x, t)
    assert (other - velocity).norm() / velocity.norm() > 0.02


REFUSED = {
    "apg at 1": (Sampler(guidance="apg"), "guidance=apg beside guidance_scale=1.0"),
    "zero at 1": (Sampler(guidance="cfg_zero_star"), "guidance=cfg_zero_star beside guidance_scale=1.0"),
    "momentum": (Sampler("dormand_prince", 9, 2.0, guidance="apg", apg_momentum=0.5), "apg_momentum remembers evaluations"),
    "all steps": (Sampler("euler", 9, 2.0, guidance="cfg_zero_star", zero_init_steps=9), "zero_init_steps=9 of 9 steps"),
    "no steps": (Sampler("dormand_prince", 9, 2.0, guidance="cfg_zero_star", zero_init_steps=1), "it counts the steps of an ODE"),
    "an SDE": (Sampler("exponential", 9, 2.0, guidance="cfg_zero_star", zero_init_steps=1), "it counts the steps of an ODE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_without_effect_is_refused_before_any_work(case):
    sampler, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_sampler(classes_of(), sampler)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"apg_eta": 0.5}, r"apg_eta=0\.5 has no effect with guidance=cfg"),
        ({"apg_momentum": 0.5, "guidance": "cfg_zero_star"}, r"apg_momentum=0\.5 has no effect with guidance=cfg_zero_star"),
        ({"zero_init_steps": 1, "guidance": "apg"}, "zero_init_steps=1 has no effect with guidance=apg"),
        ({"zero_init_steps": -1, "guidance": "cfg_zero_star"}, "zero_init_steps=-1"),
        ({"guidance": "none"}, "guidance='none' is unknown"),
        ({"guidance": "apg", "apg_momentum": 1.0}, r"apg_momentum=1\.0"),
    ],
)
def test_numbers_of_another_method_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**more)


def test_zero_init_is_for_velocities():
    with pytest.raises(ValueError, match="of a model that predicts noise: it is made for velocities"):
        check_sampler(classes_of("noise"), Sampler("euler", 9, 2.0, guidance="cfg_zero_star", zero_init_steps=1))


def test_a_null_condition_of_another_length_is_masked_behind_its_end():
    """A caption of three tokens guided away from one of one token: zeros in the mask are no tokens."""
    means = lambda states, mask: (states * mask[..., None]).sum((1, 2)) / mask.sum(1)  # noqa: E731
    field = lambda x, t, c: means(*c)[:, None] * torch.ones_like(x)  # noqa: E731
    long = (torch.tensor([[[1.0], [2.0], [6.0]]] * 2), torch.ones(2, 3))
    short = (torch.full((2, 1, 1), 5.0), torch.ones(2, 1))
    x, t = torch.zeros(2, 4), torch.full((2,), 0.5)
    for mine, its in ((long, short), (short, long)):
        torch.testing.assert_close(guide(field, mine, its, 3.0)(x, t), 3 * field(x, t, mine) - 2 * field(x, t, its))


BAD = {
    "shapes": (lambda: guide(field, LABELS, NONE[:2], 2.0), "6 conditions and 2 null ones differ"),
    "scale": (lambda: guide(field, LABELS, NONE, math.nan), r"guidance_scale=nan"),
    "interval": (lambda: guide(field, LABELS, NONE, 2.0, interval=(0.7, 0.2)), r"interval \(0\.7, 0\.2\)"),
    "rescale": (lambda: guide(field, LABELS, NONE, 2.0, rescale=1.5), r"rescale=1\.5"),
    "autoguide": (lambda: autoguide(field, field, math.inf), r"guidance_scale=inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
