"""Two-step exponential integrators: diffusers' own coefficients, orders, exact variances; churn by the paper's algorithm; plain SDEs."""

import math

import oracles
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from sampling import stream
from test_sde import moments

from condot.pipeline.flow import (
    EDM,
    PATHS,
    CondOT,
    convert,
    denoise,
    diffusion_coefficient,
    dpmpp_2m,
    dpmpp_2m_sde,
    edm_sampler,
    exponential,
    heun,
    log_snr_grid,
    scale_initial_noise,
    simulate_sde,
    time_grid,
    uniform_grid,
    velocity_field,
    widen,
)
from condot.pipeline.flow.dpm_solver import HALF_LOG_SNR, extrapolation_weights
from condot.pipeline.flow.sde import exponential_coefficients, integrate_steps

MIXTURE = oracles.three()
FIELD = MIXTURE.field(oracles.condot)
START = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
GAUSS = oracles.gaussian([0.7], [[0.25]])


def by_diffusers(algorithm: str, solver_type: str, sigmas: torch.Tensor) -> torch.Tensor:
    """diffusers' multistep scheduler on its flow path, stepped through sigmas of ours with the same noise, in single precision."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_type=solver_type, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.float()
    scheduler.timesteps = (1000 * sigmas[:-1]).float()
    x, noise = START.float() * sigmas[0].item(), stream(4, 16)
    for k, timestep in enumerate(scheduler.timesteps):
        t = 1 - sigmas[k].item()
        velocity = MIXTURE.velocity(x.double(), t, 1 - t, 1.0, -1.0).float()
        x = scheduler.step(-velocity, timestep, x, variance_noise=noise(k).float(), return_dict=False)[0]
    return x


@pytest.mark.parametrize(("algorithm", "sigma"), [("dpmsolver++", "zero"), ("sde-dpmsolver++", "forward")])
def test_on_the_log_snr_clock_the_coefficients_are_those_of_diffusers(algorithm, sigma):
    """DPM-Solver++(2M) and SDE-DPM-Solver++(2M), solver_type="heun", on one grid with one noise; "midpoint" is near."""
    times, path = uniform_grid(20, 0.02, 1.0), CondOT()
    chosen = diffusion_coefficient(sigma)
    plan, weights = exponential_coefficients(path, times, chosen), extrapolation_weights(path, times, chosen, HALF_LOG_SNR)
    ours = integrate_steps(plan, FIELD, START * (1 - times[0]), times, path, stream(4, 16), None, weights).x
    theirs = by_diffusers(algorithm, "heun", 1 - times)
    torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=2e-5)
    assert (by_diffusers(algorithm, "midpoint", 1 - times) - ours).abs().max() > 1e-3


def test_both_clocks_agree_to_second_order():
    """The signal's share or the log signal-to-noise ratio: the weights fall as h, their difference as h^2."""
    far = []
    for n in (160, 320):
        times, none = uniform_grid(n, 0.2, 0.8), diffusion_coefficient("forward")
        a, b = (extrapolation_weights(CondOT(), times, none, *variable) for variable in ((), (HALF_LOG_SNR,)))
        far.append(((a - b)[1:-1].abs().max().item(), b[1:-1].abs().max().item()))
    assert abs(math.log2(far[0][0] / far[1][0]) - 2) < 0.2 and abs(math.log2(far[0][1] / far[1][1]) - 1) < 0.2


@pytest.mark.parametrize("sigma", ["constant", "noise", "forward"])
def test_weights_are_the_integral_they_stand_for(sigma):
    """w (tau_s - tau_before) = integral of (tau - tau_s) dm, by 20,000 trapezoids; m = beta_t keep alpha / beta."""
    chosen, path, times = diffusion_coefficient(sigma), PATHS["cosine"](), torch.tensor([0.1, 0.3, 0.55, 0.7, 0.9], dtype=torch.float64)
    weights = extrapolation_weights(path, times, chosen)
    for k in (1, 2):
        r = torch.linspace(times[k], times[k + 1], 20_001, dtype=torch.float64)
        c = path(r)
        rate = (chosen(r, c) / c.b) ** 2 / 2
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(rate, r)])
        m = c.b[-1] * torch.exp(lost - lost[-1]) * c.a / c.b
        tau = c.a  # cosine: alpha^2 + beta^2 = 1
        wanted = torch.trapezoid(tau - tau[0], m) / (tau[0] - path(times[k - 1]).a)
        torch.testing.assert_close(weights[k], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "ve", "ddpm"])
def test_unit_gaussian_data_are_solved_exactly_after_the_first_step(name):
    """z is linear in the signal's share along the ODE of N(m, 1): from exact points at two times the rest is exact."""
    path, law = PATHS[name](), oracles.gaussian([0.7], [[1.0]])
    times = torch.tensor([0.2, 0.35, 0.6, 0.9], dtype=torch.float64)
    c = path(times)
    spread = torch.sqrt(c.a**2 + c.b**2)
    points = c.a[:, None] * 0.7 + spread[:, None] * torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64)  # one quantile each
    field = law.field(lambda t: tuple(v.item() for v in path(torch.tensor(t, dtype=torch.float64))))
    first = lambda x, t: points[1][:, None] if t == times[1].item() else x  # noqa: E731
    end = dpmpp_2m(field, points[0][:, None], times, path=path, step_callback=first).x[:, 0]
    torch.testing.assert_close(end, points[-1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sigma", ["zero", "noise", "constant", "forward"])
@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "ddpm"])
def test_variance_of_the_sde_in_25_evaluations(name, sigma):
    """N(0.7, 0.5^2), exactly: within 8 % where one step of the exponential form misses 11 to 34 %; the mean too."""
    oracles.BY_HAND.setdefault("ddpm", lambda t: tuple(v.item() for v in PATHS["ddpm"]()(torch.tensor(t, dtype=torch.float64))))
    missed = {}
    for solver in (exponential, dpmpp_2m_sde):
        mean, variance = denoised_moments(solver, name, 25, diffusion_coefficient(sigma))
        missed[solver] = abs(variance / 0.25 - 1)
        assert abs(mean - 0.7) < 0.02
    assert missed[dpmpp_2m_sde] < min(0.08, missed[exponential] / 2.4) and 0.1 < missed[exponential] < 0.35


@pytest.mark.parametrize(("sigma", "scale"), [("constant", 1.0), ("constant", 2.0), ("constant", 4.0), ((0.0, 2.0), 1.0), ("forward", 2.0)])
@pytest.mark.parametrize("name", ["condot", "vp"])
def test_more_steps_come_nearer_where_all_noise_is_renewed(name, sigma, scale):
    """A coefficient that stays up as beta falls: a whole extrapolation carried jumps on, 4 times the variance at `constant` 4."""
    errors = [denoised_moments(dpmpp_2m_sde, name, steps, diffusion_coefficient(sigma, scale))[1] / 0.25 - 1 for steps in (25, 100, 400)]
    assert all(-0.3 < error < 0.01 for error in errors) and abs(errors[1]) < abs(errors[0]) / 1.9 and abs(errors[2]) < abs(errors[1]) / 1.9


def denoised_moments(solver, name, steps, sigma):
    """Mean and variance of N(0.7, 0.25) after a solver, and after `denoise` where the path ends on noise; as `moments` of test_sde."""
    path, field = PATHS[name](), GAUSS.field(oracles.BY_HAND[name])
    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x[1] = path(torch.zeros(1, dtype=torch.float64)).b
    unit = lambda k: torch.eye(steps + 2, dtype=torch.float64)[:, k + 2 : k + 3]  # noqa: E731
    end = solver(field, x, uniform_grid(steps), path, sigma, unit).x
    end = denoise(field, end, 1.0, path) if path(torch.ones(1)).b > 1e-6 else end
    return end[0, 0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize("sigma", ["zero", "noise", "callable"])
def test_weak_order_two(sigma):
    """The errors of mean and variance on a normal law fall as h^2, exactly; those of `exponential` as h."""
    chosen = diffusion_coefficient(sigma) if sigma != "callable" else lambda t, c: 1.5 * torch.sqrt(c.a * c.b)
    errors = [abs(moments(dpmpp_2m_sde, "condot", steps, chosen)[1] - 0.3) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) > 1.8 and errors[1] < 1e-3


@pytest.mark.parametrize("name", ["condot", "cosine", "vp", "sub_vp", "ddpm"])
def test_order_two_of_the_ode_with_a_data_prediction(name):
    path = PATHS[name]()
    field = velocity_field(lambda x, t: MIXTURE.data(x, *(v.item() for v in path(t[:1])[:2])), path, "data")
    x = scale_initial_noise(path, START)
    ends = [dpmpp_2m(field, x, uniform_grid(n), path=path).x for n in (320, 640, 1280)]
    # of order 2, each difference is a quarter of the one before
    assert abs(math.log2((ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm()) - 2) < 0.3


def test_the_ode_evaluates_once_a_step_and_never_at_the_end():
    seen = []
    end = dpmpp_2m(lambda x, t: seen.append(t[0].item()) or FIELD(x, t), START, uniform_grid(9))
    assert end.evaluations == len(seen) == 9 and max(seen) < 1


# a grid even in the log signal-to-noise ratio


def test_log_snr_grid_is_even_in_it():
    times = log_snr_grid(12, CondOT(), 0.05, 20.0)
    levels = CondOT().log_snr(times[1:-1])
    torch.testing.assert_close(levels.diff(), torch.full((10,), 2 * math.log(400) / 12, dtype=torch.float64))
    torch.testing.assert_close(time_grid("log_snr", 9, path=PATHS["ve"](), start=0.2, end=0.7).diff(), uniform_grid(9, 0.2, 0.7).diff()[:9])


# churn


def algorithm_2(denoiser, x, sigmas, churn, low, high, s_noise, noise):
    """Karras et al., algorithm 2, line by line: sigmas end with 0."""
    n = len(sigmas) - 1
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= sigmas[i] <= high else 0.0
        hat = sigmas[i] + gamma * sigmas[i]
        if gamma > 0:
            x = x + math.sqrt(hat**2 - sigmas[i] ** 2) * s_noise * noise(i)
        d = (x - denoiser(x, hat)) / hat
        ahead = x + (sigmas[i + 1] - hat) * d
        if sigmas[i + 1] != 0:
            x = x + (sigmas[i + 1] - hat) * (d / 2 + (ahead - denoiser(ahead, sigmas[i + 1])) / sigmas[i + 1] / 2)
        else:
            x = ahead
    return x


@pytest.mark.parametrize("name", ["edm", "condot", "vp", "cosine"])
def test_churn_is_algorithm_2_of_karras_on_any_path(name):
    """EDM's own path, and others by x / alpha: the levels of their grids, clean in the end, with the same noise."""
    path = PATHS[name]()
    denoiser = lambda x, sigma: MIXTURE.data(x, 1.0, sigma)  # noqa: E731
    field = velocity_field(lambda x, t: MIXTURE.data(x, *(v.item() for v in path(t[:1])[:2])), path, "data")
    times = uniform_grid(12, 0.1, 1.0)
    c = path(times)
    sigmas = (c.b / c.a).tolist()
    start = START * c.b[0]
    how = {"s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.003}
    churn, ends_noisy = 6.0, sigmas[-1] > 0
    levels = [*sigmas, 0.0] if ends_noisy else sigmas
    theirs = algorithm_2(denoiser, start / c.a[0], levels, churn * len(levels[1:]) / 12, *how.values(), stream(5, 16))
    found = edm_sampler(field, start, times, path, stream(5, 16), s_churn=churn, **how)
    ours = denoise(field, found.x, 1.0, path) if ends_noisy else found.x
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert found.evaluations == (24 if ends_noisy else 23)


@pytest.mark.parametrize("name", ["condot", "vp"])
def test_churn_keeps_the_marginals_of_a_gaussian(name):
    """Mean and variance of N(0.7, 0.3) from t = 0, exactly, by the response to each step's noise; and S_noise = 1.1 does not keep them."""

    def solver(field, x, times, path, sigma, noise, s_noise=1.0):
        return edm_sampler(field, x, times, path, noise, s_churn=40.0, s_noise=s_noise)

    mean, variance = moments(solver, name, 200, None)
    assert abs(mean - 0.7) < 0.01 and abs(variance - 0.3) < 0.004
    swollen = moments(lambda *a: solver(*a, s_noise=1.1), name, 200, None)[1]
    assert swollen > variance * 1.05


def test_churn_forgets_the_start_and_none_is_heun_in_sigma():
    still = edm_sampler(FIELD, START, uniform_grid(400), CondOT(), None, s_churn=0.0)
    torch.testing.assert_close(still.x, heun(FIELD, START, uniform_grid(400)).x, rtol=0, atol=5e-3)
    x, quiet = torch.tensor([[0.0], [1.0]], dtype=torch.float64), lambda k: torch.zeros(2, 1, dtype=torch.float64)
    field = GAUSS.field(oracles.condot)
    left = [(e[1] - e[0]).item() for e in (edm_sampler(field, x, uniform_grid(100), CondOT(), quiet, s_churn=s).x for s in (0.0, 20.0))]
    assert abs(left[0] - 0.5) < 0.01 and left[1] < 0.9 * left[0]


def test_churn_never_leaves_the_levels_of_its_path():
    seen = []
    edm_sampler(lambda x, t: seen.append(t[0].item()) or -x, START, uniform_grid(5), EDM(), stream(6, 16), s_churn=100.0)
    assert min(seen) >= 0


# plain SDEs


def test_ornstein_uhlenbeck_process():
    """dX = -theta X dt + sigma dW: mean exp(-theta) x0, variance sigma^2 (1 - exp(-2 theta)) / (2 theta), both up to O(1 / n)."""
    theta, sigma, off = 1.5, 0.8, []
    for n in (200, 400):
        x = torch.zeros(n + 2, 1, dtype=torch.float64)
        x[:, 0] = 2.0
        x[1] = 3.0
        unit = lambda k, n=n: torch.eye(n + 2, dtype=torch.float64)[:, k + 2 : k + 3]  # noqa: E731
        found = simulate_sde(lambda x, t: -theta * x, x, uniform_grid(n), lambda t: torch.full_like(t, sigma), unit)
        assert found.evaluations == n
        psi = (found.x[1] - found.x[0]).item()
        variance = (found.x[2:, 0] - found.x[0]).square().sum().item()
        off.append((psi - math.exp(-theta), found.x[0].item() - 2 * math.exp(-theta), variance - sigma**2 * (1 - math.exp(-3)) / 3))
    for coarse, fine in zip(*off, strict=True):
        assert abs(coarse) < 0.01 and abs(coarse / fine - 2) < 0.05


def test_without_noise_a_plain_sde_is_eulers_and_with_a_flows_drift_it_leaves_the_marginals():
    still = simulate_sde(FIELD, START, uniform_grid(9), torch.zeros_like, None).x
    torch.testing.assert_close(still, euler_by_ddim(9))
    wide = moments(lambda f, x, t, p, s, noise: simulate_sde(f, x, t, torch.ones_like, noise), "condot", 200, None)[1]
    assert wide > 1.3 * 0.3  # the score term is what would have kept it at 0.3


def euler_by_ddim(n):
    return exponential(FIELD, START, uniform_grid(n), CondOT(), diffusion_coefficient("zero"), None).x


# coefficients of the caller


def test_a_table_of_values_is_linear_between_them_and_keeps_the_marginals():
    table = diffusion_coefficient((1.0, 0.5, 0.0), 2.0)
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(table(t, CondOT()(t)), torch.tensor([2.0, 1.5, 1.0, 0.2, 0.0], dtype=torch.float64))
    same = [moments(dpmpp_2m_sde, "condot", 50, chosen) for chosen in (table, lambda t, c: 2 - 2 * t, diffusion_coefficient("noise", 2.0))]
    for found in same[:2]:
        assert found == pytest.approx(same[2], abs=1e-9)


def test_a_learned_score_of_twice_the_size_is_seen():
    def pair(x, t):
        v = FIELD(x, t)
        return v, 2 * convert(v, "velocity", "score", x, CondOT()(widen(t, x)))

    ends = [dpmpp_2m_sde(f, START, uniform_grid(9), CondOT(), diffusion_coefficient("noise"), stream(2, 16)).x for f in (FIELD, pair)]
    assert (ends[0] - ends[1]).norm() > 0.1


BAD = {
    "one value": (lambda: diffusion_coefficient((1.0,)), r"two or more"),
    "negative value": (lambda: diffusion_coefficient((1.0, -0.1)), r"-0\.1\).*not negative"),
    "infinite value": (lambda: diffusion_coefficient((1.0, math.inf)), r"finite"),
    "churn": (lambda: edm_sampler(FIELD, START, uniform_grid(3), CondOT(), None, s_churn=-1.0), r"churn=-1\.0"),
    "levels": (
        lambda: edm_sampler(FIELD, START, uniform_grid(3), CondOT(), None, s_churn=1.0, s_tmin=2.0, s_tmax=1.0),
        r"levels 2\.0 and 1\.0",
    ),
    "grid": (lambda: log_snr_grid(5, CondOT(), 2.0, 1.0), r"levels 2\.0 to 1\.0"),
    "plain": (lambda: simulate_sde(FIELD, START, uniform_grid(3), lambda t: -t, None), r"sigma_t=-0\.3.*not negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
