"""What must not leave this machine: secrets and local paths, found in a text or taken out of a configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from condot.core.printable import redact_url

SECRET_PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|(?i:aws_secret_access_key)\W{1,4}[A-Za-z0-9/+]{40}",
    "a Google Cloud key": r"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[0-9A-Za-z_-]{20,}|\bGOOG[0-9A-Z]{10,}",
    "another service's key": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a signed URL": r"(?i)[?&](?:x-amz-signature|x-goog-signature|sig|signature)=[\w%/+-]{8,}",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]+:[^\s/@'\"]+@",
    "a token or password": (
        r"(?i)(?:token|secret|passw(?:or)?d|api_?key|access_?key|credentials?)[\"']?\s*[=:]\s*[\"']?"
        r"(?=[\w+/.=-]*\d)[A-Za-z0-9+/_=-][A-Za-z0-9+/_.=-]{7,}"
    ),
}
"""Kinds of secrets, and what they look like."""
LOCAL_PATH_PATTERNS = {
    "a local path": (
        r"(?<![\w./~-])(?:file://)?/(?:home|Users|root|mnt|media|scratch|tmp|var|srv|Volumes|workspace)/[^\s\"'`,;)\]]+|(?<![\w/])~/[\w.-]+/[\w.-]+"
    ),
    "a Windows path": r"\b[A-Z]:(?:\\\\|\\(?!n))[\w.$-]{2,}",
}
"""Kinds of local paths."""
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""A repository's name on the Hub, or user/name."""
ORIGIN_KEYS = ("_name_or_path", "name_or_path")
"""Where diffusers and transformers write down what a part was loaded from."""


def find_secrets(text: str, secrets: tuple[str, ...] = ()) -> list[str]:
    """What a text gives away, each as its kind and line, such as `line 3: a local path '/home/ann/data'`.

    Args:
        text: of a file.
        secrets: strings that must not be in it, such as this machine's own token.

    A secret is shown by its first four characters only.
    """
    found = [(text.find(secret), "this machine's token", secret) for secret in secrets if secret and secret in text]
    for kinds in (SECRET_PATTERNS, LOCAL_PATH_PATTERNS, _own_paths()):
        found += [(match.start(), kind, match[0]) for kind, pattern in kinds.items() for match in re.finditer(pattern, text)]
    lines = []
    for start, kind, match in sorted(set(found)):
        shown = f"{match[:60]!r}" if "path" in kind or "folder" in kind else f"'{match[:4]}...'"
        lines.append(f"line {text.count(chr(10), 0, start) + 1}: {kind} {shown}")
    return lines


def _own_paths() -> dict[str, str]:
    """Folders of this machine, as patterns."""
    folders = {"the working folder": Path.cwd(), "the home folder": Path.home()}
    return {kind: rf"(?<![\w./-]){re.escape(str(path))}(?![\w.-])" for kind, path in folders.items() if len(path.parts) > 1}


def is_hub_id(name: str) -> bool:
    """Whether a source is a repository's name on the Hub, and not a file or folder here."""
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(name)


def base_name(place: str) -> str:
    """A path or URL without where it lies: its last name, without a query."""
    return re.split(r"[\\/]", redact_url(place).partition("?")[0].rstrip("\\/"))[-1]


def without_local_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as they may be read by anyone: each local path, URL or bucket replaced by its last name.

    Names on the Hub stay: of a model as user/name, of data as hf://datasets/user/name.

    Args:
        settings: as `recipe.as_mapping` gives them; they are not changed.
    """
    data, checkpoint = settings["data"], settings["checkpoint"]
    shards = [redact_url(place) if place.startswith("hf://") else base_name(place) for place in data["shards"]]
    return {
        **settings,
        "output_dir": base_name(settings["output_dir"]),
        "init_from": _public_name(settings["init_from"]),
        "data": {
            **data,
            "shards": shards,
            "cache_dir": base_name(data["cache_dir"]),
            "encoded": base_name(data["encoded"]),
            "autoencoder": _public_name(data["autoencoder"]),
            "text_encoder": [_public_name(name) for name in data["text_encoder"]],
        },
        "checkpoint": {**checkpoint, "resume": base_name(checkpoint["resume"]), "start_from": base_name(checkpoint["start_from"])},
    }


def _public_name(name: str) -> str:
    """A model's name on the Hub, or the last name of its path."""
    return name if is_hub_id(name) else base_name(name)


def without_origin(content: Any, keep: Callable[[str], bool] = is_hub_id) -> Any:
    """A part's configuration (JSON) without the paths that it was loaded from; names that `keep` keeps stay."""
    if isinstance(content, dict):
        return {
            key: without_origin(value, keep)
            for key, value in content.items()
            if not (key in ORIGIN_KEYS and isinstance(value, str) and not keep(value))
        }
    return [without_origin(item, keep) for item in content] if isinstance(content, list) else content
