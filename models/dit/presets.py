"""The published sizes of DiT by name, in the published form or the modern one.

Sizes: Peebles and Xie, Scalable Diffusion Models with Transformers, table 1
(XL's depth and heads included). Modern: what Yao and Wang, Reconstruction vs.
Generation (LightningDiT), table 2, found to train faster at the same cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

SIZES: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
PATCHES = (1, 2, 4, 8)
PRESETS: dict[str, dict[str, int]] = {f"{name}/{p}": {"patch_size": p, **sizes} for name, sizes in SIZES.items() for p in PATCHES}
Style = Literal["dit", "modern"]
STYLES: dict[str, dict[str, bool]] = {
    "dit": {},
    "modern": {"qk_norm": True, "rope": True, "swiglu": True, "rms_norm": True},
}
KINDS_WITH_STYLES = {"dit"}
"""Kinds that have styles."""
KINDS_WITH_PRESETS = {"dit", "cross_dit"}
"""Kinds that have presets."""


def resolve_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a kind's constructor: what the preset and the style say, then the options that are not None.

    Args:
        kind: of network; one without presets gets its options as they are.
        options: of the recipe's section `model`, and what the data say.

    Raises:
        ValueError: an unknown preset or style, with the known ones.
    """
    if kind not in KINDS_WITH_PRESETS:
        return dict(options)
    chosen = {name: value for name, value in options.items() if value is not None}
    preset = chosen.pop("preset", "S/2")
    if preset not in PRESETS:
        raise ValueError(
            f"model.preset={preset!r} is unknown: choose one of {', '.join(PRESETS)}, or give width, depth and heads beside one."
        )
    if kind not in KINDS_WITH_STYLES:
        return {**PRESETS[preset], **chosen}
    style = chosen.pop("style", "dit")
    if style not in STYLES:
        raise ValueError(f"model.style={style!r} is unknown: choose one of {', '.join(STYLES)}.")
    return {**PRESETS[preset], **STYLES[style], **chosen}
