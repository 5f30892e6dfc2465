"""`condot sample`: draw images into a grid, an animation or a folder.

`python sample.py` in the checkout is this command, and its other verbs (`evaluate`, `retrieve`,
`export`, `likelihood`, `restore`) are the commands of those names.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

from condot.core.process import report_errors, stopper_of_program
from condot.data.prepare.generated import GeneratedShards
from condot.pipeline.launch import distributed
from condot.pipeline.sampling.images import generate_image_file, generate_image_folder
from condot.pipeline.sampling.options import ImagesOptions
from condot.pipeline.sampling.requests import read_requests

from .assembly.load_models import load_models
from .options_command import options_command

VERBS = ("evaluate", "retrieve", "export", "likelihood", "restore")
"""Commands that `python sample.py VERB` runs too."""


def sample_images(options: ImagesOptions) -> int:
    """Sample into a grid, an animation or a folder, and print where; returns the exit status."""
    options.sampler()  # what it refuses is refused before a model is loaded
    kind, requests = options.output_kind(), read_requests(options)
    if kind != "folder":
        distributed.require_single_process(f"--output {options.output}")
    loaded = load_models(options)
    requests = requests.check(loaded.model, guided=options.guidance_scale != 1 and not loaded.model.weak)
    if kind == "folder":
        shards = partial(GeneratedShards, Path(options.output), options.images_per_shard, loaded.class_names)
        return generate_image_folder(options, loaded.model, requests, loaded.files, shards, stopper_of_program())
    return generate_image_file(options, loaded.model, requests)


images = options_command(ImagesOptions, sample_images)


@report_errors
def main(argv: list[str]) -> int:
    """Run the command, or the other verb that the first word names; returns the exit status."""
    verb, words = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("images", argv)
    if verb == "images":
        return images(words)
    if verb not in VERBS:
        raise ValueError(f"verb {verb!r} is unknown: choose one of {', '.join(('images', *VERBS))}.")
    return int(import_module(f".{verb}", __package__).main(words))
