"""Restoring images: samples of the model that agree with what is left of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..flow import (
    Colourisation,
    Condition,
    Inpainting,
    Measurement,
    Solution,
    SuperResolution,
    map_condition,
    reconstruction_guidance,
    repeat_condition,
    replacement_callback,
)
from .flow_model import FlowModel, check_labels, require_pixel_model
from .generate import Samples, check_sampler, clipped_field, guided_field, remove_final_noise, with_classifier_guidance
from .image_grid import make_grid, save_image
from .options import RestoreOptions
from .sampler import FIRST_TIME, Sampler
from .solve import initial_point, integrate

ReadImage = Callable[[Path, int, int], Tensor]  # an image of so many channels and pixels a side, (C, H, W), -1..1


@dataclass(frozen=True, kw_only=True)
class RestorationMethod:
    """How samples are made to agree with a measurement; `options.RestoreOptions` explains each number.

    Raises:
        ValueError: a number out of its range, or without effect.
    """

    method: Literal["reconstruction", "replacement"] = "reconstruction"
    noise_std: float = 0.01
    data_std: float = 0.5
    iterations: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise_std < float("inf") or not 0 < self.data_std < float("inf") or self.iterations < 0:
            raise ValueError(
                f"--noise_std {self.noise_std}, --data_std {self.data_std}, --iterations {self.iterations}: not negative, and the second "
                f"positive. Use 0.01, 0.5 and 0."
            )
        if self.iterations and self.method == "replacement":
            raise ValueError(f"--iterations {self.iterations} has no effect with --method replacement: give --method reconstruction.")

    @property
    def backward_passes(self) -> int:
        """Through the network, of each evaluation."""
        return 0 if self.method == "replacement" else 1 if not self.iterations else self.iterations + 2


def measurement(task: str, shape: tuple[int, ...], mask: Tensor | None, factor: int) -> Measurement:
    """What a task measures of an image.

    Args:
        task: `inpaint`, `colourise` or `super_resolution`.
        shape: of an image, (C, H, W).
        mask: of inpaint, (H, W), true where the image is to be filled in.
        factor: of super_resolution.

    Raises:
        ValueError: a task that the image or the options do not allow.
    """
    if task == "inpaint":
        if mask is None or mask.shape != shape[1:]:
            raise ValueError(
                f"--mask is {'missing' if mask is None else f'{tuple(mask.shape)} beside an image of {shape[1:]}'}: white is filled in."
            )
        return Inpainting((~mask).float())
    if task == "colourise":
        if shape[0] != 3:
            raise ValueError(f"--task colourise with a model of {shape[0]} channel(s): it takes one of three, red, green and blue.")
        return Colourisation()
    if factor < 2 or shape[-1] % factor:
        raise ValueError(f"--factor {factor} does not divide the model's {shape[-1]} pixels a side: use a divisor, 2 or more.")
    return SuperResolution(factor)


@torch.no_grad()
def restore(
    model: FlowModel,
    measure: Measurement,
    y: Tensor,
    sampler: Sampler,
    restoration: RestorationMethod,
    *,
    label: int | None = None,
    prompt: str = "",
    negative_prompt: str = "",
    count: int,
    seed: int,
    batch_size: int = 256,
) -> Samples:
    """Sample images that agree with a measurement.

    Args:
        model: the model's field; pixels, since the measurement is of pixels.
        measure: A.
        y: what is left, of the shape of A x for one image.
        sampler: solver, steps, guidance.
        restoration: how they are made to agree.
        label: class of the image, or None; of a model on classes.
        prompt: caption of the image, "" for none; of a model on text.
        negative_prompt: what guidance leads away from.
        count: samples.
        seed: of the noise.
        batch_size: samples at once.

    Returns:
        (count, C, H, W), -1..1, and how often the field was evaluated for each.

    Raises:
        ValueError: what `check_restore` refuses; an SDE solver for a prior without score.
    """
    check_restore(model, sampler, restoration, label, prompt, negative_prompt)
    if count < 1 or batch_size < 1:
        raise ValueError(f"--num_images {count}, --batch_size {batch_size}: at least one of each.")
    if negative_prompt and model.encode_text:
        model = replace(model, null=model.encode_text([negative_prompt]))
    condition = model.encode_text([prompt]) if model.encode_text else torch.tensor([model.null if label is None else label])
    images, evaluations = [], 0
    for first in range(0, count, batch_size):
        index = torch.arange(first, min(first + batch_size, count), device=model.device)
        end, evaluations = _restore_batch(model, measure, y, sampler, restoration, _repeat_condition(condition, index), seed, index)
        images.append(model.decode(end).float().cpu())
    return Samples(torch.cat(images), evaluations)


def _repeat_condition(condition: Condition, index: Tensor) -> Condition:
    """Return one condition for each sample, on their device."""
    return repeat_condition(map_condition(condition, lambda part: part.to(index.device)), len(index))


def _restore_batch(
    model: FlowModel,
    measure: Measurement,
    y: Tensor,
    sampler: Sampler,
    restoration: RestorationMethod,
    condition: Condition,
    seed: int,
    index: Tensor,
) -> Solution:
    """Return the clean end of the path for one batch, (B, *S), and the evaluations it took."""
    times = _times(model, sampler, restoration)
    field = guided_field(model, condition, sampler, times)
    x, measured = initial_point(model, seed, index, float(times[0])), y[None].expand(len(index), *y.shape).to(model.device)
    if restoration.method == "reconstruction":
        deviations = {"noise_std": restoration.noise_std, "data_std": restoration.data_std}
        field = reconstruction_guidance(field, model.path, measure, measured, iterations=restoration.iterations, **deviations)
        field = clipped_field(
            model, with_classifier_guidance(model, field, condition, sampler), sampler
        )  # scores add up; the classifier's is not differentiated
        end = integrate(model, field, x, times, sampler, seed, index, last_euler=True)
        return remove_final_noise(model, field, end, float(times[-1]))
    field, noise = (
        clipped_field(model, with_classifier_guidance(model, field, condition, sampler), sampler),
        x / float(model.path(times[0]).b),
    )
    end = integrate(model, field, x, times, sampler, seed, index, step_callback=replacement_callback(measure, measured, model.path, noise))
    clean, evaluations = remove_final_noise(model, field, end, float(times[-1]))
    return Solution(clean + measure.pseudo_inverse(measured - measure(clean)), evaluations)  # denoised, it moved off the measurement


def _times(model: FlowModel, sampler: Sampler, restoration: RestorationMethod) -> Tensor:
    """Return the grid; of reconstruction one that begins off the noise, and whose last step alone is Euler's."""
    inverse = restoration.method == "reconstruction"
    times = sampler.times(model, off_noise=inverse)
    if inverse and sampler.solver == "dormand_prince" and len(times) == 2:
        return torch.tensor([float(times[0]), 1 - FIRST_TIME, float(times[1])], dtype=torch.float64)
    return times


def check_restore(
    model: FlowModel, sampler: Sampler, restoration: RestorationMethod, label: int | None, prompt: str, negative_prompt: str
) -> None:
    """Raise ValueError for a restoration that cannot be, or an option without effect.

    Args:
        model: the model's field.
        sampler, restoration, label, prompt, negative_prompt: as in `restore`.
    """
    if sampler.solver in ("langevin", "annealed_langevin"):
        raise ValueError(f"--solver {sampler.solver} cannot restore: it has no steps along the path to mend. Use euler, or exponential.")
    if sampler.solver == "dormand_prince" and restoration.method == "replacement":
        raise ValueError("--solver dormand_prince cannot restore by replacement: it has no steps of its own to mend. Use euler.")
    if not model.encode_text and (prompt or negative_prompt):
        raise ValueError(f"--prompt {prompt or negative_prompt!r} of a model that takes no text: leave the option out.")
    if model.encode_text and label is not None:
        raise ValueError(f"--class_label {label} of a model that takes text: give --prompt, or neither.")
    if label is not None:
        check_labels(torch.tensor([label]), model.num_classes)
    check_sampler(model, sampler)
    condition = prompt or negative_prompt if model.encode_text else label is not None
    if sampler.guidance_scale != 1 and model.weak is None and not condition:
        what = "--prompt" if model.encode_text else "--class_label"
        raise ValueError(f"--guidance_scale {sampler.guidance_scale} without {what} has nothing to guide by: give {what}, or 1.")
    if model.classifier is not None and label is None:
        raise ValueError("--classifier_reference without --class_label has no class to lead to: give one, or leave it out.")
    if negative_prompt and (sampler.guidance_scale == 1 or model.weak is not None):
        raise ValueError(
            f"--negative_prompt {negative_prompt!r} has no effect without guidance, or where a weaker model guides: "
            f"give --guidance_scale 3, and no --guide_run or --guide_pipeline."
        )
    if restoration.method == "reconstruction":
        if model.prior is not None:
            raise ValueError("--method reconstruction of a model whose path begins at a uniform prior needs a score: use replacement.")
        if float(model.path(_times(model, sampler, restoration)[0]).a) == 0:
            raise ValueError(
                f"--given_times {sampler.given_times[0]:g} ...: nothing of an image is left there to reconstruct by. Begin at {FIRST_TIME}."
            )


def check_restore_options(options: RestoreOptions) -> None:
    """Raise ValueError for options that cannot be, whatever the model."""
    for name in ("input", *(["mask"] if options.task == "inpaint" else [])):
        if not Path(getattr(options, name)).is_file():
            raise ValueError(f"--{name} {getattr(options, name)!r} is no file: give an image.")
    options.sampler()
    build_restoration_method(options)
    if options.num_images < 1:
        raise ValueError(f"--num_images {options.num_images}: at least one.")
    if options.mask and options.task != "inpaint":
        raise ValueError(f"--mask {options.mask!r} has no effect with --task {options.task}: leave it out, or give --task inpaint.")


def build_restoration_method(options: RestoreOptions) -> RestorationMethod:
    """Return how the options say that samples are made to agree; errors as `RestorationMethod`."""
    return RestorationMethod(method=options.method, noise_std=options.noise_std, data_std=options.data_std, iterations=options.iterations)


def restore_file(model: FlowModel, options: RestoreOptions, read: ReadImage) -> str:
    """Restore the image of a file, write it as it was measured, then the samples, and return what is to be said of them.

    Raises:
        ValueError: a model of latents; a task, a mask or a class that the image or the model does not allow.
    """
    require_pixel_model(model, "restore measures pixels", text=True)
    channels, _, side = model.shape
    mask = read(Path(options.mask), 1, side)[0] > 0 if options.task == "inpaint" else None
    measure = measurement(options.task, model.shape, mask, options.factor)
    small = options.task == "super_resolution"
    given = read(Path(options.input), channels, side // options.factor if small else side)
    y = given if small else measure(given[None])[0]
    made, evaluations = restore(
        model,
        measure,
        y,
        options.sampler(),
        build_restoration_method(options),
        label=None if options.class_label == -1 else options.class_label,
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        count=options.num_images,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    left = measure.pseudo_inverse(y[None]).clamp(-1, 1)
    save_image(make_grid(torch.cat([left, made]), options.num_images + 1, scale=max(1, 64 // side)), Path(options.output))
    difference, backward = (measure(made) - y).square().mean().sqrt().item(), build_restoration_method(options).backward_passes
    cost = f"{evaluations} evaluations each" + (f", with {backward} backward pass{'es' * (backward > 1)} in each" if backward else "")
    return (
        f"{options.output}: the input as measured, then {options.num_images} samples by {options.solver}, {cost}; "
        f"they differ from it by {difference:.4f} (root mean square, -1..1)"
    )
