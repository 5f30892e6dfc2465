"""The stream: from images in tar shards to batches whose order is a pure function of (seed, epoch, position).

`prepare` packs images into shards, `index` says what is in them, `order` which
sample comes when, `buckets` in what shape, `decode` makes pixels of files,
`encode` latents, `stream` puts it together, `build` opens it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opening import Encoded, build, check_shapes, check_sides, open_latents, open_shards, open_text

__all__ = ["Encoded", "build", "check_shapes", "check_sides", "open_latents", "open_shards", "open_text"]


def __getattr__(name: str) -> Any:
    """The front door opens when it is used: packing and looking need no torch, which takes two seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import opening

    return getattr(opening, name)
