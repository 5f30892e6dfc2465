"""Train an image generator: `accelerate launch train.py --config configs/digits.yaml`; the same command resumes."""

from __future__ import annotations

import sys

from pipeline.process import Stopper, leave_group, own_allocator, reported

STOPPER = Stopper("the same command goes on from the last checkpoint")  # before the slow imports
if __name__ == "__main__":
    own_allocator()

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import data
import models
from data.encoders import Autoencoder
from data.options import Options, bytes_of
from data.sources import Sources
from data.stream import Share, to_unit
from data.survey import survey
from data.words import Words
from models import memory
from models.convert import check_classes, to_exported, unheld
from models.cost import cost, example
from models.lora import add_lora, merge_lora
from models.published import load_published
from pipeline import launch, precision
from pipeline.card import Card
from pipeline.case import Rooms
from pipeline.checkpoint import Store, averages, choose, find, load_state
from pipeline.choice import check_encoders
from pipeline.config import ALIASES, Config
from pipeline.dry_run import dry_run
from pipeline.ema import Ema
from pipeline.export import write_folder
from pipeline.fold import check_export
from pipeline.loop import Run, fit
from pipeline.method import Method
from pipeline.networks import model_options
from pipeline.optim import adamw
from pipeline.precision import Precision
from pipeline.preview import preview
from pipeline.recipe import as_mapping, asked, facts_of, parse
from pipeline.space import Space
from pipeline.stock import form_of
from pipeline.told import MicroBatch, Teller
from pipeline.tracking import BadSamples, Log, Meter

SHOWN = 32
"""Captions that the preview draws."""


def train(config: Config) -> int:
    """Train, resume, export; returns the exit status.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    sources, space = see(config)
    store = Store(folder, config.checkpoint.keep)
    checkpoint = choose(store, config.checkpoint.resume)
    saved = load_state(checkpoint).get("precision") if checkpoint else None
    accelerator = launch.start(config, saved, partial(measure, config, sources, space))
    launch.agree("data.shards", sources.images.fingerprint)
    owned = launch.lock(folder) if accelerator.is_main_process else None
    run = assemble(config, sources, space, accelerator, store, fresh=checkpoint is None)
    data.check_sides(sources.options, space.factor * int(run.network.multiple))  # type: ignore[arg-type]
    begin(run, space, checkpoint)
    run.bad = BadSamples(folder, share=config.data.max_bad_share, main=accelerator.is_main_process, start=run.images)
    stream = sources.stream(config.seed, share_of(config, accelerator), run.images)
    accelerator.init_trackers("tensorboard")
    log = Log(folder, main=accelerator.is_main_process, start=run.step, stop=config.train.max_steps, accelerator=accelerator)
    STOPPER.defer()
    try:
        fit(run, stream, log, config.train.max_steps)
    finally:
        log.close()
        stream.close()
    if sources.cut:
        log.say(sources.cut)
    accelerator.end_training()
    if STOPPER.requested:
        log.say(f"stopped at step {run.step}; the same command goes on from there.")
    elif config.export and accelerator.is_main_process:
        export(run, sources, folder / "export")
    leave_group(STOPPER.exit_status)
    if owned:
        owned.close()
    return STOPPER.exit_status


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
    options = model_options(config.model, space.shape, len(sources.images.manifest.class_names), sources.widths)
    network = models.build(seed=0, **options).to(device)
    micro = max(1, config.train.batch_size // config.train.gradient_accumulation_steps // ranks)
    return precision.choose(network, example(network, space.shape, batch=micro, tokens=16, text_width=widths[0], pooled_width=widths[1]))


def share_of(config: Config, accelerator: Accelerator) -> Share:
    """This rank's part of every global batch."""
    accumulation, rank = config.train.gradient_accumulation_steps, accelerator.process_index
    return Share(batch_size=config.train.batch_size, accumulation=accumulation, rank=rank, ranks=accelerator.num_processes)


def assemble(config: Config, sources: Sources, space: Space, accelerator: Accelerator, store: Store, *, fresh: bool) -> Run:
    """Introduce the rooms to one another: network, objective, optimiser, average, checkpoints."""
    set_seed(config.seed)
    names, device = sources.images.manifest.class_names, accelerator.device
    words = sources.listen(device)
    method = Method(config.flow, space.shape, config.train.batch_size)
    method.check_blocks(config.model.gradient_checkpointing)
    if words:
        method.check_text()
    network = models.build(seed=config.seed, **model_options(config.model, space.shape, len(names), sources.widths))
    if fresh:
        for note in first_weights(config, network):
            accelerator.print(note)
    if config.train.lora_rank:
        add_lora(network, config.train.lora_rank, config.train.lora_alpha, seed=config.seed)
    network = network.to(device)
    ema = Ema(network, config.ema)
    if config.train.compile:
        network.compile()
    model, optimizer = accelerator.prepare(network, adamw(network, config.train))
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
        ema=ema,
        optimizer=optimizer,
        method=method,
        encode=encoder(config, space, device),
        decode=space.decoder(partial(Autoencoder, space.autoencoder, device)),
        condition=Teller(config, len(names), device, words, bool(network.micro_conditions), space.factor if sources.cached else 1),
        store=store,
        about=about,
        stopper=STOPPER,
        meter=Meter(accelerator),
        sample=partial(preview, text=sources.shown(config.seed, SHOWN) if config.log.sample_every else None),
    )


def first_weights(config: Config, network: nn.Module) -> tuple[str, ...]:
    """Put published weights, or those that low-rank additions are to stand beside, into a fresh network; what is to be said of it."""
    if config.init_from:
        report = load_published(config.init_from, network)
        flow = " ".join(f"flow.{name}={value}" for name, value in report.needs.flow.items() if value != getattr(config.flow, name))
        notes = (*report.notes, f"the weights were trained with {flow}, and this recipe is another") if flow else report.notes
        return tuple(f"init_from={config.init_from}: {note}." for note in notes)
    if config.train.lora_rank and config.checkpoint.start_from:
        network.load_state_dict(averages(find(Path(config.checkpoint.start_from))))
    elif config.train.lora_rank:
        raise ValueError("train.lora_rank without weights to add to: give init_from, or checkpoint.start_from.")
    return ()


def begin(run: Run, space: Space, checkpoint: Path | None) -> None:
    """Go on from a checkpoint, or begin afresh, and say which."""
    folder, config = Path(run.config.output_dir), run.config
    if checkpoint:
        run.load(checkpoint)
    elif config.checkpoint.start_from and not config.train.lora_rank:
        run.start_from(Path(config.checkpoint.start_from))
    if run.accelerator.is_main_process:
        run.store.sweep()
        (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        origin = f"goes on from {checkpoint}" if checkpoint else "starts afresh"
        where = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device}"
        print(f"{folder} {origin}: step {run.step} of {config.train.max_steps}, {where}; {space}")


def check_exportable(config: Config, space: Space, num_classes: int, encoders: int) -> None:
    """Raises ValueError for what diffusers could not hold."""
    form_of(config.flow)
    if config.model.takes == "class":
        check_classes(num_classes)
    check_export(space)
    check_encoders(encoders)


def export(run: Run, sources: Sources, output: Path) -> None:
    """Write the averaged weights as a folder that diffusers loads."""
    ours = merge_lora(run.ema.model.cpu())
    card = Card.of(Path(run.config.output_dir), run.images, run.step, ours)
    text, space = run.about["text"], Space.of(run.about["space"])
    masked = bool(text) and run.config.data.text_padding == "mask"
    network, why = to_exported(ours, form_of(run.config.flow).factor, masked), unheld(ours, masked)
    vae = Autoencoder(space.autoencoder).model if space.latent else None
    spoken = Words(sources.spoken).networks if text else ()
    names = () if text else tuple(run.about["class_names"])
    write_folder(output, network, run.config, names, card, space, vae, why=why, spoken=spoken, captions=text.get("captions", ()))


ROOMS = Rooms(
    options=Options,
    bytes_of=bytes_of,
    survey=survey,
    check_sides=data.check_sides,
    share=Share,
    build=models.build,
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
