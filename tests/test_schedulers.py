"""Our diffusers schedulers: orders, marginals, our own solvers step by step, stock pipelines, configurations, bad input."""

import math
from itertools import pairwise

import oracles
import pytest
import torch
from conftest import ROOT
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from sampling import stream, worst_statistic

from condot.pipeline.export.bundle import bundle_module
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler
from condot.pipeline.export.runtime.scheduling_flow_sde_v1 import FlowSDEScheduler
from condot.pipeline.flow import (
    ODE_SOLVERS,
    PATHS,
    SDE_SOLVERS,
    CondOT,
    diffusion_coefficient,
    dormand_prince,
    step_variances,
    uniform_grid,
)

MIXTURE = oracles.three()
FIELD = MIXTURE.field(oracles.condot)
START = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SOLVERS = ("euler", "midpoint", "heun", "rk4", "multistep")
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "multistep": 1}
WORDS = {"velocity": "velocity", "noise": "epsilon", "data": "sample", "v": "v_prediction", "score": "score"}
BETAS = step_variances("linear").tolist()
NAMED = {"condot": {}, "cosine": {}, "vp": {}, "ddpm": {"trained_betas": BETAS}}

OWN = {"FlowODEScheduler": "scheduling_flow_ode_v1", "FlowSDEScheduler": "scheduling_flow_sde_v1"}


def table_of(name):
    t = 1 - torch.arange(1001, dtype=torch.float64) / 1000
    return {"path": "table", "table": [part.tolist() for part in PATHS[name]()(t)]}


def predicted(scheduler, kind, x, sigma, path="condot", sigma_data=0.0):
    """What a perfect network of this kind gives at a point of the path: the mixture's posterior means."""
    if path in oracles.BY_HAND:
        a, b, da, db = oracles.BY_HAND[path](1 - sigma)
    else:
        a, b, da, db = (part.item() for part in PATHS[path]()(torch.tensor(1 - sigma, dtype=torch.float64)))
    if sigma_data:
        variance = (a * sigma_data) ** 2 + b**2
        x = x * math.sqrt(variance)  # the network sees x scaled to variance 1
        z = MIXTURE.data(x, a, b)
        return (z - a * sigma_data**2 / variance * x) * math.sqrt(variance) / (b * sigma_data)
    z, eps = MIXTURE.data(x, a, b), MIXTURE.noise(x, a, b)
    forms = {"velocity": (da, db), "flow_prediction": (-1, 1), "epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-b, a)}
    if kind == "score":
        return MIXTURE.score(x, a, b)
    u, w = forms[kind]
    return u * z + w * eps


def drawn(scheduler, x, steps=None, path="condot", step_callback=None, generator=None, **more):
    """The loop of a pipeline with a perfect network, told the exact time, not its float32 timestep."""
    scheduler.set_timesteps(steps, **more)
    for t, point in zip(scheduler.timesteps, list(scheduler._points), strict=True):
        x = scheduler.scale_model_input(x, t)
        out = predicted(scheduler, scheduler.config.prediction_type, x, point.sigma, path, scheduler.config.sigma_data)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
        if step_callback:
            step_callback(x)
    return x


@pytest.fixture(scope="module")
def truth():
    return dormand_prince(FIELD, START, uniform_grid(1), rtol=1e-11, atol=1e-11).x


# the ODE

COARSE = {"euler": 640, "midpoint": 80, "heun": 80, "multistep": 320, "rk4": 80}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "multistep": 2, "rk4": 4}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(solver, shift, truth):
    """Halving the step divides the error by 2^order, on even sigmas and on shifted ones."""
    errors = [(drawn(FlowODEScheduler(solver, shift=shift), START, n) - truth).norm() for n in (COARSE[solver], 2 * COARSE[solver])]
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[solver]) < 0.15


@pytest.mark.parametrize("path", ["cosine", "vp"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "multistep"])
def test_order_on_other_paths(path, solver):
    """On their curved paths too, against 16 times the steps of RK4; VP, whose beta is a root at the data, included."""
    make = lambda name: FlowODEScheduler(name, "epsilon", path)  # noqa: E731
    levels = [1 - 0.02 - 0.98 * i / 40 for i in range(40)]
    fine = [s - (s - t) * i / 8 for s, t in zip(levels, [*levels[1:], 0.0], strict=True) for i in range(8)]
    mid = [s - (s - t) * i / 2 for s, t in zip(levels, [*levels[1:], 0.0], strict=True) for i in range(2)]
    exact = drawn(make("rk4"), START, path=path, sigmas=fine)
    coarse, half = ((drawn(make(solver), START, path=path, sigmas=grid) - exact).norm() for grid in (levels, mid))
    assert ORDERS[solver] - 0.5 < math.log2(coarse / half) < ORDERS[solver] + 0.6


@pytest.mark.parametrize("kind", ["velocity", "flow_prediction", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_point_is_that_of_our_own_solver(solver, kind):
    """Step for step on CondOT, to 1e-11, on an uneven grid; a network that predicts data ends on an Euler step, as ours does."""
    scheduler = FlowODEScheduler(solver, kind, shift=1.7)
    seen, ours = [], []
    end = drawn(scheduler, START, 9, step_callback=seen.append)
    times = 1 - scheduler.sigmas
    solution = ODE_SOLVERS[solver](FIELD, START, times, last_euler=kind == "sample", step_callback=lambda x, t: ours.append(x) or x)
    assert solution.evaluations == len(seen) == len(scheduler.timesteps) and scheduler.order == EVALUATIONS[solver]
    steps = [x for x, later in zip(seen, [*scheduler._moves[1:], None], strict=True) if later is None or later.begins]
    torch.testing.assert_close(torch.stack(steps), torch.stack(ours), rtol=1e-11, atol=1e-11)
    assert torch.equal(end, seen[-1]) and len(scheduler.sigmas) == 10


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "sub_vp", "ve", "edm", "ddpm"])
def test_every_prediction_on_every_path_is_ddim(path, kind):
    """Euler's step takes z and eps from x and the prediction, and mixes them as at the next time; the last one ends on z."""
    more = {"path": path, **NAMED[path]} if path in NAMED else table_of(path)
    scheduler = FlowODEScheduler("euler", WORDS[kind], **more)
    mine = drawn(scheduler, START, 7, path)
    times = (1 - scheduler.sigmas).tolist()
    c = PATHS[path]()(torch.tensor(times[0], dtype=torch.float64))
    x = c.b * START
    for s, t in pairwise(times):
        c, d = (PATHS[path]()(torch.tensor([time], dtype=torch.float64)[:, None]) for time in (s, t))
        z, eps = MIXTURE.data(x, c.a.item(), c.b.item()), MIXTURE.noise(x, c.a.item(), c.b.item())
        x = z if t == 1 else d.a * z + d.b * eps
    torch.testing.assert_close(mine, x, rtol=2e-6, atol=2e-6)
    top = {"condot": 1, "cosine": 1}.get(path, 1) if kind in ("velocity", "data", "v") or path not in ("condot", "cosine") else 0.999
    assert scheduler.sigmas[0] == (0.999 if path == "ddpm" else top)


@pytest.mark.parametrize("make", [FlowODEScheduler, FlowSDEScheduler])
@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_data_predictions_are_kept_in_range(path, make):
    """A step of data clamped and of the noise that then must have been: x' = a' z + b' (x - a z) / b; ends lie in range."""
    more = {"sigma_t": "zero"} if make is FlowSDEScheduler else {}
    scheduler = make(prediction_type="epsilon", path=path, clip_sample=True, clip_sample_range=0.5, **more)
    scheduler.set_timesteps(4)
    levels = scheduler.sigmas.tolist()
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clamped = 0
    for k, (level, step_callback) in zip(scheduler.timesteps, pairwise(levels), strict=False):
        x = scheduler.scale_model_input(x, k)
        a, b, *_ = scheduler.coefficients(level)
        c, d, *_ = scheduler.coefficients(step_callback)
        eps = torch.sin(3 * x)
        z = ((x - b * eps) / a).clamp(-0.5, 0.5)
        clamped += int((z.abs() == 0.5).sum())
        expected = c * z + d * (x - a * z) / b
        x = scheduler.step(eps, k, x).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    assert clamped > 100 and x.abs().max() <= 0.5 + 1e-6
    twin = make.from_config(DDIMScheduler(clip_sample=True).config)
    assert twin.config.clip_sample and make.from_config(DPMSolverMultistepScheduler(thresholding=True).config).config.clip_sample
    with pytest.raises(ValueError, match="sample_max_value=2"):
        make.from_config(DPMSolverMultistepScheduler(thresholding=True, sample_max_value=2.0).config)


@pytest.mark.parametrize("path", ["edm", "cosine", "condot"])
def test_a_scaled_network_sees_unit_variance_and_draws_the_same(path):
    """Preconditioned the Karras way: the same points as a plain network that predicts data."""
    more = table_of(path) if path == "edm" else {"path": path}
    scaled = drawn(FlowODEScheduler("euler", "sample", sigma_data=0.7, **more), START, 12, path)
    plain = drawn(FlowODEScheduler("euler", "sample", **more), START, 12, path)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["vp", "cosine", "sub_vp"])
def test_a_table_is_its_path_between_the_rows(path):
    scheduler = FlowODEScheduler(**table_of(path)) if path != "vp" else FlowODEScheduler(path="vp")
    for sigma in (0.00037, 0.12345, 0.5001, 0.99941):
        exact = [v.item() for v in PATHS[path]()(torch.tensor(1 - sigma, dtype=torch.float64))]
        assert scheduler.coefficients(sigma) == pytest.approx(exact, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_last_step_of_a_still_data_prediction_ends_on_it(solver):
    """All data at one point: every solver's straight lines end on it, whatever the steps and the path."""
    for path in ("condot", "vp", "ddpm"):
        scheduler = FlowODEScheduler(solver, "sample", path, **NAMED[path])
        scheduler.set_timesteps(3)
        x, point = START, torch.full_like(START, 0.7)
        for t in scheduler.timesteps:
            x = scheduler.step(point, t, scheduler.scale_model_input(x, t)).prev_sample
        torch.testing.assert_close(x, point, rtol=1e-12, atol=1e-12)


# the SDE

COEFFICIENTS = {"zero": 1.0, "constant": 0.8, "noise": 2.0, "forward": 1.0}


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma_t", COEFFICIENTS)
@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_any_coefficient_keeps_the_marginals(path, sigma_t):
    """4000 samples are those of the mixture: below 3.2, which chance passes with probability 3e-9."""
    scheduler = FlowSDEScheduler("exponential", sigma_t, COEFFICIENTS[sigma_t], "velocity", path)
    assert worst_statistic(drawn(scheduler, stream(11)(-1), 160, path, generator=generator())) < 3.2


@pytest.mark.parametrize("solver", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("sigma_t", ["constant", "noise", [1.2, 1.0, 0.6, 0.0]], ids=str)
def test_other_integrators_keep_the_marginals(solver, sigma_t):
    scheduler = FlowSDEScheduler(solver, sigma_t, 0.5 if sigma_t == "constant" else 1.0)
    x = drawn(scheduler, stream(21)(-1), 200 if solver == "euler_maruyama" else 80, generator=generator())
    assert worst_statistic(x) < 3.2


@pytest.mark.parametrize("solver", FlowSDEScheduler.solvers)
@pytest.mark.parametrize("sigma_t", ["zero", "constant", "noise", "forward", [1.2, 1.0, 0.6, 0.0]], ids=str)
def test_every_point_is_that_of_our_own_sde(solver, sigma_t, monkeypatch):
    """With the same noise, on CondOT: step for step to 1e-11; `forward` from noise for the exponential, off it for the others."""
    draws = [torch.randn(START.shape, generator=generator(k), dtype=torch.float64) for k in range(20)]
    queue = iter(draws)
    monkeypatch.setattr("condot.pipeline.export.runtime.scheduling_flow_sde_v1.randn_tensor", lambda shape, **more: next(queue))
    sigmas = [0.93, 0.8, 0.55, 0.3, 0.12] if sigma_t == "forward" and solver != "exponential" else [1.0, 0.8, 0.55, 0.3, 0.12]
    if isinstance(sigma_t, str):
        sigma = diffusion_coefficient(sigma_t, 0.9)
    else:
        rows = torch.tensor(sigma_t, dtype=torch.float64)

        def sigma(t, c):
            k = (3 * t).floor().long().clamp(max=2)
            return 0.9 * (rows[k] + (3 * t - k) * (rows[k + 1] - rows[k]))

    scheduler, seen, ours = FlowSDEScheduler(solver, sigma_t, 0.9), [], []
    drawn(scheduler, START, sigmas=sigmas, step_callback=seen.append)
    times = 1 - scheduler.sigmas
    solution = SDE_SOLVERS[solver](FIELD, START, times, CondOT(), sigma, lambda k: draws[k], step_callback=lambda x, t: ours.append(x) or x)
    assert solution.evaluations == len(seen)
    steps = [x for x, later in zip(seen, [*scheduler._moves[1:], None], strict=True) if later is None or later.begins]
    torch.testing.assert_close(torch.stack(steps), torch.stack(ours), rtol=1e-11, atol=1e-11)
    assert next(queue, None) is (draws[0] if sigma_t == "zero" else draws[4]), "one draw a step, none in the last, none at zero"


@pytest.mark.parametrize("solver", ["exponential", "euler_maruyama"])
def test_without_noise_it_is_eulers_method_to_the_bit(solver):
    for path in ("condot", "vp"):
        x = drawn(FlowSDEScheduler(solver, "zero", 1.0, "epsilon", path), START, 9, path)
        torch.testing.assert_close(x, drawn(FlowODEScheduler("euler", "epsilon", path), START, 9, path), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", ["vp", "ddpm", "cosine"])
@pytest.mark.parametrize("solver", ["exponential", "euler_maruyama", "stochastic_heun"])
def test_weak_order_on_other_paths(path, solver):
    """Gaussian data: mean and variance of the end, from the response to each draw, converge to the law's."""
    gauss, errors = oracles.gaussian([0.7], [[0.3]]), []
    for n in (60, 240):
        scheduler = FlowSDEScheduler(solver, "noise", 1.5, "epsilon", path, **NAMED[path])
        scheduler.set_timesteps(n)
        x = torch.zeros(n + 2, 1, dtype=torch.float64)
        x[1] = 1
        count = iter(range(n + 2))

        def unit(shape, count=count, n=n, **more):
            one = torch.zeros(n + 2, 1, dtype=torch.float64)
            one[2 + next(count)] = 1
            return one

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("condot.pipeline.export.runtime.scheduling_flow_sde_v1.randn_tensor", unit)
            for t, point in zip(scheduler.timesteps, scheduler._points, strict=True):
                a, b, _, _ = (part.item() for part in PATHS[path]()(torch.tensor(1 - point.sigma, dtype=torch.float64)))
                x = scheduler.scale_model_input(x, t)
                x = scheduler.step(gauss.noise(x, a, b), t, x).prev_sample
        errors.append((abs(x[0].item() - 0.7), abs((x[1:] - x[0]).square().sum().item() - 0.3)))
    assert max(errors[1]) < 0.02 and max(errors[1]) < max(0.4 * max(errors[0]), 5e-3)


@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_integrators_agree_on_how_much_of_the_start_is_left(path, monkeypatch):
    """Marginals do not show sigma's size; the response of the end to the start does: within 3 %, and not that of the ODE."""
    gauss, left = oracles.gaussian([0.7], [[0.3]]), {}
    monkeypatch.setattr(
        "condot.pipeline.export.runtime.scheduling_flow_sde_v1.randn_tensor", lambda shape, **more: torch.zeros(shape, dtype=torch.float64)
    )
    for solver in (*FlowSDEScheduler.solvers, "none"):
        scheduler = FlowSDEScheduler(
            "exponential" if solver == "none" else solver, "zero" if solver == "none" else "noise", 1.5, "epsilon", path
        )
        scheduler.set_timesteps(400)
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        for t, point in zip(scheduler.timesteps, scheduler._points, strict=True):
            a, b, _, _ = oracles.BY_HAND[path](1 - point.sigma)
            x = scheduler.scale_model_input(x, t)
            x = scheduler.step(gauss.noise(x, a, b), t, x).prev_sample
        left[solver] = (x[1] - x[0]).item()
    ode = left.pop("none")
    assert max(left.values()) < 1.03 * min(left.values()) and max(left.values()) < 0.8 * ode


def test_the_generator_is_followed():
    """The same seed draws the same, another another; without one, scheduler.generator's or the global seed's noise is taken."""

    def draw(scheduler, **more):
        return drawn(scheduler, START, 6, **more)

    make = FlowSDEScheduler
    first = draw(make(), generator=generator(1))
    assert torch.equal(first, draw(make(), generator=generator(1))) and (first - draw(make(), generator=generator(2))).abs().max() > 0.1
    held = make()
    held.generator = generator(1)
    assert torch.equal(first, draw(held))
    torch.manual_seed(1)
    loose = draw(make())
    torch.manual_seed(1)
    assert torch.equal(loose, draw(make()))
    state = torch.get_rng_state()
    draw(make(), generator=generator(1)), draw(FlowODEScheduler())
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    each = [generator(k) for k in range(5)]
    assert draw(make(), generator=each).shape == START.shape


# as diffusers' schedulers are used


@pytest.mark.parametrize(
    "make", [FlowODEScheduler, FlowSDEScheduler, lambda: FlowODEScheduler("rk4"), lambda: FlowSDEScheduler("stochastic_heun")]
)
def test_float32_inside_the_models_dtype_outside(make):
    """A bfloat16 model: bfloat16 comes out, but the steps are counted in float32: 200 steps of a constant slope are exact."""
    scheduler = make()
    scheduler.register_to_config(sigma_t="zero")
    scheduler.set_timesteps(4)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, -2.0), t, x).prev_sample
        assert x.dtype == torch.bfloat16
    assert torch.equal(x, torch.full_like(x, 3.0))
    single = make()
    single.set_timesteps(3)
    out = torch.full((2, 3), 1 / 3).to(torch.bfloat16)
    (moved,) = single.step(out, single.timesteps[0], torch.full((2, 3), 1 / 7), return_dict=False)
    assert moved.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [FlowODEScheduler, lambda **more: FlowSDEScheduler(sigma_t="zero", **more)])
def test_a_step_is_rounded_once(make):
    """A bfloat16 model: the step is that in float32 of the same numbers, rounded at its end; in bfloat16 it would be another."""
    x, out = (torch.randn(64, 3, generator=generator(k)).bfloat16() for k in (1, 2))
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler = make(prediction_type="v_prediction")
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(1)
        ends.append(scheduler.step(out.to(dtype), scheduler.timesteps[1], x.to(dtype)).prev_sample)
    assert ends[0].dtype == torch.bfloat16 and torch.equal(ends[0], ends[1].bfloat16())


def test_stages_of_rk4_keep_their_start_in_single_precision():
    """The points between are rounded to the model's dtype; the step's own start is not: bfloat16 at most once a step."""
    scheduler = FlowODEScheduler("rk4", "velocity")
    scheduler.set_timesteps(1)
    x = torch.full((1, 1), 0.7311)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full((1, 1), 1e-3).bfloat16(), t, x).prev_sample
    assert x.item() == torch.tensor(0.7311 + 1e-3).bfloat16().item()


@pytest.mark.parametrize("make", [FlowODEScheduler, FlowSDEScheduler])
def test_what_pipelines_ask_of_a_scheduler(make):
    scheduler = make()
    assert scheduler.init_noise_sigma == 1.0 and scheduler.config.num_train_timesteps == len(scheduler) == 1000
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250] and scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0] and scheduler.step_index is None and scheduler.begin_index is None
    x = torch.randn(2, 3)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    assert scheduler.index_for_timestep(scheduler.timesteps[2]) == scheduler.index_for_timestep(500) == 2
    scheduler.step(x, scheduler.timesteps[0], x, generator=generator())
    assert scheduler.step_index == 1
    scheduler.set_timesteps(sigmas=[0.9, 0.3])
    assert scheduler.sigmas.tolist() == [0.9, 0.3, 0] and scheduler.step_index is None
    scheduler.set_timesteps(timesteps=[900, 300])
    assert scheduler.sigmas.tolist() == [0.9, 0.3, 0]


def test_several_evaluations_a_step_are_as_many_timesteps():
    scheduler = FlowODEScheduler("heun")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000, 500, 500, 0] and scheduler.index_for_timestep(500) == 2
    scheduler = FlowODEScheduler("rk4", "sample")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000, 750, 750, 500, 500] and len(scheduler.sigmas) == 3
    scheduler = FlowSDEScheduler("stochastic_heun")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000, 500, 500]


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_may_begin_in_the_middle(solver, truth):
    """From data noised to sigma = 0.5 both ways of beginning there agree; the step is our solver's."""
    ends = []
    for how in ("index", "timestep"):
        scheduler = FlowODEScheduler(solver, "velocity")
        scheduler.set_timesteps(8)
        begin = 4 * scheduler.order
        x = scheduler.scale_noise(truth, scheduler.timesteps[begin : begin + 1], START)
        torch.testing.assert_close(x, 0.5 * truth + 0.5 * START)
        if how == "index":
            scheduler.set_begin_index(begin)
        for t, point in zip(scheduler.timesteps[begin:], scheduler._points[begin:], strict=True):
            x = scheduler.step(predicted(scheduler, "velocity", x, point.sigma), t, x).prev_sample
        ends.append(x)
    times = torch.linspace(0.5, 1, 5, dtype=torch.float64)
    assert torch.equal(*ends)
    torch.testing.assert_close(ends[0], ODE_SOLVERS[solver](FIELD, 0.5 * truth + 0.5 * START, times).x, rtol=1e-11, atol=1e-11)


def test_noise_is_added_as_the_path_does():
    """For one timestep each; on DDPM's path as DDPMScheduler does; scaled where the network is."""
    x, noise, k = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([0, 10, 500, 999])
    theirs = DDPMScheduler().add_noise(x, noise, k)
    torch.testing.assert_close(FlowODEScheduler.from_config(DDPMScheduler().config).add_noise(x, noise, k), theirs, rtol=1e-4, atol=1e-4)
    s = k.float()[:, None, None] / 1000
    torch.testing.assert_close(FlowODEScheduler().add_noise(x, noise, k), (1 - s) * x + s * noise)
    scaled = FlowODEScheduler(prediction_type="sample", sigma_data=0.5).add_noise(x, noise, k)
    torch.testing.assert_close(scaled, ((1 - s) * x + s * noise) / torch.sqrt((0.5 * (1 - s)) ** 2 + s**2))


def test_a_pipeline_that_keeps_loud_noise_to_itself_is_served_too():
    """PixArt shows the network a copy and passes its own latents to `step`; DiT passes what it showed: the same image."""
    dit = drawn(FlowODEScheduler("euler", "epsilon", **table_of("ve")), START, 5, "ve")
    scheduler, x = FlowODEScheduler("euler", "epsilon", **table_of("ve")), START
    scheduler.set_timesteps(5)
    for t, point in zip(scheduler.timesteps, scheduler._points, strict=True):
        shown = scheduler.scale_model_input(torch.cat([x, x]), t)[: len(x)]
        x = scheduler.step(predicted(scheduler, "epsilon", shown, point.sigma, "ve"), t, x).prev_sample
    torch.testing.assert_close(x, dit)


# configurations


@pytest.mark.parametrize("make", [FlowODEScheduler, FlowSDEScheduler])
def test_a_configuration_comes_back(make, tmp_path):
    scheduler = make(prediction_type="score", path="vp", rates=(0.2, 15.0), shift=2.0, shift_terminal=0.1)
    scheduler.save_pretrained(tmp_path)
    again = make.from_pretrained(tmp_path)
    keep = {k: list(v) if isinstance(v, tuple) else v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in again.config.items() if not k.startswith("_")} == keep
    for one in (scheduler, again):
        one.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, again.timesteps) and scheduler._points == again._points


def test_from_one_to_the_other_and_back():
    ode = FlowODEScheduler("heun", "epsilon", "cosine", shift=3.0)
    sde = FlowSDEScheduler.from_config(ode.config, sigma_t="constant", sigma_scale=0.3)
    assert (sde.config.solver, sde.config.prediction_type, sde.config.path, sde.config.shift) == ("exponential", "epsilon", "cosine", 3.0)
    back = FlowODEScheduler.from_config(sde.config)
    assert (back.config.solver, back.config.path, back.config.shift, back.order) == ("heun", "cosine", 3.0, 2)
    again = FlowSDEScheduler.from_config(back.config)
    assert (again.config.sigma_t, again.config.sigma_scale, again.config.solver) == ("constant", 0.3, "exponential")


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
STOCK = {
    "flow match": (FlowMatchEulerDiscreteScheduler(shift=3.0), ("condot", "flow_prediction", 3.0)),
    "flow match, dynamic": (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        ("condot", "flow_prediction", 1.0),
    ),
    "dpm++": (DPMSolverMultistepScheduler(**FLOW, flow_shift=2.5), ("condot", "flow_prediction", 2.5)),
    "dpm++ noise": (DPMSolverMultistepScheduler(use_flow_sigmas=True), ("condot", "epsilon", 1.0)),
    "unipc": (UniPCMultistepScheduler(**FLOW, flow_shift=3.0), ("condot", "flow_prediction", 3.0)),
    "ddim": (DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"), ("ddpm", "v_prediction", 1.0)),
    "ddpm": (DDPMScheduler(), ("ddpm", "epsilon", 1.0)),
}


@pytest.mark.parametrize("saved", [False, True], ids=["fresh", "loaded"])
@pytest.mark.parametrize("make", [FlowODEScheduler, FlowSDEScheduler])
@pytest.mark.parametrize("name", STOCK)
def test_one_line_swaps_it_in(name, make, saved, tmp_path):
    """`from_config(pipe.scheduler.config)` reads stock's words, from memory and from a file, and stock can be swapped in again."""
    stock, wanted = STOCK[name]
    if saved:
        stock.save_pretrained(tmp_path)
        stock = type(stock).from_pretrained(tmp_path)
        stock.register_to_config(_class_name=type(stock).__name__)
    ours = make.from_config(stock.config)
    assert (ours.config.path, ours.config.prediction_type, ours.config.shift) == wanted
    assert ours.config.use_dynamic_shifting == ("dynamic" in name)
    if "dynamic" in name:
        assert ours.config.time_shift_type == "linear" and ours.config.base_image_seq_len == 256
    back = type(stock).from_config(ours.config)
    for key in {"shift", "flow_shift", "use_flow_sigmas", "prediction_type", "use_dynamic_shifting"} & type(stock)._get_init_keys(stock):
        assert back.config[key] == stock.config[key], key
    if wanted[0] == "ddpm":
        torch.testing.assert_close(back.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
        a = ours.coefficients(0.5)[0]
        assert a**2 == pytest.approx(stock.alphas_cumprod[500].item(), rel=1e-4)


def test_our_own_swap_for_a_stock_one():
    """Stock's schedulers read the shift and the kind of schedule from a configuration of ours."""
    config = FlowODEScheduler(shift=3.0).config
    dpm, euler = DPMSolverMultistepScheduler.from_config(config), FlowMatchEulerDiscreteScheduler.from_config(config)
    assert dpm.config.use_flow_sigmas and dpm.config.flow_shift == 3.0 and dpm.config.prediction_type == "flow_prediction"
    assert euler.config.shift == 3.0


def test_shifts_are_diffusers_own():
    """The same sigmas as FlowMatchEuler's for given ones: fixed, by mu both ways, with a terminal."""
    given = [1.0, 0.7, 0.45, 0.2]
    dynamic = {"use_dynamic_shifting": True}
    for options, mu in [
        ({"shift": 3.0}, None),
        (dynamic, 0.8),
        ({**dynamic, "time_shift_type": "linear"}, 1.7),
        ({"shift": 2.0, "shift_terminal": 0.1}, None),
        ({**dynamic, "shift_terminal": 0.1}, 0.8),
    ]:
        stock = FlowMatchEulerDiscreteScheduler(**options)
        stock.set_timesteps(sigmas=given, mu=mu)
        ours = FlowODEScheduler.from_config(stock.config)
        ours.set_timesteps(sigmas=given, mu=mu)
        torch.testing.assert_close(ours.sigmas.float(), stock.sigmas)
        torch.testing.assert_close(ours.timesteps, stock.timesteps)


@pytest.mark.parametrize("name", OWN.values())
def test_the_file_that_travels_stands_alone(name, tmp_path):
    """It imports torch and diffusers only, and gives the same points as the file here."""
    import ast
    import importlib.util

    text = bundle_module(ROOT / f"pipeline/export/runtime/{name}.py")
    heads = {alias.name.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for alias in n.names}
    heads |= {n.module.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level]
    assert heads <= {"torch", "diffusers", "math", "itertools", "typing"}
    assert ast.get_docstring(ast.parse(text)).startswith("Flow") and "Licence" in text
    (tmp_path / f"{name}_alone.py").write_text(text)
    spec = importlib.util.spec_from_file_location(f"{name}_alone", tmp_path / f"{name}_alone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = next(kind for kind, file in OWN.items() if file == name)
    x = drawn(getattr(module, kind)(), START, 4, generator=generator())
    assert torch.equal(
        x, drawn({"FlowODEScheduler": FlowODEScheduler, "FlowSDEScheduler": FlowSDEScheduler}[kind](), START, 4, generator=generator())
    )


# bad input


def planned(make=FlowODEScheduler, steps=3, **more):
    scheduler = make(**more)
    scheduler.set_timesteps(steps)
    return scheduler


def past_the_end():
    scheduler = planned(steps=1)
    scheduler.step(START, 1000, START)
    scheduler.step(START, 1000, START)


def inside_a_step():
    scheduler = planned(solver="heun")
    scheduler.set_begin_index(1)
    scheduler.step(START, scheduler.timesteps[1], START)


BAD = {
    "no step": (lambda: planned(steps=0), r"num_inference_steps=0.*at least one step"),
    "less": (lambda: planned(steps=-3), r"num_inference_steps=-3.*at least one step"),
    "nothing": (lambda: planned(steps=None), r"num_inference_steps=None"),
    "solver": (lambda: FlowODEScheduler("rk45"), r"solver='rk45' is unknown: choose one of euler"),
    "sde solver": (lambda: FlowSDEScheduler("heun"), r"solver='heun' is unknown: choose one of exponential"),
    "prediction": (lambda: FlowODEScheduler(prediction_type="noise"), r"prediction_type='noise' is unknown"),
    "path": (lambda: FlowSDEScheduler(path="ve"), r"path='ve' is unknown"),
    "shift": (lambda: FlowODEScheduler(shift=0.0), r"shift=0\.0"),
    "time shift": (lambda: FlowODEScheduler(time_shift_type="root"), r"'root'.*exponential or linear"),
    "scaled": (lambda: FlowODEScheduler(sigma_data=0.5), r"sigma_data=0\.5"),
    "table": (lambda: FlowODEScheduler(path="table", table=[[1, 0], [0, 1], [1, 1]]), r"four lists"),
    "no table": (lambda: FlowODEScheduler(path="table"), r"four lists"),
    "betas": (lambda: FlowODEScheduler(path="ddpm", trained_betas=[0.1]), r"trained_betas"),
    "beta of 1": (lambda: FlowODEScheduler(path="ddpm", trained_betas=[0.5] * 999 + [1.0]), r"inside \(0, 1\)"),
    "zero snr": (lambda: FlowSDEScheduler.from_config(DDIMScheduler(rescale_betas_zero_snr=True).config), r"rescale_betas_zero_snr"),
    "coefficient": (lambda: FlowSDEScheduler(sigma_t="root"), r"sigma_t='root'"),
    "negative": (lambda: FlowSDEScheduler(sigma_t=[1.0, -1.0]), r"sigma_t=\[1\.0, -1\.0\]"),
    "scale": (lambda: FlowSDEScheduler(sigma_scale=-1.0), r"times -1\.0"),
    "infinite": (lambda: planned(FlowSDEScheduler, solver="euler_maruyama", sigma_t="forward"), r"not finite at sigma=1"),
    "timestep": (lambda: planned().step(START, 999, START), r"timestep 999\.0 is not in the schedule, \[1000"),
    "unplanned": (lambda: FlowODEScheduler().step(START, 1000, START), r"call set_timesteps"),
    "unplanned index": (lambda: FlowSDEScheduler().index_for_timestep(1000), r"call set_timesteps"),
    "past the end": (past_the_end, r"call set_timesteps"),
    "inside a step": (inside_a_step, r"begin at a multiple of 2"),
    "rising": (lambda: FlowODEScheduler().set_timesteps(sigmas=[0.5, 0.6]), r"they fall"),
    "with the last": (lambda: FlowODEScheduler().set_timesteps(sigmas=[0.5, 0.0]), r"stay above 0, which is added"),
    "too loud": (lambda: FlowODEScheduler().set_timesteps(sigmas=[float("nan")]), r"they fall"),
    "both": (lambda: FlowODEScheduler().set_timesteps(sigmas=[0.5], timesteps=[500]), r"sigmas or timesteps"),
    "count": (lambda: FlowODEScheduler().set_timesteps(3, sigmas=[0.5]), r"num_inference_steps=3 and 1 levels"),
    "no mu": (lambda: planned(use_dynamic_shifting=True), r"pass mu"),
    "karras": (lambda: FlowODEScheduler.from_config(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config), r"use_karras_sigmas"),
    "shapes": (lambda: planned().step(START[:2], 1000, START), r"model_output \(2, 2\) and sample \(5, 2\) differ"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
