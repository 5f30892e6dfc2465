"""Sample, evaluate and export: `python sample.py --pipeline runs/digits/export --class_labels 0 1 2 --output three.png`.

Verbs: `images` (the default), `evaluate`, `retrieve`, `export`, `likelihood`, `restore`; each has its own `--help`.
"""

from __future__ import annotations

import sys

from pipeline.process import Stopper, reported

Stopper("no file was left half-written")  # before the slow imports

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from data.beside import check_captions
from data.decode import decode_image
from data.encoders import Autoencoder
from data.options import Options
from data.reading import read_captions, read_images
from data.shards import Shards
from data.stream import to_unit
from data.text_encoders import read_text_encoders
from data.words import Words
from models.convert import to_stock
from models.lora import add_lora, merge_lora
from pipeline.checkpoint import Store, averages, load_state
from pipeline.config import Config
from pipeline.density import affordable, bits
from pipeline.evaluate import evaluate, load_features
from pipeline.export import Card, check_kind, write_folder
from pipeline.flow import Condition
from pipeline.folder import open_folder
from pipeline.generate import Source, check_labels, generate, network_source
from pipeline.networks import model_options
from pipeline.options import Evaluate, Export, Images, Likelihood, Model, Restore, Retrieve
from pipeline.recipe import build, parse
from pipeline.restore import measurement, restore
from pipeline.retrieval import retrieve
from pipeline.sheet import grid, save_image
from pipeline.space import Space
from pipeline.stock import form_of


def source_of(options: Model) -> Source:
    """The field to sample from.

    Raises:
        ValueError: neither or both of --pipeline and --run, or a folder that is none.
    """
    if bool(options.pipeline) == bool(options.run):
        raise ValueError(f"--pipeline={options.pipeline!r} and --run={options.run!r}: give one of them, an exported folder or a run's.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_folder(options.pipeline, device) if options.pipeline else Trained(Path(options.run)).source(device)


class Trained:
    """A checkpoint of a run, read back.

    Raises:
        ValueError: no whole checkpoint there.
    """

    def __init__(self, run: Path, checkpoint: Path | None = None) -> None:
        found = checkpoint or Store(run, keep=1).latest()
        if found is None:
            raise ValueError(
                f"run={str(run)!r} holds no whole checkpoint: train first, `accelerate launch train.py --config ... --output_dir {run}`."
            )
        self.run, self.state = run, load_state(found)
        self.config = build(Config, self.state["config"])
        self.class_names = tuple(self.state["class_names"])
        self.space = Space.of(self.state["space"])
        self.text = self.state["text"]
        widths = tuple(self.text["widths"]) if self.text else None
        self.network = models.build(**model_options(self.config.model, self.space.shape, len(self.class_names), widths)).eval()
        if self.config.train.lora_rank:
            add_lora(self.network, self.config.train.lora_rank, self.config.train.lora_alpha)
        self.network.load_state_dict(averages(found))
        self.network = merge_lora(self.network)

    def source(self, device: str) -> Source:
        """The averaged network as a field."""
        space = self.space
        decode = space.decoder(partial(Autoencoder, space.autoencoder, device, expected=space.fingerprint))
        read = self.words(device).read if self.text else None
        classes = 0 if self.text else len(self.class_names)
        return network_source(self.network.to(device), self.config.flow, space.shape, classes, decode, space.pixels, read)

    def words(self, device: str) -> Words:
        """The text encoders it was trained with.

        Raises:
            ValueError: they are not there any more, or are others.
        """
        words = Words(read_text_encoders(Options(**vars(self.config.data))), device)
        words.check(self.text["fingerprints"])
        return words

    def export(self, output: Path) -> Path:
        """Write it for stock diffusers."""
        check_kind(self.config.model)
        card = Card.of(self.run, self.state["images"], self.state["step"], self.network)
        network = to_stock(self.network, form_of(self.config.flow).factor)
        space = self.space
        vae = Autoencoder(space.autoencoder, expected=space.fingerprint).model if space.latent else None
        return write_folder(output, network, self.config, self.class_names, card, space, vae)


def check_condition(source: Source, options: Images) -> None:
    """Raises ValueError for labels or prompts that the model does not take."""
    if options.class_labels and (options.prompt or source.read):
        raise ValueError(f"--class_labels {options.class_labels[0]} of a model that takes text, or beside --prompt: give --prompt alone.")
    if options.class_labels and not source.num_classes:
        raise ValueError(f"--class_labels {options.class_labels[0]} of a model without classes: leave the option out.")
    if source.read and not options.prompt:
        raise ValueError("--prompt is missing: the model takes text, as --prompt 'a red apple' 'a black cat'.")
    for name, given in (("prompt", options.prompt), ("negative_prompt", options.negative_prompt)):
        if given and not source.read:
            raise ValueError(f"--{name} {given!r} of a model that takes no text: leave the option out.")


def images(options: Images) -> int:
    """Sample a grid and print its path."""
    source, sampler = source_of(options), options.sampler()
    check_condition(source, options)
    asked: tuple[Any, ...] = options.prompt or options.class_labels or tuple(range(source.num_classes))
    count = options.num_images or len(asked) or 16
    if count < 1:
        raise ValueError(f"--num_images {count}: at least one.")
    condition: Condition = [asked[i % len(asked)] for i in range(count)] if asked else torch.full((count,), source.null)
    negative = None
    if source.read:
        condition, negative = source.read(condition), source.read([options.negative_prompt])
    elif asked:
        condition = torch.tensor(condition)
    made, evaluations = generate(source, condition, sampler, seed=options.seed, batch_size=options.batch_size, null=negative)
    columns = len(asked) if 1 < len(asked) <= 16 else math.ceil(math.sqrt(count))
    save_image(grid(made, min(columns, count), scale=max(1, 64 // made.shape[-1])), Path(options.output))
    print(f"{options.output}: {count} images by {options.solver}, {evaluations} evaluations each")
    return 0


def compare(options: Evaluate) -> int:
    """Sample every class alike, compare with real images, print and write the figures."""
    if not options.reference:
        raise ValueError("--reference is missing: give the folder of shards, as --reference runs/digits/shards.")
    shards = {
        name: Shards(options.reference, split) for name, split in (("train", options.train_split), ("held out", options.held_out_split))
    }
    features = load_features(options.features) if options.features else None
    source = source_of(options)
    channels, _, resolution = source.pixels or source.shape
    train, held_out = (read_images(s, channels, resolution) for s in shards.values())
    if source.num_classes != len(shards["train"].manifest.class_names) or not source.num_classes:
        raise ValueError(
            f"the model has {source.num_classes} classes, {options.reference} "
            f"has {len(shards['train'].manifest.class_names)}: give its own shards."
        )
    labels = torch.arange(options.num_images) % source.num_classes
    made = generate(source, labels, options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    report = evaluate(made.clamp(-1, 1), labels, train, held_out, features)
    print(report)
    output = Path(options.output or Path(options.pipeline or options.run) / "evaluation.json")
    drawn = {"guidance_scale": options.guidance_scale, "solver": options.solver, "steps": options.num_inference_steps}
    output.write_text(json.dumps({**report.as_dict(), **drawn}, indent=1) + "\n")
    print(f"figures in {output}")
    wanted = (
        (report.accuracy, options.min_accuracy),
        (report.diversity_ratio, options.min_diversity),
        (report.nearest_ratio, options.min_nearest),
    )
    return 0 if all(figure >= least for figure, least in wanted) else 1


def captioned(options: Retrieve) -> tuple[Tensor, Tensor, list[str]]:
    """Real images of captions that the seed draws, (N, C, H, W), a sample of each caption, and the captions."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards with captions, as --reference runs/emoji/shards.")
    source, shards = source_of(options), Shards(options.reference, options.split)
    if source.read is None:
        raise ValueError("retrieve asks by caption, and the model takes no text: use evaluate for classes.")
    check_captions(shards, options.caption)
    total = sum(shards.counts)
    if not 2 <= options.candidates <= total:
        raise ValueError(f"--candidates {options.candidates}: 2 or more, of the {total} images of split {options.split!r}.")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))[: options.candidates].tolist()
    channels, _, side = source.pixels or source.shape
    real, _ = read_images(shards, channels, side, chosen)
    captions = read_captions(shards, options.caption, chosen)
    made = generate(source, source.read(captions), options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    return real, made.clamp(-1, 1), captions


def retrieve_captions(options: Retrieve) -> int:
    """Sample captions of real images, look each up among them, print and write the figures."""
    real, made, captions = captioned(options)
    found = retrieve(made, real, torch.arange(len(real)))
    output = Path(options.output or Path(options.pipeline or options.run) / "retrieval.png")
    columns = min(10, len(real))
    white = real.new_ones(-len(real) % columns, *real.shape[1:])
    halves = (torch.cat([part, white]).split(columns) for part in (real, made))
    rows = [row for pair in zip(*halves, strict=True) for row in pair]
    save_image(grid(torch.cat(rows), columns, scale=max(1, 64 // real.shape[-1])), output)
    how = {"guidance_scale": options.guidance_scale, "solver": options.solver, "steps": options.num_inference_steps}
    output.with_suffix(".json").write_text(json.dumps({**found.as_dict(), **how, "captions": captions}, indent=1) + "\n")
    print(found)
    print(f"{output}: rows of real images, then their samples; figures in {output.with_suffix('.json')}")
    return 0


def _need_pixels(source: Source, why: str) -> None:
    """Raises ValueError for a model of latents, or of text."""
    if source.read:
        raise ValueError(f"the model takes text, and {why} of a class or of none: sample it with --prompt, or use retrieve.")
    if source.pixels:
        raise ValueError(
            f"the model works in latents of {source.shape}, and {why}: give a model that was trained without data.autoencoder."
        )


def export(options: Export) -> int:
    """Write the folder."""
    if not options.run:
        raise ValueError("--run is missing: give the folder of a run, as --run runs/digits.")
    trained = Trained(Path(options.run), Path(options.checkpoint) if options.checkpoint else None)
    trained.export(Path(options.output) if options.output else Path(options.run) / "export")
    return 0


def likelihood(options: Likelihood) -> int:
    """Measure and print bits per dimension."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards, as --reference runs/digits/shards.")
    source = source_of(options)
    _need_pixels(source, "likelihood measures bits of 8-bit pixels")
    shards = Shards(options.reference, options.split)
    real, labels = read_images(shards, source.shape[0], source.shape[-1], range(min(options.num_images, sum(shards.counts))))
    if options.unconditional or not source.num_classes:
        labels = torch.full_like(labels, source.null)
    else:
        check_labels(labels, source.num_classes)
    exact = affordable(source.shape) and not options.estimate
    print(bits(source, real, labels, steps=options.num_inference_steps, seed=options.seed, exact=exact, batch_size=options.batch_size))
    return 0


def restored(options: Restore) -> int:
    """Restore an image and write what was left of it, then the samples."""
    for name in ("input", *(["mask"] if options.task == "inpaint" else [])):
        if not Path(getattr(options, name)).is_file():
            raise ValueError(f"--{name} {getattr(options, name)!r} is no file: give an image.")
    source = source_of(options)
    _need_pixels(source, "restore measures pixels")
    channels, _, side = source.shape
    mask = torch.from_numpy(decode_image(Path(options.mask).read_bytes(), 1, side)[0] > 127) if options.task == "inpaint" else None
    measure = measurement(options.task, source.shape, mask, options.factor)
    small = options.task == "super_resolution"
    given = to_unit(torch.from_numpy(decode_image(Path(options.input).read_bytes(), channels, side // options.factor if small else side)))
    y = given if small else measure(given[None])[0]
    label = None if options.class_label == -1 else options.class_label
    made = restore(
        source,
        measure,
        y,
        options.sampler(),
        label=label,
        count=options.num_images,
        seed=options.seed,
        method=options.method,
        noise_std=options.noise_std,
    )
    difference = (measure(made) - y).square().mean().sqrt().item()
    left = measure.pseudo_inverse(y[None]).clamp(-1, 1)
    save_image(grid(torch.cat([left, made]), options.num_images + 1, scale=max(1, 64 // side)), Path(options.output))
    print(
        f"{options.output}: the input as measured, then {options.num_images} "
        f"samples; they differ from it by {difference:.4f} (root mean square, -1..1)"
    )
    return 0


VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "images": (Images, images),
    "evaluate": (Evaluate, compare),
    "export": (Export, export),
    "likelihood": (Likelihood, likelihood),
    "retrieve": (Retrieve, retrieve_captions),
    "restore": (Restore, restored),
}


@reported
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    verb, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("images", argv)
    if verb not in VERBS:
        raise ValueError(f"verb {verb!r} is unknown: choose one of {', '.join(VERBS)}.")
    options, act = VERBS[verb]
    return act(parse(options, rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
