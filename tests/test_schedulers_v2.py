"""The second versions of our diffusers schedulers: orders to the end, two-step methods, log-probabilities, what strangers pass."""

import copy
import functools
import math
import types
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from test_schedulers import BAD as BAD_FIRST
from test_schedulers import BETAS, FIELD, MIXTURE, NAMED, START, WORDS, drawn, generator, predicted, table_of

from condot.pipeline import flow
from condot.pipeline.export.runtime import scheduling_flow_sde_v1 as file
from condot.pipeline.export.runtime.scheduling_flow_ode_v1 import FlowODEScheduler as FirstODE
from condot.pipeline.export.runtime.scheduling_flow_ode_v2 import FlowODEScheduler
from condot.pipeline.export.runtime.scheduling_flow_sde_v1 import FlowSDEScheduler as FirstSDE
from condot.pipeline.export.runtime.scheduling_flow_sde_v2 import FlowSDEScheduler
from condot.pipeline.flow import ODE_SOLVERS, PATHS, SDE_SOLVERS, CondOT, diffusion_coefficient, solve_then_denoise

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "multistep": 2, "dpmpp_2m": 2, "rk4": 4}
STEPS = {"euler": 80, "midpoint": 30, "heun": 30, "multistep": 60, "dpmpp_2m": 60, "rk4": 15}
LANDED = ("midpoint", "heun", "multistep", "rk4")
BOTH = pytest.mark.parametrize("make", [FlowODEScheduler, FlowSDEScheduler])


def path_of(name):
    return {"path": name, **NAMED[name]} if name in NAMED else table_of(name)


@functools.cache
def in_even_steps(solver, path, steps, end):
    """Drawn from data predictions, by equal steps of the noise's share from the first level to `end`, which is left out."""
    scheduler = FlowODEScheduler(solver, "sample", **path_of(path))
    top = scheduler._point(0.999 if path == "ddpm" else 1.0).frame
    return drawn(scheduler, START, path=path, sigmas=[scheduler._level(top + (end - top) * i / steps) for i in range(steps)])


# data predictions


@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "ddpm", "sub_vp"])
@pytest.mark.parametrize("solver", ORDERS)
def test_a_data_prediction_keeps_the_solvers_order(solver, path):
    """On every kind of path; sub-VP as a table. The first version's last interval is an Euler step, and it has order 1."""
    last = FlowODEScheduler(path="ddpm", trained_betas=BETAS)._point(0.0).frame if path == "ddpm" else 1e-3
    end = last if path == "ddpm" or solver not in ("euler", "dpmpp_2m") else 0.0
    exact = in_even_steps("rk4", path, 100, last)
    coarse, fine = ((in_even_steps(solver, path, n, end) - exact).norm() for n in (STEPS[solver], 2 * STEPS[solver]))
    assert abs(math.log2(coarse / fine) - ORDERS[solver]) < 0.35


def test_the_last_step_begins_at_a_thousandth_of_noise():
    """On VP, whose noise at sigma = 1e-3 is still a hundredth, later than there."""
    for path, sigma in (("condot", 1e-3), ("vp", 1e-5)):
        scheduler = FlowODEScheduler("heun", "sample", path)
        scheduler.set_timesteps(5)
        assert scheduler._points[-1].frame == pytest.approx(1e-3) and scheduler._points[-1].sigma == pytest.approx(sigma, rel=0.1)


def test_rk4_ends_a_data_prediction_where_it_ends_a_velocity():
    """In 10 steps to 1e-5, where the first version is out by 1e-2; nine more evaluations: two more steps, and the last."""
    exact = drawn(FlowODEScheduler("rk4", "velocity"), START, 200)
    second, first = (drawn(make("rk4", "sample"), START, 25) for make in (FlowODEScheduler, FirstODE))
    assert (second - exact).abs().max() < 5e-5 and (first - exact).abs().max() > 100 * (second - exact).abs().max()
    scheduler = FlowODEScheduler("rk4", "sample")
    scheduler.set_timesteps(25)
    assert len(scheduler.timesteps) == 109 and scheduler.timesteps[-1] == 1 and len(scheduler.sigmas) == 26


@pytest.mark.parametrize("solver", LANDED)
def test_a_data_prediction_is_followed_as_our_own_solver_does(solver):
    """On CondOT to 1e-11: inside to t = 1 - 1e-3 by steps that leave a quarter or more, then one to the prediction."""
    scheduler = FlowODEScheduler(solver, "sample", shift=1.7)
    end = drawn(scheduler, START, 9)
    ours = solve_then_denoise(ODE_SOLVERS[solver], FIELD, START, 1 - scheduler.sigmas, CondOT())
    torch.testing.assert_close(end, ours.x, rtol=1e-11, atol=1e-11)
    assert len(scheduler.timesteps) == ours.evaluations > 9 * scheduler.order + 1


@pytest.mark.parametrize("solver", LANDED)
def test_levels_below_a_thousandth_end_with_one_step(solver):
    """A caller's last level of 1e-3 or less is where the last step begins; none is put in below it."""
    for last in (1e-3, 4e-4):
        scheduler = FlowODEScheduler(solver, "sample")
        drawn(scheduler, START, sigmas=[1.0, 0.4, last])
        assert len(scheduler.timesteps) == 2 * scheduler.order + 1 and scheduler.timesteps[-1].item() == pytest.approx(1000 * last)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("path", ["ddpm", "ve", "edm"])
def test_paths_that_keep_noise_are_followed_to_their_end(path, kind):
    """To sigma = 0, then one evaluation more: on the data prediction there, as generate.py's `cleaned`."""
    scheduler, seen = FlowODEScheduler("heun", WORDS[kind], **path_of(path)), []
    end = drawn(scheduler, START, 5, path, step_callback=seen.append)
    a, b, _, _ = scheduler.coefficients(0.0)
    torch.testing.assert_close(end, MIXTURE.data(seen[-2], a, b), rtol=2e-6, atol=2e-6)
    assert len(scheduler.timesteps) == 11 and scheduler.timesteps[-1] == 0


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "flow_prediction"])
@pytest.mark.parametrize("solver", [name for name in ORDERS if name != "dpmpp_2m"])
def test_what_was_right_is_as_it_was(solver, kind):
    """Where the slope at the data is known the second version is the first, to the bit; and Euler's method always is."""
    kind = "sample" if solver == "euler" and kind == "epsilon" else kind
    assert torch.equal(drawn(FlowODEScheduler(solver, kind), START, 7), drawn(FirstODE(solver, kind), START, 7))


@pytest.mark.parametrize("solver", ["exponential", "euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("sigma_t", ["noise", [1.2, 1.0, 0.6, 0.0]], ids=str)
def test_older_sde_solvers_are_as_they_were(solver, sigma_t):
    ends = [drawn(make(solver, sigma_t, 0.9, "sample"), START, 6, generator=generator()) for make in (FlowSDEScheduler, FirstSDE)]
    assert torch.equal(*ends)


# two-step methods


def two_step_moments(path, sigma_t, steps, m=0.7, variance=0.25):
    """Mean and variance of the ends of a two-step exponential SDE on data N(m, variance): the recursion of the pair (x, z before).

    Written from the linear SDE `d(x / I) = z d(a / I) + noise`, I = b exp(-1/2 int sigma_t^2 / b^2), with dense quadrature.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    law = PATHS[path]()
    mean, cov = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    cov[0, 0], share_before = law(times[:1]).b.item() ** 2, None
    for k, (s, t) in enumerate(pairwise(times.tolist())):
        inside = torch.linspace(s, t, 20001, dtype=torch.float64)
        c = law(inside)
        a, b = c.a[0].item(), c.b[0].item()
        gain = a * variance / (a * a * variance + b * b)
        rate = {"zero": 0 * c.b, "noise": torch.ones_like(c.b), "constant": 1 / c.b**2}[sigma_t]
        rate = torch.zeros_like(rate) if k + 1 == steps else rate
        log = torch.cat([rate.new_zeros(1), torch.cumsum((rate[1:] + rate[:-1]) / 2 * inside.diff(), 0)]) / 2
        keep, share = torch.exp(log - log[-1]), c.a / torch.sqrt(c.a**2 + c.b**2)  # of the noise at each time, at t
        m_of = c.b[-1] * keep * c.a / c.b
        m_of[-1] = c.a[-1]
        of_x, of_z, ahead = c.b[-1].item() / b * keep[0].item(), (m_of[-1] - m_of[0]).item(), 0.0
        if share_before is not None:
            slope = (share - share[0]) / (share[0] - share_before)
            ahead = ((slope[1:] + slope[:-1]) / 2 * m_of.diff()).sum().item()
            kept = min(keep[0].item(), 1 - 1e-9)
            # one form of DPM-Solver++ by the other
            ahead *= (1 - kept) / 2 / (1 + (1 - kept) / math.log(kept)) if kept < 1 - 1e-5 else 1
        step = torch.tensor([[of_x + (of_z + ahead) * gain, -ahead], [gain, 0.0]], dtype=torch.float64)
        offset = m * (1 - gain * a)
        mean = step @ mean + torch.tensor([(of_z + ahead) * offset, offset], dtype=torch.float64)
        cov = step @ cov @ step.T
        cov[0, 0] += c.b[-1].item() ** 2 * (1 - keep[0].item() ** 2)
        share_before = share[0].item()
    return mean[0].item(), cov[0, 0].item()


def response(scheduler, path, steps, monkeypatch, m=0.7, variance=0.25):
    """Mean and variance of the ends on data N(m, variance), from the response to each draw."""
    gauss = oracles.gaussian([m], [[variance]])
    scheduler.set_timesteps(steps)
    x = torch.zeros(steps + 3, 1, dtype=torch.float64)
    x[1], count = 1, iter(range(2, steps + 3))

    def unit(shape, **more):
        one = torch.zeros(steps + 3, 1, dtype=torch.float64)
        one[next(count)] = 1
        return one

    monkeypatch.setattr(file, "randn_tensor", unit)
    for t, point in zip(scheduler.timesteps, scheduler._points, strict=True):
        a, b, _, _ = (part.item() for part in PATHS[path]()(torch.tensor(1 - point.sigma, dtype=torch.float64)))
        x = scheduler.step(gauss.data(x, a, b), t, scheduler.scale_model_input(x, t)).prev_sample
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize("sigma_t", ["zero", "noise", "constant"])
@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_the_two_step_sde_has_the_variance_of_its_recursion(path, sigma_t, monkeypatch):
    scheduler = FlowSDEScheduler("dpmpp_2m_sde", sigma_t, 1.0, "sample", path)
    torch.testing.assert_close(
        response(scheduler, path, 12, monkeypatch), two_step_moments(path, sigma_t, 12), rtol=2e-4 if path == "vp" else 2e-6, atol=1e-6
    )


@pytest.mark.parametrize("sigma_t", ["noise", "forward"])
@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_in_25_evaluations_two_steps_come_nearer_than_one(path, sigma_t, monkeypatch):
    """N(0.7, 0.5^2): the variance is out by 1 to 7 %, by one step by 12 to 34 %; half the step, a quarter of the error."""
    errors = {
        (solver, n): abs(response(FlowSDEScheduler(solver, sigma_t, 1.0, "sample", path), path, n, monkeypatch)[1] / 0.25 - 1)
        for solver, n in (("dpmpp_2m_sde", 25), ("dpmpp_2m_sde", 50), ("exponential", 25))
    }
    assert errors["dpmpp_2m_sde", 25] < 0.075 and errors["exponential", 25] > 0.11
    assert errors["dpmpp_2m_sde", 50] < 0.4 * errors["dpmpp_2m_sde", 25]


@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "ddpm", "sub_vp", "ve"])
def test_without_noise_the_two_step_sde_is_the_two_step_ode(path):
    ends = [
        drawn(make("dpmpp_2m" + end, prediction_type="epsilon", **more, **path_of(path)), START, 9, path)
        for make, end, more in ((FlowODEScheduler, "", {}), (FlowSDEScheduler, "_sde", {"sigma_t": "zero"}))
    ]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
@pytest.mark.parametrize("path", ["condot", "cosine", "vp", "ddpm"])
def test_two_step_methods_are_our_own(path, kind, monkeypatch):
    """With the same noise, on an uneven grid, for every coefficient; a path that keeps noise ends on the data prediction."""
    law, levels = PATHS[path](), [0.97, 0.8, 0.55, 0.3, 0.12, 0.05]
    times = 1 - torch.tensor([*levels, 0.0], dtype=torch.float64)
    field = MIXTURE.field(lambda t: tuple(part.item() for part in law(torch.tensor(t, dtype=torch.float64))))
    clean = (lambda x: x) if path != "ddpm" else (lambda x: flow.denoise(field, x, 1.0, law))
    end = drawn(FlowODEScheduler("dpmpp_2m", kind, **path_of(path)), START, path=path, sigmas=levels)
    torch.testing.assert_close(end, clean(ODE_SOLVERS["dpmpp_2m"](field, START, times, path=law).x), rtol=1e-9, atol=1e-9)
    draws = [torch.randn(START.shape, generator=generator(k), dtype=torch.float64) for k in range(9)]
    for sigma_t in ("noise", "forward", "constant"):
        queue = iter(draws)
        monkeypatch.setattr(file, "randn_tensor", lambda *args, queue=queue, **more: next(queue))
        end = drawn(FlowSDEScheduler("dpmpp_2m_sde", sigma_t, 0.9, kind, **path_of(path)), START, path=path, sigmas=levels)
        ours = SDE_SOLVERS["dpmpp_2m_sde"](field, START, times, law, diffusion_coefficient(sigma_t, 0.9), lambda k: draws[k]).x
        torch.testing.assert_close(end, clean(ours), rtol=1e-9, atol=1e-9)


def test_a_two_step_method_begun_in_the_middle_begins_with_one_step():
    scheduler, middle = FlowODEScheduler("dpmpp_2m", "velocity"), 0.5 * START
    for _ in range(2):  # the second time what was seen before is forgotten
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        out = predicted(scheduler, "velocity", middle, 0.5)
        x = scheduler.step(out, scheduler.timesteps[2], middle).prev_sample
        torch.testing.assert_close(x, middle + 0.25 * out)
        scheduler.step(out, scheduler.timesteps[3], x)


# log-probabilities


def policy(**more):
    scheduler = FlowSDEScheduler(**{"solver": "exponential", **more})
    scheduler.set_timesteps(4)
    return scheduler


@pytest.mark.parametrize("solver", ["exponential", "euler_maruyama", "dpmpp_2m_sde"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_with_its_logarithm_is_the_same_step_and_torchs_normal_law(solver, dtype):
    """Of what is returned, rounding included; asked again of that point, the same logarithm: a ratio of policies of exactly 1."""
    x, ends = START.to(dtype), []
    plain, told, again = (policy(solver=solver, prediction_type="sample", path="cosine") for _ in range(3))
    for t in plain.timesteps:
        out = torch.tanh(x)
        draw = generator(3)
        ends.append(plain.step(out, t, x, generator=generator(3)).prev_sample)
        step = told.step(out, t, x, generator=draw, return_log_prob=True)
        assert torch.equal(step.prev_sample, ends[-1]) and step.prev_sample.dtype == dtype and step.log_prob.dtype == torch.float64
        known = again.step(out, t, x, prev_sample=step.prev_sample, return_dict=False)
        assert (
            torch.equal(known[1], step.log_prob)
            and torch.equal(known[0], step.prev_sample)
            and torch.equal(known[2], step.prev_sample_mean)
        )
        if step.std:
            law = torch.distributions.Normal(step.prev_sample_mean.double(), step.std.double())
            xi = torch.randn(START.shape, generator=generator(3), dtype=step.prev_sample_mean.dtype)
            torch.testing.assert_close((step.prev_sample_mean + step.std * xi).to(dtype), step.prev_sample, rtol=1e-2, atol=1e-6)
            torch.testing.assert_close(step.log_prob, law.log_prob(step.prev_sample.double()).sum(1), rtol=1e-5, atol=1e-5)
        else:
            assert step.log_prob.tolist() == [0] * 5 and torch.equal(step.prev_sample_mean.to(dtype), step.prev_sample)
        x = step.prev_sample
    assert told.step_index == again.step_index == plain.step_index == 4 and not step.std


def test_the_gradient_of_the_logarithm_is_that_of_reinforce():
    """E[grad log p] = 0 over draws, and d log p / d mean = (x - mean) / std^2; the point itself is taken as given."""
    scheduler, x = policy(), torch.zeros(200_000, 1, dtype=torch.float64)
    out = torch.full_like(x, 0.3, requires_grad=True)
    step = scheduler.step(out, scheduler.timesteps[0], x, generator=generator(), return_log_prob=True)
    (grad,) = torch.autograd.grad(step.log_prob.sum(), out)
    move = scheduler._moves[0]
    by_hand = move.of_slope * (step.prev_sample - step.prev_sample_mean) / step.std**2
    torch.testing.assert_close(grad, by_hand.detach(), rtol=1e-5, atol=1e-6)
    assert abs(grad.mean()) < 4 * grad.std() / math.sqrt(len(grad)) and grad.std() > 0.1


def test_steps_may_be_asked_out_of_turn():
    """As minibatches of a policy's update do, by `set_begin_index`; the sum over a trajectory is flow's."""
    scheduler, x, points, asked = policy(), START, [START], []
    for t, point in zip(scheduler.timesteps, list(scheduler._points), strict=True):
        step = scheduler.step(predicted(scheduler, "flow_prediction", x, point.sigma), t, x, generator(4), return_log_prob=True)
        asked.append(step.log_prob)
        points.append(x := step.prev_sample)
    for k in (2, 0, 3, 1):
        scheduler.set_begin_index(k)
        out = predicted(scheduler, "flow_prediction", points[k], scheduler._points[k].sigma)
        again = scheduler.step(out, scheduler.timesteps[k], points[k], prev_sample=points[k + 1])
        assert torch.equal(again.log_prob, asked[k])
    ours = flow.trajectory_log_prob(FIELD, points, 1 - scheduler.sigmas, CondOT(), diffusion_coefficient("noise"))
    torch.testing.assert_close(torch.stack(asked), ours, rtol=1e-6, atol=1e-6)
    two = policy(solver="dpmpp_2m_sde")
    two.set_begin_index(2)
    with pytest.raises(ValueError, match="looks back on the step before"):
        two.step(START, two.timesteps[2], START, prev_sample=START)


def test_the_example_of_the_docs_runs_and_raises_the_reward():
    """docs/export.md's loop on a network of one number: at first every ratio is 1, and the gradient leads to the reward."""
    text = (ROOT / "docs/export.md").read_text().split("**Reinforcement learning**")[1].split("```python\n")[1].split("```")[0]
    theta, ratios = torch.zeros((), requires_grad=True), []
    names = {
        "torch": torch, "shape": (1, 2, 2), "reward": lambda x: x.mean((1, 2, 3)), "network": lambda x, t: theta + 0.1 * x,
        "pipe": types.SimpleNamespace(FlowSDEScheduler=FlowSDEScheduler, scheduler=FlowODEScheduler("heun")),
    }  # fmt: skip
    torch.manual_seed(0)
    exec(text.replace("    loss.backward()", "    loss.backward()\n    ratios.append(ratio)"), {**names, "ratios": ratios})
    assert len(ratios) == 9 and all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios)
    assert theta.grad > 0, "noise - data is to fall"


def test_what_has_no_logarithm_is_refused():
    for more, message in [({"solver": "stochastic_heun"}, "its steps are not normal"), ({"sigma_t": "zero"}, "no step draws anything")]:
        scheduler = policy(**more)
        with pytest.raises(ValueError, match=message):
            scheduler.step(START, 1000, START, return_log_prob=True)
    with pytest.raises(ValueError, match="nothing is drawn where the point is given"):
        policy().step(START, 1000, START, generator(), prev_sample=START)
    with pytest.raises(ValueError, match=r"prev_sample \(2, 2\): of the shape of sample, \(5, 2\)"):
        policy().step(START, 1000, START, prev_sample=START[:2])


# what strangers pass


@BOTH
@pytest.mark.parametrize("count", [np.int64(4), np.int32(4), torch.tensor(4), torch.tensor([4])[0]])
def test_whole_numbers_of_any_library_are_steps(make, count):
    scheduler = make()
    scheduler.set_timesteps(count)
    assert scheduler.num_inference_steps == 4 and type(scheduler.num_inference_steps) is int
    scheduler.set_begin_index(np.int64(0))
    for given in (np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), (1, 0.5)):
        scheduler.set_timesteps(sigmas=given)
        assert scheduler.sigmas.tolist() == [1, 0.5, 0]
    scheduler.set_timesteps(timesteps=torch.tensor([900, 300]))
    assert scheduler.index_for_timestep(np.float64(900.0)) == 0 and scheduler.index_for_timestep(torch.full((3,), 300.0)) == 1


@BOTH
def test_more_steps_than_timesteps_and_planning_twice(make):
    """2,500 steps are as many; the second plan stands alone: the same end as of a new scheduler."""
    used, new = make(), make()
    used.set_timesteps(2500)
    assert len(used.timesteps) == 2500 and len(set(used.timesteps.tolist())) == 2500
    x = used.step(START, used.timesteps[0], START, generator=generator()).prev_sample
    used.step(START, used.timesteps[1], x, generator=generator())
    assert torch.equal(drawn(used, START, 5, generator=generator()), drawn(new, START, 5, generator=generator()))


def test_a_copy_goes_on_where_the_original_stands():
    """Half-way, with its generator: both end alike."""
    scheduler = FlowSDEScheduler()
    scheduler.generator = generator()
    scheduler.set_timesteps(4)
    x = START
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    twin, ends = copy.deepcopy(scheduler), []
    for one in (scheduler, twin):
        y = x
        for t in scheduler.timesteps[2:]:
            y = one.step(torch.tanh(y), t, y).prev_sample
        ends.append(y)
    assert torch.equal(*ends)


def test_configurations_of_arrays_are_saved(tmp_path):
    """Tables, betas and coefficients as tensors and arrays; numbers of numpy's."""
    rows = torch.tensor(table_of("sub_vp")["table"])
    one = FlowSDEScheduler(sigma_t=np.linspace(1, 0, 5), sigma_scale=np.float32(0.5), path="table", table=rows, shift=np.float64(2))
    one.save_pretrained(tmp_path / "one")
    again = FlowSDEScheduler.from_pretrained(tmp_path / "one")
    assert again.config.sigma_t == [1, 0.75, 0.5, 0.25, 0] and again.config.shift == 2 and again.config.table == rows.tolist()
    ends = [drawn(s, START, 4, "sub_vp", generator=generator()) for s in (one, again)]
    assert torch.equal(*ends)
    two = FlowODEScheduler(path="ddpm", trained_betas=torch.tensor(BETAS, dtype=torch.float64))
    two.save_pretrained(tmp_path / "two")
    assert FlowODEScheduler.from_pretrained(tmp_path / "two").config.trained_betas == BETAS


@pytest.mark.parametrize("name", [name for name in PATHS if not name.startswith("ddpm")])
def test_every_path_of_ours_is_a_table(name):
    FlowODEScheduler(**table_of(name)) if name != "vp" else FlowODEScheduler(path="vp")


def test_image_to_image_at_full_strength_is_not_made_loud_twice():
    """VE begins on noise 50 times as loud: what scale_noise mixed begins as it is, whether `set_begin_index(0)` was called or not."""
    for called in (True, False):
        scheduler = FlowODEScheduler("euler", "epsilon", **table_of("ve"))
        scheduler.set_timesteps(5)
        if called:
            scheduler.set_begin_index(0)
        x = scheduler.scale_noise(torch.zeros_like(START), scheduler.timesteps[:1], START)
        shown = scheduler.scale_model_input(x, scheduler.timesteps[0])
        torch.testing.assert_close(shown, scheduler._loudness * x)
        for t, point in zip(scheduler.timesteps, scheduler._points, strict=True):
            x = scheduler.scale_model_input(x, t)
            x = scheduler.step(predicted(scheduler, "epsilon", x, point.sigma, "ve"), t, x).prev_sample
        torch.testing.assert_close(x, drawn(FlowODEScheduler("euler", "epsilon", **table_of("ve")), START, 5, "ve"), rtol=1e-5, atol=1e-5)


def test_a_generator_for_each_sample():
    """A tuple of them as a list; each sample depends on its own alone."""

    def five():
        return [generator(k) for k in range(5)]

    ends = [drawn(FlowSDEScheduler(), START, 3, generator=kind(five())) for kind in (list, tuple)]
    alone = drawn(FlowSDEScheduler(), START[2:3], 3, generator=[generator(2)])
    assert torch.equal(*ends) and torch.equal(ends[0][2:3], alone)


def test_a_mu_of_zero_is_one():
    """exp(0) = 1: no shift; by `linear` it would put every sigma at 0, and is refused."""
    scheduler = FlowODEScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(4, mu=0)
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_versions_read_each_others_configurations():
    """Forth and back, and from stock: the solver is kept where it is known, else the other's default stands in."""
    first = FirstODE("heun", "epsilon", "cosine", shift=3.0)
    second = FlowODEScheduler.from_config(first.config)
    assert (second.config.solver, second.config.prediction_type, second.config.path, second.config.shift) == (
        "heun",
        "epsilon",
        "cosine",
        3.0,
    )
    sde = FlowSDEScheduler.from_config(first.config, sigma_t="constant")
    assert (sde.config.solver, sde.config.path) == ("dpmpp_2m_sde", "cosine")
    assert FlowODEScheduler.from_config(sde.config).config.solver == "heun"
    back = FirstODE.from_config(FlowODEScheduler(path="vp").config)
    assert (back.config.solver, back.config.path) == ("euler", "vp")
    assert FirstSDE.from_config(FlowSDEScheduler("euler_maruyama", [1.0, 0.0]).config).config.sigma_t == [1.0, 0.0]
    for stock, path in ((FlowMatchEulerDiscreteScheduler(), "condot"), (DDIMScheduler(), "ddpm"), (DPMSolverMultistepScheduler(), "ddpm")):
        found = FlowODEScheduler.from_config(stock.config)
        assert (found.config.solver, found.config.path) == ("dpmpp_2m", path)


def planned(make=FlowODEScheduler, steps=3, how=None, **more):
    scheduler = make(**more)
    scheduler.set_timesteps(**how) if how else scheduler.set_timesteps(steps)
    return scheduler


def ode(**how):
    return lambda: planned(how=how)


def sde(draw):
    return lambda: planned(FlowSDEScheduler).step(START, 1000, START, generator=draw)


def other_shape():
    scheduler = planned()
    scheduler.step(START, 1000, START)
    scheduler.step(START[:2], scheduler.timesteps[1], START[:2])


BAD = {
    "sigma above 1": (ode(sigmas=[1.2, 0.5]), r"sigmas=\[1\.2, 0\.5\]: they fall, from 1 at most, and stay above 0"),
    "infinite sigma": (ode(sigmas=[math.inf, 0.5]), r"sigmas=\[inf, 0\.5\]: they fall"),
    "sigma of nothing": (ode(sigmas=[0.5, math.nan]), r"sigmas=\[0\.5, nan\]: they fall"),
    "negative sigma": (ode(sigmas=[0.5, -0.1]), r"stay above 0"),
    "no sigmas": (ode(sigmas=[]), r"0 levels: at least one step"),
    "one number": (ode(sigmas=0.5), r"sigmas=0\.5: a list of numbers"),
    "words": (ode(sigmas=["high"]), r"sigmas=\['high'\]: a list of numbers"),
    "timestep beyond": (ode(timesteps=[1200, 500]), r"timesteps=\[1200\.0, 500\.0\]: they fall, from 1000 at most"),
    "timestep 0": (ode(timesteps=[500, 0]), r"stay above 0"),
    "timestep of nothing": (ode(timesteps=[math.nan]), r"timesteps=\[nan\]"),
    "two at the top": (
        lambda: planned(prediction_type="epsilon", how={"sigmas": [1.0, 0.9995, 0.5]}), r"at most one lies at or above 0\.999, the first"
    ),
    "3.7 steps": (ode(num_inference_steps=3.7), r"num_inference_steps=3\.7: a whole number, at least one step"),
    "25.0 steps": (ode(num_inference_steps=25.0), r"num_inference_steps=25\.0: a whole number"),
    "steps in words": (ode(num_inference_steps="25"), r"num_inference_steps='25': a whole number"),
    "true steps": (ode(num_inference_steps=True), r"num_inference_steps=True: a whole number"),
    "no shift": (lambda: planned(how={"num_inference_steps": 3, "mu": 0}, use_dynamic_shifting=True, time_shift_type="linear"), r"mu=0\.0"),
    "mu of nothing": (lambda: planned(how={"num_inference_steps": 3, "mu": math.nan}, use_dynamic_shifting=True), r"mu=nan"),
    "begins before": (lambda: planned().set_begin_index(-1), r"begin_index=-1: no step begins there"),
    "begins beyond": (lambda: planned().set_begin_index(3), r"begin_index=3: no step begins there"),
    "begins inside": (lambda: planned(solver="heun").set_begin_index(1), r"begin at a multiple of 2"),
    "begins in words": (lambda: planned().set_begin_index("0"), r"begin_index='0': a whole number"),
    "two timesteps": (lambda: planned().step(START, torch.tensor([1000.0, 500.0]), START), r"one for all samples"),
    "an output object": (lambda: planned().step({"sample": START}, 1000, START), r"model_output is a dict: pass a tensor"),
    "another shape": (other_shape, r"sample \(2, 2\) after \(5, 2\): one run has one shape"),
    "few generators": (sde([generator(0), generator(1)]), r"generator: 2 of type Generator for 5 samples"),
    "many generators": (sde([generator(k) for k in range(6)]), r"generator: 6 of type Generator for 5 samples"),
    "no generators": (sde([]), r"generator: 0 of type none for 5 samples"),
    "a seed": (sde(5), r"generator: 1 of type int"),
    "a bare coefficient": (lambda: FlowSDEScheduler(sigma_t=0.5), r"sigma_t=0\.5.*give sigma_t='constant', sigma_scale=c"),
    "coefficient of nothing": (lambda: FlowSDEScheduler(sigma_t=[1.0, math.nan]), r"sigma_t=\[1\.0, nan\]"),
    "scale of nothing": (lambda: FlowSDEScheduler(sigma_scale=math.nan), r"times nan"),
    "no timesteps": (lambda: FlowODEScheduler(num_train_timesteps=0), r"num_train_timesteps=0"),
    "shift of nothing": (lambda: FlowODEScheduler(shift=math.nan), r"shift=nan"),
    "shift in words": (lambda: FlowODEScheduler(shift="3"), r"shift='3'"),
    "terminal": (lambda: FlowODEScheduler(shift_terminal=1.0), r"shift_terminal=1\.0"),
    "range": (lambda: FlowODEScheduler(clip_sample=True, clip_sample_range=0), r"clip_sample_range=0"),
    "scaled by nothing": (lambda: FlowODEScheduler(prediction_type="sample", sigma_data=math.nan), r"sigma_data=nan"),
    "rates": (lambda: FlowODEScheduler(path="vp", rates=(0.1, -3.0)), r"rates=\[0\.1, -3\.0\]"),
    "one rate": (lambda: FlowODEScheduler(path="vp", rates=0.1), r"rates=0\.1"),
    "betas of nothing": (lambda: FlowODEScheduler(path="ddpm", trained_betas=[math.nan] * 1000), r"trained_betas: it holds"),
    "table of nothing": (lambda: FlowODEScheduler(path="table", table=[[1, 0], [0, math.nan], [1, 1], [1, 1]]), r"table: it holds"),
    "table that falls": (lambda: FlowODEScheduler(path="table", table=[[0, 1], [1, 0], [1, 1], [1, 1]]), r"does not rise"),
    "noise of another shape": (lambda: planned().scale_noise(START, 500, START[:2]), r"noise of the sample's shape"),
    "timesteps for another batch": (lambda: planned().scale_noise(START, torch.tensor([1.0, 2.0]), START), r"2 timesteps"),
    "noise beyond the path": (lambda: planned().add_noise(START, START, torch.tensor([1200])), r"timesteps \[1200\]: from 0, the data"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_FIRST)
def test_what_the_first_version_refuses_the_second_refuses_too(case, monkeypatch):
    import test_schedulers

    monkeypatch.setattr(test_schedulers, "FlowODEScheduler", FlowODEScheduler)
    monkeypatch.setattr(test_schedulers, "FlowSDEScheduler", FlowSDEScheduler)
    monkeypatch.setattr(test_schedulers, "planned", planned)
    call, message = BAD_FIRST[case]
    with pytest.raises(ValueError, match=message.split(": choose one of")[0]):
        call()


def test_what_lies_between_the_first_known_level_and_1_is_moved_there():
    scheduler = planned(prediction_type="epsilon", how={"sigmas": [1.0, 0.5]})
    assert scheduler.sigmas.tolist() == [0.999, 0.5, 0]
    assert planned(prediction_type="epsilon", how={"timesteps": [999.5, 10]}).sigmas.tolist() == [0.999, 0.01, 0]
