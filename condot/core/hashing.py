"""SHA-256 of texts, bytes and files, as manifests and fingerprints name them: 64 hexadecimal digits.

Hashes that grow while a file is written or downloaded stay where the bytes pass by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(content: bytes | str) -> str:
    """Return the hash of bytes, or of a text in UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """Return the hash of a file, which is read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
