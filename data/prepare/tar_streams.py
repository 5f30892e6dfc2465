"""Tars that are streams: what only webdataset opens, a command's output or a URL, read once from front to back.

`pipe:` runs a shell command, so a stream is only ever taken from the command line: no manifest, no
recipe and no folder can name one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from condot.core.printable import printable, redact_url

from ..format.index_record import MAX_SAMPLE_BYTES
from ..format.tar_headers import BLOCK

SCHEMES = ("pipe", "file", "http", "https", "gs", "hf", "ais", "htgs", "sftp", "ftps", "scp")
"""What `webdataset.gopen` opens."""
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(?=//|/)|(pipe):")
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""By the first bytes."""
MAX_INFLATION = 200
"""Times its compressed size: gzip makes at most 1,030 of zeros, and 5 to 20 of images with small texts and padding."""
SLACK = 1 << 20
"""Bytes that may inflate beyond that: the padding of a small tar."""
GRACE = 10.0
"""Seconds in which a command must end when nobody reads it any more."""
STREAM_ERRORS = (OSError, EOFError, ValueError, AssertionError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What webdataset, tarfile and decompressors raise for streams that break off or are no tars."""


@dataclass(frozen=True)
class StreamFilter:
    """Which of a stream's samples are packed, and which of their files, as webdataset's filters do."""

    files: tuple[str, ...] = ()
    """Patterns of names in the tar, such as `*.jpg`; none takes all."""
    keys: tuple[str, ...] = ()
    """Patterns of samples' names without extensions; none takes all."""
    renamed: tuple[tuple[str, str], ...] = ()
    """New extension and old, or several old with `;` between, of which the first that is there counts."""


def parse_renames(words: list[str]) -> tuple[tuple[str, str], ...]:
    """Return what `--rename NEW=OLD` says.

    Raises:
        ValueError: a word that says no such thing.
    """
    pairs = [word.partition("=") for word in words]
    for word, (new, _, old) in zip(words, pairs, strict=True):
        if not (re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", new) and old):
            raise ValueError(f"--rename {word}: write NEW=OLD, such as txt=caption or jpg=jpeg;image.jpg.")
    return tuple((new, old) for new, _, old in pairs)


def is_stream(source: str) -> bool:
    """Return whether a source is written as a URL or a command, and not as files of this machine.

    Raises:
        ValueError: a URL that webdataset does not open.
    """
    found = SCHEME.match(source)
    scheme = (found[1] or found[2]) if found else ""
    if scheme and scheme not in SCHEMES:
        command = "aws s3 cp s3://BUCKET/a-{000..009}.tar -" if scheme == "s3" else "COMMAND THAT WRITES THE TAR"
        raise ValueError(
            f"source {redact_url(source)!r}: {scheme}:// is not opened by itself. Give the command that prints it, as 'pipe:{command}'."
        )
    return bool(scheme)


def expand_streams(source: str) -> list[str]:
    """Return the single streams of a source: several stand with `::` between, and braces count through numbers and words.

    Raises:
        ValueError: braces that cannot be read, or an empty URL.
    """
    try:
        found = [url for part in source.split("::") for url in (braceexpand(part) if "{" in part else [part])]
    except ValueError as error:
        raise ValueError(f"source {display_stream(source)!r} is no pattern: {error}.") from error
    for url in found:
        if not is_stream(url):
            raise ValueError(
                f"source: {printable(url)!r} is no URL beside URLs. Write file:///FOLDER/{{000..009}}.tar for files of this machine."
            )
    return found


def display_stream(url: str) -> str:
    """Return a stream as it may be printed and kept: of a command the program alone, since its words may hold secrets of any form."""
    if url.startswith("pipe:"):
        words = url.removeprefix("pipe:").split()
        program = next((word for word in words if not re.match(r"\w+=", word)), "")  # behind `TOKEN=...`
        return printable(f"pipe:{program} ...")
    return printable(redact_url(url))


@contextmanager
def open_stream(url: str) -> Iterator[BinaryIO]:
    """Open a stream by webdataset; at the end, whatever gave it must have ended well.

    Raises:
        ValueError: it cannot be opened, or its command fails.
    """
    from webdataset.gopen import Pipe, gopen

    name = display_stream(url)
    path = unquote(urlsplit(url).path) if url.startswith("file:") else ""
    try:
        stream = gopen(path or url)
    except (OSError, ValueError, ImportError) as error:
        why = f"{error.strerror or type(error).__name__}" if isinstance(error, OSError) else type(error).__name__
        tool = f" ({os.path.basename(str(error.filename))})" if isinstance(error, OSError) and error.filename else ""
        raise ValueError(f"{name} cannot be opened: {why}{tool}. Check the URL, and that its program is installed.") from None
    if not isinstance(stream, Pipe):
        with stream:
            yield stream
        return
    try:
        yield stream.stream  # past `Pipe.read`, whose errors repeat the command with all that is secret in it
        status = stream.proc.wait(GRACE)
    except ValueError:
        status = _wait(stream.proc, 1.0)  # a command that failed gives no whole tar either, and is the cause
        if not status:
            raise
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name}: the tar is over and its command goes on. Let it end.") from None
    finally:
        _end(stream)
    if status:
        raise ValueError(f"{name}: its command ended with status {status}. Run it by hand to see why, and this command again.")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Return a command's exit status; 0 for one that has not ended by then."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 0


def _end(pipe: Any) -> None:
    """End a command that may still run, and all that webdataset keeps of it."""
    pipe.stream.close()
    if pipe.proc.poll() is None:
        pipe.proc.terminate()
        try:
            pipe.proc.wait(GRACE)
        except subprocess.TimeoutExpired:
            pipe.proc.kill()
            pipe.proc.wait()
    pipe.ignore_errors = True  # told above; `close` is called again when it is collected


def read_stream(url: str, chosen: StreamFilter) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a stream: name, and files by extension in the order of the tar.

    Raises:
        ValueError: it cannot be opened, is no tar, breaks off, or goes on behind its end; its command fails.
    """
    from webdataset.filters import rename, select
    from webdataset.tariterators import group_by_keys, tar_file_expander

    name = display_stream(url)
    with open_stream(url) as raw:
        try:
            plain = _decompressed(raw)
            wanted = chosen.files and (lambda file: any(fnmatchcase(file, pattern) for pattern in chosen.files))
            found: Any = group_by_keys(tar_file_expander([{"url": name, "stream": plain}], select_files=wanted or None))
            if chosen.keys:
                found = select(lambda sample: any(fnmatchcase(sample["__key__"], key) for key in chosen.keys))(found)
            for sample in found:
                files = {extension: body for extension, body in sample.items() if not extension.startswith("__")}
                for new, old in chosen.renamed:
                    if any(one in files for one in old.split(";")):  # webdataset's wants all renamed files in each sample
                        files = next(iter(rename(**{new: old})([files])))
                yield sample["__key__"], files
            plain.drain()
        except STREAM_ERRORS as error:
            why = " ".join(str(error.args[0] if error.args else error).split()).partition(" @ ")[0]
            raise ValueError(
                f"{name} is no whole tar ({printable(why) or type(error).__name__}). See that its command or URL gives it all."
            ) from None


def _decompressed(raw: BinaryIO) -> TarBytes:
    """Return the bytes of a tar, whatever it is compressed by."""
    counted = _Counted(raw)
    for magic, opener in COMPRESSIONS.items():
        if counted.head.startswith(magic):
            return TarBytes(opener(counted), counted)
    return TarBytes(counted, None)


class _Counted(io.RawIOBase):
    """A stream from which the first bytes were looked at, and of which it is known how many were read."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.head, self.count = raw, raw.read(6), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        body, self.head = self.head[:size] if size >= 0 else self.head, self.head[size:] if size >= 0 else b""
        if not body or size < 0:
            body += self.raw.read(size)
        self.count += len(body)
        return body


class TarBytes:
    """The bytes of a tar as they go by, of which the headers are followed: whether it ends as a tar ends only they tell.

    `tarfile` takes a stream that stops between two files for a whole one, and reads nothing behind the end.

    Args:
        raw: the bytes, decompressed.
        packed: what they were decompressed from, if anything.
    """

    def __init__(self, raw: Any, packed: _Counted | None) -> None:
        self._raw, self._packed = raw, packed
        self._header, self._skip, self._count = b"", 0, 0
        self._ended = False

    def read(self, size: int) -> bytes:
        """Return bytes as they come; `tarfile` asks for them."""
        body: bytes = self._raw.read(size)
        self._count += len(body)
        if self._packed and self._count > MAX_INFLATION * self._packed.count + SLACK:
            raise ValueError(f"more than {MAX_INFLATION} times its size when decompressed")
        self._follow(body)
        return body

    def drain(self) -> None:
        """Read to the end.

        Raises:
            ValueError: it broke off, or something stands behind the end.
        """
        while self.read(1 << 20):
            pass
        if not self._ended:
            raise ValueError("it breaks off before the mark that ends a tar")

    def _follow(self, body: bytes) -> None:
        view = memoryview(body)
        while view and not self._ended:
            if self._skip:
                gone = min(self._skip, len(view))
                self._skip, view = self._skip - gone, view[gone:]
                continue
            gone = BLOCK - len(self._header)
            self._header, view = self._header + view[:gone], view[gone:]
            if len(self._header) == BLOCK:
                self._ended = not any(self._header)
                self._skip = 0 if self._ended else _body_blocks(self._header)
                self._header = b""
        if self._ended and any(view.tobytes().strip(b"\0")):
            raise ValueError("another tar or something else stands behind its end: give them one by one, with `::` between")


def _body_blocks(header: bytes) -> int:
    """Return the bytes between a header and the next."""
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    if info.size > MAX_SAMPLE_BYTES or info.size < 0:
        raise ValueError(f"a file of {info.size} bytes, at most {MAX_SAMPLE_BYTES} are read")
    has_body = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in (b"x", b"g", b"X", b"L", b"K")
    return -(-info.size // BLOCK) * BLOCK if has_body else 0
