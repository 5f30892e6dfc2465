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
from condot.core.process import Stopper

from ..checkpoint.store import Store, find, load_into, load_state
from ..config.parse import as_mapping
from ..config.schema import Config
from ..ema.averages import Averages
from ..ema.snapshots import forget
from ..flow import Condition
from ..hub.secrets import scrubbed
from ..latent_space import Space
from ..objectives.training_objective import Method
from ..tracking.run_log import BadSamples, Log, Meter
from ..tracking.trackers import attach
from .best_effort import SideWork
from .conditioning import MicroBatch
from .guard import Evidence, Guard
from .resume_rules import compare, write_journal
from .status import Status
from .step_stats import Pulse
from .watchdog import Watch


class Stream(Protocol):
    """What gives micro-batches, and remembers the samples it replaced: see data.stream.Stream."""

    def __next__(self) -> MicroBatch: ...
    def ready(self, count: int) -> BaseException | None: ...
    def take_faults(self) -> list[Any]: ...
    def keys(self, batch: Any) -> list[str]: ...
    def close(self) -> None: ...


class Told(Exception):
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
    ema: Averages
    optimizer: Any
    method: Method
    encode: Callable[[MicroBatch, int], Tensor]
    """From a micro-batch and its step to what the model learns, (B, *S), on the device."""
    decode: Callable[[Tensor], Tensor]
    """From that to images, -1..1."""
    condition: Callable[[MicroBatch, int, Tensor], tuple[Condition, ...]]
    """From a micro-batch, its step and a chance a sample, (B,), to what the model takes beside x and t, some of it null."""
    store: Store
    snapshots: Store
    """Of the power averages."""
    status: Status
    about: dict[str, Any]
    """What a checkpoint says of its run: `config`, `class_names`, and `facts`, on which a resumed run must agree."""
    stopper: Stopper
    meter: Meter
    watch: Watch
    guard: Guard
    pulse: Pulse
    sample: Callable[[Run], None]
    """Writes a grid of samples; where the network is shared out, all ranks together."""
    open: Callable[[int], Stream]
    """The stream from a position on."""
    sharded: bool = False
    log: Log = field(init=False)
    stream: Stream = field(init=False)
    bad: BadSamples = field(init=False)
    """Counted from where the run goes on."""
    evidence: Evidence = field(init=False)
    step: int = 0
    images: int = 0
    """Seen: the clock of averages and logs."""
    cursor: int = 0
    """Positions of the stream consumed: as many as images, and those that were passed over."""
    saved: int = -1
    """The step of the newest checkpoint; -1 for none."""
    again: int | None = None
    """The step at which a save that failed is tried again."""
    side: SideWork = field(init=False)
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
        with self.watch.at("saving"):
            self.settle()
            if self.saved == self.step:
                return
            state = {
                "step": self.step,
                "images": self.images,
                "cursor": self.cursor,
                "meter": self.meter.state(),
                "guard": self.guard.state(),
                "averages": self.ema.labels,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                **self.about,
            }
            self.store.begin(self.step, self.tensors(), state)
            if wait or not self.config.checkpoint.asynchronous:
                self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if there is one; on failure say why and go on, to try again soon."""
        if self.store.pending is None:
            return
        step = self.store.pending
        errors = self.store.finish()
        if not errors:
            self.saved, self.again = step, None
            return
        self.again = self.step + max(1, self.config.checkpoint.every // 10)
        self.log.say(
            f"checkpoint of step {step} failed, older ones are untouched: {'; '.join(errors)}. It is tried again at step {self.again}."
        )

    def load(self, folder: Path) -> None:
        """Restore a checkpoint, and pass over what a rollback to it says.

        Raises:
            ValueError: it is damaged, or of another network, flow or data set.
        """
        state = load_state(folder)
        differences = compare(state["facts"], self.about["facts"])
        if differences:
            raise ValueError(f"{folder} is of another run: {'; '.join(differences)}. Give another --output_dir, or that run's settings.")
        optimizer = self._optimizer_state()
        moments = {f"optim.{k}": v for k, v in optimizer.items() if isinstance(v, Tensor)}
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        kept = state.get("averages", ())
        averages, copied = self.ema.stored(kept, str(folder))
        beside = ["ema["] if any(name.startswith("ema.") for name in averages) else ["ema[", "ema."]
        try:
            load_into(folder, weights | averages | moments, allow_unexpected=beside)
        except ValueError as error:
            raise ValueError(f"{error} Or give another --output_dir.") from error
        self.ema.begin(copied)
        self.ema.begin_raw(self.network, kept)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        set_optimizer_state_dict(self.network, inner, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        self.step = self.saved = state["step"]
        self.again = None
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
        found = find(folder)
        weights = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        main = {name: value for name, value in self.ema.tensors().items() if name.startswith("ema.")}
        try:
            load_into(found, weights | main, allow_unexpected=["ema[", "optim."])
        except ValueError as error:
            raise _unfit(found, error) from error
        self.ema.begin()

    def told(self, trouble: int = 0) -> int:
        """Hear, in work beside training, whether it is to be given up. Where all ranks share it, all together.

        Args:
            trouble: of this rank, 0 for none.

        Returns:
            The worst trouble of any rank that shares the work.

        Raises:
            Told: a signal came.
        """
        come = self.stopper.requested
        if self.sharded:
            flags = torch.tensor([float(come), float(trouble)], device=self.accelerator.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            come, trouble = flags[0].item() > 0, int(flags[1].item())
        if come:
            raise Told
        return trouble


def load_average(found: Path, network: nn.Module) -> None:
    """Put the first average of another run's checkpoint into a network that is whole.

    Raises:
        ValueError: weights of another network.
    """
    try:
        load_into(found, {f"ema.{k}": v for k, v in network.state_dict().items()}, allow_unexpected=["ema[", "model.", "optim."])
    except ValueError as error:
        raise _unfit(found, error) from error


def _unfit(found: Path, error: ValueError) -> ValueError:
    """Return what to say of a beginning whose weights do not fit."""
    adapted = ".base_layer." in str(error)
    remedy = (
        "It holds low-rank additions: export it, and give the folder as init_from."
        if adapted
        else "Give it the same section `model` and classes."
    )
    return ValueError(f"checkpoint.start_from={found}: {error} {remedy}")


def begin(run: Run, checkpoint: Path | None, space: Space) -> None:
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
    run.evidence = Evidence(folder, main=main, start=run.step, fresh=checkpoint is None)
    run.cursor = max(run.cursor, run.evidence.cursor(run.step))
    run.bad = BadSamples(folder, share=config.data.max_bad_share, main=main, start=run.cursor)
    if main:
        run.store.sweep(checkpoint)
        write_whole(folder / "config.yaml", yaml.safe_dump(as_mapping(config), sort_keys=False))
        write_journal(folder, run.about.get("changes", []))
        origin = f"goes on from {checkpoint}" if checkpoint else "starts afresh"
        where = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device}"
        say(f"{folder} {origin}: step {run.step} of {config.train.max_steps}, {where}; {space}")
        forget(run.snapshots, run.step)
    run.stream = run.open(run.cursor)
    told = scrubbed(as_mapping(config))
    run.log = Log(folder, main=main, start=run.step, stop=config.train.max_steps, accelerator=run.accelerator)
    run.side = SideWork(run.log.say)
    run.side("log.report_to", lambda: attach(run.accelerator, config.log.report_to, config.log.project, folder, told, run.step))
