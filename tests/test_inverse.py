"""Inverse problems: pseudo-inverses, measured values, and the exact posterior of Gaussian data."""

import math

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    Colourisation,
    CondOT,
    Cosine,
    Inpainting,
    Purpose,
    SuperResolution,
    diffusion_coefficient,
    euler,
    exponential,
    heun,
    normal,
    reconstruction_guidance,
    replacement_callback,
    uniform_grid,
)

MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
MEASUREMENTS = {"inpainting": Inpainting(MASK), "colourisation": Colourisation(), "super-resolution": SuperResolution(2)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_pseudo_inverses_are_moore_and_penroses(name):
    """A A+ A = A, A+ A A+ = A+, A A+ and A+ A symmetric, and A A^T = gain on what is measured; as matrices."""
    measure, shape = MEASUREMENTS[name], (3, 2, 4)
    basis = torch.eye(24, dtype=torch.float64).reshape(24, *shape)
    a = measure(basis).flatten(1).T
    out = measure(basis).shape[1:]
    units = torch.eye(a.shape[0], dtype=torch.float64).reshape(-1, *out)
    plus = measure.pseudo_inverse(units).flatten(1).T
    for left, right in ((a @ plus @ a, a), (plus @ a @ plus, plus), (a @ plus, (a @ plus).T), (plus @ a, (plus @ a).T)):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
    torch.testing.assert_close(measure.gain * plus, a.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(plus, torch.linalg.pinv(a), atol=1e-12, rtol=0)


def test_operators_are_what_their_names_say():
    x = draw(2, 3, 4, 6)
    gray = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(Colourisation()(x), gray)
    torch.testing.assert_close(SuperResolution(2)(x)[0, 1, 1, 2], x[0, 1, 2:4, 4:6].mean())
    assert Inpainting(torch.ones(4, 6))(x).equal(x)


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_measured_values_come_back_by_replacement(name, stochastic):
    """Whatever the field: A x = y at the end of a clean path."""
    measure, noise = MEASUREMENTS[name], draw(2, 3, 2, 4, seed=1)
    y = measure(draw(2, 3, 2, 4))
    after = replacement_callback(measure, y, CondOT(), noise)
    field = lambda x, t: torch.sin(3 * x) - x  # noqa: E731
    if stochastic:
        more = lambda k: draw(2, 3, 2, 4, seed=2 + k)  # noqa: E731
        end = exponential(field, noise, uniform_grid(9), CondOT(), diffusion_coefficient("noise"), more, step_callback=after).x
    else:
        end = heun(field, noise, uniform_grid(9), step_callback=after).x
    torch.testing.assert_close(measure(end), y, atol=1e-12, rtol=0)
    x = draw(2, 3, 2, 4, seed=9)
    half = after(x, 0.5)
    torch.testing.assert_close(measure(half), 0.5 * y + 0.5 * measure(noise), atol=1e-12, rtol=0)
    unseen = x - measure.pseudo_inverse(measure(x))
    torch.testing.assert_close(half - measure.pseudo_inverse(measure(half)), unseen, atol=1e-12, rtol=0)


def gaussian_field(mean, covariance, path):
    """The velocity of N(mean, covariance) on a path, on flattened images."""
    law = oracles.Mixture(torch.ones(1, dtype=torch.float64), mean[None], covariance[None])
    by_hand = {CondOT: oracles.condot, Cosine: oracles.cosine}[type(path)]
    return lambda x, t: law.velocity(x.flatten(1), *by_hand(t[0].item())).reshape(x.shape)


def posterior_moments(measure, mean, covariance, y, noise_std, path, shape, **options):
    """Mean and covariance of the guided ODE's end: the flow is affine, so its response to unit starts is all of it."""
    size = math.prod(shape)
    starts = torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)]).reshape(-1, *shape)
    field = reconstruction_guidance(
        gaussian_field(mean, covariance, path), path, measure, y.expand(size + 1, *y.shape[1:]), noise_std=noise_std, **options
    )
    grid = uniform_grid(250, 1e-3)
    end = heun(field, starts, grid, last_euler=True).x.flatten(1)
    root = end[1:] - end[0]
    return end[0], root.T @ root


def exact_posterior(measure, mean, covariance, y, noise_std, shape):
    size = math.prod(shape)
    a = measure(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T
    noise = noise_std**2 * torch.eye(a.shape[0], dtype=torch.float64)
    gain = covariance @ a.T @ torch.linalg.pinv(a @ covariance @ a.T + noise)
    return mean + gain @ (y.flatten() - a @ mean), covariance - gain @ a @ covariance


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("noise_std", [0.3, 0.05])
@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=["condot", "cosine"])
def test_reconstruction_guidance_has_the_exact_posterior_of_isotropic_data(name, noise_std, path):
    """Data N(m, 0.7^2 I): mean and covariance of p(z | y), without conjugate gradients."""
    shape = (3, 2, 4) if name == "inpainting" else (3, 2, 2)
    measure = MEASUREMENTS[name]
    size = math.prod(shape)
    mean, covariance = draw(size), 0.49 * torch.eye(size, dtype=torch.float64)
    y = measure(draw(1, *shape, seed=1))
    got = posterior_moments(measure, mean, covariance, y, noise_std, path, shape, data_std=0.7)
    exact = exact_posterior(measure, mean, covariance, y, noise_std, shape)
    torch.testing.assert_close(got[0], exact[0], atol=6e-3, rtol=0)
    torch.testing.assert_close(got[1], exact[1], atol=6e-3, rtol=0)


def test_conjugate_gradients_have_the_exact_posterior_of_correlated_data():
    """A covariance with neighbours: what is masked is told by what is seen. Without iterations the error is large."""
    shape, size = (1, 2, 4), 8
    root = draw(size, size, seed=5) / 2
    mean, covariance = draw(size, seed=6), root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    measure = Inpainting(MASK)
    y = measure(draw(1, *shape, seed=1))
    exact = exact_posterior(measure, mean, covariance, y, 0.3, shape)
    got = posterior_moments(measure, mean, covariance, y, 0.3, CondOT(), shape, data_std=1.0, iterations=8)
    torch.testing.assert_close(got[0], exact[0], atol=0.02, rtol=0)
    torch.testing.assert_close(got[1], exact[1], atol=0.02, rtol=0)
    rough = posterior_moments(measure, mean, covariance, y, 0.3, CondOT(), shape, data_std=1.0)
    assert (rough[1] - exact[1]).abs().max() > 0.05


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measured_values_come_back_by_reconstruction(name):
    """On correlated data with a noise of 0.02: A x = y up to a few of its deviations."""
    measure, n, shape = MEASUREMENTS[name], 4, (3, 2, 4)
    root = draw(24, 24, seed=5) / 5
    field = gaussian_field(draw(24, seed=6), root @ root.T + 0.05 * torch.eye(24, dtype=torch.float64), CondOT())
    y = measure(draw(n, *shape, seed=1))
    guided = reconstruction_guidance(field, CondOT(), measure, y, noise_std=0.02, data_std=1.0)
    end = euler(guided, normal(0, Purpose.INITIAL, 0, torch.arange(n), shape).double(), uniform_grid(400, 1e-3)).x
    assert (measure(end) - y).square().mean().sqrt() < 0.06


X = draw(2, 3, 4, 4)
BAD = {
    "mask": (lambda: Inpainting(0.5 * torch.ones(2, 2)), r"other than 0 and 1.*\(mask > 0\.5\)"),
    "channels": (lambda: Colourisation()(X[:, :2]), r"\(2, 2, 4, 4\): colourisation takes"),
    "sides": (lambda: SuperResolution(3)(X), r"sides that 3 divides"),
    "factor": (lambda: SuperResolution(1), r"factor=1"),
    "measurement": (lambda: replacement_callback(SuperResolution(2), X, CondOT(), X), r"\(2, 3, 4, 4\) is not of the shape"),
    "std": (lambda: reconstruction_guidance(lambda x, t: x, CondOT(), Colourisation(), X, noise_std=-1.0), r"noise_std=-1\.0"),
    "iterations": (lambda: reconstruction_guidance(lambda x, t: x, CondOT(), Colourisation(), X, iterations=-1), r"iterations=-1"),
    "shape": (lambda: reconstruction_guidance(lambda x, t: x, CondOT(), Colourisation(), X)(X, torch.full((2,), 0.5)), r"not of the shape"),
    "start": (
        lambda: euler(reconstruction_guidance(lambda x, t: -x, CondOT(), SuperResolution(2), X[:, :, :2, :2]), X, uniform_grid(3)),
        r"Begin at 1e-3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
