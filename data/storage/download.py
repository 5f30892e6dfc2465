"""Bytes from elsewhere: a file of a remote folder, read through fsspec, resumed where it broke and checked against what it must be."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from string import punctuation
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import aiohttp
import fsspec
from fsspec.asyn import sync
from yarl import URL

from condot.core.printable import one_line, redact_url
from condot.core.urls import display_url

from .retry import LONGEST, ContentMismatch, FileRetry, HttpError, LocalDiskError

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
    "file": "fsspec",
    "memory": "fsspec",
}
"""Protocols that are read, and the package behind each."""
PIECE = 8 << 20
"""Bytes of one range request, where a source is read by ranges; one that takes longer than the stall time-out is a stall."""
READ = 1 << 20
"""Bytes handed over at once, where a source streams."""
STALL_SECONDS = 60.0


class ExpectedFile(NamedTuple):
    """What a file must be."""

    sha256: str
    min_bytes: int
    max_bytes: int
    """Bytes."""


class Origin:
    """A remote folder.

    Args:
        url: of the folder; a query (`?sig=...`) goes with every request.
        retry_seconds: how long a file may bring nothing new before it is given up.

    Raises:
        ValueError: a protocol that is not read, a package that is missing, no URL.
    """

    def __init__(self, url: str, retry_seconds: float) -> None:
        parts = _split(url)
        if parts.scheme not in PACKAGES:
            raise ValueError(
                f"data.shards={display_url(url)!r}: {parts.scheme or url.partition(':')[0]}:// is not read. "
                f"Use one of {', '.join(f'{p}://' for p in PACKAGES)}, or a path."
            )
        self.name = display_url(url).rstrip("/")
        self.retry_seconds = retry_seconds
        self.stall = min(STALL_SECONDS, retry_seconds / 3)
        self._web = parts.scheme in ("http", "https")
        self._query = f"?{quote(parts.query, safe=punctuation)}" if self._web and parts.query else ""
        base = urlunsplit(parts._replace(query="", fragment="")) if self._web else url
        if parts.scheme == "file" and not Path(base.removeprefix("file://")).exists():
            base = unquote(base)  # as a browser and Path.as_uri() write it
        try:
            more = {"client_kwargs": {"trust_env": True}} if self._web else {}  # $HTTPS_PROXY and ~/.netrc, as curl has it
            self._fs, path = fsspec.url_to_fs(base.rstrip("/"), **more)
        except ImportError as error:
            package = PACKAGES[parts.scheme]
            raise ValueError(f"{self.name}: {parts.scheme}:// needs a package that is not installed: `pip install {package}`.") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name} is no URL that can be read: {one_line(error, LONGEST)}.") from error
        self._path = (str(URL(str(path))) if self._web else str(path)).rstrip("/")
        if parts.scheme == "hf" and "@" not in self._path:  # else the first @ of a file's name would begin a revision
            self._path = re.sub(r"^((?:datasets/|spaces/)?[^/]+/[^/]+)", r"\1@main", self._path)

    def text(self, name: str, max_bytes: int) -> bytes:
        """A small file, whole.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it cannot be had, or has more than `max_bytes` bytes.
        """
        body = bytearray()
        retry = FileRetry(f"{self.name}/{name}", self.retry_seconds)

        def attempt() -> None:
            body.clear()
            for _, piece in self._pieces(name, 0, 0, max_bytes + 1):
                body.extend(piece)
                retry.progress(len(body))

        retry(attempt, self._fs.invalidate_cache)
        if len(body) > max_bytes:
            raise ValueError(f"{self.name}/{name} has more than {max_bytes} bytes, too many for what it should be. Check the URL.")
        return bytes(body)

    def download(self, name: str, expected: ExpectedFile, file: BinaryIO) -> None:
        """Write a file to `file`; on return its size and hash are what they must be.

        Args:
            name: in this folder.
            expected: its hash and size; no byte beyond the size is read.
            file: open for writing; whatever it holds is lost.

        Raises:
            ValueError: it is not there, cannot be had in time, or is another file.
            LocalDiskError: `file` cannot be written.
        """
        done, digest = 0, hashlib.sha256()
        retry = FileRetry(f"{self.name}/{name}", self.retry_seconds)

        def attempt() -> None:
            nonlocal done, digest
            for begin, body in self._pieces(name, done, expected.min_bytes, expected.max_bytes):
                if begin != done:  # a server that cannot skip starts again
                    done, digest = begin, hashlib.sha256()
                _write(file, body, done)
                digest.update(body)
                done += len(body)
                retry.progress(done)
            size, found = done, digest.hexdigest()
            if size < expected.min_bytes or found != expected.sha256:
                done, digest = 0, hashlib.sha256()
                raise ContentMismatch(
                    f"{size} bytes, the manifest says {expected.min_bytes}"
                    if size < expected.min_bytes
                    else f"its {size} bytes hash to sha256 {found}, the manifest says {expected.sha256}"
                )
            file.truncate(size)

        try:
            retry(attempt, self._fs.invalidate_cache)
        except FileNotFoundError as error:
            raise ValueError(f"{self.name}/{name} is not there, though the manifest lists it. Upload it again, or index again.") from error

    def _pieces(self, name: str, start: int, min_bytes: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
        """A file's bytes, each piece with its place: from `start`, or from 0 where the source cannot skip, to `max_bytes` or its end."""
        path = f"{self._path}/{name}"
        if self._web:
            yield from self._streamed(f"{self._path}/{quote(name, safe='')}{self._query}", start, min_bytes, max_bytes)
        elif self._fs.async_impl:  # s3, gs: a request can be aborted from outside
            while start < max_bytes:
                end = min(start + PIECE, max_bytes)
                try:
                    body = self._fs.cat_file(path, start=start, end=end, timeout=self.stall)
                except OSError as error:
                    if error.errno == errno.EINVAL and start:  # s3fs: a range that begins behind the end
                        return
                    raise
                yield start, body
                start += len(body)
                if start < end:
                    return
        else:
            with self._fs.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                while start < max_bytes and (body := file.read(min(PIECE, max_bytes - start))):
                    yield start, body
                    start += len(body)

    def _streamed(self, url: str, start: int, min_bytes: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
        """One GET, read as it comes: fsspec's own reads take whatever comes for the range that they asked for."""
        loop = self._fs.loop
        response = sync(loop, _get, self._fs, url, start, self.stall)
        try:
            at = start if response.status == 206 else 0
            while at < max_bytes and (body := sync(loop, _read, response.content, min(READ, max_bytes - at))):
                yield at, body
                at += len(body)
            if at < min_bytes and response.content_length is None:  # whether that was the end, nobody said
                raise ConnectionError(f"the answer ended at byte {at} of {min_bytes}")
        finally:
            loop.call_soon_threadsafe(response.close)


async def _get(fs: Any, url: str, start: int, stall: float) -> aiohttp.ClientResponse:
    session = await fs.set_session()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    # No total: aiohttp's default would cut every download of more than five minutes.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
    response: aiohttp.ClientResponse = await session.get(URL(url, encoded=True), headers=headers, timeout=limits)
    if response.url.scheme == "http" and url.startswith("https:"):
        response.close()
        raise ValueError(f"it is redirected from https to {redact_url(str(response.url))}, where anybody could change it")
    if response.status in (200, 206):
        span = response.headers.get("Content-Range", "")
        begin = re.match(r"bytes (\d+)-", span)
        if response.status == 206 and (begin is None or int(begin[1]) != start):
            response.close()
            raise ConnectionError(f"asked for the bytes from {start}, the answer has {span!r}")
        return response
    response.close()
    if response.status == 416:
        raise ContentMismatch(f"it ends at byte {start} or before")
    raise HttpError(response.status, response.reason or "", response.headers.get("Retry-After", ""))


async def _read(content: aiohttp.StreamReader, max_bytes: int) -> bytes:
    """Up to `max_bytes` bytes; what came before a break is handed over first, and the next call meets the break."""
    out, size = list[bytes](), 0
    while size < max_bytes:
        try:
            part = await content.read(max_bytes - size)
        except Exception:
            if out:
                break
            raise
        if not part:
            break
        out.append(part)
        size += len(part)
    return b"".join(out)


def _write(file: BinaryIO, body: bytes, at: int) -> None:
    try:
        file.seek(at)
        file.write(body)
    except OSError as error:
        raise LocalDiskError(error.errno, error.strerror) from error


def _split(url: str) -> SplitResult:
    """Raises ValueError for what is no URL, without the part that the library quotes: it may be of a password."""
    try:
        parts = urlsplit(url)
        assert parts.port is None or parts.port >= 0
        return parts
    except ValueError:
        why = "its host or its port cannot be right. Write the signs []:/?#@ of a password as %5B and so on"
        raise ValueError(f"data.shards={redact_url(url)!r} is no URL: {why}.") from None
