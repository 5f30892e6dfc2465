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

from condot.core.data_options import Options, bytes_of
from condot.core.printable import printable
from condot.core.process import leave_group, reported, stopper_of_program
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.loader.build import check_sides
from condot.data.loader.stream import Share, to_unit
from condot.data.loader.survey import survey
from condot.data.loader.training_data import Sources
from condot.models import memory, registry
from condot.models.convert import check_classes, unheld
from condot.models.cost import cost, example, stages
from condot.models.init_from import load_published
from condot.models.lora import add_lora
from condot.pipeline.checkpoint.store import Store, choose, find, load_state
from condot.pipeline.config.model import model_options
from condot.pipeline.config.parse import as_mapping, asked, parse
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.dry_run.report import dry_run
from condot.pipeline.dry_run.resolved_recipe import Rooms
from condot.pipeline.ema.averages import Averages
from condot.pipeline.ema.snapshots import store_of
from condot.pipeline.export.autoencoder import check_export
from condot.pipeline.export.pipeline_class import check_two_outputs
from condot.pipeline.export.scheduler_map import form_of
from condot.pipeline.latent_space import Space
from condot.pipeline.launch import distributed, parallel, precision
from condot.pipeline.launch.precision import Precision
from condot.pipeline.objectives.training_objective import Method
from condot.pipeline.sampling.options import Export
from condot.pipeline.tracking.mfu import Utilisation
from condot.pipeline.tracking.run_log import Meter
from condot.pipeline.tracking.trackers import check as check_trackers
from condot.pipeline.tracking.trackers import leave
from condot.pipeline.training.conditioning import MicroBatch, Teller
from condot.pipeline.training.guard import Guard
from condot.pipeline.training.loop import story
from condot.pipeline.training.optimizer import adamw, check_ramp
from condot.pipeline.training.preview import preview
from condot.pipeline.training.resume_rules import facts_of, journal_of, notes_of, resumed
from condot.pipeline.training.run import Run, begin, load_average
from condot.pipeline.training.status import Status
from condot.pipeline.training.step_stats import Pulse
from condot.pipeline.training.watchdog import Watch

STOPPER = stopper_of_program()
SHOWN = 32
"""Captions that the preview draws."""


def train(config: Config) -> int:
    """Train, resume, export; returns the exit status.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    check_trackers(config.log.report_to)
    check_ramp(config.train)
    sources, space = see(config)
    group = distributed.enter(config)
    store = Store(folder, config.checkpoint.keep)
    checkpoint = choose(store, config.checkpoint.resume)
    state = load_state(checkpoint) if checkpoint else {}
    config, change = resumed(config, state) if checkpoint else (config, None)
    accelerator = distributed.start(config, group, state.get("precision"), partial(measure, config, sources, space))
    distributed.agree("data.shards", sources.images.fingerprint)
    owned = distributed.lock(folder) if accelerator.is_main_process else None
    with closing(owned) if owned else nullcontext():
        status = Status(folder, accelerator.is_main_process)
        status.lock = owned
        run = assemble(config, sources, space, accelerator, store, status, fresh=checkpoint is None)
        if owned:
            run.store.lost = run.snapshots.lost = owned.lost
        run.about["changes"] = journal_of(state, change)
        check_sides(sources.options, space.factor * int(run.network.multiple))  # type: ignore[arg-type]
        begin(run, checkpoint, space)
        for note in notes_of(change, config):
            run.log.say(note)
        run.log.say(sources.note)
        STOPPER.defer()
        code = story(run)
        if sources.cut:
            run.log.say(sources.cut)
        accelerator.end_training()
        if code == 0 and config.export and accelerator.is_main_process:
            export(folder)
        leave_group(code)
    return code


def see(config: Config) -> tuple[Sources, Space]:
    """Open what the recipe names, and refuse what cannot be trained or exported.

    Raises:
        ValueError: shards, encoders or caches that are not there or do not fit; an export that could not be made.
    """
    if config.init_from and config.checkpoint.start_from:
        raise ValueError(f"init_from={config.init_from!r} and checkpoint.start_from={config.checkpoint.start_from!r}: give one of them.")
    options = Options(**vars(config.data))
    sources = Sources.open(options, config.model.takes == "text")
    space = Space.of_pixels(options.channels, options.resolution)
    if sources.autoencoder:
        space = Space.of_latents(sources.autoencoder, options.resolution)
        if sources.latents:  # online too, so that the two are one run
            space = space.measured(sources.latents.encoding["statistics"])
        space = space.given(options.latent_scale, options.latent_shift)
    if config.export:  # what could not be exported at the end is refused at the start
        check_exportable(config, space, len(sources.images.manifest.class_names), len(sources.spoken))
    return sources, space


def encoder(config: Config, space: Space, device: torch.device) -> Callable[[MicroBatch, int], Tensor]:
    """From a micro-batch to what the network learns: pixels, or latents drawn from their posterior, encoded now or before."""
    online = Autoencoder(space.autoencoder, device) if space.latent and config.data.encoding == "online" else None

    def encode(batch: MicroBatch, step: int) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        if not space.latent:
            return to_unit(images)
        moments = online.moments(to_unit(images)) if online else images.float()
        return space.draw(moments, config.seed, step, batch.places.to(device, non_blocking=True))

    return encode


def measure(config: Config, sources: Sources, space: Space, ranks: int, device: torch.device) -> Precision:
    """The precision in which a network of this recipe computes its micro-batches faster on that device."""
    widths = sources.widths or (0, 0)
    options = model_options(config.model, space.shape, len(sources.images.manifest.class_names), sources.widths, config.flow.objective)
    network = registry.build(seed=0, **options).to(device)
    micro = max(1, config.train.batch_size // config.train.gradient_accumulation_steps // ranks)
    return precision.choose(network, example(network, space.shape, batch=micro, tokens=16, text_width=widths[0], pooled_width=widths[1]))


def share_of(config: Config, accelerator: Accelerator) -> Share:
    """This rank's part of every global batch."""
    accumulation, rank = config.train.gradient_accumulation_steps, accelerator.process_index
    return Share(batch_size=config.train.batch_size, accumulation=accumulation, rank=rank, ranks=accelerator.num_processes)


def assemble(config: Config, sources: Sources, space: Space, accelerator: Accelerator, store: Store, status: Status, *, fresh: bool) -> Run:
    """Introduce the rooms to one another: network, objective, optimiser, averages, checkpoints."""
    set_seed(config.seed % 2**32)  # more NumPy does not take
    torch.manual_seed(config.seed)
    names, device = sources.images.manifest.class_names, accelerator.device
    words = sources.listen(device)
    method = Method(config.flow, space.shape, config.train.batch_size)
    method.check_blocks(config.model.gradient_checkpointing)
    if words:
        method.check_text()
    sharding = distributed.sharding(config)
    options = model_options(config.model, space.shape, len(names), sources.widths, config.flow.objective)
    network, average = networks(config, options, accelerator, sharding, fresh=fresh)
    once = config.flow.objective in ("regression", "joint")  # the others differentiate twice
    plain = registry.build(device="meta", **options).eval() if once else None
    model, optimizer = parallel.prepare(accelerator, network, adamw(network, config.train), sharding)
    lora = [config.train.lora_rank, config.train.lora_alpha] if config.train.lora_rank else []
    said = {"lora": lora, "text": [one.fingerprint for one in sources.spoken], "space": space.facts if space.latent else {}}
    about = {
        "config": as_mapping(config),
        "class_names": list(names),
        "facts": facts_of(config, sources.images.fingerprint) | said,
        "space": vars(space),
        "precision": accelerator.mixed_precision,
        "text": {"widths": sources.widths, "fingerprints": said["text"], "captions": sources.examples(SHOWN)} if words else {},
    }
    return Run(
        config=config,
        accelerator=accelerator,
        network=network,
        model=model,
        ema=Averages(network, average, config.ema),
        optimizer=optimizer,
        method=method,
        encode=encoder(config, space, device),
        decode=space.decoder(partial(Autoencoder, space.autoencoder, device)),
        condition=Teller(config, len(names), device, words, bool(network.micro_conditions), space.factor if sources.cached else 1),
        store=store,
        snapshots=store_of(Path(config.output_dir)),
        status=status,
        about=about,
        stopper=STOPPER,
        meter=Meter(accelerator, Utilisation.of(accelerator, network, plain, config.log.peak_tflops)),
        watch=Watch(config.guard.hang_seconds, status),
        guard=Guard(config.guard),
        pulse=Pulse(device, accelerator.num_processes, scaled=accelerator.scaler is not None),
        sample=partial(preview, text=sources.shown(config.seed, SHOWN) if config.log.sample_every else None),
        open=lambda cursor: sources.stream(config.seed, share_of(config, accelerator), cursor),
        sharded=sharding != "none",
    )


def networks(
    config: Config, options: dict[str, Any], accelerator: Accelerator, sharding: parallel.Sharding, *, fresh: bool
) -> tuple[nn.Module, nn.Module]:
    """The network to train and the copy that holds its average, as they lie on this rank: with their first weights if the run is fresh."""
    train, device = config.train, accelerator.device
    given = bool(config.init_from or train.lora_rank)  # first weights that come whole
    network = registry.build(seed=config.seed, device="meta" if sharding != "none" and not given else "cpu", **options)
    if fresh:
        for note in first_weights(config, network):
            accelerator.print(printable(note))
    if train.lora_rank:
        add_lora(network, train.lora_rank, train.lora_alpha, seed=config.seed)
    if sharding == "none":
        network = network.to(device)
    average = copy.deepcopy(network)
    blocks = [block for _, block in stages(network)]
    if train.compile:
        for block in blocks:
            block.compile()
    if sharding != "none":
        mesh = parallel.mesh_of(sharding, device)
        parallel.shard(network, blocks, mesh, accelerator.mixed_precision)
        parallel.shard(average, [block for _, block in stages(average)], mesh)
        if not given:
            registry.initialise(network.to_empty(device=device), config.seed)
            average.to_empty(device=device)
            parallel.copy_values(network, average)
    return network, average


def first_weights(config: Config, network: nn.Module) -> tuple[str, ...]:
    """Put published weights, or those that low-rank additions are to stand beside, into a fresh network; what is to be said of it."""
    if config.init_from:
        report = load_published(config.init_from, network)
        flow = " ".join(f"flow.{name}={value}" for name, value in report.needs.flow.items() if value != getattr(config.flow, name))
        notes = (*report.notes, f"the weights were trained with {flow}, and this recipe is another") if flow else report.notes
        return tuple(f"init_from={config.init_from}: {note}." for note in notes)
    if config.train.lora_rank and config.checkpoint.start_from:
        load_average(find(Path(config.checkpoint.start_from)), network)
    elif config.train.lora_rank:
        raise ValueError("train.lora_rank without weights to add to: give init_from, or checkpoint.start_from.")
    return ()


def check_exportable(config: Config, space: Space, num_classes: int, encoders: int) -> None:
    """Raises ValueError for what diffusers could not hold."""
    form_of(config.flow)
    if config.flow.objective == "joint":
        options = model_options(config.model, space.shape, num_classes, (8, 8), config.flow.objective)
        check_two_outputs(space, config.model.takes, unheld(registry.build(device="meta", **options)))
    if config.model.takes == "class":
        check_classes(num_classes)
    check_export(space, encoders)


def export(folder: Path) -> None:
    """Write the averaged weights of the run's last checkpoint as a folder that diffusers loads.

    Raises:
        ValueError: it failed; training did not.
    """
    from . import sample

    try:
        sample.export(Export(run=str(folder), output=str(folder / "export")))
    except Exception as error:
        remedy = f"`python sample.py export --run {folder} --output {folder / 'export'}` tries it again"
        raise ValueError(f"training is finished and saved; its export failed ({type(error).__name__}: {error}): {remedy}.") from error


ROOMS = Rooms(
    options=Options,
    bytes_of=bytes_of,
    survey=survey,
    check_sides=check_sides,
    share=Share,
    build=registry.build,
    example=example,
    cost=cost,
    units=memory.units,
    foretell=memory.foretell,
    measured=memory.measured,
    at_work=memory.at_work,
    add_lora=add_lora,
    load_published=load_published,
    checks=(lambda c, space, seen: check_exportable(c, space, len(seen.class_names), len(seen.spoken)) if c.export else None,),
)
"""What a dry run tries of the other rooms."""


@reported
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    return dry_run(argv, ROOMS) if asked(argv, "dry_run") else train(parse(Config, argv, ALIASES))


def program(argv: list[str]) -> None:
    """The command as a program: trackers that hang do not keep the process."""
    leave(main(argv))
