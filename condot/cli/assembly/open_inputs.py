"""What a run reads: its data, its encoders, and the space that it trains in; refused here where it cannot be trained or exported."""

from __future__ import annotations

from condot.data.loader.training_data import TrainingData
from condot.models import registry
from condot.models.convert import check_num_classes, check_travels, unsupported_by_stock
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.schema import Config
from condot.pipeline.export.autoencoder import check_export
from condot.pipeline.export.pipeline_class import check_joint_export
from condot.pipeline.export.scheduler_map import export_form
from condot.pipeline.latent_space import LatentSpace


def open_inputs(config: Config) -> tuple[TrainingData, LatentSpace]:
    """Open what the recipe names, and refuse what cannot be trained or exported.

    Raises:
        ValueError: shards, encoders or caches that are not there or do not fit; an export that could not be made.
    """
    if config.init_from and config.checkpoint.start_from:
        raise ValueError(f"init_from={config.init_from!r} and checkpoint.start_from={config.checkpoint.start_from!r}: give one of them.")
    options = config.data
    training_data = TrainingData.open(options, config.model.conditioning == "text")
    space = LatentSpace.from_pixels(options.channels, options.resolution)
    if training_data.autoencoder:
        space = LatentSpace.from_autoencoder(training_data.autoencoder, options.resolution)
        if training_data.latents:  # online too, so that the two are one run
            space = space.with_statistics(training_data.latents.encoding["statistics"])
        space = space.with_overrides(options.latent_scale, options.latent_shift)
    if config.export:  # what could not be exported at the end is refused at the start
        classes = len(training_data.images.manifest.class_names)
        check_exportable(config, space, classes, len(training_data.text_encoders))
    return training_data, space


def check_exportable(config: Config, space: LatentSpace, num_classes: int, encoders: int) -> None:
    """Raise ValueError for what diffusers could not hold."""
    export_form(config.flow)
    check_travels(config.model.kind)
    if config.flow.objective == "joint":
        options = build_model_kwargs(config.model, space.shape, num_classes, (8, 8), config.flow.objective)
        network = registry.build(device="meta", **options)
        check_joint_export(space, config.model.conditioning, unsupported_by_stock(network))
    if config.model.conditioning == "class":
        check_num_classes(num_classes)
    check_export(space, encoders)
