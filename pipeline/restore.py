"""Restoring images: samples of the model that agree with what is left of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .flow import Colourisation, Inpainting, Measurement, SuperResolution, reconstruction, replacement
from .generate import Sampler, Source, cleaned, follow, guided, start
from .options import Restore
from .sheet import grid, save_image
from .source import check_labels

Read = Callable[[Path, int, int], Tensor]  # an image of so many channels and pixels a side, (C, H, W), -1..1

DATA_STD = 0.5
"""Standard deviation of images in -1..1, as reconstruction takes it."""


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
    if shape[-1] % factor:
        raise ValueError(f"--factor {factor} does not divide the model's {shape[-1]} pixels a side: use a divisor.")
    return SuperResolution(factor)


@torch.no_grad()
def restore(
    source: Source,
    measure: Measurement,
    y: Tensor,
    sampler: Sampler,
    *,
    label: int | None,
    count: int,
    seed: int,
    method: str,
    noise_std: float,
) -> Tensor:
    """Sample images that agree with a measurement.

    Args:
        source: the model's field; pixels, since the measurement is of pixels.
        measure: A.
        y: what is left, of the shape of A x for one image.
        sampler: solver, steps, guidance.
        label: class of the image, or None.
        count: samples.
        seed: of the noise.
        method: `reconstruction` or `replacement`.
        noise_std: of the measurement, images in -1..1.

    Returns:
        (count, C, H, W), -1..1.

    Raises:
        ValueError: a label out of range, an SDE solver for a prior without
            score, a solver that follows no path.
    """
    if sampler.solver in ("langevin", "annealed_langevin", "dormand_prince"):
        raise ValueError(f"--solver {sampler.solver} cannot restore: it has no steps along the path to mend. Use euler, or exponential.")
    label = source.null if label is None else label
    labels = torch.full((count,), label, device=source.device)
    if label != source.null:
        check_labels(labels, source.num_classes)
    field, times = guided(source, labels, sampler), sampler.times(source, off_noise=method == "reconstruction")
    index = torch.arange(count, device=source.device)
    x, many = start(source, seed, index, float(times[0])), y[None].expand(count, *y.shape).to(source.device)
    if method == "reconstruction":
        field = reconstruction(field, source.path, measure, many, noise_std=noise_std, data_std=DATA_STD)
        end = follow(source, field, x, times, sampler, seed, index, last_euler=True)
    else:
        noise = x / float(source.path(times[0]).b)
        end = follow(source, field, x, times, sampler, seed, index, after=replacement(measure, many, source.path, noise))
        end = cleaned(source, field, end, float(times[-1]))
    return source.decode(end.x).float().cpu()


def restore_file(source: Source, options: Restore, read: Read) -> float:
    """Restore the image of a file, and write it as it was measured, then the samples.

    Returns:
        The root mean square difference of the samples from what was measured, -1..1.

    Raises:
        ValueError: a task, a mask or a class that the image or the model does not allow.
    """
    channels, _, side = source.shape
    mask = read(Path(options.mask), 1, side)[0] > 0 if options.task == "inpaint" else None
    measure = measurement(options.task, source.shape, mask, options.factor)
    small = options.task == "super_resolution"
    given = read(Path(options.input), channels, side // options.factor if small else side)
    y = given if small else measure(given[None])[0]
    made = restore(
        source,
        measure,
        y,
        options.sampler(),
        label=None if options.class_label == -1 else options.class_label,
        count=options.num_images,
        seed=options.seed,
        method=options.method,
        noise_std=options.noise_std,
    )
    left = measure.pseudo_inverse(y[None]).clamp(-1, 1)
    save_image(grid(torch.cat([left, made]), options.num_images + 1, scale=max(1, 64 // side)), Path(options.output))
    return (measure(made) - y).square().mean().sqrt().item()
