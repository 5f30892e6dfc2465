"""Which scheduler an export should have, and which may be put in its place: the tables of docs/export.md.

The network is perfect: its data are N(0.2, 0.25^2), or three normal laws in the plane, known in closed form (tests/oracles.py).

    python benchmarks/schedulers.py --exported

First table, by recipe: deviation over the right one after 10 to 1,000 steps, and root mean square distance of 2,000 ends of
the three laws from those of a fine solution, in 10, 25 and 50 steps. Second: the same ratio in 25 steps by diffusers' own
pipelines and by ours, for every scheduler that is made of the export's by from_config; `-` is an error.
"""

import diffusers
import oracles
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DEISMultistepScheduler, DiTPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils import logging
from exact import ExactNetwork, quantiles

from condot.pipeline.config.flow import FlowConfig
from condot.pipeline.export.identity_autoencoder import identity_autoencoder
from condot.pipeline.export.runtime.pipeline_condot_v2 import CondotPipeline
from condot.pipeline.export.runtime.scheduling_flow_ode_v2 import FlowODEScheduler
from condot.pipeline.export.scheduler_map import PREDICTION_TYPES, build_scheduler, export_form
from condot.pipeline.flow import dormand_prince, uniform_grid

logging.set_verbosity_error()  # of words that a scheduler does not know
STEPS, FEW = (10, 25, 50, 250, 600, 1000), (10, 25, 50)
RECIPES = ("condot velocity", "condot noise", "condot data", "cosine velocity", "vp noise", "vp v", "vp data")
OWN = ("vp velocity", "sub_vp noise", "ve noise", "ve data")
SWAPS = (
    "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "DDIM", "DDPM", "PNDM", "EulerDiscrete", "HeunDiscrete",
    "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "EulerAncestralDiscrete", "EDMEuler", "LCM", "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete",
)  # fmt: skip


def flow_of(recipe):
    path, predict = recipe.split()
    return FlowConfig(path=path, predict=predict)


def prediction_of(recipe):
    flow = flow_of(recipe)
    form = export_form(flow)
    return "velocity" if flow.predict == "velocity" and not form.stock else PREDICTION_TYPES[form.predict]


def candidates(recipe):
    """Name and maker of each scheduler that could be exported."""
    base = build_scheduler(flow_of(recipe), pixels=False)
    if recipe in OWN:
        return {
            solver: lambda solver=solver: FlowODEScheduler.from_config(base.config, solver=solver) for solver in FlowODEScheduler.solvers
        }
    kinds = [DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler]
    kinds += [] if recipe.startswith("condot") else [DDIMScheduler]
    kinds += [diffusers.FlowMatchEulerDiscreteScheduler] if recipe == "condot velocity" else []
    return {kind.__name__.removesuffix("Scheduler"): lambda kind=kind: kind.from_config(base.config) for kind in kinds}


def drawn(scheduler, network, x, steps):
    """The end of x, (B, ...), by the loop of our pipeline."""
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for k in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, k), k, x, return_dict=False)[0]
    return x


def in_the_plane(recipe):
    """A perfect network of the three laws, on points (B, 2), and the fine solution from noise at a timestep."""
    law, coefficients, kind = oracles.three(), getattr(oracles, recipe.split()[0]), prediction_of(recipe)

    def network(x, k):
        a, b, da, db = coefficients(min(max(1 - float(k) / 1000, 1e-6), 1 - 1e-6))
        data, noise = law.data(x, a, b), law.noise(x, a, b)
        forms = {"flow_prediction": noise - data, "velocity": da * data + db * noise, "epsilon": noise, "sample": data}
        return forms.get(kind, a * noise - b * data)

    def fine(noise, k):
        begin = max(1 - float(k) / 1000, 1e-4)
        return dormand_prince(
            law.field(coefficients), coefficients(begin)[1] * noise, uniform_grid(1, begin, 1 - 1e-6), rtol=1e-7, atol=1e-7
        ).x

    return network, fine


def row(recipe, make, ends):
    """The figures of one scheduler, as text."""
    network, noise = ExactNetwork(recipe.split()[0], prediction_of(recipe), std=0.25), quantiles(1024, 1, 4, 4)
    figures = []
    for steps in STEPS:
        try:
            end = drawn(make(), lambda x, k: network(x, k, return_dict=False)[0], noise, steps)
            figures.append(f"{(end.std() / noise.std()).item() / 0.25:.3f}")
        except Exception:
            figures.append("-")
    plane, fine = in_the_plane(recipe)
    start = quantiles(4000, 2).double()
    for steps in FEW:
        scheduler = make()
        end = drawn(scheduler, plane, start, steps)
        key = round(float(scheduler.timesteps[0]), 3)
        ends.setdefault(key, fine(start, key))
        figures.append(f"{(end - ends[key]).square().sum(1).mean().sqrt().item():.4f}")
    return " | ".join(figures)


def by_recipe():
    print("\n| recipe | scheduler | " + " | ".join(f"{n}" for n in STEPS) + " | " + " | ".join(f"distance, {n}" for n in FEW) + " |")
    print("|---" * (2 + len(STEPS) + len(FEW)) + "|")
    for recipe in (*RECIPES, *OWN):
        ends = {}
        for name, make in candidates(recipe).items():
            print(f"| {recipe} | {name} | {row(recipe, make, ends)} |", flush=True)


def ratio(pipe, recipe, name, **how):
    """Deviation over the right one of what a pipeline draws in 25 steps under a scheduler; `-` for an error."""
    try:
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(num_inference_steps=25, output_type="np", generator=torch.Generator().manual_seed(0), **how).images
        return f"{torch.as_tensor(images).double().mul(2).std().item() / 0.25:.3f}"
    except Exception:
        return "-"


def by_pipeline():
    recipes = ("condot velocity", "cosine velocity", "vp noise")
    print("\n| scheduler | " + " | ".join(f"{kind}, {recipe}" for recipe in recipes for kind in ("DiT", "DDPM", "ours")) + " |")
    print("|---" * (1 + 3 * len(recipes)) + "|")
    for name in SWAPS:
        cells = []
        for recipe in recipes:
            network = ExactNetwork(recipe.split()[0], prediction_of(recipe), std=0.25, in_channels=3, sample_size=8)
            scheduler = build_scheduler(flow_of(recipe), pixels=False)
            dit = DiTPipeline(network, identity_autoencoder(3, 8), scheduler)
            cells.append(ratio(dit, recipe, name, class_labels=[0] * 64, guidance_scale=1.0))
            cells.append(ratio(DDPMPipeline(network, scheduler), recipe, name, batch_size=64))
            cells.append(ratio(CondotPipeline(scheduler, transformer=network, id2label={}), recipe, name, num_images_per_prompt=64))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
