"""A run: everything that training changes or needs, and how it is saved and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from condot.core.process import InterruptHandler

from ..checkpoint.store import CheckpointManager, load_into, load_state
from ..config.objective import TrainingObjective
from ..config.schema import Config
from ..ema.averages import WeightAverages
from ..flow import Condition
from ..tracking.bad_samples import BadSamples
from ..tracking.meter import Meter
from ..tracking.run_log import RunLog
from .best_effort import BestEffort
from .conditioning import MicroBatch
from .guard import Guard
from .incidents import IncidentLog
from .resume_rules import find_differences
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


class Callback(Protocol):
    """What falls due after a step: see callbacks.py."""

    needs_checked_step: bool
    """Whether it must know that the step was good: on a GPU that is a wait, when it is due."""

    def due(self, run: Run) -> bool:
        """Return whether it is to act after the step that `run.step` counts last; the same on all ranks."""
        ...

    def act(self, run: Run) -> None:
        """Act, on all ranks together; `run.accelerator.is_main_process` says who writes."""
        ...


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
    callbacks: list[Callback] = field(default_factory=list)
    """What falls due after a step, in order."""

    @property
    def is_done(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.train.max_steps

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
