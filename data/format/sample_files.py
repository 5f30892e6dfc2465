"""The files of one sample in a tar: which is its image, what its class says, whether its texts can be read; and what is no sample."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from condot.core.printable import printable
from condot.core.text_files import MAX_TEXT_BYTES, decode_text, parse_json

from ..images.formats import IMAGE_EXTENSIONS

_IMAGES = frozenset(IMAGE_EXTENSIONS)
UNREAD_IMAGES = frozenset(
    (
        *("heic", "heif", "hif", "svg", "svgz", "jxl", "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "pef", "srw"),
        *("eps", "ai", "tga", "ppm", "pgm", "pbm", "pnm", "pfm", "exr", "hdr", "dds", "pcx", "xcf", "j2k", "jpf", "jpx", "jpm", "jxr"),
        *("wdp", "emf", "wmf", "fits", "dcm"),
    )
)
"""Extensions of images that are not read: a sample of one is not passed over in silence."""
TEXTS = ("txt", "json", "cls")
"""Those that are read."""
NEED_IMAGE = frozenset(("txt", "cls", "caption"))
"""A file of one of these without an image is a sample that lost it."""
ABOUT_THE_DATA = frozenset(
    (
        *("readme", "license", "licence", "copying", "notice", "changelog", "citation"),
        *("dataset_info", "dataset_infos", "dataset_dict", "metadata", "stats", "sizes", "info"),
    )
)
"""Names of files that describe all the data, whatever their extension."""
NO_LABEL = 65535
"""More than any class number."""
CLASS = re.compile(r"-?[0-9]{1,9}(\.0*)?")


def parse_image_extension(text: str) -> str:
    """Return the option `--image_extension` as indexes use it: in lower case, without a dot before it.

    Raises:
        ValueError: it names no image that is read.
    """
    wanted = text.strip().lower().removeprefix(".")
    if wanted and wanted.rpartition(".")[2] not in _IMAGES:
        raise ValueError(
            f"--image_extension {printable(text)}: no image that is read. Name one of {', '.join(IMAGE_EXTENSIONS)}, or seg.png."
        )
    return wanted


def has_image(extensions: Collection[str], wanted: str = "") -> bool:
    """Return whether some file of a sample is an image; arguments as in `image_among`."""
    return not _IMAGES.isdisjoint(extensions) or (bool(wanted) and wanted in extensions)


def image_among(extensions: Collection[str], wanted: str = "") -> str:
    """Return the extension of a sample's image.

    Args:
        extensions: of the sample's files.
        wanted: the image's, where several may be one; "" for the only one.

    Raises:
        ValueError: none of the files is `wanted`, or several are images.
    """
    if wanted:
        if wanted not in extensions:
            raise ValueError(f"no .{wanted}, which --image_extension names, only {_dotted(extensions)}")
        return wanted
    found = [extension for extension in extensions if extension in _IMAGES]
    if len(found) > 1 and "npy" in found:  # an array beside an image is something about it
        found.remove("npy")
    if len(found) != 1:
        raise ValueError(f"{len(found)} images, {_dotted(found)}: name the one to train on, say --image_extension {found[0]}")
    return found[0]


def why_no_image(key: str, extensions: Collection[str]) -> str:
    """Return what is wrong with files that have no image among them; "" where they may be no sample at all."""
    if is_about_the_data(key):
        return ""
    last = {extension.rpartition(".")[2]: extension for extension in extensions}
    unread = sorted(last.keys() & UNREAD_IMAGES)
    if unread:
        return f"no image that is read: .{unread[0]}. Convert it to PNG, JPEG or WebP"
    parts = sorted(last[extension] for extension in last.keys() & _IMAGES)
    if parts:
        part = printable(parts[0])
        return f"no image but .{part}, since names are split at their first dot: name it with --image_extension {part}, or pack other names"
    return no_image(extensions) if NEED_IMAGE.intersection(extensions) else ""


def is_about_the_data(key: str) -> bool:
    """Return whether a file's name without its extension is one of those that describe a data set."""
    return key.rpartition("/")[2].lower() in ABOUT_THE_DATA


def kind_without_image(extension: str) -> str:
    """Return how reports call a file of a kind that no image has beside it."""
    last = extension.rpartition(".")[2]
    return f".{last} without an image" if len(last) <= 12 and last.isascii() and last.isalnum() else "of other kinds"


def no_image(extensions: Collection[str]) -> str:
    """Return the words for a sample without an image."""
    return (
        f"no image: one of {', '.join(IMAGE_EXTENSIONS)} is needed beside {_dotted(extensions)}; "
        "the files of a sample follow one another, as `tar --sort=name` packs them"
    )


def _dotted(extensions: Collection[str]) -> str:
    return ", ".join(f".{printable(extension)}" for extension in list(extensions)[:8])


def read_texts(texts: Mapping[str, bytes]) -> tuple[int, bool]:
    """Return a sample's class, NO_LABEL for none, and whether it has a caption.

    Args:
        texts: its files of TEXTS, by extension.

    Raises:
        ValueError: one that cannot be read, by the rules of `text_files`; a class that is no number from 0 on.
    """
    label, captioned = NO_LABEL, False
    for extension, body in texts.items():
        try:
            if extension == "cls":
                label = parse_label(body)
            elif extension == "txt":
                captioned = bool(decode_text(body))
            else:
                parse_json(body)
        except ValueError as error:
            raise ValueError(f"its .{extension}: {error}") from error
    return label, captioned


def check_text_size(extension: str, size: int) -> None:
    """Raise ValueError where a text is too large."""
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"its .{extension} has {size} bytes, at most {MAX_TEXT_BYTES} are read")


def parse_label(body: bytes) -> int:
    """Return the class that a `.cls` holds: a whole number, "3.0" too; NO_LABEL for blanks and -1.

    Raises:
        ValueError: anything else.
    """
    if len(body) < 5 and body.isdigit():
        return int(body)
    text = decode_text(body)
    if not text:
        return NO_LABEL
    if not CLASS.fullmatch(text):
        raise ValueError(f"class {text[:40]!r} is no whole number. Write numbers from 0, and their names into the file of --class_names")
    label = int(text.partition(".")[0])
    if not -1 <= label < NO_LABEL:
        raise ValueError(f"class {label} is not in 0 to {NO_LABEL - 1}")
    return NO_LABEL if label == -1 else label
