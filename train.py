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
from torch import Tensor

import data
import models
from data.encoders import Autoencoder, read_autoencoder
from data.options import Options
from data.shards import Shards
from data.stream import Share, to_unit
from models.condition import drop
from models.convert import check_classes, to_stock
from pipeline import launch
from pipeline.checkpoint import Store, choose
from pipeline.config import ALIASES, Config, model_options
from pipeline.ema import Ema
from pipeline.export import Card, write_folder
from pipeline.fold import check_export
from pipeline.loop import MicroBatch, Run, fit
from pipeline.method import Method
from pipeline.optim import adamw
from pipeline.preview import preview
from pipeline.recipe import as_mapping, facts_of, parse
from pipeline.space import Space
from pipeline.stock import form_of
from pipeline.tracking import BadSamples, Log, Meter


def train(config: Config) -> int:
    """Train, resume, export; returns the exit status.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    options = Options(**vars(config.data))
    images = data.open_shards(options)
    space, latents = see(options, images)
    if config.export:  # what could not be exported at the end is refused at the start
        form_of(config.flow)
        check_classes(len(images.manifest.class_names))
        check_export(space)
    accelerator = launch.start(config)
    share = Share(
        batch_size=config.train.batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    launch.agree("data.shards", images.fingerprint)
    owned = launch.lock(folder) if accelerator.is_main_process else None
    run = assemble(config, images, space, accelerator)
    data.check_sides(options, space.factor * int(run.network.multiple))  # type: ignore[arg-type]
    checkpoint = choose(run.store, config.checkpoint.resume)
    if checkpoint:
        run.load(checkpoint)
    elif config.checkpoint.start_from:
        run.start_from(Path(config.checkpoint.start_from))
    if accelerator.is_main_process:
        run.store.sweep()
        (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        origin = f"goes on from {checkpoint}" if checkpoint else "starts afresh"
        print(
            f"{folder} {origin}: step {run.step} of {config.train.max_steps}, "
            f"{accelerator.num_processes} process(es) on {accelerator.device}; {space}"
        )
    run.bad = BadSamples(folder, share=config.data.max_bad_share, main=accelerator.is_main_process, start=run.images)
    stream = data.build(options, seed=config.seed, share=share, start=run.images, images=images, latents=latents)
    accelerator.init_trackers("tensorboard")
    log = Log(folder, main=accelerator.is_main_process, start=run.step, stop=config.train.max_steps, accelerator=accelerator)
    STOPPER.defer()
    try:
        fit(run, stream, log, config.train.max_steps)
    finally:
        log.close()
        stream.close()
    accelerator.end_training()
    if STOPPER.requested:
        log.say(f"stopped at step {run.step}; the same command goes on from there.")
    elif config.export and accelerator.is_main_process:
        export(run, folder / "export")
    leave_group(STOPPER.exit_status)
    if owned:
        owned.close()
    return STOPPER.exit_status


def see(options: Options, images: Shards) -> tuple[Space, data.Encoded | None]:
    """What the network works on, and the latents if they are encoded already.

    Raises:
        ValueError: an autoencoder that is not there or does not fit, a cache of another making.
    """
    if not options.autoencoder:
        return Space.of_pixels(options.channels, options.resolution), None
    known = read_autoencoder(options.autoencoder)
    data.check_shapes(options, known)
    space = Space.of_latents(known, options.resolution)
    cache = data.open_latents(options, images, known)
    space = space.measured(cache.encoding["statistics"]) if cache else space  # online too, so that the two are one run
    return space.given(options.latent_scale, options.latent_shift), cache if options.encoding == "cached" else None


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


def assemble(config: Config, shards: Shards, space: Space, accelerator: Accelerator) -> Run:
    """Introduce the rooms to one another: network, objective, optimiser, average, checkpoints."""
    set_seed(config.seed)
    names = shards.manifest.class_names
    network = models.build(**model_options(config, space.shape, len(names))).to(accelerator.device)
    ema = Ema(network, config.ema)
    if config.train.compile:
        network.compile()
    model, optimizer = accelerator.prepare(network, adamw(network, config.train))
    method = Method(config.flow, space.shape, config.train.batch_size)
    settings = as_mapping(config)
    facts = facts_of(config, shards.fingerprint) | {"space": space.facts if space.latent else {}}
    return Run(
        config=config,
        accelerator=accelerator,
        network=network,
        model=model,
        ema=ema,
        optimizer=optimizer,
        method=method,
        encode=encoder(config, space, accelerator.device),
        decode=space.decoder(partial(Autoencoder, space.autoencoder, accelerator.device)),
        drop_label=partial(drop, null=len(names), probability=config.train.label_dropout),
        store=Store(Path(config.output_dir), config.checkpoint.keep),
        about={"config": settings, "class_names": list(names), "facts": facts, "space": vars(space)},
        stopper=STOPPER,
        meter=Meter(accelerator),
        sample=preview,
    )


def export(run: Run, output: Path) -> None:
    """Write the averaged weights as a folder for stock diffusers."""
    card = Card.of(Path(run.config.output_dir), run.images, run.step, run.network)
    network = to_stock(run.ema.model.cpu(), form_of(run.config.flow).factor)
    space = Space.of(run.about["space"])
    vae = Autoencoder(space.autoencoder).model if space.latent else None
    write_folder(output, network, run.config, tuple(run.about["class_names"]), card, space, vae)


@reported
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    return train(parse(Config, argv, ALIASES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
