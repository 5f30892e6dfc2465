"""The network that a run trains and the copy that holds its average, with their first weights, as they lie on a rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from condot.core.printable import printable
from condot.models import registry
from condot.models.cost import named_blocks
from condot.models.init_from import init_from_published
from condot.models.lora import add_lora
from condot.pipeline.checkpoint.store import find_checkpoint
from condot.pipeline.config.schema import Config
from condot.pipeline.launch import parallel
from condot.pipeline.training.start import load_average


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
