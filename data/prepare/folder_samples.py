"""Image files of a folder as a worker reads them: the image, its caption, and why it cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from condot.core.errors import describe_error
from condot.core.regular_files import MAX_IMAGE_BYTES, open_regular, read_regular
from condot.core.text_files import MAX_TEXT_BYTES, decode_text

from ..images.formats import IMAGE_EXTENSIONS, JPEG_NAMES
from .metadata_tables import Row
from .scan_folder import extension
from .source import RawSample, UnreadableSample, to_utf8


class Sample(NamedTuple):
    """One image file, with what is known of it."""

    name: str
    bytes: int
    row: Row
    sidecar: str
    """The `.txt` with its caption, below the folder; empty where it has none."""


@dataclass(frozen=True)
class FolderSubset:
    """Some image files below a folder."""

    root: str
    samples: list[Sample]

    def read(self, scratch: Path) -> Iterator[RawSample | UnreadableSample]:
        for sample in self.samples:
            try:
                data = self._image(sample)
                caption = self._caption(sample.sidecar) if sample.sidecar else sample.row.caption
            except (OSError, ValueError) as error:
                yield UnreadableSample(to_utf8(sample.name), describe_error(error))
                continue
            kind = extension(sample.name)
            known = kind if kind in IMAGE_EXTENSIONS and kind not in JPEG_NAMES else ""
            yield RawSample(to_utf8(sample.name), data, known, sample.row.label, caption, sample.row.more or {})

    def _image(self, sample: Sample) -> bytes:
        path = os.path.join(self.root, sample.name)
        if sample.bytes > MAX_IMAGE_BYTES:
            raise ValueError(f"it has {sample.bytes} bytes, at most {MAX_IMAGE_BYTES} are read")
        try:
            with open_regular(path) as file:
                data = file.read(sample.bytes + 1)
        except OSError:
            if os.path.islink(path) and not os.path.exists(path):
                raise ValueError("it is a link that leads to nothing") from None
            raise
        if len(data) != sample.bytes:
            raise ValueError(
                f"it had {sample.bytes} bytes when it was listed and has {'more' if len(data) > sample.bytes else len(data)} now"
            )
        return data

    def _caption(self, name: str) -> str | None:
        try:
            return decode_text(read_regular(os.path.join(self.root, name), MAX_TEXT_BYTES)) or None
        except (OSError, ValueError) as error:
            raise ValueError(f"its caption {name.rpartition('/')[2]}: {describe_error(error)}") from error
