"""What lies below a folder of images: images, their text sidecars, tables, and what is none of these, all of it counted."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..format.file_stamps import Facts, file_facts
from ..images.formats import IMAGE_EXTENSIONS
from .metadata_tables import is_table
from .source import to_utf8

WRITTEN = ("manifest.json", "report.json", "summary.png")
"""What `data.prepare` writes beside its shards."""
TEXT_EXTENSIONS = ("txt", "caption")
"""Of sidecars: `.caption` is what kohya's scripts call them."""
MADE_BY_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders of an operating system or a storage device: their images are previews, or were thrown away."""


@dataclass
class FolderScan:
    """What a walk through a folder finds; names are relative to it."""

    images: dict[str, Facts | None] = field(default_factory=dict)
    """Of a link, the facts of what it leads to; None where that is nothing, which may have been a folder."""
    sidecars: dict[str, str] = field(default_factory=dict)
    """Names of `.txt` and `.caption` files by their name without it."""
    sidecar_facts: dict[str, Facts | None] = field(default_factory=dict)
    rivals: list[tuple[str, str]] = field(default_factory=list)
    """Sidecars of one image: `a.txt` and `a.TXT`."""
    tables: list[str] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    """Links to folders that are read already, each with that folder."""
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """Other files by extension: the first few names."""
    count: Counter[str] = field(default_factory=Counter)
    """Other files by extension."""

    def add(self, name: str, status: os.stat_result | None) -> None:
        """Put a file where it belongs."""
        kind, facts = extension(name), file_facts(status) if status else None
        if kind in TEXT_EXTENSIONS:
            base = stem(name)
            if base in self.sidecars:
                self.rivals.append((self.sidecars[base], name))
            self.sidecars[base], self.sidecar_facts[base] = name, facts
        elif is_table(name):
            self.tables.append(name)
        elif kind in IMAGE_EXTENSIONS or status is None:
            self.images[name] = facts
        else:
            self.count_unpacked(name, "" if stat.S_ISREG(status.st_mode) else "that are FIFOs, sockets or devices")

    def count_unpacked(self, name: str, kind: str = "") -> None:
        """Count a file that is not packed."""
        kind = to_utf8(kind or (f".{extension(name)}" if extension(name) else "without extension"))
        self.count[kind] += 1
        self.unknown.setdefault(kind, [])
        if len(self.unknown[kind]) < 3:
            self.unknown[kind].append(to_utf8(name))

    def sort(self) -> None:
        """Bring the images into their order: by name, those of a folder before those of its sub-folders.

        Arrays are images where nothing else is: beside pictures an `.npy` is a mask, a feature or an index.
        """
        arrays = [name for name in self.images if extension(name) == "npy"]
        for name in arrays if len(arrays) < len(self.images) else ():
            self.count_unpacked(name)
            del self.images[name]
        self.images = {name: self.images[name] for name in sorted(self.images, key=_place)}
        self.tables.sort(key=_place)


def walk(root: Path) -> FolderScan:
    """Find everything below a folder but hidden files and what `data.prepare` wrote.

    Links to folders are followed, once each; a folder is read where it lies
    before it is read where a link shows it.
    """
    found, above = FolderScan(), os.path.realpath(root) + os.sep
    seen, folders, links = dict[str, str](), [""], list[str]()
    while folders or links:
        at = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(root / at)
        if real in seen or (at and above.startswith(real.rstrip(os.sep) + os.sep)):
            found.repeated.append((to_utf8(at.rstrip("/")), to_utf8(seen.get(real, real))))
            continue
        seen[real] = at.rstrip("/") or str(root)
        ours = _holds_shards(real)
        for entry in sorted(os.scandir(root / at), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in MADE_BY_SYSTEMS:
                if not ours:
                    _count_hidden(entry, f"{at}{entry.name}", found)
                continue
            if ours and (entry.name in WRITTEN or entry.name.endswith((".tar", ".npy"))):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{at}{entry.name}/")
            else:
                found.add(f"{at}{entry.name}", _status(entry))
    found.sort()
    return found


def _count_hidden(entry: os.DirEntry[str], name: str, found: FolderScan) -> None:
    """Count a hidden image, or the images in a hidden folder; links to folders are not followed."""
    below = [name]
    if _is_folder(entry):
        below = [f"{name}/{file}" for _, _, files in os.walk(entry.path) for file in files if not entry.is_symlink()]
    for one in below:
        if extension(one) in IMAGE_EXTENSIONS and not one.rpartition("/")[2].startswith("._"):
            found.count_unpacked(one, "that are hidden" if entry.name.startswith(".") else f"in {entry.name}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _holds_shards(folder: str) -> bool:
    """Return whether `data.prepare` packed, or packs, into a folder."""
    return all(os.path.isfile(f"{folder}/{name}") for name in ("manifest.json", "report.json")) or os.path.isfile(
        f"{folder}/.packing/request.json"
    )


def _place(name: str) -> list[tuple[int, str]]:
    *folders, file = name.split("/")
    return [*((1, folder) for folder in folders), (0, file)]


def extension(name: str) -> str:
    """Return the extension of a file's name, in small letters and without its dot."""
    return os.path.splitext(name)[1].lower().lstrip(".")


def stem(name: str) -> str:
    """Return a file's name without its extension."""
    return os.path.splitext(name)[0]
