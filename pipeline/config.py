"""The schema of a run: frozen dataclasses that every recipe fills.

The comment behind a field is its help text (`python train.py --help`). Fields
are checked here where one value can be wrong by itself; what only the data or
the number of ranks can tell is checked in `train.py`, still before any work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .networks import DiTConfig, ModelConfig
from .printable import redact


def _require(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"{name}={value}: {text}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at what size, seen through which encoders; `data/options.py` checks what is given here."""

    shards: tuple[str, ...] = ()  # folders of shards with a manifest, as `python -m data.prepare` makes them
    weights: tuple[float, ...] = ()  # share of each folder in every batch; none shuffles all together
    split: str = "train"  # which of the manifest's splits to train on
    resolution: int = 256  # pixels; images are resized by the short side and cropped to this square
    channels: int = 3  # 1: gray; 2: gray and alpha; 3: RGB; 4: RGB and alpha; 5 and more: the bands of TIFF and .npy files
    bit_depth: Literal[8, 16] = 8  # of a pixel's values as they are trained on; 16 keeps what 16-bit files hold, beside 8-bit ones
    horizontal_flip: bool = False  # mirror half of the images, chosen by (seed, position)
    random_crop: bool = False  # crop anywhere, chosen by (seed, position), instead of at the centre
    aspect_ratios: tuple[float, ...] = ()  # width / height of each bucket, all of about resolution^2 pixels; none for squares
    bucket_step: int = 32  # pixels of which every bucket's sides are multiples
    # where captions are: txt, json.KEY (a list is joined with commas), json.KEY[*] (one entry of a list, drawn), or several by weight, as
    # txt=0.7,json.short=0.3; which a sample is shown with is drawn by (seed, position)
    caption: str = "txt"
    shuffle_block: int = 16  # shards; so many are mixed with one another, which bounds the memory of the order
    workers: int = 2  # threads that read and decode ahead on each rank; 0 reads inside the loop
    max_bad_share: float = 0.001  # of samples that cannot be read; more stop training with the list
    lost_shards: str = "stop"  # or skip: go on without a shard that is gone
    cache_dir: str = ""  # where copies of remote shards are kept
    cache_size: str = "100GB"  # of all copies
    retry_seconds: float = 300.0  # a remote source is tried again for so long
    autoencoder: str = ""  # folder or Hub id of a frozen AutoencoderKL, AutoencoderTiny or AutoencoderDC; none trains on pixels
    text_encoder: tuple[str, ...] = ()  # folders or Hub ids of frozen text encoders: CLIP, T5, or any that gives token states
    max_tokens: tuple[int, ...] = (128,)  # longer captions are cut; one number for all encoders, or one each
    # mask: no attention to what stands behind a caption's end; attend: full length, all of it seen, as Stable Diffusion 3 and Flux do
    text_padding: Literal["mask", "attend"] = "mask"
    encoding: str = "online"  # or cached: read what `python -m data.encode` wrote into data.encoded
    encoded: str = ""  # folder of that cache
    # multiplies latents after the shift, one number or one a channel; none: as measured (cached), or as the autoencoder says (online)
    latent_scale: tuple[float, ...] = ()
    latent_shift: tuple[float, ...] = ()  # subtracted from latents, one number or one a channel; none: likewise


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What is learned: the path, the prediction, the law of t. docs/theory.md explains each name."""

    # how signal and noise are mixed over time
    path: Literal["condot", "cosine", "vp", "sub_vp", "ve", "edm", "ddpm", "ddpm_scaled_linear", "ddpm_cosine"] = "condot"
    prior: Literal["normal", "uniform"] = "normal"  # where the path starts; uniform, of unit variance, on condot only
    predict: Literal["velocity", "noise", "data", "score", "v"] = "velocity"  # what the network outputs
    # regression to `predict`; joint: velocity and score, two outputs of one network; explicit and sliced score matching need predict=score
    objective: Literal["regression", "joint", "explicit", "sliced"] = "regression"
    joint_balance: float = 1.0  # of joint: factor on the score's loss, which is weighted by beta^2
    weighting: Literal["none", "velocity", "likelihood", "min_snr", "edm"] = "none"  # how errors count over time
    min_snr_gamma: float = 5.0  # signal-to-noise ratio at which min_snr caps
    precondition: bool = False  # scale the network the Karras way, with predict=data; always so on edm
    sigma_data: float = 0.5  # standard deviation of the data, for precondition and the weighting edm
    # law of t in training; discrete are DDPM's thousand steps
    time: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal_sigma", "discrete"] = "uniform"
    time_mean: float = 0.0  # logit of t for logit_normal, log of sigma for log_normal_sigma
    time_std: float = 1.0  # of the same
    time_scale: float = 1.29  # bump of the law mode, -1 to 1.75
    time_shift: float = 1.0  # above 1 moves the law towards the noise, for higher resolutions; 1 is none
    stratified: bool = False  # spread the times of each global batch evenly
    coupling: Literal["independent", "optimal_transport"] = "independent"  # which noise goes with which image; among images of one class
    coupling_group: int = 32  # images assigned to one another by optimal_transport; divides the micro-batch

    def __post_init__(self) -> None:
        _require(self.time_std > 0, "flow.time_std", self.time_std, "a standard deviation is positive. Use 1.0.")
        balance = self.joint_balance
        _require(0 <= balance < float("inf"), "flow.joint_balance", balance, "finite and not negative. Use 1.")
        _require(self.time_shift > 0, "flow.time_shift", self.time_shift, "a shift is positive; 1 is none.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, in what precision."""

    max_steps: int = 400_000  # optimiser steps in all
    batch_size: int = 256  # images per optimiser step, all ranks together, so that the curve does not depend on their number
    gradient_accumulation_steps: int = 1  # forward passes that one optimiser step is split into
    learning_rate: float = 1e-4  # per step, at its highest
    lr_warmup_steps: int = 0  # optimiser steps from zero to the learning rate
    lr_ramp: Literal["constant", "linear", "cosine"] = "constant"  # shape of the way down at the end
    lr_decay_fraction: float = 1.0  # share of the run's steps at its end over which a linear or cosine ramp falls to zero
    weight_decay: float = 0.0  # of matrices only; vectors and embeddings are never decayed
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it; 0 leaves them
    condition_dropout: float = 0.1  # probability that a sample is trained without its class or caption, for guidance
    encoder_dropout: float = 0.0  # of several text encoders: probability that a sample is trained without this one; SD3 has 0.464
    mixed_precision: Literal["no", "bf16", "fp16", "fp8", "auto"] | None = None  # None: as launched; auto: the faster of no and bf16
    # FSDP2: weights, gradients, moments and averages in shares on all ranks (full) or on each machine (hybrid); None: as launched
    sharding: Literal["none", "full", "hybrid"] | None = None
    lora_rank: int = 0  # train only low-rank additions of this rank to the attention and feed-forward layers; 0 trains all weights
    lora_alpha: float = 16.0  # the additions are multiplied by lora_alpha / lora_rank
    compile: bool = False  # torch.compile each block of the network: slower to start, faster on long runs
    cpu_threads: int = 0  # on a CPU: threads of each process; 0 shares the cores among the processes of this machine

    def __post_init__(self) -> None:
        _require(self.max_steps >= 1, "train.max_steps", self.max_steps, "at least one optimiser step.")
        _require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least one image a step.")
        accumulation = self.gradient_accumulation_steps
        _require(accumulation >= 1, "train.gradient_accumulation_steps", accumulation, "at least one pass a step.")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "it is positive. Use 1e-4 for a DiT.")
        _require(self.lr_warmup_steps >= 0, "train.lr_warmup_steps", self.lr_warmup_steps, "0 or more steps.")
        _require(0 < self.lr_decay_fraction <= 1, "train.lr_decay_fraction", self.lr_decay_fraction, "a share above 0, at most 1.")
        for name in ("condition_dropout", "encoder_dropout"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "a probability below 1. Use 0.1.")
        _require(self.max_grad_norm >= 0, "train.max_grad_norm", self.max_grad_norm, "0 (off) or positive.")
        _require(self.cpu_threads >= 0, "train.cpu_threads", self.cpu_threads, "0 (automatic) or a number of threads.")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The averages of the weights; the first half-life's is sampled and exported."""

    enabled: bool = True  # without it the raw weights are sampled and exported
    halflife: tuple[float, ...] = (2e6,)  # images after which a weight counts half; one average each
    ramp: float = 0.05  # a half-life is at most this share of the images seen so far
    power: tuple[float, ...] = ()  # EDM2's power-function averages by relative width, such as 0.05 0.1: any width can be rebuilt from two
    snapshot_every: float = 0  # images between two snapshots of the power averages, from which it is rebuilt; 0: a 64th of the run

    def __post_init__(self) -> None:
        _require(len(self.halflife) > 0, "ema.halflife", list(self.halflife), "at least one average is kept; --ema.enabled=false for none.")
        _require(all(h > 0 for h in self.halflife), "ema.halflife", list(self.halflife), "positive numbers of images.")
        _require(len(set(self.halflife)) == len(self.halflife), "ema.halflife", list(self.halflife), "each once.")
        _require(self.ramp > 0, "ema.ramp", self.ramp, "a positive share. Use 0.05.")
        widths = all(0 < w < 0.28 for w in self.power) and len(set(self.power)) == len(self.power)
        _require(widths, "ema.power", list(self.power), "relative widths between 0 and 0.28, each once. Use 0.05 0.1.")
        _require(self.snapshot_every >= 0, "ema.snapshot_every", self.snapshot_every, "0 (automatic) or a number of images.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what is resumed."""

    every: int = 5_000  # optimiser steps
    keep: int = 2  # checkpoints kept; older ones go once a newer one is safe
    asynchronous: bool = True  # copy the state, then write it while training goes on; false waits for the disk
    resume: str = "latest"  # `latest` (fresh where there is none), `none`, or a checkpoint's folder
    start_from: str = ""  # another run's folder, or a checkpoint of it, whose weights and average a fresh run starts from

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "at least one step.")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least one checkpoint is kept.")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a bad step does, and a step that never ends."""

    skips: int = 3  # steps in a row whose loss or gradient is not finite: so many are skipped, one more rolls back to the last checkpoint
    loss_spike: float = 5.0  # a loss over so many times the median of the last `window` steps rolls back; 0 never
    norm_spike: float = 20.0  # likewise of the gradient's norm; 0 never
    window: int = 100  # steps whose median a spike is held against; none is called before so many were seen
    rollbacks: int = 3  # so many, then the run ends with status 3, its evidence in rollbacks.jsonl
    hang_seconds: float = 1800.0  # a step or a save that takes longer ends the run, saying where each rank stood; 0 never

    def __post_init__(self) -> None:
        _require(self.skips >= 0, "guard.skips", self.skips, "0 or more steps.")
        for name in ("loss_spike", "norm_spike"):
            _require(
                getattr(self, name) == 0 or getattr(self, name) > 1, f"guard.{name}", getattr(self, name), "0 (never) or above 1. Use 5."
            )
        _require(self.window >= 2, "guard.window", self.window, "at least two steps.")
        _require(self.rollbacks >= 0, "guard.rollbacks", self.rollbacks, "0 (the first ends the run) or more.")
        _require(self.hang_seconds >= 0, "guard.hang_seconds", self.hang_seconds, "0 (never) or a number of seconds.")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `--dry_run` reckons with."""

    ranks: int = 0  # processes, one a device; 0: as many as were launched
    images_per_second: float = 0.0  # of one rank in training; 0: not known, and no hours are told
    cost_per_hour: float = 0.0  # of one rank, in whatever currency
    memory: str = ""  # of one device, such as 80GB: what needs more is a mistake

    def __post_init__(self) -> None:
        _require(self.ranks >= 0, "plan.ranks", self.ranks, "0 (as launched) or a number of processes.")
        _require(self.images_per_second >= 0, "plan.images_per_second", self.images_per_second, "0 (unknown) or a rate.")
        _require(self.cost_per_hour >= 0, "plan.cost_per_hour", self.cost_per_hour, "0 (unknown) or a price.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown while training goes on."""

    every: int = 50  # optimiser steps between two lines of metrics.jsonl; the only time the loop waits for the device
    sample_every: int = 5_000  # optimiser steps between two sample grids; 0 for none
    sample_steps: int = 25  # solver steps of those samples
    guidance_scale: float = 1.5  # of those samples; 1 is none
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...] = ("tensorboard",)  # trackers beside metrics.jsonl
    project: str = "condot"  # what wandb and trackio call the project; the run is called as its folder
    peak_tflops: float = 0.0  # of one device, for the model FLOP utilisation; 0: by its name, or measured at the start

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", self.every, "at least one step.")
        _require(self.sample_every >= 0, "log.sample_every", self.sample_every, "0 (off) or a number of steps.")
        _require(self.sample_steps >= 1, "log.sample_steps", self.sample_steps, "at least one step.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an image generator.

    A recipe (`--config recipe.yaml`) fills these fields, `--section.field=value`
    overrides it, and so do the names of diffusers' scripts (`--learning_rate`).
    The run's folder keeps all of it; the same command resumes.
    """

    output_dir: str = "runs/untitled"  # the run's folder: checkpoints, metrics.jsonl, samples, export
    seed: int = 0  # of the order, the noise, the times and the initial weights
    init_from: str = ""  # published weights to begin with: a folder or Hub id of diffusers, or a file of the original DiT or SiT
    export: bool = True  # write the folder `export` for stock diffusers at the end
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=DiTConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    dry_run: bool = False  # check the recipe, say what it takes, and stop before any work

    def __post_init__(self) -> None:
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
