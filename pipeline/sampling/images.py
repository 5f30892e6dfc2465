"""What the verb `images` draws: one picture, still or moving, or a folder of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from condot.core.printable import say
from condot.core.process import InterruptHandler, exit_if_distributed

from ..launch.distributed import join_process_group
from .animation import FrameRecorder, save_animation
from .bulk import FolderWriter, ImageFiles, ImageWriter, fingerprint_model, generate_folder
from .flow_model import FlowModel
from .generate import Samples, StepCallback, check_sampler, generate
from .image_encoding import encode_image, file_extension
from .image_grid import make_grid, save_image
from .options import ImagesOptions
from .requests import ImageRequests

DEFAULT_NUM_IMAGES = 16
"""Images of a model without conditions, unless another number is given."""


def generate_images(options: ImagesOptions, model: FlowModel, requests: ImageRequests, on_step: StepCallback | None = None) -> Samples:
    """Sample what is asked for, all at once in memory.

    Args:
        options: how, and how many.
        model: of the images' size, with its guide if it has one.
        requests: conditions, checked.
        on_step: as in `generate`.
    """
    count = options.num_images or len(requests) or DEFAULT_NUM_IMAGES
    condition, null = requests.conditions(model, range(count))
    how: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size, "null": null, "on_step": on_step}
    return generate(model, condition, options.sampler(), **how)


def generate_image_file(options: ImagesOptions, model: FlowModel, requests: ImageRequests) -> int:
    """Write a grid, or an animation of it, and print where; returns the exit status."""
    model = model.with_image_size(options.height, options.width)
    animated = options.output_kind() == "animation"
    recorder = FrameRecorder(model, options.sampler(), options.show or "state") if animated else None
    images, evaluations = generate_images(options, model, requests, recorder)
    count = len(images)
    columns = min(count, len(requests) if 1 < len(requests) <= 16 else math.ceil(math.sqrt(count)))
    output, scale = Path(options.output), max(1, 64 // max(images.shape[2:]))
    if recorder:
        save_animation(recorder.frames(images), output, columns, scale)
    else:
        save_image(make_grid(images, columns, scale), output)
    say(f"{output}: {count} images by {options.solver}, {evaluations} evaluations each{note_on_display(model)}")
    return 0


def note_on_display(model: FlowModel) -> str:
    """Say what of a model's images a picture of several of them does not show; "" where it shows all."""
    channels, depth = model.image_shape[0], model.bit_depth
    kept = file_extension(channels)
    if kept == "npy":
        return f"; it shows the first three of {channels} bands: an --output that ends in / keeps all, as .{kept}"
    return f"; it has 8 of {depth} bits: an --output that ends in / keeps all" if depth > 8 else ""


def image_settings(model: FlowModel) -> dict[str, Any]:
    """Return how a model's images are written and led, where it is not as ever, gray or RGB of 8 bits; so older folders go on."""
    channels = {} if model.image_shape[0] in (1, 3) else {"channels": model.image_shape[0]}
    classifier = {} if model.classifier is None else {"classifier": model.classifier.digest}
    return channels | ({} if model.bit_depth == 8 else {"bit_depth": model.bit_depth}) | classifier


def generate_image_folder(
    options: ImagesOptions,
    model: FlowModel,
    requests: ImageRequests,
    files: Sequence[Path],
    open_shards: Callable[[], ImageWriter],
    interrupt: InterruptHandler,
) -> int:
    """Fill a folder, together with the other processes of this launch, and print what is there.

    Args:
        options: what is asked for, and where it goes.
        model: the model, with its guide if it has one.
        requests: conditions, checked.
        files: folders of the model and of its guide, whose content decides the images.
        open_shards: keeps images in shards.
        interrupt: a signal ends the work after the batch.

    Returns:
        The exit status.

    Raises:
        ValueError: what `bulk.generate_folder` and `generate` refuse.
    """
    sampler, folder, model = options.sampler(), Path(options.output), model.with_image_size(options.height, options.width)
    check_sampler(model, sampler)
    extension = file_extension(model.image_shape[0])

    def make(numbers: range) -> list[ImageFiles]:
        condition, negative = requests.conditions(model, numbers)
        size, first = len(numbers), numbers[0]
        images = generate(model, condition, sampler, seed=options.seed, first=first, batch_size=size, null=negative).images
        return [
            {extension: encode_image(image, model.bit_depth), **requests.sidecar_files(i)} for i, image in zip(numbers, images, strict=True)
        ]

    count, shards = options.num_images or len(requests) or DEFAULT_NUM_IMAGES, options.format == "shards"
    settings = options.settings([fingerprint_model(one) for one in files], requests.digest) | image_settings(model)
    if options.height or options.width:
        settings["size"] = list(model.image_shape[1:])
    unit = options.images_per_shard if shards else options.batch_size
    open_writer = open_shards if shards else partial(FolderWriter, folder, extension)
    writer, remaining = generate_folder(folder, count, settings, unit, options.batch_size, open_writer, make, interrupt)
    if join_process_group().is_main_process:
        if remaining:
            say(f"{folder}: {remaining} of {count} images are still to be made; the same command goes on from there.")
        else:
            writer.finish()
            say(f"{folder}: {count} images by {options.solver}, {min(writer.there, count)} of them were there")
    exit_if_distributed(interrupt.exit_status)
    return interrupt.exit_status
