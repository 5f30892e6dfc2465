"""The model card, README.md of an exported folder: what was measured and what is in the folder, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..config.parse import config_to_mapping
from ..config.schema import Config
from ..evaluation.markdown import code_block, code_span, escape_markdown
from ..evaluation.provenance import Provenance
from ..evaluation.results import EVALUATION_KEYS, RETRIEVAL_KEYS, eval_results, read_results, results_section
from ..hub.checksums import sha256_of
from ..hub.secrets import base_name, is_hub_id, without_local_paths
from ..tracking.run_log import last_loss, loss_curve
from ..training.resume_rules import describe_changes

CHANNEL_NAMES = {1: "gray", 2: "gray and alpha", 3: "RGB", 4: "RGB and alpha"}
STOCK_LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes load without trust."""


@dataclass(frozen=True)
class CardFacts:
    """What the model card says beside the configuration."""

    title: str
    images: int
    """Seen in training."""
    steps: int
    loss: float | None
    parameters: int
    license: str = "unknown"
    """An identifier of the Hub, such as apache-2.0."""
    datasets: tuple[str, ...] = ()
    """On the Hub, as user/name."""
    repository: str = ""
    """Where it will be published, user/name."""
    weights: str = ""
    """Which weights of the run these are, in words; "" is its first average."""
    curve: tuple[tuple[float, float], ...] = ()
    """(images seen, loss)."""
    provenance: Provenance | None = None
    changes: tuple[Mapping[str, Any], ...] = ()
    """Lines of the run's journal of settings."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license={self.license!r} is no identifier of the Hub's: lower case, such as apache-2.0, mit, cc-by-4.0, other."
            )
        if len(self.title.splitlines()) > 1:
            raise ValueError(f"title={self.title!r} has more than one line: give one.")
        for name in self.datasets:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"dataset={name!r} is no data set on the Hub: give user/name ({error}).") from None

    @classmethod
    def from_run(
        cls,
        run: Path,
        images: int,
        steps: int,
        network: nn.Module,
        *,
        title: str = "",
        license: str = "",
        datasets: tuple[str, ...] = (),
        repository: str = "",
        weights: str = "",
        provenance: Provenance | None = None,
        changes: Sequence[Mapping[str, Any]] = (),
        output: Path | None = None,
    ) -> CardFacts:
        """The facts of a run's folder and network, with what only its owner knows.

        Figures of evaluation.json and retrieval.json are taken from the run's
        folder, its export or `output` if they are of exactly the weights of
        `provenance`; `weights` are the same in words.

        Raises:
            ValueError: a licence, title or data set that cannot be one.
        """
        places = [run, run / "export", *([output] if output else [])]
        return cls(
            title=title or repository.rpartition("/")[2] or run.resolve().name,
            images=images,
            steps=steps,
            loss=last_loss(run),
            parameters=sum(p.numel() for p in network.parameters()),
            license=license or "unknown",
            datasets=datasets,
            repository=repository,
            weights=weights,
            curve=tuple(loss_curve(run)),
            provenance=provenance,
            changes=tuple(changes),
            evaluation=read_results(places, "evaluation.json", EVALUATION_KEYS, provenance),
            retrieval=read_results(places, "retrieval.json", RETRIEVAL_KEYS, provenance),
        )


def render_readme(
    folder: Path, config: Config, class_names: tuple[str, ...], card: CardFacts, guidance: float, calls: tuple[str, str], why_not_stock: str
) -> str:
    """The text of README.md.

    Args:
        folder: the exported folder, complete but for this text: its index, code and pictures are described.
        config: of the run; local paths do not get into the text.
        class_names: name of each class; none for an unconditional model or one of text.
        card: the facts.
        guidance: scale with which samples.png was drawn, and the examples are.
        calls: arguments that draw an image, such as `class_labels=[0]`: of the folder's pipeline, and of our own.
        why_not_stock: it is not of stock classes; "" if it is.
    """
    sections = [
        f"---\n{_metadata(config, class_names, card).to_yaml()}\n---",
        f"# {escape_markdown(card.title)}",
        _description(config, class_names, card),
        f"![samples](samples.png)\n\nSamples of seed 0, 25 Heun steps, guidance {guidance:g}.",
        _loading(folder, card, calls, why_not_stock),
        _beyond_pil_paragraph(config.data.channels, config.data.bit_depth),
        _training(folder, config, card),
        results_section(card.evaluation, card.retrieval),
        _limits(config, card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(config: Config, class_names: tuple[str, ...], card: CardFacts) -> ModelCardData:
    """What the Hub reads."""
    text = config.model.conditioning == "text"
    task = "text-to-image" if text else "unconditional-image-generation"  # there is no task for classes
    kind = "flow-matching" if config.flow.path == "condot" else "diffusion"
    source = card.datasets[0] if card.datasets else ", ".join(map(base_name, config.data.shards)) or "images"
    results = eval_results(card.evaluation, card.retrieval, task, source)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=card.license,
        tags=["condot", kind, "class-conditional"] if class_names and not text else ["condot", kind],
        datasets=list(card.datasets) or None,
        base_model=config.init_from if config.init_from and is_hub_id(config.init_from) else None,
        model_name=card.title if results else None,
        eval_results=results or None,
    )


def _description(config: Config, class_names: tuple[str, ...], card: CardFacts) -> str:
    """What it is, in a sentence or two."""
    data = config.data
    more = ", ..." if len(class_names) > 20 else ""
    told = f"{len(class_names)} classes: {', '.join(map(escape_markdown, class_names[:20]))}{more}" if class_names else "no classes"
    if config.model.conditioning == "text":
        told = f"captions, read by {' and '.join(map(_hub_link, data.text_encoder))}"
    latents = f", in the latents of {_hub_link(data.autoencoder)}" if data.autoencoder else ""
    origin = f"from the weights of {_hub_link(config.init_from)}" if config.init_from else "from scratch"
    if config.checkpoint.start_from:  # what that one began from, its own card says
        origin = f"from the weights of another run, {code_span(base_name(config.checkpoint.start_from))}"
    return (
        f"A {config.model.kind} of {card.parameters:,} parameters, trained {origin} by condot on\n"
        f"{data.resolution} x {data.resolution} {describe_images(data.channels, data.bit_depth)}, {told}{latents}."
    )


def describe_images(channels: int, bit_depth: int) -> str:
    """Return what kind of images those of so many channels and bits are, in words."""
    named = f" ({CHANNEL_NAMES[channels]})" if channels in CHANNEL_NAMES else ""
    return f"images with {channels} channel(s){named}{f' of {bit_depth} bits' if bit_depth != 8 else ''}"


def note_beyond_pil(channels: int, bit_depth: int) -> str:
    """Return how to have all of an image that a pipeline's PIL images do not hold; "" where they hold all."""
    numbers = f'`output_type="np"` gives numbers in 0 to 1, (height, width, {channels})'
    if channels not in CHANNEL_NAMES:
        return f"no PIL image holds {channels} bands: {numbers}"
    return f"PIL images of a pipeline have 8 of its {bit_depth} bits: {numbers}" if bit_depth != 8 else ""


def _hub_link(name: str) -> str:
    """A model on the Hub as a link; a local one by its last name."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) and "/" in name else escape_markdown(base_name(name))


def _loading(folder: Path, card: CardFacts, calls: tuple[str, str], why_not_stock: str) -> str:
    """How to load it, in stock diffusers and with samplers of ours; the code in the folder, by hash."""
    index = json.loads((folder / "model_index.json").read_text())
    own = components_with_code(index)
    place, (call, ours) = card.repository or "path/to/this/folder", calls
    trust = ", trust_remote_code=True" if own else ""
    kind = index["_class_name"][-1] if isinstance(index["_class_name"], list) else index["_class_name"]
    verb = "is" if len(own) == 1 else "are"
    said = (
        f"It is a `{kind}`; its {' and '.join(own)} {verb} code of ours in this repository: read it, then allow it with "
        f"`trust_remote_code=True`. Why no stock class does: {why_not_stock}."
        if own
        else f"It is a `{kind}` of stock classes, which hold it exactly: no code of this repository runs."
    )
    text = f"""## Loading

{said}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{place}"{trust})
image = pipe({call}).images[0]
```"""
    for path in sorted(folder.glob("pipeline_*.py")):
        text += f"""

The trainer's own samplers, ODE and SDE, come with code in this repository:

```python
import torch

pipe = DiffusionPipeline.from_pretrained("{place}", custom_pipeline="{path.stem}", trust_remote_code=True)
image = pipe({ours}, solver="heun", generator=torch.Generator().manual_seed(0)).images[0]
```"""
    files = [f"| `{path.relative_to(folder).as_posix()}` | `{sha256_of(path)}` |" for path in sorted(folder.rglob("*.py"))]
    if files:
        text += '\n\nThe code, by SHA-256; to run what you read, give `from_pretrained` its commit as `revision="..."`.\n\n'
        text += "\n".join(["| file | SHA-256 |", "|---|---|", *files])
    return text


def _beyond_pil_paragraph(channels: int, bit_depth: int) -> str:
    """What of an image the pipeline's default output does not hold, as a paragraph of its own."""
    said = note_beyond_pil(channels, bit_depth)
    return f"{said[0].upper()}{said[1:]}, to be multiplied by {2**bit_depth - 1}." if said else ""


def components_with_code(index: dict[str, Any]) -> list[str]:
    """Names of the parts in a model_index.json whose code lies in the folder, the pipeline's class among them."""
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)}
    own = [name for name, (library, _) in parts.items() if library not in STOCK_LIBRARIES]
    return ["pipeline" if name == "_class_name" else name for name in own]


def _training(folder: Path, config: Config, card: CardFacts) -> str:
    """The recipe: in words, as a curve, and whole."""
    each = f" of {config.train.batch_size} images" if card.images == card.steps * config.train.batch_size else ""
    seen = f"{card.steps:,} steps{each} ({card.images:,} images seen)"
    loss = "" if card.loss is None else f", last logged loss {card.loss:.4f}"
    names = [f"[{name}](https://huggingface.co/datasets/{name})" for name in card.datasets]
    data = (
        f"Data: {', '.join(names or (escape_markdown(base_name(place)) for place in config.data.shards))}"
        f", split {code_span(config.data.split)}."
        if config.data.shards or names
        else ""
    )
    weights = card.weights or ("the running average of the trained ones" if config.ema.enabled else "")
    average = f"\nThe weights here are {weights}." if weights else ""
    curve = "\n\n![loss over images seen](curve.png)" if (folder / "curve.png").exists() else ""
    recipe = code_block(yaml.safe_dump(without_local_paths(config_to_mapping(config)), sort_keys=False, width=10_000), "yaml")
    return f"""## Training

{config.flow.predict} prediction on the {config.flow.path} path, {seen}{loss}. {data}{average}{_resumed(card)}{curve}

<details><summary>The whole recipe</summary>

{recipe}

</details>"""


def _resumed(card: CardFacts) -> str:
    """Return what the run was resumed with on its way, from the journal."""
    lines = [f"after step {line['step']}, {', '.join(map(code_span, describe_changes(line)))}" for line in card.changes]
    return f"\nResumed with other settings: {'; '.join(lines)}." if lines else ""


def _limits(config: Config, card: CardFacts) -> str:
    """What it cannot do, and what its user must see to."""
    unmeasured = "" if card.evaluation or card.retrieval else " Nothing was measured on these weights beside the loss."
    unlicensed = " No licence was given with these weights (`license: unknown`)." if card.license == "unknown" else ""
    return f"""## Limits

It draws what it was trained on, at {config.data.resolution} x {config.data.resolution} pixels, and nothing else.{unmeasured}
Check the licence of the training images before sharing what it makes.{unlicensed}"""
