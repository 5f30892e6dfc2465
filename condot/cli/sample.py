"""Sample, evaluate and export: `python sample.py --pipeline runs/digits/export --class_labels 0 1 2 --output three.png`.

Verbs: `images` (the default), `evaluate`, `retrieve`, `export`, `likelihood`, `restore`; each has its own `--help`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condot.core.atomic_files import write_whole
from condot.core.data_options import Options
from condot.core.printable import say
from condot.core.process import reported, stopper_of_program
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.encoders.text import read_text_encoders
from condot.data.images.decode import decode_image
from condot.data.loader.captions import check_captions
from condot.data.loader.read_samples import read_captions, read_images
from condot.data.loader.stream import to_unit
from condot.data.loader.text_conditioner import Words
from condot.data.prepare.generated import MadeShards
from condot.data.storage.shard_reader import Shards
from condot.models import registry
from condot.models.convert import OWN, one_size, to_exported, unheld
from condot.models.lora import add_lora, merge_lora
from condot.pipeline.checkpoint.store import Store, check_network, load_state, understood
from condot.pipeline.config.model import model_options
from condot.pipeline.config.parse import build, parse
from condot.pipeline.config.schema import Config
from condot.pipeline.ema.weight_selection import read_wanted, read_weights
from condot.pipeline.evaluation.metrics import check_features, evaluate, load_features
from condot.pipeline.evaluation.provenance import Provenance, digest, provenance_of
from condot.pipeline.evaluation.retrieval import retrieve
from condot.pipeline.export.load import open_folder, read_index
from condot.pipeline.export.model_card import Card
from condot.pipeline.export.scheduler_map import form_of
from condot.pipeline.export.write import write_folder
from condot.pipeline.hub.publish import check_repository, publish
from condot.pipeline.latent_space import Space
from condot.pipeline.launch import distributed
from condot.pipeline.sampling.classifier_guidance import led_by_classifier
from condot.pipeline.sampling.flow_model import Source, check_labels, led_by, need_pixels, network_source
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.image_grid import save_image, side_by_side
from condot.pipeline.sampling.images import draw_folder, draw_picture
from condot.pipeline.sampling.likelihood import affordable, bits
from condot.pipeline.sampling.options import Evaluate, Export, Images, Likelihood, Model, Restore, Retrieve, Sampling
from condot.pipeline.sampling.requests import asked
from condot.pipeline.sampling.restore import check_options, restore_file
from condot.pipeline.training.resume_rules import lines_of

STOPPER = stopper_of_program()


class Opened(NamedTuple):
    """A model read back."""

    source: Source
    files: tuple[Path, ...]  # folders, exported or checkpoints, of itself and of its guide, if it has one
    class_names: tuple[str, ...]
    weights: tuple[Callable[[], Provenance], ...]  # of itself and of its guide


def open_one(pipeline: str, run: str, ema: str, device: torch.device, prefix: str = "") -> Opened:
    """An exported folder, or a run and which of its weights.

    Raises:
        ValueError: neither or both of them, or a folder that is none.
    """
    if bool(pipeline) == bool(run):
        raise ValueError(f"--{prefix}pipeline={pipeline!r} and --{prefix}run={run!r}: give one of them, an exported folder or a run's.")
    if pipeline and ema:
        raise ValueError(f"--{prefix}ema {ema} of --{prefix}pipeline {pipeline}, which holds one set of weights: give --{prefix}run.")
    if pipeline:
        source, index = open_folder(pipeline, device, OWN), read_index(Path(pipeline))
        names = index.get("id2label") or dict.fromkeys(map(str, range(source.num_classes)))
        names = tuple(names[key] or key for key in sorted(names, key=int))
        return Opened(source, (Path(pipeline),), names, (partial(provenance_of, Path(pipeline)),))
    trained = Trained(Path(run), None, ema, f"--{prefix}ema")
    return Opened(trained.source(device), (trained.found,), () if trained.text else trained.class_names, (trained.provenance,))


def opened(options: Model) -> Opened:
    """The model to sample from, with its guide.

    Raises:
        ValueError: as `open_one`; a guide that has no effect, or is of other data; a classifier that cannot lead the model.
    """
    guide = (options.guide_pipeline, options.guide_run, options.guide_ema) if isinstance(options, Sampling) else ("", "", "")
    if any(guide) and options.guidance_scale == 1:  # type: ignore[attr-defined]
        raise ValueError(f"--guide_run or --guide_pipeline {''.join(guide)!r} beside --guidance_scale 1, which is none: give 2.")
    device = distributed.join(patience=distributed.A_MONTH).device
    model = open_one(options.pipeline, options.run, options.ema, device)
    if any(guide):
        weak = open_one(*guide, device, "guide_")
        model = model._replace(
            source=led_by(model.source, weak.source), files=model.files + weak.files, weights=model.weights + weak.weights
        )
    if not (reference := getattr(options, "classifier_reference", "")):
        return model
    source = led_by_classifier(model.source, shards := Shards(reference, "train"), read_images, reference)
    return model._replace(source=source, class_names=model.class_names or tuple(shards.manifest.class_names))


class Trained:
    """A checkpoint of a run, read back; with the weights that `ema` names, as in `pipeline.ema.weights.read_wanted`.

    Raises:
        ValueError: no whole checkpoint there, or no such weights.
    """

    def __init__(self, run: Path, checkpoint: Path | None = None, ema: str = "", option: str = "--ema") -> None:
        found = checkpoint or (run if (run / "state.json").is_file() else Store(run, keep=1).latest())
        if found is None:
            raise ValueError(f"run={str(run)!r} holds no whole checkpoint: train first, `accelerate launch train.py --output_dir {run}`.")
        self.run, self.found, self.state = run, found, load_state(found)
        with understood(found):
            self.config = build(Config, self.state["config"])
            wanted = read_wanted(ema, self.config.ema, self.config.train.batch_size, option)
            self.ema, self.class_names = wanted.name, tuple(self.state["class_names"])
            self.space, self.text = Space.of(self.state["space"]), self.state["text"]
            words = tuple(self.text["widths"]) if self.text else None
            sizes = model_options(self.config.model, self.space.shape, len(self.class_names), words, self.config.flow.objective)
            check_network(found, sizes, partial(registry.build, **sizes, device="meta"))
            self.network = registry.build(**sizes).eval()
            if self.config.train.lora_rank:
                add_lora(self.network, self.config.train.lora_rank, self.config.train.lora_alpha)
            weights, self.weights = read_weights(found, self.state, wanted, self.config.ema)
            self.network.load_state_dict(weights)
            self.adapted = digest(weights) if self.config.train.lora_rank else ""  # merging rounds as its machine does
            self.network = merge_lora(self.network)

    def provenance(self) -> Provenance:
        """Return which weights these are."""
        return Provenance.of_run(self.adapted or digest(self.network.state_dict()), self.state["step"], self.ema)

    def source(self, device: torch.device | str) -> Source:
        """The averaged network as a field."""
        space = self.space
        decode = space.decoder(partial(Autoencoder, space.autoencoder, device, expected=space.fingerprint))
        read = self.words(device).read if self.text else None
        classes = 0 if self.text else len(self.class_names)
        network, data = self.network.to(device), self.config.data
        facts = (read, None, data.bit_depth, one_size(network, bool(data.aspect_ratios)))
        return network_source(network, self.config.flow, space.shape, classes, decode, space.pixels, *facts)

    def words(self, device: torch.device | str) -> Words:
        """The text encoders it was trained with.

        Raises:
            ValueError: they are not there any more, or are others.
        """
        words = Words(read_text_encoders(Options(**vars(self.config.data))), device)
        words.check(self.text["fingerprints"])
        return words

    def export(self, output: Path, options: Export) -> Path:
        """Write it for stock diffusers."""
        told: dict[str, Any] = {"title": options.title, "license": options.license, "datasets": options.dataset}
        told |= {"weights": self.weights, "changes": lines_of(self.state), "output": output, "repository": options.push_to_hub}
        trained, space, form = self.provenance(), self.space, form_of(self.config.flow)
        spoken = self.words("cpu").networks if self.text else ()
        how = (bool(spoken) and self.config.data.text_padding == "mask", bool(self.config.data.aspect_ratios))
        network, why = to_exported(self.network, form.factor, *how), unheld(self.network, *how)
        told["provenance"] = replace(trained, sha256=digest(network.state_dict()))
        card = Card.of(self.run, self.state["images"], self.state["step"], self.network, **told)
        vae = Autoencoder(space.autoencoder, expected=space.fingerprint).model if space.latent else None
        about: dict[str, Any] = {"why": why, "spoken": spoken, "captions": self.text.get("captions", ()), "variant": options.variant}
        return write_folder(output, network, self.config, () if self.text else self.class_names, card, space, vae, **about)


def images(options: Images) -> int:
    """Sample into a grid, an animation or a folder, and print where."""
    options.sampler()  # what it refuses is refused before a model is loaded
    kind, wanted = options.kind(), asked(options)
    if kind != "folder":
        distributed.alone(f"--output {options.output}")
    model = opened(options)
    wanted = wanted.check(model.source, guided=options.guidance_scale != 1 and not model.source.weak)
    if kind == "folder":
        tars = partial(MadeShards, Path(options.output), options.images_per_shard, model.class_names)
        return draw_folder(options, model.source, wanted, model.files, tars, STOPPER)
    return draw_picture(options, model.source, wanted)


def compare(options: Evaluate) -> int:
    """Sample every class alike, compare with real images, print and write the figures."""
    if not options.reference:
        raise ValueError("--reference is missing: give the folder of shards, as --reference runs/digits/shards.")
    shards = [Shards(options.reference, split) for split in (options.train_split, options.held_out_split)]
    features = load_features(options.features) if options.features else None
    model = opened(options)
    source, drawn = model.source, options.told(*(one() for one in model.weights))
    channels, _, resolution = source.image_shape
    train, held_out = (read_images(s, channels, resolution, bit_depth=source.bit_depth) for s in shards)
    if (there := len(shards[0].manifest.class_names)) != source.num_classes or not there:
        raise ValueError(f"the model has {source.num_classes} classes, {options.reference} has {there}: give its own shards.")
    check_features(features, held_out[0][:2], options.features)
    labels = torch.arange(options.num_images) % source.num_classes
    made = generate(source, labels, options.sampler(), seed=options.seed, batch_size=options.batch_size).images.clamp(-1, 1)
    report = evaluate(made, labels, train, held_out, features)
    say(report)
    output = Path(options.output or Path(options.pipeline or options.run) / "evaluation.json")
    write_whole(output, json.dumps({**report.as_dict(), **drawn}, indent=1) + "\n")
    say(f"figures in {output}")
    return 0 if report.reaches(options.min_accuracy, options.min_diversity, options.min_nearest) else 1


def captioned(options: Retrieve) -> tuple[Tensor, Tensor, list[str], dict[str, Any]]:
    """Real images of captions that the seed draws, (N, C, H, W), a sample of each caption, the captions, and how they were drawn."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards with captions, as --reference runs/emoji/shards.")
    model, shards = opened(options), Shards(options.reference, options.split)
    source = model.source
    if source.read is None:
        raise ValueError("retrieve asks by caption, and the model takes no text: use evaluate for classes.")
    check_captions(shards, options.caption)
    total, drawn = sum(shards.counts), options.told(*(one() for one in model.weights))
    if not 2 <= options.candidates <= total:
        raise ValueError(f"--candidates {options.candidates}: 2 or more, of the {total} images of split {options.split!r}.")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))[: options.candidates].tolist()
    channels, _, side = source.image_shape
    real, _ = read_images(shards, channels, side, chosen, bit_depth=source.bit_depth)
    captions = read_captions(shards, options.caption, chosen)
    made = generate(source, source.read(captions), options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    return real, made.clamp(-1, 1), captions, drawn


def retrieve_captions(options: Retrieve) -> int:
    """Sample captions of real images, look each up among them, print and write the figures."""
    real, made, captions, drawn = captioned(options)
    found = retrieve(made, real, torch.arange(len(real)))
    output = Path(options.output or Path(options.pipeline or options.run) / "retrieval.png")
    save_image(side_by_side(real, made, scale=max(1, 64 // real.shape[-1])), output)
    write_whole(output.with_suffix(".json"), json.dumps({**found.as_dict(), **drawn, "captions": captions}, indent=1) + "\n")
    say(f"{found}\n{output}: rows of real images, then their samples; figures in {output.with_suffix('.json')}")
    return 0


def export(options: Export) -> int:
    """Write the folder, and publish it if asked."""
    if not options.run:
        raise ValueError("--run is missing: give the folder of a run, as --run runs/digits.")
    if options.push_to_hub:
        check_repository(options.push_to_hub)
    elif options.private:
        raise ValueError("--private without --push_to_hub: nothing is published. Give --push_to_hub user/name too.")
    trained = Trained(Path(options.run), Path(options.checkpoint) if options.checkpoint else None, options.ema)
    folder = trained.export(Path(options.output) if options.output else Path(options.run) / "export", options)
    if options.push_to_hub:
        publish(folder, options.push_to_hub, private=options.private)
    return 0


def likelihood(options: Likelihood) -> int:
    """Measure and print bits per dimension."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards, as --reference runs/digits/shards.")
    source = opened(options).source
    need_pixels(source, "likelihood measures bits of pixels")
    shards = Shards(options.reference, options.split)
    first = range(min(options.num_images, sum(shards.counts)))
    real, labels = read_images(shards, source.shape[0], source.shape[-1], first, bit_depth=source.bit_depth)
    if options.unconditional or not source.num_classes:
        labels = torch.full_like(labels, source.null)
    else:
        check_labels(labels, source.num_classes)
    say(bits(source, real, labels, exact=affordable(source.shape) and not options.estimate, **options.how()))
    return 0


def restored(options: Restore) -> int:
    """Restore an image and write what was left of it, then the samples."""
    check_options(options)
    source = opened(options).source

    def read(file: Path, channels: int, side: int) -> Tensor:
        return to_unit(torch.from_numpy(decode_image(file.read_bytes(), channels, side, bit_depth=source.bit_depth)))

    say(restore_file(source, options, read))
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
    if verb != "images":
        distributed.alone(verb)
    return act(parse(options, rest))
