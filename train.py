"""Train an image generator: `accelerate launch train.py --config configs/digits.yaml`; the same command resumes."""

from __future__ import annotations

import sys

from pipeline.process import Stopper, leave_group, reported

STOPPER = Stopper("the same command goes on from the last checkpoint")  # before the slow imports

from functools import partial
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

import models
from data.stream import Shards, Share, Stream, to_unit
from models.condition import drop
from models.convert import check_classes, to_stock
from pipeline import launch
from pipeline.checkpoint import Store, choose
from pipeline.config import ALIASES, Config, model_options
from pipeline.ema import Ema
from pipeline.export import Card, write_folder
from pipeline.loop import Run, fit
from pipeline.method import Method
from pipeline.optim import adamw
from pipeline.preview import preview
from pipeline.recipe import as_mapping, parse
from pipeline.stock import form_of
from pipeline.tracking import Log, Meter


def train(config: Config) -> int:
    """Train, resume, export; returns the exit status.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    shards = Shards(config.data.shards, config.data.split)
    if config.export:  # what could not be exported at the end is refused at the start
        form_of(config.flow)
        check_classes(len(shards.manifest.class_names))
    accelerator = launch.start(config)
    share = Share(
        batch_size=config.train.batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    owned = launch.lock(folder) if accelerator.is_main_process else None
    run = assemble(config, shards, accelerator)
    checkpoint = choose(run.store, config.checkpoint.resume)
    if checkpoint:
        run.load(checkpoint)
    if accelerator.is_main_process:
        run.store.sweep()
        (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config), sort_keys=False))
        origin = f"goes on from {checkpoint}" if checkpoint else "starts afresh"
        print(
            f"{folder} {origin}: step {run.step} of {config.train.max_steps}, "
            f"{accelerator.num_processes} process(es) on {accelerator.device}"
        )
    stream = Stream(
        shards,
        channels=config.data.channels,
        resolution=config.data.resolution,
        seed=config.seed,
        share=share,
        block=config.data.shuffle_block,
        flip=config.data.horizontal_flip,
        workers=config.data.workers,
        start=run.images,
    )
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


def assemble(config: Config, shards: Shards, accelerator: Accelerator) -> Run:
    """Introduce the rooms to one another: network, objective, optimiser, average, checkpoints."""
    set_seed(config.seed)
    names = shards.manifest.class_names
    network = models.build(**model_options(config, len(names))).to(accelerator.device)
    ema = Ema(network, config.ema)
    if config.train.compile:
        network.compile()
    model, optimizer = accelerator.prepare(network, adamw(network, config.train))
    shape = (config.data.channels, config.data.resolution, config.data.resolution)
    method = Method(config.flow, shape, config.train.batch_size)
    settings = as_mapping(config)
    data = {key: settings["data"][key] for key in ("split", "resolution", "channels", "horizontal_flip", "shuffle_block")}
    facts = {
        "model": settings["model"],
        "flow": settings["flow"],
        "data": {**data, "shards": shards.manifest.fingerprint},
        "seed": config.seed,
    }
    return Run(
        config=config,
        accelerator=accelerator,
        network=network,
        model=model,
        ema=ema,
        optimizer=optimizer,
        method=method,
        encode=to_unit,
        drop_label=partial(drop, null=len(names), probability=config.train.label_dropout),
        store=Store(Path(config.output_dir), config.checkpoint.keep),
        about={"config": settings, "class_names": list(names), "facts": facts},
        stopper=STOPPER,
        meter=Meter(accelerator),
        sample=preview,
    )


def export(run: Run, output: Path) -> None:
    """Write the averaged weights as a folder for stock diffusers."""
    card = Card.of(Path(run.config.output_dir), run.images, run.step, run.network)
    network = to_stock(run.ema.model.cpu(), form_of(run.config.flow).factor)
    write_folder(output, network, run.config, tuple(run.about["class_names"]), card)


@reported
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    return train(parse(Config, argv, ALIASES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
