"""Whether a scheduler that somebody put into a pipeline can draw with its network: tried on a normal law, whose every prediction is known.

It travels with exported models, written into the file of their pipeline. Licence: Apache-2.0.
"""

import inspect
from typing import Any

import torch

OURS = ("FlowODEScheduler", "FlowSDEScheduler")
"""Schedulers that say what path they follow."""
MEAN, STD = 0.2, 0.25
"""Of the law: of its data predictions none lies beyond -1..1, which some schedulers cut off."""
STEPS = 40
DRAWS = 4096
NEAR, WIDE = 0.1, 0.2
"""So far, as a share of STD, may the mean of what is drawn lie from the law's, and its deviation: DDIM's is 0.1 too small in 40 steps."""
EDGE = 1e-6
"""At either end of a path a prediction may be a quotient of zeros: it is asked so far inside."""


def language(scheduler: Any) -> Any:
    """Return what a scheduler takes a network's output for: a prediction, and whether on the straight path.

    Its class decides: one that does not know a word, such as use_flow_sigmas, keeps it in its configuration all the same.
    """
    config, known = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    if not {"prediction_type", "beta_schedule", "trained_betas"} & known.keys():
        return "flow_prediction", True
    straight = config.path == "condot" if "path" in known else bool("use_flow_sigmas" in known and config.use_flow_sigmas)
    return config.prediction_type if "prediction_type" in known else "epsilon", straight


def said_by(config: Any) -> Any:
    """Return what the configuration of a network's scheduler says of the network, as `language` does, whatever its class knows of it.

    A scheduler that took the place of the exported one as the pipeline was loaded kept all words, and may not follow them.
    """
    if not {"prediction_type", "beta_schedule", "trained_betas"} & config.keys():
        return "flow_prediction", True
    straight = config["path"] == "condot" if "path" in config else bool(config.get("use_flow_sigmas"))
    return config.get("prediction_type", "epsilon"), straight


def with_its_path(config: Any) -> Any:
    """Return a configuration for a FlowODEScheduler of the path that it names, if it names one, though it is another class's now."""
    return {**config, "_class_name": OURS[0]} if "path" in config else config


def inside(sigma: float) -> float:
    """Return a time, 1 the noise and 0 the data, so far from either end that every prediction is defined."""
    return min(max(sigma, EDGE), 1 - EDGE)


def exact_prediction(clock: Any, x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Return what a perfect network of the law N(MEAN, STD^2) gives for x at a timestep.

    Args:
        clock: a FlowODEScheduler of the network's path and prediction.
        x: (B, ...), data and noise mixed as training did.
    """
    sigma = inside(timestep / 1000)
    (a, b, _, _), point = clock.coefficients(sigma), clock._point(sigma)
    gauge = point.gauge / (a + b)  # the network of a scaled path sees a z + b eps times this
    noise = b / ((a * STD) ** 2 + b**2) * (x / gauge - a * MEAN)
    data = MEAN + a * STD**2 / b * noise
    return (noise - data - point.of_sample * x) / point.of_output


@torch.no_grad()
def moments(scheduler: Any, clock: Any) -> Any:
    """Return mean and standard deviation of what a scheduler draws with a perfect network of N(MEAN, STD^2)."""
    generator = torch.Generator().manual_seed(0)
    quantiles = torch.special.ndtri((torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS)
    x = quantiles[torch.randperm(DRAWS, generator=generator)].float().reshape(-1, 4, 4, 4)
    scheduler.set_timesteps(STEPS)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for k in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(exact_prediction(clock, seen.double(), float(k)).float(), k, x, return_dict=False, **more)[0]
    return x.mean().item(), x.std().item()


def check_scheduler(scheduler: Any, clock: Any, trained: Any) -> None:
    """Raise ValueError for a scheduler that would not draw what the network was trained on.

    Args:
        scheduler: any; a copy of it is tried.
        clock: a FlowODEScheduler of the network's path and prediction.
        trained: what `said_by` finds in the configuration that came with the network.
    """
    name, remedy = type(scheduler).__name__, "use DPMSolverMultistepScheduler or FlowODEScheduler, from_config(pipe.scheduler.config)"
    if language(scheduler) != trained:
        raise ValueError(
            f"{name} takes the network's output for {language(scheduler)}, and it is {trained} (prediction, straight path): "
            f"build the scheduler by its from_config(pipe.scheduler.config), or {remedy}."
        )
    try:
        mean, std = moments(type(scheduler).from_config(scheduler.config), clock)
    except Exception as error:  # a stranger's class: whatever it raises, it cannot be followed
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} cannot follow this network ({type(error).__name__}: {said}): {remedy}.") from error
    if not (abs(mean - MEAN) <= NEAR * STD and abs(std - STD) <= WIDE * STD):
        raise ValueError(
            f"{name} with this network draws N({mean:.3f}, {std:.3f}^2) where N({MEAN}, {STD}^2) is right, in {STEPS} steps: {remedy}."
        )
