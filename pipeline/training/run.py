"""A run: everything that training changes or needs, and how it is saved and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from condot.core.atomic_files import write_whole
from condot.core.printable import say
from condot.core.process import InterruptHandler

from ..checkpoint.store import CheckpointManager, find_checkpoint, load_into, load_state
from ..config.parse import config_to_mapping
from ..config.schema import Config
from ..ema.averages import WeightAverages
from ..ema.snapshots import remove_later_snapshots
from ..flow import Condition
from ..hub.secrets import without_local_paths
from ..latent_space import LatentSpace
from ..objectives.training_objective import TrainingObjective
from ..tracking.bad_samples import BadSamples
from ..tracking.meter import Meter
from ..tracking.run_log import RunLog
from ..tracking.trackers import attach_trackers
from .best_effort import BestEffort
from .conditioning import MicroBatch
from .guard import Guard, IncidentLog
from .resume_rules import find_differences, write_journal
from .status import Status
from .step_stats import StepReducer
from .watchdog import Watchdog


class TrainingStream(Protocol):
    """What gives micro-batches, and remembers the samples it replaced: see data.stream.BatchStream."""

    def __next__(self) -> MicroBatch: ...
    def ready(self, count: int) -> BaseException | None: ...
    def take_faults(self) -> list[Any]: ...
    def keys(self, batch: Any) -> list[str]: ...
    def close(self) -> None: ...


class Interrupted(Exception):
    """Work that is not the state's was given up, since a signal came."""


@dataclass
class Run:
    """Everything that training changes or needs; `train.py` puts it together."""

    config: Config
    accelerator: Accelerator
    network: nn.Module
    """The bare network, whole or this rank's share of it."""
    model: nn.Module
    """The network as Accelerate wrapped it."""
    ema: WeightAverages
    optimizer: Any
    objective: TrainingObjective
    encode: Callable[[MicroBatch, int], Tensor]
    """From a micro-batch and its step to what the model learns, (B, *S), on the device."""
    decode: Callable[[Tensor], Tensor]
    """From that to images, -1..1."""
    condition: Callable[[MicroBatch, int, Tensor], tuple[Condition, ...]]
    """From a micro-batch, its step and a chance a sample, (B,), to what the model takes beside x and t, some of it null."""
    checkpoints: CheckpointManager
    snapshots: CheckpointManager
    """Of the power averages."""
    status: Status
    metadata: dict[str, Any]
    """What a checkpoint says of its run: `config`, `class_names`, and `facts`, on which a resumed run must agree."""
    interrupt: InterruptHandler
    meter: Meter
    watchdog: Watchdog
    guard: Guard
    step_reducer: StepReducer
    preview: Callable[[Run], None]
    """Writes a grid of samples; where the network is shared out, all ranks together."""
    open_stream: Callable[[int], TrainingStream]
    """The stream from a position on."""
    sharded: bool = False
    log: RunLog = field(init=False)
    stream: TrainingStream = field(init=False)
    bad_samples: BadSamples = field(init=False)
    """Counted from where the run goes on."""
    incidents: IncidentLog = field(init=False)
    step: int = 0
    images: int = 0
    """Seen: the clock of averages and logs."""
    cursor: int = 0
    """Positions of the stream consumed: as many as images, and those that were passed over."""
    last_saved_step: int = -1
    """The step of the newest checkpoint; -1 for none."""
    retry_save_at: int | None = None
    """The step at which a save that failed is tried again."""
    best_effort: BestEffort = field(init=False)
    """Does what may fail without harm."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name, as they lie on the ranks."""
        named = {f"model.{k}": v for k, v in self.network.state_dict().items()} | self.ema.tensors()
        return named | {f"optim.{k}": v for k, v in self._optimizer_state().items() if isinstance(v, Tensor)}

    def _optimizer_state(self) -> dict[str, Any]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        fresh = not inner.state
        state = get_optimizer_state_dict(self.network, inner, options=StateDictOptions(flatten_optimizer_state_dict=True))
        if fresh:  # torch makes it by a step of zero gradients, which AdamW's correction of its young moments must not count
            for moments in inner.state.values():
                moments["step"].zero_()
        return state

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint, all ranks together: copied now, written while training goes on, unless it is to be waited for."""
        with self.watchdog.phase("saving"):
            self.wait_for_checkpoint()
            if self.last_saved_step == self.step:
                return
            state = {
                "step": self.step,
                "images": self.images,
                "cursor": self.cursor,
                "meter": self.meter.state(),
                "guard": self.guard.state(),
                "averages": self.ema.labels,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                **self.metadata,
            }
            self.checkpoints.begin(self.step, self.tensors(), state)
            if wait or not self.config.checkpoint.asynchronous:
                self.wait_for_checkpoint()

    def wait_for_checkpoint(self) -> None:
        """Wait for the save under way, if there is one; on failure say why and go on, to try again soon."""
        if self.checkpoints.pending is None:
            return
        step = self.checkpoints.pending
        errors = self.checkpoints.finish()
        if not errors:
            self.last_saved_step, self.retry_save_at = step, None
            return
        self.retry_save_at = self.step + max(1, self.config.checkpoint.every // 10)
        self.log.say(
            f"checkpoint of step {step} failed, older ones are untouched: {'; '.join(errors)}. "
            f"It is tried again at step {self.retry_save_at}."
        )

    def load(self, folder: Path) -> None:
        """Restore a checkpoint, and pass over what a rollback to it says.

        Raises:
            ValueError: it is damaged, or of another network, flow or data set.
        """
        state = load_state(folder)
        differences = find_differences(state["facts"], self.metadata["facts"])
        if differences:
            raise ValueError(f"{folder} is of another run: {'; '.join(differences)}. Give another --output_dir, or that run's settings.")
        optimizer = self._optimizer_state()
        moments = {f"optim.{k}": v for k, v in optimizer.items() if isinstance(v, Tensor)}
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        kept = state.get("averages", ())
        averages, copied = self.ema.locate_in_checkpoint(kept, str(folder))
        ignored = ["ema["] if any(name.startswith("ema.") for name in averages) else ["ema[", "ema."]
        try:
            load_into(folder, weights | averages | moments, allow_unexpected=ignored)
        except ValueError as error:
            raise ValueError(f"{error} Or give another --output_dir.") from error
        self.ema.copy_averages(copied)
        self.ema.copy_raw(self.network, kept)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        set_optimizer_state_dict(self.network, inner, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        self.step = self.last_saved_step = state["step"]
        self.retry_save_at = None
        self.images = state["images"]
        self.cursor = state.get("cursor", self.images)
        try:
            self.meter.restore(state["meter"])
            self.guard.restore(state.get("guard", {}))
            if self.accelerator.scaler and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder}/state.json holds figures that no run wrote ({error}): take another checkpoint.") from error

    def start_from(self, folder: Path) -> None:
        """Take the weights and the average of another run's checkpoint, and nothing else: a next stage begins.

        Raises:
            ValueError: no good checkpoint there, or weights of another network.
        """
        found = find_checkpoint(folder)
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        main = {name: value for name, value in self.ema.tensors().items() if name.startswith("ema.")}
        try:
            load_into(found, weights | main, allow_unexpected=["ema[", "optim."])
        except ValueError as error:
            raise _weights_mismatch(found, error) from error
        self.ema.copy_averages()

    def check_interrupt(self, failure: int = 0) -> int:
        """Hear, in work beside training, whether it is to be given up. Where all ranks share it, all together.

        Args:
            failure: of this rank, 0 for none.

        Returns:
            The worst failure of any rank that shares the work.

        Raises:
            Interrupted: a signal came.
        """
        interrupted = self.interrupt.requested
        if self.sharded:
            flags = torch.tensor([float(interrupted), float(failure)], device=self.accelerator.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            interrupted, failure = flags[0].item() > 0, int(flags[1].item())
        if interrupted:
            raise Interrupted
        return failure


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
        run.start_from(Path(config.checkpoint.start_from))
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
