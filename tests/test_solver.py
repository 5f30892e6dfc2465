"""ODE solvers and grids: orders of convergence on a mixture's field, counts, ends, bad input."""

import math
from functools import cache

import oracles
import pytest
import torch

from condot.pipeline.flow import (
    EDM,
    GRIDS,
    ODE_SOLVERS,
    PATHS,
    VP,
    CondOT,
    Cosine,
    dormand_prince,
    euler,
    heun,
    multistep,
    rho_grid,
    scale_initial_noise,
    shifted_grid,
    solve_then_denoise,
    time_grid,
    uniform_grid,
    velocity_field,
)
from condot.pipeline.flow.solver import DORMAND_PRINCE, runge_kutta

MIXTURE = oracles.three()
FIELD = MIXTURE.field(oracles.condot)
WIDE = oracles.Mixture(MIXTURE.weights, MIXTURE.means, 10 * MIXTURE.covariances).field(oracles.condot)  # order 5 shows before rounding does
START = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def fixed_dormand_prince(field, x, times):
    return runge_kutta(DORMAND_PRINCE, field, x, times)


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "multistep": 2, "rk4": 4, "dormand_prince": 5}
COARSE = {"euler": 640, "midpoint": 80, "heun": 80, "multistep": 320, "rk4": 80, "dormand_prince": 40}


@pytest.fixture(scope="module")
def truth():
    return fixed_dormand_prince(FIELD, START, uniform_grid(500)).x


@pytest.fixture(scope="module")
def wide_truth():
    return fixed_dormand_prince(WIDE, START, uniform_grid(500)).x


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("warp", [False, True], ids=["uniform", "uneven"])
def test_order_of_convergence(name, warp, truth, wide_truth):
    """Halving the step divides the error on a mixture's field by 2^order; on an uneven grid as well."""
    solver, field, exact = ODE_SOLVERS[name], FIELD, truth
    if name == "dormand_prince":
        solver, field, exact = fixed_dormand_prince, WIDE, wide_truth
    errors = []
    for n in (COARSE[name], 2 * COARSE[name]):
        times = uniform_grid(n)
        errors.append((solver(field, START, times + 0.1 * torch.sin(2 * math.pi * times) * warp / math.pi).x - exact).norm().item())
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[name]) < 0.15


def test_two_step_method_keeps_its_order_when_steps_alternate(truth):
    """Steps in turns of h and 2 h: the slope is drawn through the last two points as they lie."""
    errors = []
    for n in (320, 640):
        widths = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(n // 2)
        times = torch.cat([torch.zeros(1, dtype=torch.float64), widths.cumsum(0) / widths.sum()])
        times[-1] = 1
        errors.append((multistep(FIELD, START, times).x - truth).norm().item())
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15


@pytest.mark.parametrize(("name", "per_step"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("multistep", 1), ("rk4", 4)])
def test_evaluations_are_counted(name, per_step):
    seen = []
    solution = ODE_SOLVERS[name](lambda x, t: seen.append(t) or x, START, uniform_grid(7))
    assert solution.evaluations == len(seen) == 7 * per_step


@pytest.mark.parametrize("name", ["euler", "midpoint", "multistep"])
def test_solvers_that_do_not_evaluate_at_the_end(name):
    times = []
    ODE_SOLVERS[name](lambda x, t: times.append(t.max().item()) or x, START, uniform_grid(7))
    assert max(times) < 1


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_last_interval_as_an_euler_step(name):
    """With `last_euler` the field is not evaluated at the end, and a singular one is solved."""
    times = []

    def field(x, t):  # z = 2 x / (1 + t), as a data prediction would be turned into a velocity: 0 / 0 at t = 1
        times.append(t.max().item())
        return (2 * x / (1 + t[:, None]) - x) / (1 - t[:, None])

    end = ODE_SOLVERS[name](field, START, uniform_grid(40), last_euler=True)
    assert max(times) < 1 and end.evaluations == len(times)
    torch.testing.assert_close(end.x, 2 * START, atol=0.07, rtol=0)
    if name in ("heun", "rk4", "dormand_prince"):
        with pytest.raises(ValueError, match=r"singular"):
            ODE_SOLVERS[name](field, START, uniform_grid(40))


def data_field(path, law=MIXTURE):
    """The mixture's exact data prediction, made a velocity: singular where the path ends clean."""
    return velocity_field(lambda x, t: law.data(x, *(v.item() for v in path(t[:1])[:2])), path, "data")


@cache
def landed_truth(name):
    """The end of the ODE of data predictions from START: where the noise is a millionth, the data are the point itself."""
    path = PATHS[name]()
    late = min(path.time_from_log_snr(torch.tensor(2 * math.log(1e6), dtype=torch.float64)).item(), 1 - 1e-7)
    times = torch.cat([uniform_grid(120, 0.0, 0.999), torch.tensor([(0.999 + late) / 2, late])])
    return runge_kutta(DORMAND_PRINCE, data_field(path), scale_initial_noise(path, START), times).x / path(torch.tensor(late)).a


@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "sub_vp"])
@pytest.mark.parametrize(("name", "order"), [("midpoint", 2), ("heun", 2), ("multistep", 2), ("rk4", 4)])
def test_order_of_convergence_with_a_data_prediction(path, name, order, monkeypatch):
    """`solve_then_denoise`: doubling the steps divides the error by 2^order on paths that end clean; the last step is too short to show."""
    truth, path = landed_truth(path), PATHS[path]()
    field, x, coarse = data_field(path), scale_initial_noise(path, START), {"multistep": 160, "rk4": 50}.get(name, 80)
    fine = solve_then_denoise(ODE_SOLVERS[name], field, x, uniform_grid(2 * coarse), path).x
    monkeypatch.setattr("condot.pipeline.flow.solver.FINAL_STEP", 1e-5)
    errors = [
        (solve_then_denoise(ODE_SOLVERS[name], field, x, uniform_grid(n), path).x - truth).norm().item() for n in (coarse, 2 * coarse)
    ]
    assert math.log2(errors[0] / errors[1]) > order - 0.4
    if name == "rk4":  # from 1e-3 the last step costs 1e-5; a whole last interval by Euler loses two digits and the order
        whole = (ODE_SOLVERS[name](field, x, uniform_grid(2 * coarse), last_euler=True).x - truth).norm()
        assert (fine - truth).norm() < 1e-5 < whole / 20


@pytest.mark.parametrize(
    ("name", "evaluations"), [("midpoint", 2 * 10 + 1), ("heun", 2 * 10 + 1), ("multistep", 10 + 1), ("rk4", 4 * 10 + 1)]
)
def test_a_landing_counts_what_it_evaluates_and_keeps_to_the_times_given(name, evaluations):
    """Of 7 intervals the last is four, each leaving 0.29 of the way to 1 - 1e-3; the hook sees the caller's times alone."""
    seen, hooked, path = [], [], CondOT()
    field = lambda x, t: seen.append(t[0].item()) or data_field(path)(x, t)  # noqa: E731
    end = solve_then_denoise(ODE_SOLVERS[name], field, START, uniform_grid(7), path, step_callback=lambda x, t: hooked.append(t) or x)
    assert end.evaluations == len(seen) == evaluations and max(seen) == pytest.approx(1 - 1e-3)
    assert hooked == pytest.approx(uniform_grid(7)[1:].tolist())
    given, seen[:] = torch.tensor([0.0, 0.4, 0.9995, 1.0], dtype=torch.float64), []
    assert solve_then_denoise(ODE_SOLVERS[name], field, START, given, path).evaluations == len(seen) and max(seen) == pytest.approx(0.9995)


@pytest.mark.parametrize("name", ["heun", "rk4"])  # which take a slope at the end
def test_what_a_network_errs_is_not_multiplied_at_the_end(name):
    """Data predictions that err by 1e-2 after t = 0.95: the end errs by little more, where one step to 1 - 1e-3 made 50 times of it."""
    exact = data_field(CondOT())

    def erring(x, t):
        return exact(x, t) + 1e-2 * (t[0].item() > 0.95) / (1 - t[0].item())

    ends = [solve_then_denoise(ODE_SOLVERS[name], field, START, uniform_grid(10), CondOT()).x for field in (exact, erring)]
    assert (ends[0] - ends[1]).abs().max() < 0.1


def test_one_given_time_before_the_end_is_landed_from():
    found = solve_then_denoise(heun, data_field(CondOT()), START, torch.tensor([0.9995, 1.0], dtype=torch.float64), CondOT())
    assert found.evaluations == 1
    torch.testing.assert_close(found.x, MIXTURE.data(START, 0.9995, 0.0005))


def test_an_adaptive_solution_lands_too():
    end = solve_then_denoise(dormand_prince, data_field(CondOT()), START, uniform_grid(1), CondOT(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(end.x, fixed_dormand_prince(FIELD, START, uniform_grid(500)).x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_straight_line_is_followed_exactly(name):
    end = ODE_SOLVERS[name](lambda x, t: torch.full_like(x, 3.0), START, uniform_grid(3))
    torch.testing.assert_close(end.x, START + 3, rtol=1e-13, atol=1e-13)


def test_linear_ode_is_its_exponential():
    """dx = -theta x dt: psi_t(x) = exp(-theta t) x."""
    end = dormand_prince(lambda x, t: -2.5 * x, START, uniform_grid(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end.x, math.exp(-2.5) * START, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7, 1e-9])
def test_adaptive_error_follows_its_tolerance(tolerance, truth):
    solution = dormand_prince(FIELD, START, uniform_grid(1), rtol=tolerance, atol=tolerance)
    assert (solution.x - truth).abs().max() < 20 * tolerance
    assert solution.evaluations < 60 * (1e-3 / tolerance) ** 0.2 + 100


def test_adaptive_steps_are_free_on_a_still_field():
    assert dormand_prince(lambda x, t: torch.zeros_like(x), START, uniform_grid(1)).evaluations < 40


def test_the_hook_sees_every_step():
    for name, solver in ODE_SOLVERS.items():
        seen = []
        solver(FIELD, START, uniform_grid(4), step_callback=lambda x, t, seen=seen: seen.append(t) or x)
        assert seen == [0.25, 0.5, 0.75, 1.0], name


def test_the_learned_score_is_left_out_of_an_ode():
    for solver in ODE_SOLVERS.values():
        assert torch.equal(solver(lambda x, t: (FIELD(x, t), x), START, uniform_grid(4)).x, solver(FIELD, START, uniform_grid(4)).x)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (4, 4), (2, 1, 2, 2)])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_shapes_and_half_precision(name, shape):
    """One time per sample whatever the shape; half-precision states are carried in single."""
    shapes = []
    x = torch.ones(shape, dtype=torch.bfloat16)
    end = ODE_SOLVERS[name](lambda x, t: shapes.append(tuple(t.shape)) or -x, x, uniform_grid(20))
    assert set(shapes) == {(shape[0],)} and end.x.shape == shape and end.x.dtype == torch.float32
    assert (end.x - math.exp(-1)).abs().max() < 0.02


# grids


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", [CondOT(), Cosine(), VP(), EDM(), PATHS["ve"](), PATHS["ddpm"]()], ids=lambda p: type(p).__name__)
def test_grids_rise_from_end_to_end(name, path):
    times = time_grid(name, 11, path=path)
    assert len(times) == 12 and times[0] == 0 and times[-1] == 1 and bool((times.diff() > 0).all()) and times.dtype == torch.float64


def test_shifted_grid_multiplies_noise_to_signal():
    plain, moved = uniform_grid(10)[1:-1], shifted_grid(10, 3.0)[1:-1]
    torch.testing.assert_close((1 - moved) / moved, 3 * (1 - plain) / plain)
    torch.testing.assert_close(shifted_grid(10, 1.0), uniform_grid(10))


def test_rho_grid_has_even_roots_of_the_noise():
    sigma = torch.exp(-CondOT().log_snr(rho_grid(12, CondOT())[1:-1]) / 2)
    roots = sigma ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 12 * torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(rho_grid(9, EDM()), uniform_grid(9))


def test_grids_keep_their_ends():
    for name in GRIDS:
        times = time_grid(name, 5, start=0.01, end=0.99)
        assert times[0] == 0.01 and times[-1] == 0.99 and bool((times.diff() > 0).all())


# bad input

BAD = {
    "no step": (lambda: uniform_grid(0), r"num_inference_steps=0.*at least one"),
    "ends": (lambda: uniform_grid(5, 0.5, 0.5), r"0\.5 to 0\.5"),
    "shift": (lambda: shifted_grid(5, 0.0), r"shift=0\.0"),
    "rho": (lambda: rho_grid(5, CondOT(), rho=-1), r"rho=-1"),
    "grid": (lambda: time_grid("cosine", 5), r"'cosine' is unknown: choose one of uniform"),
    "one time": (lambda: euler(FIELD, START, torch.tensor([0.5])), r"no grid"),
    "falling": (lambda: euler(FIELD, START, torch.tensor([0.0, 0.6, 0.5])), r"rising strictly"),
    "outside": (lambda: multistep(FIELD, START, torch.tensor([0.0, 1.5])), r"inside \[0, 1\]"),
    "nan time": (lambda: heun(FIELD, START, torch.tensor([0.0, math.nan])), r"no grid"),
    "start": (lambda: heun(FIELD, START * math.inf, uniform_grid(2)), r"start holds 10 values that are not finite"),
    "one sample": (lambda: heun(FIELD, START[0, :1].reshape(1), uniform_grid(2)), r"\(B, \*S\)"),
    "whole": (lambda: heun(FIELD, START.long(), uniform_grid(2)), r"int64"),
    "end": (lambda: euler(lambda x, t: x / 0, START, uniform_grid(2)), r"end point is not finite"),
    "tolerance": (lambda: dormand_prince(FIELD, START, uniform_grid(1), rtol=0.0), r"rtol=0\.0"),
    "single": (lambda: dormand_prince(lambda x, t: -x, START.float(), uniform_grid(1), rtol=1e-14, atol=1e-14), r"cannot be met.*Loosen"),
    "jump": (lambda: dormand_prince(lambda x, t: 1 / (t[:, None] - 0.501) ** 2 + 0 * x, START, uniform_grid(1)), r"cannot be met"),
    "limit": (lambda: dormand_prince(FIELD, START, uniform_grid(1), rtol=1e-9, atol=1e-9, max_evaluations=50), r"of 50 evaluations"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
