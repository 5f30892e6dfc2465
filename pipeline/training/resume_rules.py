"""What a resumed run may change of its recipe: each field is free, recorded in `settings.jsonl`, refused, or kept from the beginning.

What is recorded goes into every later checkpoint, the file, and the model
card; what is refused is a fact on which the two must agree.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from condot.core.atomic_files import write_whole
from condot.core.printable import redact_url

from ..config.flow import FlowConfig
from ..config.parse import config_to_mapping
from ..config.schema import Config
from .optimizer import learning_rate

JOURNAL_FILE = "settings.jsonl"
"""A run's journal: a line each time that it was resumed with other settings."""
ResumeRule = Literal["free", "recorded", "refused", "content", "beginning"]
RESUME_RULES: dict[ResumeRule, tuple[str, ...]] = {
    # where things lie, what is shown and kept, how fast it goes: no weight depends on it
    "free": (
        "output_dir", "export", "dry_run", "plan.*", "log.*", "checkpoint.every", "checkpoint.keep", "checkpoint.asynchronous",
        "checkpoint.resume", "guard.hang_seconds", "data.workers", "data.cache_dir", "data.cache_size", "data.retry_seconds",
        "train.cpu_threads", "model.gradient_checkpointing", "ema.snapshot_every",
    ),
    # may change on the way, and later weights depend on it, if only by rounding
    "recorded": (
        "train.max_steps", "train.batch_size", "train.gradient_accumulation_steps", "train.learning_rate", "train.lr_warmup_steps",
        "train.lr_ramp", "train.lr_decay_fraction", "train.weight_decay", "train.beta1", "train.beta2", "train.max_grad_norm",
        "train.condition_dropout", "train.encoder_dropout", "train.mixed_precision", "train.sharding", "train.compile",
        "ema.enabled", "ema.halflife", "ema.ramp", "ema.power", "guard.skips", "guard.loss_spike", "guard.norm_spike", "guard.window",
        "guard.rollbacks", "data.max_bad_share", "data.lost_shards",
    ),
    # another run: a fact of every checkpoint
    "refused": (
        "seed", "model.*", "flow.*", "train.lora_rank", "train.lora_alpha", "data.split", "data.resolution", "data.channels",
        "data.bit_depth", "data.horizontal_flip", "data.random_crop", "data.aspect_ratios", "data.bucket_step", "data.weights",
        "data.shuffle_block",
    ),
    # places may change, what is found there is a fact: hashes of shards and encoders, the latents' scale, the captions of a run on text
    "content": (
        "data.shards", "data.caption", "data.autoencoder", "data.text_encoder", "data.max_tokens", "data.text_padding", "data.encoding",
        "data.encoded", "data.latent_scale", "data.latent_shift",
    ),
    # read once, by a fresh run: a later word cannot change where the weights came from
    "beginning": ("init_from", "checkpoint.start_from"),
}  # fmt: skip
"""Of every field of a recipe, what a resumed run may do with it; a name that is listed goes before its section."""


def rule_of(key: str) -> ResumeRule:
    """Return the rule of a field, such as `train.beta1`."""
    for name in (key, f"{key.partition('.')[0]}.*"):
        for rule, keys in RESUME_RULES.items():
            if name in keys:
                return rule
    raise KeyError(key)


@dataclass(frozen=True)
class SettingsChange:
    """What a run was resumed with that it had not been trained with before."""

    step: int
    """It acts from the step after this one on."""
    images: int
    """Seen until then."""
    settings: Mapping[str, tuple[Any, Any]]
    """Before and after, by field."""
    rate: tuple[float, float] | None = None
    """The learning rate of the last step and of the next, where the new settings make the ramp jump."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as a line of the journal."""
        line = {"step": self.step, "images": self.images, "changed": {key: list(pair) for key, pair in self.settings.items()}}
        return line | ({"learning_rate": list(self.rate)} if self.rate else {})


def describe_changes(line: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a line of the journal says, field by field."""
    for key, (before, after) in line["changed"].items():
        yield f"{key} {_format(before)} -> {_format(after)}"
    if "learning_rate" in line:
        before, after = line["learning_rate"]
        yield f"the learning rate jumps {before:.3g} -> {after:.3g}"


def _format(value: Any) -> str:
    return (
        " ".join(map(_format, value)) or "none"
        if isinstance(value, (list, tuple))
        else f"{value:g}"
        if type(value) is float
        else str(value)
    )


def resume_config(config: Config, state: Mapping[str, Any]) -> tuple[Config, SettingsChange | None]:
    """Hold a recipe against the checkpoint that it goes on from.

    Args:
        config: of this launch.
        state: the checkpoint's `state.json`.

    Returns:
        The recipe with the beginning that the run had, and what it changes that is recorded; None where it changes nothing.

    Raises:
        ValueError: another beginning.
    """
    saved = _flatten(config_to_mapping(Config())) | _flatten(state["config"])
    config = _with_saved_start(config, saved)
    now = _flatten(config_to_mapping(config))
    pairs = {key: (_as_list(saved[key], now[key]), now[key]) for key in now if rule_of(key) == "recorded"}
    settings = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    step = state["step"]
    return config, SettingsChange(step, state.get("images", 0), settings, _learning_rate_jump(step, saved, config)) if settings else None


def _with_saved_start(config: Config, saved: Mapping[str, Any]) -> Config:
    """Return the recipe with the `init_from` and `start_from` of the run; one that is left out is the run's own."""
    saved_start = {key: saved[key] or "" for key in RESUME_RULES["beginning"]}
    given = {"init_from": config.init_from, "checkpoint.start_from": config.checkpoint.start_from}
    other = [key for key, name in given.items() if name and not _same_place(name, saved_start[key])]
    if other:
        key = other[0]
        origin = next((f"from {one}={name}" for one, name in saved_start.items() if name), "from scratch")
        raise ValueError(
            f"{key}={redact_url(given[key])}: the run in {config.output_dir} began {origin}, and weights are taken at the beginning alone. "
            f"Leave --{key} out to go on, or begin another run: --output_dir."
        )
    start = replace(config.checkpoint, start_from=saved_start["checkpoint.start_from"])
    return replace(config, init_from=saved_start["init_from"], checkpoint=start)


def _same_place(one: str, other: str) -> bool:
    """Return whether two names lead to one place."""
    return redact_url(one) == redact_url(other) or (bool(other) and os.path.realpath(one) == os.path.realpath(other))


def _learning_rate_jump(step: int, saved: Mapping[str, Any], config: Config) -> tuple[float, float] | None:
    """Return the learning rate of the last step and of the next, where the old settings would have gone on otherwise."""
    before: Any = SimpleNamespace(**{key.removeprefix("train."): value for key, value in saved.items() if key.startswith("train.")})
    last, on, now = learning_rate(max(0, step - 1), before), learning_rate(step, before), learning_rate(step, config.train)
    if step >= config.train.max_steps or math.isclose(on, now, rel_tol=1e-6, abs_tol=1e-9 * config.train.learning_rate):
        return None
    return (last, now) if step else None


def saved_journal(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the journal that a checkpoint holds; older ones hold none, and a line that is none is left out."""
    valid_lines = []
    for line in state.get("changes", ()):
        with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
            valid_lines += [line] if list(describe_changes(line)) and int(line["step"]) >= 0 else []
    return valid_lines


def extend_journal(state: Mapping[str, Any], change: SettingsChange | None) -> list[dict[str, Any]]:
    """Return the lines of the journal from here on: those of the checkpoint's own course, and this launch's."""
    return [*saved_journal(state), *([change.as_dict()] if change else [])]


def write_journal(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the journal of a run whole, so that lines of a course that was left are gone; none where nothing was changed."""
    if lines or (folder / JOURNAL_FILE).exists():
        write_whole(folder / JOURNAL_FILE, "".join(f"{json.dumps(line)}\n" for line in lines), lasting=True)


def change_notes(change: SettingsChange | None, config: Config) -> list[str]:
    """Return what is to be said of a change before training goes on."""
    if change is None:
        return []
    changed = "; ".join(describe_changes({"changed": change.settings}))
    notes = [f"resumed with other settings, kept in {JOURNAL_FILE}: {changed}."]
    if change.rate:
        last, now = change.rate
        notes.append(
            f"the learning rate jumps: step {change.step} was taken at {last:.3g}, the next is at {now:.3g}, as its ramp is one of "
            f"train.max_steps={config.train.max_steps}. To go on without a jump give --train.lr_ramp constant "
            f"--train.learning_rate {last:.3g}, or begin a stage with a ramp of its own: --output_dir OTHER "
            f"--checkpoint.start_from {config.output_dir}."
        )
    return notes


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_list(value: Any, like: Any) -> Any:
    """Return a value as fields of several have it; older runs wrote one half-life as a number."""
    return [value] if isinstance(like, list) and not isinstance(value, list) else value


DATA_FACTS = tuple(key.removeprefix("data.") for key in RESUME_RULES["refused"] if key.startswith("data."))
"""Fields of `data` that decide what the network is shown, and in which order."""


def run_facts(config: Any, fingerprint: str) -> dict[str, Any]:
    """Return that on which a resumed run must agree with the one that was saved; `fingerprint` is of its shards."""
    settings = config_to_mapping(config)
    shown = {key: settings["data"][key] for key in DATA_FACTS} | {"shards": fingerprint}
    if config.data.aspect_ratios:  # which samples share a batch then depends on its size
        shown["batch_size"] = config.train.batch_size
    if config.model.conditioning == "text":
        shown["caption"] = _normalise_captions(config.data.caption)
    model = {key: value for key, value in settings["model"].items() if key != "gradient_checkpointing"}
    return {"model": model, "flow": settings["flow"], "data": shown, "seed": config.seed}


def _normalise_captions(text: str) -> str:
    """Return `data.caption` with its fields in one order and their weights as shares: what decides which caption is drawn."""
    pairs = [(field.strip(), weight) for field, _, weight in (part.partition("=") for part in text.split(","))]
    if len(pairs) == 1:
        return pairs[0][0]
    try:
        weights = {field: float(weight or 1) for field, weight in pairs}
        total = math.fsum(weights.values())
        return ",".join(f"{field}={weights[field] / total!r}" for field in sorted(weights))
    except (ValueError, ArithmeticError):
        return text  # `data/` says what is wrong with it


LEGACY_FACTS: dict[str, Any] = {
    "data.bit_depth": 8,
    **{f"flow.{item.name}": item.default for item in fields(FlowConfig) if item.default is not MISSING},
}
"""Facts that older checkpoints do not name, as they were."""


def find_differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return each place where two nested mappings differ, as `model.width is 128 there and 256 here`."""
    found = []
    for key in {**saved, **now}:
        a, b = saved.get(key, LEGACY_FACTS.get(prefix + key)), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += find_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {a} there and {b} here")
    return found
