"""Where the rooms are introduced to one another: data, network, objective, optimiser and averages become a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from condot.core.plugins import loaded_plugins
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.loader.stream import Share, to_unit
from condot.data.loader.training_data import TrainingData
from condot.models import registry
from condot.models.cost import example_inputs
from condot.pipeline.checkpoint.store import CheckpointManager
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.config.parse import config_to_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.ema.averages import WeightAverages
from condot.pipeline.ema.snapshots import snapshot_manager
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.launch import distributed, parallel, precision
from condot.pipeline.launch.precision import Precision
from condot.pipeline.tracking.meter import Meter
from condot.pipeline.tracking.mfu import MfuEstimator
from condot.pipeline.training.conditioning import ConditionBuilder, MicroBatch
from condot.pipeline.training.guard import Guard
from condot.pipeline.training.optimizer import adamw
from condot.pipeline.training.preview import preview
from condot.pipeline.training.resume_rules import run_facts
from condot.pipeline.training.run import Run
from condot.pipeline.training.status import Status
from condot.pipeline.training.step_stats import StepReducer
from condot.pipeline.training.watchdog import Watchdog

from ..host import Host
from .build_networks import build_networks

PREVIEW_CAPTIONS = 32
"""Captions that the preview draws."""


def build_run(
    config: Config,
    training_data: TrainingData,
    space: LatentSpace,
    accelerator: Accelerator,
    checkpoints: CheckpointManager,
    status: Status,
    host: Host,
    *,
    fresh: bool,
) -> Run:
    """Introduce the rooms to one another: network, objective, optimiser, averages, checkpoints."""
    set_seed(config.seed % 2**32)  # more NumPy does not take
    torch.manual_seed(config.seed)
    names, device = training_data.images.manifest.class_names, accelerator.device
    text_conditioner = training_data.build_text_conditioner(device)
    objective = TrainingObjective(config.flow, space.shape, config.train.batch_size)
    objective.check_gradient_checkpointing(config.model.gradient_checkpointing)
    if text_conditioner:
        objective.check_text_conditioning()
    sharding = distributed.resolve_sharding(config)
    options = build_model_kwargs(config.model, space.shape, len(names), training_data.widths, config.flow.objective)
    network, average = build_networks(config, options, accelerator, sharding, fresh=fresh)
    once = not objective.differentiates_twice
    plain = registry.build(device="meta", **options).eval() if once else None
    model, optimizer = parallel.prepare_model(accelerator, network, adamw(network, config.train), sharding)
    lora = [config.train.lora_rank, config.train.lora_alpha] if config.train.lora_rank else []
    said = {
        "lora": lora,
        "text": [one.fingerprint for one in training_data.text_encoders],
        "space": space.resume_facts if space.is_latent else {},
    }
    metadata = {
        "config": config_to_mapping(config),
        "class_names": list(names),
        "plugins": loaded_plugins(),
        "facts": run_facts(config, training_data.images.fingerprint) | said,
        "space": vars(space),
        "precision": accelerator.mixed_precision,
        "text": {"widths": training_data.widths, "fingerprints": said["text"], "captions": training_data.example_captions(PREVIEW_CAPTIONS)}
        if text_conditioner
        else {},
    }
    return Run(
        config=config,
        accelerator=accelerator,
        network=network,
        model=model,
        ema=WeightAverages(network, average, config.ema),
        optimizer=optimizer,
        objective=objective,
        encode=build_encoder(config, space, device),
        decode=space.decoder(partial(Autoencoder, space.autoencoder, device)),
        condition=ConditionBuilder(
            config, len(names), device, text_conditioner, bool(network.micro_conditions), space.factor if training_data.cached else 1
        ),
        checkpoints=checkpoints,
        snapshots=snapshot_manager(Path(config.output_dir)),
        status=status,
        metadata=metadata,
        interrupt=host.interrupt,
        meter=Meter(accelerator, MfuEstimator.for_run(accelerator, network, plain, config.log.peak_tflops)),
        watchdog=Watchdog(config.guard.hang_seconds if host.owns_process else 0.0, status),
        guard=Guard(config.guard),
        step_reducer=StepReducer(device, accelerator.num_processes, scaled=accelerator.scaler is not None),
        preview=partial(preview, text=training_data.preview_captions(config.seed, PREVIEW_CAPTIONS) if config.log.sample_every else None),
        open_stream=lambda cursor: training_data.stream(config.seed, rank_share(config, accelerator), cursor),
        sharded=sharding != "none",
    )


def build_encoder(config: Config, space: LatentSpace, device: torch.device) -> Callable[[MicroBatch, int], Tensor]:
    """From a micro-batch to what the network learns: pixels, or latents drawn from their posterior, encoded now or before."""
    online = Autoencoder(space.autoencoder, device) if space.is_latent and config.data.encoding == "online" else None

    def encode(batch: MicroBatch, step: int) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        if not space.is_latent:
            return to_unit(images)
        moments = online.moments(to_unit(images)) if online else images.float()
        return space.sample_posterior(moments, config.seed, step, batch.batch_indices.to(device, non_blocking=True))

    return encode


def benchmark_precision(config: Config, training_data: TrainingData, space: LatentSpace, ranks: int, device: torch.device) -> Precision:
    """The precision in which a network of this recipe computes its micro-batches faster on that device."""
    widths = training_data.widths or (0, 0)
    options = build_model_kwargs(
        config.model, space.shape, len(training_data.images.manifest.class_names), training_data.widths, config.flow.objective
    )
    network = registry.build(seed=0, **options).to(device)
    micro = max(1, config.train.batch_size // config.train.gradient_accumulation_steps // ranks)
    return precision.pick_faster_precision(
        network, example_inputs(network, space.shape, batch=micro, tokens=16, text_width=widths[0], pooled_width=widths[1])
    )


def rank_share(config: Config, accelerator: Accelerator) -> Share:
    """This rank's part of every global batch."""
    accumulation, rank = config.train.gradient_accumulation_steps, accelerator.process_index
    return Share(batch_size=config.train.batch_size, accumulation=accumulation, rank=rank, ranks=accelerator.num_processes)
