"""Train an image generator: `accelerate launch train.py --config configs/digits.yaml`; the same command resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from condot.core.data_options import Options, parse_size
from condot.core.plugins import changed_plugins, explain_missing, loaded_plugins, take_plugins
from condot.core.printable import printable
from condot.core.process import exit_if_distributed, report_errors, stopper_of_program
from condot.core.registry import UnknownKindError
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.loader.build import check_sides
from condot.data.loader.stream import Share, to_unit
from condot.data.loader.survey import survey
from condot.data.loader.training_data import TrainingData
from condot.models import memory, registry
from condot.models.convert import check_num_classes, unsupported_by_stock
from condot.models.cost import count_params_and_macs, example_inputs, named_blocks
from condot.models.init_from import init_from_published
from condot.models.lora import add_lora
from condot.pipeline.checkpoint.store import CheckpointManager, find_checkpoint, load_state, select_checkpoint
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.config.parse import config_to_mapping, is_switch_set, parse, read_word
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.dry_run.report import dry_run
from condot.pipeline.dry_run.resolved_recipe import DryRunHooks
from condot.pipeline.ema.averages import WeightAverages
from condot.pipeline.ema.snapshots import snapshot_manager
from condot.pipeline.export.autoencoder import check_export
from condot.pipeline.export.pipeline_class import check_joint_export
from condot.pipeline.export.scheduler_map import export_form
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.launch import distributed, parallel, precision
from condot.pipeline.launch.folder_lock import lock_folder
from condot.pipeline.launch.precision import Precision
from condot.pipeline.sampling.options import ExportOptions
from condot.pipeline.tracking.meter import Meter
from condot.pipeline.tracking.mfu import MfuEstimator
from condot.pipeline.tracking.trackers import check_installed as check_trackers
from condot.pipeline.tracking.trackers import exit_process
from condot.pipeline.training.conditioning import ConditionBuilder, MicroBatch
from condot.pipeline.training.guard import Guard
from condot.pipeline.training.loop import run_training
from condot.pipeline.training.optimizer import adamw, check_ramp
from condot.pipeline.training.preview import preview
from condot.pipeline.training.resume_rules import change_notes, extend_journal, resume_config, run_facts
from condot.pipeline.training.run import Run
from condot.pipeline.training.start import load_average, start_or_resume
from condot.pipeline.training.status import Status
from condot.pipeline.training.step_stats import StepReducer
from condot.pipeline.training.watchdog import Watchdog

INTERRUPT = stopper_of_program()
PREVIEW_CAPTIONS = 32
"""Captions that the preview draws."""


def train(config: Config) -> int:
    """Train, resume, export; returns the exit status.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    check_trackers(config.log.report_to)
    check_ramp(config.train)
    training_data, space = open_inputs(config)
    group = distributed.init_distributed(config)
    checkpoints = CheckpointManager(folder, config.checkpoint.keep)
    checkpoint = select_checkpoint(checkpoints, config.checkpoint.resume)
    state = load_state(checkpoint) if checkpoint else {}
    config, change = resume_config(config, state) if checkpoint else (config, None)
    accelerator = distributed.create_accelerator(
        config, group, state.get("precision"), partial(benchmark_precision, config, training_data, space)
    )
    distributed.check_same_data("data.shards", training_data.images.fingerprint)
    folder_lock = lock_folder(folder) if accelerator.is_main_process else None
    with closing(folder_lock) if folder_lock else nullcontext():
        status = Status(folder, accelerator.is_main_process)
        status.lock = folder_lock
        run = build_run(config, training_data, space, accelerator, checkpoints, status, fresh=checkpoint is None)
        if folder_lock:
            run.checkpoints.lock_error = run.snapshots.lock_error = folder_lock.lock_error
        run.metadata["changes"] = extend_journal(state, change)
        check_sides(training_data.options, space.factor * int(run.network.size_multiple))  # type: ignore[arg-type]
        start_or_resume(run, checkpoint, space)
        for note in (*changed_plugins(state.get("plugins")), *change_notes(change, config)):
            run.log.say(note)
        run.log.say(training_data.caption_note)
        INTERRUPT.defer()
        code = run_training(run)
        if training_data.truncation_note:
            run.log.say(training_data.truncation_note)
        accelerator.end_training()
        if code == 0 and config.export and accelerator.is_main_process:
            export(folder)
        exit_if_distributed(code)
    return code


def open_inputs(config: Config) -> tuple[TrainingData, LatentSpace]:
    """Open what the recipe names, and refuse what cannot be trained or exported.

    Raises:
        ValueError: shards, encoders or caches that are not there or do not fit; an export that could not be made.
    """
    if config.init_from and config.checkpoint.start_from:
        raise ValueError(f"init_from={config.init_from!r} and checkpoint.start_from={config.checkpoint.start_from!r}: give one of them.")
    options = Options(**vars(config.data))
    training_data = TrainingData.open(options, config.model.conditioning == "text")
    space = LatentSpace.from_pixels(options.channels, options.resolution)
    if training_data.autoencoder:
        space = LatentSpace.from_autoencoder(training_data.autoencoder, options.resolution)
        if training_data.latents:  # online too, so that the two are one run
            space = space.with_statistics(training_data.latents.encoding["statistics"])
        space = space.with_overrides(options.latent_scale, options.latent_shift)
    if config.export:  # what could not be exported at the end is refused at the start
        check_exportable(config, space, len(training_data.images.manifest.class_names), len(training_data.text_encoders))
    return training_data, space


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


def build_run(
    config: Config,
    training_data: TrainingData,
    space: LatentSpace,
    accelerator: Accelerator,
    checkpoints: CheckpointManager,
    status: Status,
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
        interrupt=INTERRUPT,
        meter=Meter(accelerator, MfuEstimator.for_run(accelerator, network, plain, config.log.peak_tflops)),
        watchdog=Watchdog(config.guard.hang_seconds, status),
        guard=Guard(config.guard),
        step_reducer=StepReducer(device, accelerator.num_processes, scaled=accelerator.scaler is not None),
        preview=partial(preview, text=training_data.preview_captions(config.seed, PREVIEW_CAPTIONS) if config.log.sample_every else None),
        open_stream=lambda cursor: training_data.stream(config.seed, rank_share(config, accelerator), cursor),
        sharded=sharding != "none",
    )


def build_networks(
    config: Config, options: dict[str, Any], accelerator: Accelerator, sharding: parallel.Sharding, *, fresh: bool
) -> tuple[nn.Module, nn.Module]:
    """The network to train and the copy that holds its average, as they lie on this rank: with their first weights if the run is fresh."""
    train, device = config.train, accelerator.device
    given = bool(config.init_from or train.lora_rank)  # first weights that come whole
    network = registry.build(seed=config.seed, device="meta" if sharding != "none" and not given else "cpu", **options)
    if fresh:
        for note in load_first_weights(config, network):
            accelerator.print(printable(note))
    if train.lora_rank:
        add_lora(network, train.lora_rank, train.lora_alpha, seed=config.seed)
    if sharding == "none":
        network = network.to(device)
    average = copy.deepcopy(network)
    blocks = [block for _, block in named_blocks(network)]
    if train.compile:
        for block in blocks:
            block.compile()
    if sharding != "none":
        mesh = parallel.build_mesh(sharding, device)
        parallel.shard_model(network, blocks, mesh, accelerator.mixed_precision)
        parallel.shard_model(average, [block for _, block in named_blocks(average)], mesh)
        if not given:
            registry.initialise(network.to_empty(device=device), config.seed)
            average.to_empty(device=device)
            parallel.copy_values(network, average)
    return network, average


def load_first_weights(config: Config, network: nn.Module) -> tuple[str, ...]:
    """Put published weights, or those that low-rank additions are to stand beside, into a fresh network; what is to be said of it."""
    if config.init_from:
        report = init_from_published(config.init_from, network)
        flow = " ".join(f"flow.{name}={value}" for name, value in report.required.flow.items() if value != getattr(config.flow, name))
        notes = (*report.notes, f"the weights were trained with {flow}, and this recipe is another") if flow else report.notes
        return tuple(f"init_from={config.init_from}: {note}." for note in notes)
    if config.train.lora_rank and config.checkpoint.start_from:
        load_average(find_checkpoint(Path(config.checkpoint.start_from)), network)
    elif config.train.lora_rank:
        raise ValueError("train.lora_rank without weights to add to: give init_from, or checkpoint.start_from.")
    return ()


def check_exportable(config: Config, space: LatentSpace, num_classes: int, encoders: int) -> None:
    """Raises ValueError for what diffusers could not hold."""
    export_form(config.flow)
    if config.flow.objective == "joint":
        options = build_model_kwargs(config.model, space.shape, num_classes, (8, 8), config.flow.objective)
        check_joint_export(space, config.model.conditioning, unsupported_by_stock(registry.build(device="meta", **options)))
    if config.model.conditioning == "class":
        check_num_classes(num_classes)
    check_export(space, encoders)


def export(folder: Path) -> None:
    """Write the averaged weights of the run's last checkpoint as a folder that diffusers loads.

    Raises:
        ValueError: it failed; training did not.
    """
    from . import sample

    try:
        sample.export_run(ExportOptions(run=str(folder), output=str(folder / "export")))
    except Exception as error:
        remedy = f"`python sample.py export --run {folder} --output {folder / 'export'}` tries it again"
        raise ValueError(f"training is finished and saved; its export failed ({type(error).__name__}: {error}): {remedy}.") from error


DRY_RUN_HOOKS = DryRunHooks(
    options=Options,
    bytes_of=parse_size,
    survey=survey,
    check_sides=check_sides,
    share=Share,
    build_model=registry.build,
    example_inputs=example_inputs,
    count_params_and_macs=count_params_and_macs,
    fsdp_units=memory.fsdp_units,
    estimate_memory=memory.estimate_memory,
    measure_memory=memory.measure_memory,
    inference_cost=memory.inference_cost,
    add_lora=add_lora,
    init_from_published=init_from_published,
    checks=(lambda c, space, seen: check_exportable(c, space, len(seen.class_names), len(seen.text_encoders)) if c.export else None,),
)
"""What a dry run tries of the other rooms."""


def parse_recipe(argv: list[str]) -> Config:
    """Return the recipe of a command line; a kind that no table has is said to be of the run's plugins, where it records some."""
    try:
        return parse(Config, argv, ALIASES)
    except UnknownKindError:
        folder = Path(read_word(argv, "output_dir") or Config().output_dir)
        found = CheckpointManager(folder, 1).latest() if folder.is_dir() else None
        with explain_missing(load_state(found).get("plugins") if found else None):
            raise


@report_errors
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    argv = take_plugins(argv)
    return dry_run(argv, DRY_RUN_HOOKS) if is_switch_set(argv, "dry_run") else train(parse_recipe(argv))


def program(argv: list[str]) -> None:
    """The command as a program: trackers that hang do not keep the process."""
    exit_process(main(argv))
