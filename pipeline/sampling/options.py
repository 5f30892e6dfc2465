"""What the verbs of `sample.py` take; the comment behind a field is its help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from condot.core.option_ranges import SEED_RANGE, FloatRange, IntRange, check_numbers

from ..config.kinds import OneOf
from ..evaluation.provenance import Provenance
from ..flow import ODE_SOLVERS, SDE_SOLVERS
from .sampler import LANGEVIN_SOLVERS, Sampler

Solver = Annotated[str, OneOf((ODE_SOLVERS, SDE_SOLVERS), more=LANGEVIN_SOLVERS)]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
ANIMATION_SUFFIXES = (".gif", ".webp")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model."""

    pipeline: str = ""  # an exported folder; or give --run
    run: str = ""  # a run's folder: its newest checkpoint, averaged weights; or one checkpoint of it
    ema: str = (
        ""  # which weights of the run: by half-life in images or decay a step, width=0.08 (any, where power averages were kept), or raw
    )
    seed: Annotated[int, SEED_RANGE] = 0  # image i is a function of (seed, i)
    batch_size: Annotated[int, IntRange("[1, inf)", "at least 1 image at once.")] = 256  # images at once
    # solver steps; evaluations are reported
    num_inference_steps: Annotated[int, IntRange("[1, inf)", "a solver takes at least one step. Use 50 as a rule.")] = 50

    def __post_init__(self) -> None:
        check_numbers(self, "--")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """How images are drawn."""

    guidance_scale: Annotated[float, FloatRange("(-inf, inf)")] = 1.0  # 1 is none
    guide_pipeline: str = ""  # guide by this weaker model of the same data, not by the model without its condition: an exported folder
    guide_run: str = ""  # or a run's folder, or an early checkpoint of the same run
    guide_ema: str = ""  # which weights of that run, as --ema
    # times at which guidance acts, 0 noise, 1 data
    guidance_interval: tuple[Annotated[float, FloatRange("[0, 1]")], Annotated[float, FloatRange("[0, 1]")]] = (0.0, 1.0)
    # share of the guided prediction brought back to the spread of the unguided one, 0 to 1
    guidance_rescale: Annotated[float, FloatRange("[0, 1]")] = 0.0
    guidance: Literal["cfg", "apg", "cfg_zero_star"] = (
        "cfg"  # plain; adaptive projected guidance, which saturates less; or CFG-Zero*, away from the best multiple of the lesser one
    )
    # of apg: share kept of what guidance adds along the data prediction; 1 is plain guidance
    apg_eta: Annotated[float, FloatRange("(-inf, inf)")] = 0.0
    # of apg: longest difference of an image's two data predictions; 0 for no limit, the paper 2.5 to 15
    apg_norm_threshold: Annotated[float, FloatRange("[0, inf)")] = 0.0
    # of apg: share of the differences of earlier evaluations that is added; the paper -0.75 to -0.5
    apg_momentum: Annotated[float, FloatRange("(-1, 1)")] = 0.0
    zero_init_steps: Annotated[int, IntRange("[0, inf)")] = 0  # of cfg_zero_star: first steps that stand still; the paper 4 in 100
    classifier_reference: str = ""  # shards of labelled images: a small classifier learns them, noise and all, and leads to class_labels
    classifier_guidance_scale: Annotated[float, FloatRange("(-inf, inf)")] = 1.0  # of that classifier; 1 is Bayes' rule, more is sharper
    solver: Solver = "dpmpp_2m"  # to dormand_prince the ODE, to stochastic_heun the SDE (dpmpp_2m_sde first), then Langevin dynamics
    sigma_t: Literal["zero", "constant", "noise", "forward"] = "noise"  # diffusion coefficient of the SDE; noise: as the path's beta
    # a coefficient of your own instead: values evenly from t = 0 (noise) to 1, linear between
    sigma_t_values: tuple[Annotated[float, FloatRange("[0, inf)")], ...] = ()
    sigma_scale: Annotated[float, FloatRange("[0, inf)")] = 1.0  # factor on sigma_t
    drift: Literal["marginals", "plain"] = (
        "marginals"  # plain: dX = u dt + sigma dW by euler_maruyama, for networks trained so; of a flow it leaves the marginals
    )
    grid: Literal["uniform", "shifted", "rho", "log_snr"] = (
        "uniform"  # where the steps lie; shifted: finer near the noise; rho: Karras's; log_snr: even in the log signal-to-noise ratio
    )
    grid_shift: Annotated[float, FloatRange("(0, inf)")] = 3.0  # of the shifted grid
    grid_rho: Annotated[float, FloatRange("(0, inf)")] = 7.0  # of the grid rho
    # a grid of your own, rising from 0 (noise) to 1 (data), in place of num_inference_steps
    given_times: tuple[Annotated[float, FloatRange("[0, 1]")], ...] = ()
    tolerance: Annotated[float, FloatRange("(0, inf)")] = (
        1e-5  # of dormand_prince, relative and absolute; it takes as many steps as that needs
    )
    # Langevin steps at each time; 0: one of predictor_corrector, of annealed_langevin as many as let noise settle
    corrections: Annotated[int, IntRange("[0, inf)")] = 0
    langevin_step: Annotated[float, FloatRange("(0, inf)")] = (
        0.2  # of langevin and annealed_langevin, in units of the last level's variance
    )
    snr: Annotated[float, FloatRange("(0, inf)")] = 0.16  # signal-to-noise ratio of a correction of predictor_corrector
    # of heun and euler: noise added before each step and taken off by it, Karras's S_churn; 0 is none
    churn: Annotated[float, FloatRange("[0, inf)")] = 0.0
    churn_min: Annotated[float, FloatRange("[0, inf)")] = 0.0  # only above this noise-to-signal ratio (S_tmin)
    churn_max: Annotated[float, FloatRange("[0, inf)")] = 1000.0  # and below this one (S_tmax)
    churn_noise: Annotated[float, FloatRange("[0, inf)")] = 1.0  # standard deviation of the noise added (S_noise); 1 keeps the marginals
    clip: Literal["auto", "on", "off"] = "auto"  # keep data predictions within -1..1; auto: of a model that predicts noise in pixels

    def sampler(self) -> Sampler:
        """The options as the pipeline knows them."""
        return Sampler(
            solver=self.solver,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guidance_rescale=self.guidance_rescale,
            sigma_t=self.sigma_t_values or self.sigma_t,
            sigma_scale=self.sigma_scale,
            drift=self.drift,
            grid=self.grid,
            grid_shift=self.grid_shift,
            grid_rho=self.grid_rho,
            given_times=self.given_times,
            tolerance=self.tolerance,
            corrections=self.corrections,
            langevin_step=self.langevin_step,
            snr=self.snr,
            churn=self.churn,
            churn_min=self.churn_min,
            churn_max=self.churn_max,
            churn_noise=self.churn_noise,
            clip=self.clip,
            guidance=self.guidance,
            apg_eta=self.apg_eta,
            apg_norm_threshold=self.apg_norm_threshold,
            apg_momentum=self.apg_momentum,
            zero_init_steps=self.zero_init_steps,
            classifier_guidance_scale=self.classifier_guidance_scale,
        )

    def sampling_metadata(self, weights: Provenance, guide: Provenance | None = None) -> dict[str, Any]:
        """Return what figures are told beside: how samples were drawn, and by which weights, those of a guide among them."""
        drawn: dict[str, Any] = {"guidance_scale": self.guidance_scale, "solver": self.solver, "steps": self.num_inference_steps}
        drawn |= {"guidance": self.guidance} if self.guidance != "cfg" else {}
        drawn |= {"classifier_guidance_scale": self.classifier_guidance_scale} if self.classifier_reference else {}
        return drawn | weights.as_dict() | ({"guide_sha256": guide.sha256} if guide else {})


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(SamplingOptions):
    """Sample images: as one grid, as an animation of the way from noise to them, or by the thousand into a folder.

    Under `accelerate launch` or torchrun the processes share a folder's images. The same command goes on with a folder where it was
    stopped, on any number of processes; image i is the same whoever draws it, up to rounding.
    """

    class_labels: tuple[
        Annotated[int, IntRange("[0, inf)")], ...
    ] = ()  # classes; taken in turn until there are num_images. None: all in turn
    prompt: tuple[str, ...] = ()  # captions, of a model that takes text; taken in turn until there are num_images
    labels: str = ""  # a file of classes, one number a line, in place of class_labels
    prompts: str = ""  # a file in place of prompt: .txt, one a line; .jsonl, {"prompt": ..., "negative_prompt": ...} a line
    negative_prompt: str = ""  # what guidance leads away from; by default from no caption
    num_images: Annotated[int, IntRange("[0, inf)")] = 0  # images in all; 0 for one of each label or prompt
    height: Annotated[int, IntRange("[0, inf)")] = 0  # pixels, of a model trained on several shapes; 0 for the usual one
    width: Annotated[int, IntRange("[0, inf)")] = 0  # pixels; 0 for the usual one
    # .png, .jpg, .webp: a grid; .gif: an animation; without a suffix: a folder, 000000.png and on (.npy of 5 bands or more)
    output: str = "samples.png"
    show: Literal["", "state", "prediction"] = (
        ""  # of an animation: the points, or the image each leads to; .webp moves where this is given
    )
    format: Literal["png", "shards"] = "png"  # of a folder: a file per image, or webdataset tars that `data.shards` takes
    # images in a tar; each tar is one process's, and begun anew if it was not finished
    images_per_shard: Annotated[int, IntRange("[1, inf)")] = 1000

    def output_kind(self) -> Literal["grid", "animation", "folder"]:
        """What `output` names.

        Raises:
            ValueError: a suffix of no picture, or `show` or `format` where they say nothing.
        """
        suffix = Path(self.output).suffix.lower()
        folder = not suffix or self.output.endswith("/") or Path(self.output).is_dir()
        if not folder and suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"--output {self.output!r}: {suffix} is none of {', '.join(IMAGE_SUFFIXES)}; for a folder end it in /.")
        if self.show and (folder or suffix not in ANIMATION_SUFFIXES):
            raise ValueError(f"--show {self.show} of an --output {self.output!r} that does not move: give a .gif or a .webp.")
        if self.format == "shards" and not folder:
            raise ValueError(f"--format shards of an --output {self.output!r} that is one picture: give a folder.")
        if folder:
            return "folder"
        return "animation" if suffix == ".gif" or self.show else "grid"

    def settings(self, models: Sequence[str], conditions: str) -> dict[str, Any]:
        """All that decides what image i of a folder is.

        Args:
            models: hashes of the model and, if it has one, of its guide.
            conditions: a hash of what is asked for.
        """
        which = dict(zip(("model", "guide"), models, strict=False))
        size = {"images_per_shard": self.images_per_shard} if self.format == "shards" else {}
        weights = {name: asked for name, asked in (("ema", self.ema), ("guide_ema", self.guide_ema)) if asked}
        return {**which, **weights, "seed": self.seed, "conditions": conditions, **self.sampler().settings(), "format": self.format, **size}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Compare samples with real images: accuracy, diversity, memorisation, Frechet distance. For small labelled images."""

    reference: str = ""  # folder of shards with a split to train on and one held out
    num_images: Annotated[int, IntRange("[1, inf)")] = 1000  # samples, the same number of each class
    guidance_scale: Annotated[float, FloatRange("(-inf, inf)")] = 2.0  # 1 is none
    train_split: str = "train"  # what the model was trained on
    held_out_split: str = "val"  # what it was not
    features: str = ""  # of the Frechet distance: FILE.py:NAME, a function of images in -1..1; by default a classifier's, learnt here
    output: str = ""  # figures as JSON; by default evaluation.json in the pipeline's or the run's folder
    min_accuracy: Annotated[float, FloatRange("[0, 1]")] = 0.0  # fail below this share of samples in their class
    min_diversity: Annotated[float, FloatRange("[0, inf)")] = 0.0  # fail below this ratio to real images
    min_nearest: Annotated[float, FloatRange("[0, inf)")] = 0.0  # fail below this ratio of distances to the nearest training image


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions(SamplingOptions):
    """Does a sample of a caption lie nearest to the real image of that caption, among others? For models that take text."""

    reference: str = ""  # folder of shards with captions
    split: str = "train"  # of the shards; what was trained on was seen
    caption: str = "txt"  # where captions are, as data.caption in a recipe; of several, each image draws one
    candidates: Annotated[int, IntRange("[2, inf)")] = 50  # captions, drawn by the seed; one sample and one real image each
    guidance_scale: Annotated[float, FloatRange("(-inf, inf)")] = 3.0  # 1 is none
    output: str = (
        ""  # the grid: real images, then samples, 10 a row; by default retrieval.png in the run's folder, figures beside it as JSON
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run's averaged weights as a folder that stock diffusers loads."""

    run: str = ""  # the run's folder; its newest checkpoint is taken
    checkpoint: str = ""  # another of its checkpoints
    ema: str = ""  # which weights: by half-life in images or decay a step, width=0.08 (any, where power averages were kept), or raw
    output: str = ""  # the folder; by default `export` in the run's
    variant: Literal["", "fp16", "bf16"] = ""  # weights in half precision too, beside the full ones: from_pretrained(..., variant="fp16")
    push_to_hub: str = ""  # user/name: publish the folder there, after listing and checking every file
    private: bool = False  # with push_to_hub: the repository is private; one that is there must agree
    license: str = ""  # of the weights, for the model card: apache-2.0, cc-by-4.0, ...; by default unknown
    dataset: tuple[str, ...] = ()  # data sets on the Hub that it was trained on, for the model card: user/name
    title: str = ""  # of the model card; by default the repository's or the run's name


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(ModelOptions):
    """Bits per dimension of images under the model, by the probability flow ODE; of 8 bits, or of as many as it was trained on."""

    reference: str = ""  # folder of shards
    split: str = "val"  # of the shards
    num_images: Annotated[int, IntRange("[1, inf)")] = 100  # the first so many
    solver: Literal["dormand_prince", "rk4", "heun", "midpoint"] = "dormand_prince"  # adaptive; the others take a uniform grid
    tolerance: Annotated[float, FloatRange("(0, 1)")] = 1e-5  # of dormand_prince, relative and absolute
    num_inference_steps: Annotated[int, IntRange("[1, inf)")] = 50  # of the other solvers
    unconditional: bool = False  # ignore the classes of the images
    estimate: bool = False  # Hutchinson's estimate also where the exact divergence is affordable (64 dimensions)

    def solver_arguments(self) -> dict[str, Any]:
        """Return the arguments of `likelihood.compute_bits_per_dimension` that are options."""
        steps = self.num_inference_steps
        return {"solver": self.solver, "tolerance": self.tolerance, "steps": steps, "seed": self.seed, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(SamplingOptions):
    """Fill in, colour or enlarge an image with samples that agree with it."""

    task: Literal["inpaint", "colourise", "super_resolution"] = "inpaint"  # what was lost
    method: Literal["reconstruction", "replacement"] = (
        "reconstruction"  # reconstruction guides by the data prediction, for a backward pass; replacement keeps what is seen exactly
    )
    input: str = ""  # the image; it is resized to the model's size (super_resolution: to that over the factor)
    mask: str = ""  # of inpaint: white is filled in, black is kept
    factor: Annotated[int, IntRange("[2, inf)")] = 2  # of super_resolution: pixels a side that one pixel becomes
    noise_std: Annotated[float, FloatRange("[0, inf)")] = (
        0.01  # of reconstruction: standard deviation of the input's own noise, images in -1..1
    )
    # of reconstruction: standard deviation of images, by which it guesses what a point does not tell
    data_std: Annotated[float, FloatRange("(0, inf)")] = 0.5
    # of reconstruction: conjugate gradients in place of that guess, a backward pass each; 4 is many
    iterations: Annotated[int, IntRange("[0, inf)")] = 0
    class_label: Annotated[int, IntRange("[-1, inf)")] = -1  # class of the image; -1: not known
    prompt: str = ""  # caption of the image, of a model that takes text; by default none
    negative_prompt: str = ""  # what guidance leads away from; by default from no caption
    num_inference_steps: Annotated[int, IntRange("[1, inf)")] = 100  # solver steps
    solver: Solver = "euler"  # of an ODE or an SDE, not langevin or annealed_langevin; dormand_prince with reconstruction alone
    num_images: Annotated[int, IntRange("[1, inf)")] = 4  # samples
    output: str = "restored.png"  # the input as measured, then the samples
