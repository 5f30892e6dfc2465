"""What images are asked for: classes or captions, in turn, from the command line or from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condot.core.hashing import sha256_of

from ..flow import Condition
from .flow_model import FlowModel
from .options import ImagesOptions


@dataclass(frozen=True)
class ImageRequests:
    """Conditions in turn: image i has number i modulo their count; none at all for a model that takes none."""

    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    """Of each prompt, what guidance leads away from; "" for no caption."""
    file: str = ""
    """Where they were read, if they were."""

    def __len__(self) -> int:
        return len(self.labels) or len(self.prompts)

    @property
    def digest(self) -> str:
        """A hash of all of them, in order."""
        return sha256_of(json.dumps([self.labels, self.prompts, self.negative_prompts]))

    def conditions(self, model: FlowModel, index: Sequence[int]) -> tuple[Condition, Condition | None]:
        """What `generate` takes for these images: conditions, (N, ...), and what to lead away from, or None."""
        positions = [i % len(self) for i in index] if len(self) else []
        if self.prompts:
            assert model.encode_text is not None, "check was called"
            negative = model.encode_text([self.negative_prompts[i] for i in positions]) if any(self.negative_prompts) else None
            return model.encode_text([self.prompts[i] for i in positions]), negative
        return torch.tensor([self.labels[i] for i in positions]) if positions else torch.full((len(index),), model.null), None

    def sidecar_files(self, i: int) -> dict[str, bytes]:
        """The files that go beside image i in a shard, by extension."""
        position = i % max(len(self), 1)
        if self.labels:
            return {"cls": str(self.labels[position]).encode()}
        return {"txt": self.prompts[position].encode()} if self.prompts else {}

    def check(self, model: FlowModel, guided: bool) -> ImageRequests:
        """These conditions, or all classes where none are given.

        Args:
            model: the model that takes them.
            guided: by the model's own field without a condition, or with a negative one.

        Raises:
            ValueError: labels or prompts that the model does not take, or none of those it needs.
        """
        if self.labels and model.encode_text:
            raise ValueError(f"--class_labels {self.labels[0]} of a model that takes text: give --prompt or --prompts.")
        if self.labels and not model.num_classes:
            raise ValueError(f"--class_labels {self.labels[0]} of a model without classes: leave the option out.")
        if self.prompts and not model.encode_text:
            raise ValueError(f"--prompt {self.prompts[0]!r} of a model that takes no text: leave the option out.")
        if model.encode_text and not self.prompts:
            raise ValueError("--prompt is missing: the model takes text, as --prompt 'a red apple' 'a black cat', or --prompts FILE.")
        if any(self.negative_prompts) and not guided:
            raise ValueError(
                f"--negative_prompt {next(filter(None, self.negative_prompts))!r} has no effect without guidance, "
                f"or where a weaker model guides: give --guidance_scale 3, and no --guide_run or --guide_pipeline."
            )
        for number, label in enumerate(self.labels, 1):
            if not 0 <= label < model.num_classes:
                place = f"{self.file}, line {number}: " if self.file else ""
                raise ValueError(f"{place}class label {label} is out of range: the model has classes 0 to {model.num_classes - 1}.")
        return self if len(self) else ImageRequests(labels=tuple(range(model.num_classes)))


def read_requests(options: ImagesOptions) -> ImageRequests:
    """What the command line and its files ask for.

    Raises:
        ValueError: two of the options that exclude one another; a file that is missing or empty, or a line of it that cannot be used.
    """
    given = [name for name in ("class_labels", "labels", "prompt", "prompts") if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} beside one another: give classes or captions, by one option.")
    for name, least in (("num_images", 0), ("batch_size", 1), ("images_per_shard", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}: at least {least or 'one, or 0 for one of each label or prompt'}.")
    if options.negative_prompt and not any(name in given for name in ("prompt", "prompts")):
        raise ValueError(f"--negative_prompt {options.negative_prompt!r} beside no --prompt: leave the option out.")
    if options.labels:
        return ImageRequests(
            labels=tuple(_parse_label(text, place) for place, text in _read_lines(options.labels, "labels")), file=options.labels
        )
    rows = [(text, options.negative_prompt) for text in options.prompt]
    if options.prompts:
        read = _parse_json_line if options.prompts.endswith(".jsonl") else _parse_text_line
        rows = [read(text, place, options.negative_prompt) for place, text in _read_lines(options.prompts, "prompts")]
    return ImageRequests(options.class_labels, tuple(prompt for prompt, _ in rows), tuple(negative for _, negative in rows))


def _read_lines(file: str, option: str) -> list[tuple[str, str]]:
    """Each line of a file, without the spaces around it, and how messages call it."""
    if not Path(file).is_file():
        raise ValueError(f"--{option} {file!r} is no file: give a text file, one of the {option} a line.")
    found = []
    for number, raw in enumerate(Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        place = f"{file}, line {number}"
        try:
            found.append((place, raw.decode().strip()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {error.reason} at byte {error.start}: save the file as UTF-8.") from error
    if not found:
        raise ValueError(f"--{option} {file!r} is empty: give one of the {option} a line.")
    return found


def _parse_label(text: str, place: str) -> int:
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()):
        raise ValueError(f"{place}: {text[:40]!r} is no class: give one whole number a line.")
    return int(text)


def _parse_text_line(text: str, place: str, negative: str) -> tuple[str, str]:
    if not text:
        raise ValueError(f'{place}: no prompt: remove the line, or ask for no caption by {{"prompt": ""}} in a .jsonl file.')
    return text, negative


def _parse_json_line(text: str, place: str, negative: str) -> tuple[str, str]:
    try:
        row: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{place}: not valid JSON ({error}): write {{"prompt": "a red apple"}}.') from error
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise ValueError(f'{place}: {text[:40]!r} is no mapping of texts: write {{"prompt": "a red apple"}}.')
    unknown = sorted(row.keys() - {"prompt", "negative_prompt"})
    if unknown or "prompt" not in row:
        raise ValueError(
            f"{place}: {f'unknown key {unknown[0]!r}' if unknown else 'no prompt'}: the keys are prompt and, where wanted, negative_prompt."
        )
    return row["prompt"], row.get("negative_prompt", negative)
