"""The story of training: what a run is made of, one optimiser step, and what falls due after it.

Noise, time and dropped label of a sample are functions of (seed, step, place in
the global batch), the learning rate is one of the step, the order one of the
images consumed: so a resumed run is the uninterrupted one, and the number of
ranks changes only the order in which gradients are summed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from .checkpoint import Store, find, load_state, load_tensors
from .config import Config
from .ema import Ema
from .flow import Condition
from .method import Method
from .optim import learning_rate
from .process import Stopper
from .told import MicroBatch
from .tracking import BadSamples, Log, Meter


@dataclass
class Run:
    """Everything that training changes or needs; `train.py` puts it together."""

    config: Config
    accelerator: Accelerator
    network: nn.Module
    """The bare network."""
    model: nn.Module
    """The network as Accelerate wrapped it."""
    ema: Ema
    optimizer: Any
    method: Method
    encode: Callable[[MicroBatch, int], Tensor]
    """From a micro-batch and its step to what the model learns, (B, *S), on the device."""
    decode: Callable[[Tensor], Tensor]
    """From that to images, -1..1."""
    condition: Callable[[MicroBatch, int, Tensor], tuple[Condition, ...]]
    """From a micro-batch, its step and a chance a sample, (B,), to what the model takes beside x and t, some of it null."""
    store: Store
    about: dict[str, Any]
    """What a checkpoint says of its run: `config`, `class_names`, and `facts`, on which a resumed run must agree."""
    stopper: Stopper
    meter: Meter
    sample: Callable[[Run], None]
    """Writes a grid of samples."""
    bad: BadSamples = field(init=False)
    """Counted from where the run goes on."""
    step: int = 0
    images: int = 0
    saved: int = 0
    """The step of the newest checkpoint."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""
        named = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        named |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        return named | {f"optim.{k}": v for k, v in self._optimizer_state().items() if isinstance(v, Tensor)}

    def _optimizer_state(self) -> dict[str, Any]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return get_optimizer_state_dict(self.network, inner, options=StateDictOptions(flatten_optimizer_state_dict=True))

    def save(self) -> None:
        """Write a checkpoint, all ranks together; on failure say why and go on, to try again when the next is due.

        Raises:
            ValueError: a loss or gradient since the last log line was not finite; nothing is saved then.
        """
        meter = self.meter.state()
        self.check_finite("loss", meter["loss"])
        if self.accelerator.scaler is None:  # with fp16 a gradient may overflow: the scaler skips that step
            self.check_finite("gradient", meter["norm"])
        state = {"step": self.step, "images": self.images, "meter": meter, **self.about}
        errors = self.store.save(self.step, self.tensors(), state)
        if errors and self.accelerator.is_main_process:
            print(f"\ncheckpoint of step {self.step} failed, older ones are untouched: {'; '.join(errors)}. Free some space.", flush=True)
        if not errors:
            self.saved = self.step

    def check_finite(self, what: str, value: float) -> None:
        """Raises ValueError for a figure that says the run diverged."""
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the {what} is {value} at step {self.step}: training diverged. Lower train.learning_rate="
                f"{self.config.train.learning_rate}; the same command goes on from step {self.saved}."
            )

    def load(self, folder: Path) -> None:
        """Restore a checkpoint.

        Raises:
            ValueError: it is damaged, or of another network, flow or data set.
        """
        state = load_state(folder)
        differences = compare(state["facts"], self.about["facts"])
        if differences:
            raise ValueError(f"{folder} is of another run: {'; '.join(differences)}. Give another --output_dir, or that run's settings.")
        tensors = load_tensors(folder)
        self._load_networks(tensors, str(folder))
        restored = self._optimizer_state()
        for name in restored:
            restored[name] = tensors.get(f"optim.{name}", restored[name])
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        set_optimizer_state_dict(self.network, inner, restored, options=StateDictOptions(flatten_optimizer_state_dict=True))
        self.step = self.saved = state["step"]
        self.images = state["images"]
        self.meter.restore(state["meter"])

    def start_from(self, folder: Path) -> None:
        """Take the weights and the average of another run's checkpoint, and nothing else: a next stage begins.

        Raises:
            ValueError: no good checkpoint there, or weights of another network.
        """
        found = find(folder)
        self._load_networks(load_tensors(found), f"checkpoint.start_from={found}")

    def _load_networks(self, tensors: dict[str, Tensor], where: str) -> None:
        for prefix, module in (("model.", self.network), ("ema.", self.ema.model)):
            try:
                module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            except RuntimeError as error:
                first = " ".join(str(error).split(":", 1)[-1].split())[:300]
                raise ValueError(f"{where} is of another network: {first}. Give it the same section `model` and classes.") from error


def compare(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Each place where two nested mappings differ, as `model.width is 128 there and 256 here`."""
    found = []
    for key in {**saved, **now}:
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += compare(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {a} there and {b} here")
    return found


class Stream(Protocol):
    """What gives micro-batches, and remembers the samples it replaced: see data.stream.Stream."""

    def __next__(self) -> MicroBatch: ...
    def take_faults(self) -> list[Any]: ...


def fit(run: Run, stream: Stream, log: Log, stop: int) -> None:
    """Advance to optimiser step `stop`, or to the step at which a signal came; saved either way.

    Raises:
        ValueError: a loss or gradient that is not finite, seen at a log line
            or a checkpoint, which is not saved then; too many bad samples; or
            a last state that could not be saved.
    """
    run.meter.since = time.perf_counter()
    while run.step < stop and not _stopping(run):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.config.train)
        for _ in range(run.config.train.gradient_accumulation_steps):
            with run.meter.waiting():
                batch = next(stream)
            log.say(run.meter.count(partial(seen, run, batch)))
            with run.accelerator.accumulate(run.model):
                losses = loss_of(run, batch)
                run.accelerator.backward(losses.mean())
                run.meter.add(losses)
                if run.accelerator.sync_gradients:
                    run.meter.add_step(clip(run))
                run.optimizer.step()
                run.optimizer.zero_grad()
        run.step += 1
        run.images += run.config.train.batch_size
        run.ema.update(run.network, run.images, run.config.train.batch_size)
        log.advance()
        notify(run, stream, log, stop)
    if run.saved != run.step:
        run.save()
    if run.saved != run.step:
        raise ValueError(
            f"the state of step {run.step} could not be saved in {run.store.root}: "
            f"free some space; the same command goes on from step {run.saved}."
        )


def loss_of(run: Run, batch: MicroBatch) -> Tensor:
    """The objective on a micro-batch, (B,)."""
    device = run.accelerator.device
    data = run.encode(batch, run.step)
    draws = run.method.draw(run.config.seed, run.step, batch.places.to(device, non_blocking=True), tuple(data.shape[1:]))
    return run.method.losses(run.model, data, draws, *run.condition(batch, run.step, draws.drop))


def seen(run: Run, batch: MicroBatch) -> tuple[Any, ...]:
    """What the network sees of a micro-batch beside the time, nothing dropped: data, (B, *S), and what else it takes."""
    data = run.encode(batch, run.step)
    return data, *run.condition(batch, run.step, torch.ones(len(data), device=run.accelerator.device))


def clip(run: Run) -> Tensor:
    """Shorten the gradients; their norm before, on the device."""
    longest = run.config.train.max_grad_norm or float("inf")
    return run.accelerator.clip_grad_norm_(run.model.parameters(), longest).detach()


def notify(run: Run, stream: Stream, log: Log, stop: int) -> None:
    """Whatever is due after a step: a log line, a checkpoint, a sample grid."""
    config = run.config
    if run.step % config.log.every == 0 or run.step == stop:
        faults = stream.take_faults()
        values = run.meter.read(config.train.batch_size, len(faults))
        run.check_finite("loss", values["loss"] or 0.0)
        values["bad_samples"] = run.bad.report(faults, run.images, any_rank=bool(values["bad_samples"]))
        log.write(run.step, run.images, {**values, "lr": learning_rate(run.step - 1, config.train)})
    paused = time.perf_counter()
    if run.step % config.checkpoint.every == 0:
        run.save()
    if config.log.sample_every and (run.step % config.log.sample_every == 0 or run.step == stop):
        if run.accelerator.is_main_process:
            run.sample(run)
        run.accelerator.wait_for_everyone()
    run.meter.since += time.perf_counter() - paused


def _stopping(run: Run) -> bool:
    """Whether any rank was told to stop; all ranks agree. Asked at log lines only where the answer waits for a device."""
    if run.accelerator.num_processes == 1:
        return run.stopper.requested
    if run.accelerator.device.type != "cpu" and run.step % run.config.log.every:
        return False
    flag = torch.tensor([float(run.stopper.requested)], device=run.accelerator.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag.item() and run.stopper.received is None:
        run.stopper.received = 15
    return bool(flag.item())
