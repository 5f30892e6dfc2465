"""The published sizes of DiT by name, which DiTs on text take over.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers, table 1 (XL's depth and heads included).
"""

from __future__ import annotations

SIZES: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
PATCHES = (1, 2, 4, 8)
PRESETS: dict[str, dict[str, int]] = {f"{name}/{p}": {"patch_size": p, **sizes} for name, sizes in SIZES.items() for p in PATCHES}
IMAGENET = {"channels": 4, "resolution": 32, "num_classes": 1000}
"""What the data say of ImageNet at 256 pixels a side in latents, which tables count with."""
CAPTIONED = {"channels": 4, "resolution": 32, "text_width": 384, "pooled_width": 384}
"""The same with captions."""
