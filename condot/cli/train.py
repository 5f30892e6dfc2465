"""`condot train`: train an image generator; the same command resumes.

In the checkout `accelerate launch train.py --config configs/digits.yaml` is this command.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

from condot.core.plugins import changed_plugins, explain_missing, take_plugins
from condot.core.process import report_errors
from condot.core.registry import UnknownKindError
from condot.data.loader.build import check_sides
from condot.pipeline.checkpoint.store import CheckpointManager, load_state, select_checkpoint
from condot.pipeline.config.parse import is_switch_set, parse, read_word
from condot.pipeline.config.schema import ALIASES, Config
from condot.pipeline.dry_run.report import dry_run
from condot.pipeline.launch import distributed
from condot.pipeline.launch.folder_lock import lock_folder
from condot.pipeline.sampling.options import ExportOptions
from condot.pipeline.tracking.trackers import check_installed as check_trackers
from condot.pipeline.tracking.trackers import exit_process
from condot.pipeline.training.loop import run_training
from condot.pipeline.training.optimizer import check_ramp
from condot.pipeline.training.resume_rules import change_notes, extend_journal, resume_config
from condot.pipeline.training.start import start_or_resume
from condot.pipeline.training.status import Status
from condot.training_result import TrainingResult

from .assembly.build_run import benchmark_precision, build_run
from .assembly.open_inputs import open_inputs
from .dry_run import DRY_RUN_HOOKS
from .export import export_run
from .host import Host, program_host


def train(config: Config, host: Host) -> TrainingResult:
    """Train, resume, export.

    Raises:
        ValueError: what a user can mend, before any work is lost.
    """
    folder = Path(config.output_dir)
    check_trackers(config.log.report_to)
    check_ramp(config.train)
    data, space = open_inputs(config)
    group = distributed.init_distributed(config)

    checkpoints = CheckpointManager(folder, config.checkpoint.keep)
    checkpoint = select_checkpoint(checkpoints, config.checkpoint.resume)
    saved = load_state(checkpoint) if checkpoint else {}
    config, change = resume_config(config, saved) if checkpoint else (config, None)

    pick_precision = partial(benchmark_precision, config, data, space)
    accelerator = distributed.create_accelerator(config, group, saved.get("precision"), pick_precision)
    distributed.check_same_data("data.shards", data.images.fingerprint)
    folder_lock = lock_folder(folder) if accelerator.is_main_process else None
    with closing(folder_lock) if folder_lock else nullcontext():
        status = Status(folder, accelerator.is_main_process)
        status.lock = folder_lock
        run = build_run(config, data, space, accelerator, checkpoints, status, host, fresh=checkpoint is None)
        if folder_lock:
            run.checkpoints.lock_error = run.snapshots.lock_error = folder_lock.lock_error
        run.metadata["changes"] = extend_journal(saved, change)
        check_sides(data.options, space.factor * int(run.network.size_multiple))  # type: ignore[arg-type]
        start_or_resume(run, checkpoint, space)
        for note in (*changed_plugins(saved.get("plugins")), *change_notes(change, config), data.caption_note):
            run.log.say(note)

        host.interrupt.defer()
        code = run_training(run)
        if data.truncation_note:
            run.log.say(data.truncation_note)
        accelerator.end_training()
        exported = None
        if code == 0 and config.export and accelerator.is_main_process:
            exported = export_at_end(folder)
        host.leave(code)
    latest = next(iter(run.checkpoints.folders()), None)  # not verified, which would read all of it
    return TrainingResult(folder=folder, step=run.step, exit_status=code, checkpoint=latest, export=exported)


def export_at_end(folder: Path) -> Path:
    """Write the averaged weights of the run's last checkpoint as a folder that diffusers loads, and return it.

    Raises:
        ValueError: it failed; training did not.
    """
    output = folder / "export"
    try:
        return export_run(ExportOptions(run=str(folder), output=str(output)))
    except Exception as error:
        remedy = f"`condot export --run {folder} --output {output}` tries it again"
        raise ValueError(f"training is finished and saved; its export failed ({type(error).__name__}: {error}): {remedy}.") from error


@report_errors
def main(argv: list[str]) -> int:
    """Run the command, or its dry run; returns the exit status."""
    argv = take_plugins(argv)
    if is_switch_set(argv, "dry_run"):
        return dry_run(argv, DRY_RUN_HOOKS)
    return train(parse_recipe(argv), program_host()).exit_status


def parse_recipe(argv: list[str]) -> Config:
    """Return the recipe of a command line; of a kind that no table has say which plugin it was, where the run records some."""
    try:
        return parse(Config, argv, ALIASES)
    except UnknownKindError:
        folder = Path(read_word(argv, "output_dir") or Config().output_dir)
        found = CheckpointManager(folder, 1).latest() if folder.is_dir() else None
        with explain_missing(load_state(found).get("plugins") if found else None):
            raise


def program(argv: list[str]) -> NoReturn:
    """Run the command as a program: trackers that hang do not keep the process."""
    exit_process(main(argv))
