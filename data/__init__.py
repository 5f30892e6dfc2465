"""The stream: from images on disk to batches whose order is a pure function of (seed, epoch, position)."""

from .index import Manifest, read_manifest
from .stream import Batch, Stream

__all__ = ["Batch", "Manifest", "Stream", "read_manifest"]
