"""Where a run starts: its own checkpoint, another run's weights, or afresh; and the files that it opens."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import nn

from condot.core.atomic_files import write_whole
from condot.core.printable import say

from ..checkpoint.store import find_checkpoint, load_into
from ..config.parse import config_to_mapping
from ..ema.snapshots import remove_later_snapshots
from ..hub.secrets import without_local_paths
from ..latent_space import LatentSpace
from ..tracking.bad_samples import BadSamples
from ..tracking.run_log import RunLog
from ..tracking.trackers import attach_trackers
from .best_effort import BestEffort
from .callbacks import build_callbacks
from .incidents import IncidentLog
from .resume_rules import write_journal
from .run import Run


def start_from(run: Run, folder: Path) -> None:
    """Take the weights and the average of another run's checkpoint, and nothing else: a next stage begins.

    Raises:
        ValueError: no good checkpoint there, or weights of another network.
    """
    found = find_checkpoint(folder)
    weights = {f"model.{k}": v for k, v in run.network.state_dict().items()}
    main = {name: value for name, value in run.ema.tensors().items() if name.startswith("ema.")}
    try:
        load_into(found, weights | main, allow_unexpected=["ema[", "optim."])
    except ValueError as error:
        raise _weights_mismatch(found, error) from error
    run.ema.copy_averages()


def load_average(found: Path, network: nn.Module) -> None:
    """Put the first average of another run's checkpoint into a network that is whole.

    Raises:
        ValueError: weights of another network.
    """
    try:
        load_into(found, {f"ema.{k}": v for k, v in network.state_dict().items()}, allow_unexpected=["ema[", "model.", "optim."])
    except ValueError as error:
        raise _weights_mismatch(found, error) from error


def _weights_mismatch(found: Path, error: ValueError) -> ValueError:
    """Return what to say of a beginning whose weights do not fit."""
    adapted = ".base_layer." in str(error)
    remedy = (
        "It holds low-rank additions: export it, and give the folder as init_from."
        if adapted
        else "Give it the same section `model` and classes."
    )
    return ValueError(f"checkpoint.start_from={found}: {error} {remedy}")


def start_or_resume(run: Run, checkpoint: Path | None, space: LatentSpace) -> None:
    """Go on from a checkpoint, or begin afresh, and say which; open what the run reads and writes.

    Args:
        run: assembled.
        checkpoint: of this run.
        space: that it trains in.
    """
    folder, config, main = Path(run.config.output_dir), run.config, run.accelerator.is_main_process
    if checkpoint:
        run.load(checkpoint)
    elif config.checkpoint.start_from and not config.train.lora_rank:
        start_from(run, Path(config.checkpoint.start_from))
    run.incidents = IncidentLog(folder, main=main, start=run.step, fresh=checkpoint is None)
    run.cursor = max(run.cursor, run.incidents.cursor_after_rollback(run.step))
    run.bad_samples = BadSamples(folder, share=config.data.max_bad_share, main=main, start=run.cursor)
    if main:
        run.checkpoints.remove_leftovers(checkpoint)
        write_whole(folder / "config.yaml", yaml.safe_dump(config_to_mapping(config), sort_keys=False))
        write_journal(folder, run.metadata.get("changes", []))
        origin = f"goes on from {checkpoint}" if checkpoint else "starts afresh"
        where = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device}"
        say(f"{folder} {origin}: step {run.step} of {config.train.max_steps}, {where}; {space}")
        remove_later_snapshots(run.snapshots, run.step)
    run.stream = run.open_stream(run.cursor)
    settings = without_local_paths(config_to_mapping(config))
    run.log = RunLog(folder, main=main, start=run.step, stop=config.train.max_steps, accelerator=run.accelerator)
    run.best_effort = BestEffort(run.log.say)
    run.best_effort(
        "log.report_to", lambda: attach_trackers(run.accelerator, config.log.report_to, config.log.project, folder, settings, run.step)
    )
    run.callbacks = build_callbacks()
