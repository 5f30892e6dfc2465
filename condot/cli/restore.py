"""`condot restore`: restore what is missing of an image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from condot.core.printable import say
from condot.data.images.decode import decode_image
from condot.data.loader.stream import to_unit
from condot.pipeline.sampling.options import RestoreOptions
from condot.pipeline.sampling.restore import check_restore_options, restore_file

from .assembly.load_models import load_models
from .options_command import options_command


def run(options: RestoreOptions) -> int:
    """Restore an image and write what was left of it, then the samples."""
    check_restore_options(options)
    model = load_models(options).model

    def read(file: Path, channels: int, side: int) -> Tensor:
        pixels = decode_image(file.read_bytes(), channels, side, bit_depth=model.bit_depth)
        return to_unit(torch.from_numpy(pixels))

    say(restore_file(model, options, read))
    return 0


main = options_command(RestoreOptions, run, single_process="restore")
