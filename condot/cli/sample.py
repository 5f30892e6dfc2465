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
from condot.core.plugins import explain_missing, take_plugins
from condot.core.printable import say
from condot.core.process import report_errors, stopper_of_program
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.encoders.text import read_text_encoders
from condot.data.images.decode import decode_image
from condot.data.loader.captions import check_captions
from condot.data.loader.read_samples import read_captions, read_images
from condot.data.loader.stream import to_unit
from condot.data.loader.text_conditioner import TextConditioner
from condot.data.prepare.generated import GeneratedShards
from condot.data.storage.shard_reader import Shards
from condot.models import registry
from condot.models.convert import CUSTOM_CLASSES, has_fixed_size, to_diffusers, unsupported_by_stock
from condot.models.lora import add_lora, merge_lora
from condot.pipeline.checkpoint.store import CheckpointManager, check_network, explain_errors, load_state
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.parse import config_from_mapping, parse
from condot.pipeline.config.schema import Config
from condot.pipeline.ema.weight_selection import load_selected_weights, parse_weight_selection
from condot.pipeline.evaluation.features import check_features, load_features
from condot.pipeline.evaluation.metrics import evaluate
from condot.pipeline.evaluation.provenance import Provenance, hash_tensors, read_provenance
from condot.pipeline.evaluation.retrieval import retrieve
from condot.pipeline.export.load import load_flow_model, read_model_index
from condot.pipeline.export.model_card import CardFacts
from condot.pipeline.export.scheduler_map import export_form
from condot.pipeline.export.write import export_pipeline
from condot.pipeline.hub.publish import check_repository, publish
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.launch import distributed
from condot.pipeline.sampling.classifier_guidance import with_trained_classifier
from condot.pipeline.sampling.flow_model import FlowModel, build_flow_model, check_labels, require_pixel_model, with_autoguidance
from condot.pipeline.sampling.generate import generate
from condot.pipeline.sampling.image_grid import make_comparison_grid, save_image
from condot.pipeline.sampling.images import generate_image_file, generate_image_folder
from condot.pipeline.sampling.likelihood import compute_bits_per_dimension, is_exact_affordable
from condot.pipeline.sampling.options import (
    EvaluateOptions,
    ExportOptions,
    ImagesOptions,
    LikelihoodOptions,
    ModelOptions,
    RestoreOptions,
    RetrieveOptions,
    SamplingOptions,
)
from condot.pipeline.sampling.requests import read_requests
from condot.pipeline.sampling.restore import check_restore_options, restore_file
from condot.pipeline.training.resume_rules import saved_journal

INTERRUPT = stopper_of_program()


class LoadedModel(NamedTuple):
    """A model read back."""

    model: FlowModel
    files: tuple[Path, ...]  # folders, exported or checkpoints, of itself and of its guide, if it has one
    class_names: tuple[str, ...]
    weights: tuple[Callable[[], Provenance], ...]  # of itself and of its guide


def load_model(pipeline: str, run: str, ema: str, device: torch.device, prefix: str = "") -> LoadedModel:
    """An exported folder, or a run and which of its weights.

    Raises:
        ValueError: neither or both of them, or a folder that is none.
    """
    if bool(pipeline) == bool(run):
        raise ValueError(f"--{prefix}pipeline={pipeline!r} and --{prefix}run={run!r}: give one of them, an exported folder or a run's.")
    if pipeline and ema:
        raise ValueError(f"--{prefix}ema {ema} of --{prefix}pipeline {pipeline}, which holds one set of weights: give --{prefix}run.")
    if pipeline:
        model, index = load_flow_model(pipeline, device, CUSTOM_CLASSES), read_model_index(Path(pipeline))
        names = index.get("id2label") or dict.fromkeys(map(str, range(model.num_classes)))
        names = tuple(names[key] or key for key in sorted(names, key=int))
        return LoadedModel(model, (Path(pipeline),), names, (partial(read_provenance, Path(pipeline)),))
    trained = TrainedModel(Path(run), None, ema, f"--{prefix}ema")
    return LoadedModel(
        trained.build_model(device), (trained.checkpoint,), () if trained.text else trained.class_names, (trained.provenance,)
    )


def load_models(options: ModelOptions) -> LoadedModel:
    """The model to sample from, with its guide.

    Raises:
        ValueError: as `load_model`; a guide that has no effect, or is of other data; a classifier that cannot lead the model.
    """
    guide = (options.guide_pipeline, options.guide_run, options.guide_ema) if isinstance(options, SamplingOptions) else ("", "", "")
    if any(guide) and options.guidance_scale == 1:  # type: ignore[attr-defined]
        raise ValueError(f"--guide_run or --guide_pipeline {''.join(guide)!r} beside --guidance_scale 1, which is none: give 2.")
    device = distributed.join_process_group(timeout=distributed.A_MONTH).device
    loaded = load_model(options.pipeline, options.run, options.ema, device)
    if any(guide):
        weak = load_model(*guide, device, "guide_")
        loaded = loaded._replace(
            model=with_autoguidance(loaded.model, weak.model), files=loaded.files + weak.files, weights=loaded.weights + weak.weights
        )
    if not (reference := getattr(options, "classifier_reference", "")):
        return loaded
    model = with_trained_classifier(loaded.model, shards := Shards(reference, "train"), read_images, reference)
    return loaded._replace(model=model, class_names=loaded.class_names or tuple(shards.manifest.class_names))


class TrainedModel:
    """A checkpoint of a run, read back; with the weights that `ema` names, as in `pipeline.ema.weights.parse_weight_selection`.

    Raises:
        ValueError: no whole checkpoint there, or no such weights.
    """

    def __init__(self, run: Path, checkpoint: Path | None = None, ema: str = "", option: str = "--ema") -> None:
        found = checkpoint or (run if (run / "state.json").is_file() else CheckpointManager(run, keep=1).latest())
        if found is None:
            raise ValueError(f"run={str(run)!r} holds no whole checkpoint: train first, `accelerate launch train.py --output_dir {run}`.")
        self.run, self.checkpoint, self.state = run, found, load_state(found)
        with explain_errors(found), explain_missing(self.state.get("plugins")):
            self.config = config_from_mapping(Config, self.state["config"])
            wanted = parse_weight_selection(ema, self.config.ema, self.config.train.batch_size, option)
            self.ema, self.class_names = wanted.name, tuple(self.state["class_names"])
            self.space, self.text = LatentSpace.from_checkpoint(self.state["space"]), self.state["text"]
            text_widths = tuple(self.text["widths"]) if self.text else None
            sizes = build_model_kwargs(self.config.model, self.space.shape, len(self.class_names), text_widths, self.config.flow.objective)
            check_network(found, sizes, partial(registry.build, **sizes, device="meta"))
            self.network = registry.build(**sizes).eval()
            if self.config.train.lora_rank:
                add_lora(self.network, self.config.train.lora_rank, self.config.train.lora_alpha)
            weights, self.weights = load_selected_weights(found, self.state, wanted, self.config.ema)
            self.network.load_state_dict(weights)
            self.lora_digest = hash_tensors(weights) if self.config.train.lora_rank else ""  # merging rounds as its machine does
            self.network = merge_lora(self.network)

    def provenance(self) -> Provenance:
        """Return which weights these are."""
        return Provenance.from_run(
            self.lora_digest or hash_tensors(self.network.state_dict()), self.state["step"], self.ema, self.state.get("plugins")
        )

    def build_model(self, device: torch.device | str) -> FlowModel:
        """The averaged network as a field."""
        space = self.space
        decode = space.decoder(partial(Autoencoder, space.autoencoder, device, expected=space.fingerprint))
        read = self.load_text_conditioner(device).read if self.text else None
        classes = 0 if self.text else len(self.class_names)
        network, data = self.network.to(device), self.config.data
        facts = (read, None, data.bit_depth, has_fixed_size(network, bool(data.aspect_ratios)))
        return build_flow_model(network, self.config.flow, space.shape, classes, decode, space.pixels, *facts)

    def load_text_conditioner(self, device: torch.device | str) -> TextConditioner:
        """The text encoders it was trained with.

        Raises:
            ValueError: they are not there any more, or are others.
        """
        words = TextConditioner(read_text_encoders(Options(**vars(self.config.data))), device)
        words.check(self.text["fingerprints"])
        return words

    def export(self, output: Path, options: ExportOptions) -> Path:
        """Write it for stock diffusers."""
        card_facts: dict[str, Any] = {"title": options.title, "license": options.license, "datasets": options.dataset}
        card_facts |= {"weights": self.weights, "changes": saved_journal(self.state), "output": output, "repository": options.push_to_hub}
        trained, space, form = self.provenance(), self.space, export_form(self.config.flow)
        text_encoders = self.load_text_conditioner("cpu").networks if self.text else ()
        how = (bool(text_encoders) and self.config.data.text_padding == "mask", bool(self.config.data.aspect_ratios))
        network, why_not_stock = to_diffusers(self.network, form.factor, *how), unsupported_by_stock(self.network, *how)
        card_facts["provenance"] = replace(trained, sha256=hash_tensors(network.state_dict()))
        card = CardFacts.from_run(self.run, self.state["images"], self.state["step"], self.network, **card_facts)
        vae = Autoencoder(space.autoencoder, expected=space.fingerprint).model if space.is_latent else None
        about: dict[str, Any] = {
            "why_not_stock": why_not_stock,
            "text_encoders": text_encoders,
            "captions": self.text.get("captions", ()),
            "variant": options.variant,
        }
        return export_pipeline(output, network, self.config, () if self.text else self.class_names, card, space, vae, **about)


def sample_images(options: ImagesOptions) -> int:
    """Sample into a grid, an animation or a folder, and print where."""
    options.sampler()  # what it refuses is refused before a model is loaded
    kind, wanted = options.output_kind(), read_requests(options)
    if kind != "folder":
        distributed.require_single_process(f"--output {options.output}")
    loaded = load_models(options)
    wanted = wanted.check(loaded.model, guided=options.guidance_scale != 1 and not loaded.model.weak)
    if kind == "folder":
        tars = partial(GeneratedShards, Path(options.output), options.images_per_shard, loaded.class_names)
        return generate_image_folder(options, loaded.model, wanted, loaded.files, tars, INTERRUPT)
    return generate_image_file(options, loaded.model, wanted)


def evaluate_samples(options: EvaluateOptions) -> int:
    """Sample every class alike, compare with real images, print and write the figures."""
    if not options.reference:
        raise ValueError("--reference is missing: give the folder of shards, as --reference runs/digits/shards.")
    shards = [Shards(options.reference, split) for split in (options.train_split, options.held_out_split)]
    features = load_features(options.features) if options.features else None
    loaded = load_models(options)
    model, metadata = loaded.model, options.sampling_metadata(*(one() for one in loaded.weights))
    channels, _, resolution = model.image_shape
    train, held_out = (read_images(s, channels, resolution, bit_depth=model.bit_depth) for s in shards)
    if (there := len(shards[0].manifest.class_names)) != model.num_classes or not there:
        raise ValueError(f"the model has {model.num_classes} classes, {options.reference} has {there}: give its own shards.")
    check_features(features, held_out[0][:2], options.features)
    labels = torch.arange(options.num_images) % model.num_classes
    made = generate(model, labels, options.sampler(), seed=options.seed, batch_size=options.batch_size).images.clamp(-1, 1)
    report = evaluate(made, labels, train, held_out, features)
    say(report)
    output = Path(options.output or Path(options.pipeline or options.run) / "evaluation.json")
    write_whole(output, json.dumps({**report.as_dict(), **metadata}, indent=1) + "\n")
    say(f"figures in {output}")
    return 0 if report.meets(options.min_accuracy, options.min_diversity, options.min_nearest) else 1


def sample_captions(options: RetrieveOptions) -> tuple[Tensor, Tensor, list[str], dict[str, Any]]:
    """Real images of captions that the seed draws, (N, C, H, W), a sample of each caption, the captions, and how they were drawn."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards with captions, as --reference runs/emoji/shards.")
    loaded, shards = load_models(options), Shards(options.reference, options.split)
    model = loaded.model
    if model.encode_text is None:
        raise ValueError("retrieve asks by caption, and the model takes no text: use evaluate for classes.")
    check_captions(shards, options.caption)
    total, metadata = sum(shards.counts), options.sampling_metadata(*(one() for one in loaded.weights))
    if not 2 <= options.candidates <= total:
        raise ValueError(f"--candidates {options.candidates}: 2 or more, of the {total} images of split {options.split!r}.")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))[: options.candidates].tolist()
    channels, _, side = model.image_shape
    real, _ = read_images(shards, channels, side, chosen, bit_depth=model.bit_depth)
    captions = read_captions(shards, options.caption, chosen)
    made = generate(model, model.encode_text(captions), options.sampler(), seed=options.seed, batch_size=options.batch_size).images
    return real, made.clamp(-1, 1), captions, metadata


def evaluate_retrieval(options: RetrieveOptions) -> int:
    """Sample captions of real images, look each up among them, print and write the figures."""
    real, made, captions, metadata = sample_captions(options)
    found = retrieve(made, real, torch.arange(len(real)))
    output = Path(options.output or Path(options.pipeline or options.run) / "retrieval.png")
    save_image(make_comparison_grid(real, made, scale=max(1, 64 // real.shape[-1])), output)
    write_whole(output.with_suffix(".json"), json.dumps({**found.as_dict(), **metadata, "captions": captions}, indent=1) + "\n")
    say(f"{found}\n{output}: rows of real images, then their samples; figures in {output.with_suffix('.json')}")
    return 0


def export_run(options: ExportOptions) -> int:
    """Write the folder, and publish it if asked."""
    if not options.run:
        raise ValueError("--run is missing: give the folder of a run, as --run runs/digits.")
    if options.push_to_hub:
        check_repository(options.push_to_hub)
    elif options.private:
        raise ValueError("--private without --push_to_hub: nothing is published. Give --push_to_hub user/name too.")
    trained = TrainedModel(Path(options.run), Path(options.checkpoint) if options.checkpoint else None, options.ema)
    folder = trained.export(Path(options.output) if options.output else Path(options.run) / "export", options)
    if options.push_to_hub:
        publish(folder, options.push_to_hub, private=options.private)
    return 0


def measure_likelihood(options: LikelihoodOptions) -> int:
    """Measure and print bits per dimension."""
    if not options.reference:
        raise ValueError("--reference is missing: give a folder of shards, as --reference runs/digits/shards.")
    model = load_models(options).model
    require_pixel_model(model, "likelihood measures bits of pixels")
    shards = Shards(options.reference, options.split)
    first = range(min(options.num_images, sum(shards.counts)))
    real, labels = read_images(shards, model.shape[0], model.shape[-1], first, bit_depth=model.bit_depth)
    if options.unconditional or not model.num_classes:
        labels = torch.full_like(labels, model.null)
    else:
        check_labels(labels, model.num_classes)
    say(
        compute_bits_per_dimension(
            model, real, labels, exact=is_exact_affordable(model.shape) and not options.estimate, **options.solver_arguments()
        )
    )
    return 0


def restore_image(options: RestoreOptions) -> int:
    """Restore an image and write what was left of it, then the samples."""
    check_restore_options(options)
    model = load_models(options).model

    def read(file: Path, channels: int, side: int) -> Tensor:
        return to_unit(torch.from_numpy(decode_image(file.read_bytes(), channels, side, bit_depth=model.bit_depth)))

    say(restore_file(model, options, read))
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "images": (ImagesOptions, sample_images),
    "evaluate": (EvaluateOptions, evaluate_samples),
    "export": (ExportOptions, export_run),
    "likelihood": (LikelihoodOptions, measure_likelihood),
    "retrieve": (RetrieveOptions, evaluate_retrieval),
    "restore": (RestoreOptions, restore_image),
}


@report_errors
def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    argv = take_plugins(argv)
    verb, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("images", argv)
    if verb not in COMMANDS:
        raise ValueError(f"verb {verb!r} is unknown: choose one of {', '.join(COMMANDS)}.")
    options, act = COMMANDS[verb]
    if verb != "images":
        distributed.require_single_process(verb)
    return act(parse(options, rest))
