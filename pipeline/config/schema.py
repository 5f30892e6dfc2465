"""The schema of a run: frozen dataclasses that every recipe fills.

The comment behind a field is its help text (`condot train --help`). Fields
are checked here where one value can be wrong by itself; what only the data or
the number of ranks can tell is checked in `train.py`, still before any work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from condot.core.data_config import DataConfig
from condot.core.option_ranges import SEED_RANGE, FloatRange, IntRange, check_numbers
from condot.core.printable import redact

from .flow import FlowConfig
from .model import ModelConfig, default_model_config


def _require(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"{name}={value}: {text}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, in what precision."""

    max_steps: Annotated[int, IntRange("[1, inf)", "at least one optimiser step.")] = 400_000  # optimiser steps in all
    # images per optimiser step, all ranks together, so that the curve does not depend on their number
    batch_size: Annotated[int, IntRange("[1, inf)", "at least one image a step.")] = 256
    # forward passes that one optimiser step is split into
    gradient_accumulation_steps: Annotated[int, IntRange("[1, inf)", "at least one pass a step.")] = 1
    learning_rate: Annotated[float, FloatRange("(0, inf)", "it is positive and finite. Use 1e-4 for a DiT.")] = (
        1e-4  # per step, at its highest
    )
    lr_warmup_steps: Annotated[int, IntRange("[0, inf)", "0 or more steps.")] = 0  # optimiser steps from zero to the learning rate
    lr_ramp: Literal["constant", "linear", "cosine"] = "constant"  # shape of the way down at the end
    # share of the run's steps at its end over which a linear or cosine ramp falls to zero
    lr_decay_fraction: Annotated[float, FloatRange("(0, 1]", "a share above 0, at most 1.")] = 1.0
    # of matrices only; vectors and embeddings are never decayed
    weight_decay: Annotated[float, FloatRange("[0, inf)", "0 (none) or a positive, finite factor. Use 0.01.")] = 0.0
    beta1: Annotated[float, FloatRange("[0, 1)", "from 0 to below 1. Use 0.9.")] = 0.9  # of AdamW
    beta2: Annotated[float, FloatRange("[0, 1)", "from 0 to below 1. Use 0.999.")] = 0.999  # of AdamW
    # gradients longer than this are shortened to it; 0 leaves them
    max_grad_norm: Annotated[float, FloatRange("[0, inf)", "0 (off) or positive and finite.")] = 1.0
    # probability that a sample is trained without its class or caption, for guidance
    condition_dropout: Annotated[float, FloatRange("[0, 1)", "a probability below 1. Use 0.1.")] = 0.1
    # of several text encoders: probability that a sample is trained without this one; SD3 has 0.464
    encoder_dropout: Annotated[float, FloatRange("[0, 1)", "a probability below 1. Use 0.1.")] = 0.0
    mixed_precision: Literal["no", "bf16", "fp16", "fp8", "auto"] | None = None  # None: as launched; auto: the faster of no and bf16
    # FSDP2: weights, gradients, moments and averages in shares on all ranks (full) or on each machine (hybrid); None: as launched
    sharding: Literal["none", "full", "hybrid"] | None = None
    # train only low-rank additions of this rank to the attention and feed-forward layers; 0 trains all weights
    lora_rank: Annotated[int, IntRange("[0, inf)", "0 (all weights are trained) or a rank. Use 16.")] = 0
    # the additions are multiplied by lora_alpha / lora_rank
    lora_alpha: Annotated[float, FloatRange("(0, inf)", "positive and finite. Use 16.")] = 16.0
    compile: bool = False  # torch.compile each block of the network: slower to start, faster on long runs
    # on a CPU: threads of each process; 0 shares the cores among the processes of this machine
    cpu_threads: Annotated[int, IntRange("[0, inf)", "0 (automatic) or a number of threads.")] = 0

    def __post_init__(self) -> None:
        check_numbers(self, "train.")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The averages of the weights; the first half-life's is sampled and exported."""

    enabled: bool = True  # without it the raw weights are sampled and exported
    # images after which a weight counts half; one average each
    halflife: tuple[Annotated[float, FloatRange("(0, inf)", "positive numbers of images.")], ...] = (2e6,)
    # a half-life is at most this share of the images seen so far
    ramp: Annotated[float, FloatRange("(0, inf)", "a positive share. Use 0.05.")] = 0.05
    # EDM2's power-function averages by relative width, such as 0.05 0.1: any width can be rebuilt from two
    power: tuple[Annotated[float, FloatRange("(0, 0.28)", "relative widths between 0 and 0.28, each once. Use 0.05 0.1.")], ...] = ()
    # images between two snapshots of the power averages, from which it is rebuilt; 0: a 64th of the run
    snapshot_every: Annotated[float, FloatRange("[0, inf)", "0 (automatic) or a number of images.")] = 0

    def __post_init__(self) -> None:
        check_numbers(self, "ema.")
        _require(len(self.halflife) > 0, "ema.halflife", list(self.halflife), "at least one average is kept; --ema.enabled=false for none.")
        _require(len(set(self.halflife)) == len(self.halflife), "ema.halflife", list(self.halflife), "each once.")
        _require(len(set(self.power)) == len(self.power), "ema.power", list(self.power), "each once. Use 0.05 0.1.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what is resumed."""

    every: Annotated[int, IntRange("[1, inf)", "at least one step.")] = 5_000  # optimiser steps
    # checkpoints kept; older ones go once a newer one is safe
    keep: Annotated[int, IntRange("[1, inf)", "at least one checkpoint is kept.")] = 2
    asynchronous: bool = True  # copy the state, then write it while training goes on; false waits for the disk
    resume: str = "latest"  # `latest` (fresh where there is none), `none`, or a checkpoint: its folder, or its name in this run's
    start_from: str = ""  # another run's folder, or a checkpoint of it, whose weights and average a fresh run starts from

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a bad step does, and a step that never ends."""

    # steps in a row whose loss or gradient is not finite: so many are skipped, one more rolls back to the last checkpoint
    skips: Annotated[int, IntRange("[0, inf)", "0 or more steps.")] = 3
    # a loss over so many times the median of the last `window` steps rolls back; 0 never
    loss_spike: Annotated[float, FloatRange("[0, inf)")] = 5.0
    norm_spike: Annotated[float, FloatRange("[0, inf)")] = 20.0  # likewise of the gradient's norm; 0 never
    # steps whose median a spike is held against; none is called before so many were seen
    window: Annotated[int, IntRange("[2, inf)", "at least two steps.")] = 100
    # so many, then the run ends with status 3, its evidence in rollbacks.jsonl
    rollbacks: Annotated[int, IntRange("[0, inf)", "0 (the first ends the run) or more.")] = 3
    # a step or a save that takes longer ends the run, saying where each rank stood; 0 never
    hang_seconds: Annotated[float, FloatRange("[0, inf)", "0 (never) or a number of seconds.")] = 1800.0

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")
        for name in ("loss_spike", "norm_spike"):
            spike = getattr(self, name)
            _require(spike == 0 or spike > 1, f"guard.{name}", spike, "0 (never) or above 1. Use 5.")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `--dry_run` reckons with."""

    # processes, one a device; 0: as many as were launched
    ranks: Annotated[int, IntRange("[0, inf)", "0 (as launched) or a number of processes.")] = 0
    # of one rank in training; 0: not known, and no hours are told
    images_per_second: Annotated[float, FloatRange("[0, inf)", "0 (unknown) or a rate.")] = 0.0
    cost_per_hour: Annotated[float, FloatRange("[0, inf)", "0 (unknown) or a price.")] = 0.0  # of one rank, in whatever currency
    memory: str = ""  # of one device, such as 80GB: what needs more is a mistake

    def __post_init__(self) -> None:
        check_numbers(self, "plan.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown while training goes on."""

    # optimiser steps between two lines of metrics.jsonl; the only time the loop waits for the device
    every: Annotated[int, IntRange("[1, inf)", "at least one step.")] = 50
    # optimiser steps between two sample grids; 0 for none
    sample_every: Annotated[int, IntRange("[0, inf)", "0 (off) or a number of steps.")] = 5_000
    sample_steps: Annotated[int, IntRange("[1, inf)", "at least one step.")] = 25  # solver steps of those samples
    guidance_scale: Annotated[float, FloatRange("(-inf, inf)")] = 1.5  # of those samples; 1 is none
    report_to: tuple[str, ...] = ("tensorboard",)  # trackers beside metrics.jsonl: tensorboard, wandb, trackio, none or one of a plugin
    project: str = "condot"  # what wandb and trackio call the project; the run is called as its folder
    # of one device, for the model FLOP utilisation; 0: by its name, or measured at the start
    peak_tflops: Annotated[float, FloatRange("[0, inf)", "0 (by its name, or measured) or a rate.")] = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "log.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an image generator.

    A recipe (`--config recipe.yaml`) fills these fields, `--section.field=value`
    overrides it, and so do the names of diffusers' scripts (`--learning_rate`).
    The run's folder keeps all of it; the same command resumes.
    """

    output_dir: str = "runs/untitled"  # the run's folder: checkpoints, metrics.jsonl, samples, export
    seed: Annotated[int, SEED_RANGE] = 0  # of the order, the noise, the times and the initial weights
    init_from: str = ""  # published weights to begin with: a folder or Hub id of diffusers, or a file of the original DiT or SiT
    export: bool = True  # write the folder `export` for stock diffusers at the end
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=default_model_config)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    dry_run: bool = False  # check the recipe, say what it takes, and stop before any work

    def __post_init__(self) -> None:
        check_numbers(self, "")
        if "://" in self.output_dir:  # it would become a folder of that name, signature and all
            raise ValueError(
                f"output_dir={redact(self.output_dir)!r}: a run's folder is on this machine. Give a path, and upload it afterwards."
            )


ALIASES = {
    "resolution": "data.resolution",
    "dataloader_num_workers": "data.workers",
    "random_flip": "data.horizontal_flip",
    "train_data_dir": "data.shards",
    "train_batch_size": "train.batch_size",
    "max_train_steps": "train.max_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "learning_rate": "train.learning_rate",
    "lr_warmup_steps": "train.lr_warmup_steps",
    "lr_scheduler": "train.lr_ramp",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "adam_weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "mixed_precision": "train.mixed_precision",
    "use_ema": "ema.enabled",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "rank": "train.lora_rank",
    "proportion_empty_prompts": "train.condition_dropout",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "report_to": "log.report_to",
    "validation_steps": "log.sample_every",
}
"""Names that users of diffusers' training scripts know. `--train_batch_size` counts all ranks together here."""
