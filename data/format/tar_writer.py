"""Writing plain ustar tars, byte for byte the same whatever clock, user or machine writes them."""

from __future__ import annotations

from typing import BinaryIO

from .tar_headers import BLOCK

MAX_NAME_BYTES = 100
"""Of a name in a plain ustar header."""


class TarWriter:
    """A tar that grows sample by sample.

    Args:
        file: where it goes, open for writing, at its start.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, key: str, files: dict[str, bytes]) -> None:
        """One sample: its files by extension, in the order given; put the image first.

        Raises:
            ValueError: a name of more than 100 bytes or a file of 8 GiB or more, which plain ustar cannot say.
        """
        for extension, body in files.items():
            self._file.write(_header(f"{key}.{extension}".encode(), len(body)))
            self._file.write(body)
            self._file.write(bytes(-len(body) % BLOCK))

    def add_span(self, span: bytes) -> None:
        """One sample as it lies in another tar, headers and all."""
        self._file.write(span)

    def finish(self) -> None:
        """The end-of-archive mark, without which a tar counts as cut."""
        self._file.write(bytes(2 * BLOCK))


def _header(name: bytes, size: int) -> bytes:
    if len(name) > MAX_NAME_BYTES or size >= 8**11:
        raise ValueError(
            f"{name.decode()!r} of {size} bytes does not fit a plain tar: names have at most 100 bytes, files less than 8 GiB."
        )
    head = bytearray(BLOCK)
    head[: len(name)] = name
    head[100:124] = b"0000644\x000000000\x000000000\x00"
    head[124:148] = b"%011o\x0000000000000\x00" % size
    head[148:157] = b"        0"
    head[257:265] = b"ustar\x0000"
    head[148:156] = b"%06o\x00 " % sum(head)
    return bytes(head)
