"""What the verb `images` draws: one picture, still or moving, or a folder of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from condot.core.printable import say
from condot.core.process import Stopper, leave_group

from ..launch.distributed import join
from .animation import Film, save_animation
from .bulk import Files, Keeper, Made, collect, fingerprint
from .flow_model import Source
from .generate import check_sampler, generate
from .image_encoding import encode_image, file_extension
from .image_grid import grid, save_image
from .options import Images
from .requests import Asked

UNASKED = 16
"""Images of a model without conditions, unless another number is given."""


def draw_picture(options: Images, source: Source, wanted: Asked) -> int:
    """Write a grid, or an animation of it, and print where; returns the exit status."""
    count, sampler, source = options.num_images or len(wanted) or UNASKED, options.sampler(), source.sized(options.height, options.width)
    condition, away = wanted.conditions(source, range(count))
    film = Film(source, sampler, options.show or "state") if options.kind() == "animation" else None
    made, evaluations = generate(source, condition, sampler, seed=options.seed, batch_size=options.batch_size, null=away, watch=film)
    columns = min(count, len(wanted) if 1 < len(wanted) <= 16 else math.ceil(math.sqrt(count)))
    output, scale = Path(options.output), max(1, 64 // max(made.shape[2:]))
    if film:
        save_animation(film.frames(made), output, columns, scale)
    else:
        save_image(grid(made, columns, scale), output)
    say(f"{output}: {count} images by {options.solver}, {evaluations} evaluations each{unseen(source)}")
    return 0


def unseen(source: Source) -> str:
    """Say what of a source's images a picture of several of them does not show; "" where it shows all."""
    channels, depth = source.image_shape[0], source.bit_depth
    kept = file_extension(channels)
    if kept == "npy":
        return f"; it shows the first three of {channels} bands: an --output that ends in / keeps all, as .{kept}"
    return f"; it has 8 of {depth} bits: an --output that ends in / keeps all" if depth > 8 else ""


def described(source: Source) -> dict[str, Any]:
    """Return how a source's images are written and led, where it is not as ever, gray or RGB of 8 bits; so older folders go on."""
    channels = {} if source.image_shape[0] in (1, 3) else {"channels": source.image_shape[0]}
    judge = {} if source.classifier is None else {"classifier": source.classifier.digest}
    return channels | ({} if source.bit_depth == 8 else {"bit_depth": source.bit_depth}) | judge


def draw_folder(options: Images, source: Source, wanted: Asked, files: Sequence[Path], tars: Callable[[], Keeper], stopper: Stopper) -> int:
    """Fill a folder, together with the other processes of this launch, and print what is there.

    Args:
        options: what is asked for, and where it goes.
        source: the model, with its guide if it has one.
        wanted: conditions, checked.
        files: folders of the model and of its guide, whose content decides the images.
        tars: keeps images in shards.
        stopper: a signal ends the work after the batch.

    Returns:
        The exit status.

    Raises:
        ValueError: what `many.collect` and `generate` refuse.
    """
    sampler, folder, source = options.sampler(), Path(options.output), source.sized(options.height, options.width)
    check_sampler(source, sampler)
    extension = file_extension(source.image_shape[0])

    def make(numbers: range) -> list[Made]:
        condition, away = wanted.conditions(source, numbers)
        size, first = len(numbers), numbers[0]
        made = generate(source, condition, sampler, seed=options.seed, first=first, batch_size=size, null=away).images
        return [{extension: encode_image(image, source.bit_depth), **wanted.beside(i)} for i, image in zip(numbers, made, strict=True)]

    count, shards = options.num_images or len(wanted) or UNASKED, options.format == "shards"
    settings = options.settings([fingerprint(one) for one in files], wanted.digest) | described(source)
    if options.height or options.width:
        settings["size"] = list(source.image_shape[1:])
    unit = options.images_per_shard if shards else options.batch_size
    keep = tars if shards else partial(Files, folder, extension)
    keeper, left = collect(folder, count, settings, unit, options.batch_size, keep, make, stopper)
    if join().is_main_process:
        if left:
            say(f"{folder}: {left} of {count} images are still to be made; the same command goes on from there.")
        else:
            keeper.finish()
            say(f"{folder}: {count} images by {options.solver}, {min(keeper.there, count)} of them were there")
    leave_group(stopper.exit_status)
    return stopper.exit_status
