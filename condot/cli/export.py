"""`condot export`: write a run's averaged weights as the folder that stock diffusers loads, and publish it if asked."""

from __future__ import annotations

from pathlib import Path

from condot.pipeline.hub.publish import check_repository, publish
from condot.pipeline.sampling.options import ExportOptions

from .assembly.trained_model import TrainedModel
from .options_command import options_command


def export_run(options: ExportOptions) -> Path:
    """Write the folder, publish it if asked, and return it.

    Raises:
        ValueError: no run, no whole checkpoint, or a repository that may not be published to.
    """
    if not options.run:
        raise ValueError("--run is missing: give the folder of a run, as --run runs/digits.")
    if options.push_to_hub:
        check_repository(options.push_to_hub)
    elif options.private:
        raise ValueError("--private without --push_to_hub: nothing is published. Give --push_to_hub user/name too.")
    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    trained = TrainedModel(Path(options.run), checkpoint, options.ema)
    folder = trained.export(Path(options.output) if options.output else Path(options.run) / "export", options)
    if options.push_to_hub:
        publish(folder, options.push_to_hub, private=options.private)
    return folder


def run(options: ExportOptions) -> int:
    """Write and publish; returns the exit status."""
    export_run(options)
    return 0


main = options_command(ExportOptions, run, single_process="export")
