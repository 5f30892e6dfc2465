"""Which weights of a run are read: as they were trained, an average that it kept, or one rebuilt from its snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from condot.core.printable import say

from ..checkpoint.store import averages, raw_weights
from ..config.schema import EmaConfig
from .averages import RAW, HalfLifeProfile, PowerProfile, ema_profiles
from .posthoc import NARROWEST, WIDEST
from .snapshots import find_kept_averages, rebuild_average

HALFLIFE_TOLERANCE = 0.05
"""A decay is written with few digits: half-lives so near are one."""
ACCEPTED_FORMS = "a half-life in images, a decay a step such as 0.9999, width=0.08, width=0.08,images=640000 for an earlier time, or raw"


@dataclass(frozen=True)
class WeightSelection:
    """Weights of a run, one way to name them."""

    label: str = ""
    """Of an average that was kept, or `raw`; "" is the run's first."""
    width: float = 0.0
    """Above 0: a power average that is rebuilt."""
    images: float = 0.0
    """At this time; 0 is the checkpoint's."""

    @property
    def name(self) -> str:
        """Return what was asked for, in one spelling."""
        if not self.width:
            return self.label
        return PowerProfile(self.width).label + (f",images={self.images:.0f}" if self.images else "")


def parse_weight_selection(asked: str, config: EmaConfig, batch_size: int, option: str = "--ema") -> WeightSelection:
    """What a word such as `raw`, `0.9999` or `width=0.08` asks for.

    Args:
        asked: `raw`; a half-life in images, or a decay a step, below 1, which is 0.5 ** (batch size / half-life), bare or after
            `halflife=` or `decay=`; `width=W`, and `,images=N` for the time at which it ends. "" is the run's first average.
        config: what the run keeps.
        batch_size: images of a step.
        option: that it was given with.

    Raises:
        ValueError: no such word, or an average that the run neither kept nor can rebuild.
    """
    if not asked:
        return WeightSelection()
    if asked == RAW:
        return WeightSelection(RAW)
    words = [part.rpartition("=") for part in asked.split(",")]
    try:
        numbers = {key.strip(): float(value) for key, _, value in words}
    except ValueError:
        numbers = {}
    known = set(numbers) in ({""}, {"halflife"}, {"decay"}, {"width"}, {"width", "images"})
    if not known or len(words) != len(numbers) or not all(0 < n < math.inf for n in numbers.values()) or numbers.get("decay", 0) >= 1:
        raise ValueError(f"{option} {asked!r} is none: give {ACCEPTED_FORMS}.")
    kept = f"The run kept {_describe_kept(config, batch_size)}."
    if "width" in numbers:
        return _select_power(numbers["width"], numbers.get("images", 0.0), config, f"{option} {asked}", kept)
    ((key, number),) = numbers.items()
    halflife = number if key == "halflife" or number >= 1 else -batch_size * math.log(2) / math.log(number)
    far = {profile.label: abs(profile.halflife / halflife - 1) for profile in ema_profiles(config) if isinstance(profile, HalfLifeProfile)}
    label = min(far, key=lambda one: far[one])
    if not config.enabled or far[label] > HALFLIFE_TOLERANCE:
        raise ValueError(f"{option} {asked}: a half-life of {halflife:.4g} images. {kept} Leave {option} out for the first.")
    return WeightSelection("" if label == ema_profiles(config)[0].label else label)


def _select_power(width: float, images: float, config: EmaConfig, said: str, kept: str) -> WeightSelection:
    """A power average that was kept, or is to be rebuilt."""
    if not config.power:
        raise ValueError(f"{said}: power averages are rebuilt from others, and none was kept. {kept} Train with --ema.power 0.05 0.1.")
    if not NARROWEST <= width < WIDEST:
        raise ValueError(f"{said}: relative widths lie between {NARROWEST:g} and {WIDEST}. {kept}")
    near = [w for w in config.power if math.isclose(w, width, rel_tol=1e-9)]
    return WeightSelection(PowerProfile(near[0]).label) if near and not images else WeightSelection(width=width, images=images)


def _describe_kept(config: EmaConfig, batch_size: int) -> str:
    """What a run kept, in words."""
    halflives = [f"half-life {h:g} images (decay {0.5 ** (batch_size / h):.6g} a step)" for h in config.halflife] if config.enabled else []
    powers = [f"width {w:g}" for w in config.power] + (["other widths, rebuilt"] if config.power else [])
    return f"{', '.join(halflives + powers) or 'no average'}, and {RAW}"


def load_selected_weights(
    checkpoint: Path, state: Mapping[str, Any], selection: WeightSelection, config: EmaConfig
) -> tuple[dict[str, Tensor], str]:
    """The weights asked for, whole, by the network's own names.

    Args:
        checkpoint: a run's, verified.
        state: its state.json.
        selection: which weights.
        config: what the run keeps.

    Returns:
        The tensors, and what they are in words.

    Raises:
        ValueError: an average that cannot be rebuilt, or of a time beyond the checkpoint's.
    """
    if selection.label == RAW or not (config.enabled or selection.label or selection.width):
        return raw_weights(checkpoint), "the weights as they were trained"
    first = averages(checkpoint)
    if not selection.width:
        profile = next(profile for profile in ema_profiles(config) if selection.label in ("", profile.label))
        return first | (_load_extra(checkpoint, selection.label) if selection.label else {}), _describe_average(profile)
    seen = int(state["images"])
    images = selection.images or seen
    if not 0 < images <= seen:
        raise ValueError(f"--ema {selection.name}: {checkpoint} has seen {seen} images. Give at most so many.")
    found, how = rebuild_average(find_kept_averages(checkpoint, seen, config.power), selection.width, images)
    used = sum(1 for c in how.coefficients if c)
    say(
        f"width {selection.width:g} at {images:.0f} images: rebuilt from {used} of the averages kept, coefficients of {how.size:.3g} in "
        f"all, its profile missed by {100 * how.error:.1g} %"
    )
    return first | found, f"a power average of the trained ones of relative width {selection.width:g}, rebuilt from others"


def _load_extra(checkpoint: Path, label: str) -> dict[str, Tensor]:
    """An average that is not the first: its trained weights."""
    found = averages(checkpoint, label)
    if not found:
        raise ValueError(f"--ema {label}: {checkpoint} does not hold it, though its recipe says so. Give raw, or leave --ema out.")
    return found


def _describe_average(profile: HalfLifeProfile | PowerProfile) -> str:
    if isinstance(profile, PowerProfile):
        return f"a power average of the trained ones, of relative width {profile.width:g}"
    return f"a running average of the trained ones, of half-life {profile.halflife:g} images"
