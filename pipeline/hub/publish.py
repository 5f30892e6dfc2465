"""An exported folder on the Hub: listed, checked and scanned first, then uploaded in one commit.

Nothing is asked of the network before the folder has passed, and what was not
listed is not sent. Large files go up before the commit; the Hub keeps them, so
the same command goes on where an interrupted one stopped, and a repository
never holds half an export.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .checksums import CHECKSUM_FILE, UNLISTED_FILES, check_checksums, list_files, read_safetensors_header, sha256_of
from .secrets import find_secrets

T = TypeVar("T")
ALLOWED_FILES = (
    "model_index.json", "README.md", "config.yaml", CHECKSUM_FILE, "samples.png", "curve.png", "evaluation.json", "retrieval.json",
    "provenance.json",
    "pipeline_*_v[0-9]*.py", "scheduler*/scheduling_*_v[0-9]*.py", "transformer/modeling_*_v[0-9]*.py", "unet/modeling_*_v[0-9]*.py",
    "*/config.json", "scheduler*/scheduler_config.json", "*/*.safetensors", "*/*.safetensors.index.json", "*/generation_config.json",
    "tokenizer*/tokenizer.json", "tokenizer*/tokenizer_config.json", "tokenizer*/special_tokens_map.json", "tokenizer*/added_tokens.json",
    "tokenizer*/vocab.json", "tokenizer*/vocab.txt", "tokenizer*/merges.txt", "tokenizer*/spiece.model", "tokenizer*/tokenizer.model",
)  # fmt: skip
"""What an export consists of; everything else in its folder is refused. A star does not cross a slash."""
MAX_ATTEMPTS = 5
"""Attempts at each request that fails by the server's or the connection's fault; the waits between them double."""
LOGIN_HINT = "Run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or set HF_TOKEN to one"
"""For every refusal."""


class UploadFile(NamedTuple):
    """A file that will be uploaded."""

    name: str
    size: int
    """Bytes."""
    sha256: str


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    wait: float = 1.0,
    progress: Callable[[str], None] = print,
) -> str:
    """Upload an exported folder; the repository is made if there is none.

    Files of the repository that this export does not have stay, and are named.

    Args:
        folder: as `write.export_pipeline` makes it.
        repository: user/name.
        private: must agree with a repository that is there.
        token: of the Hub; by default HF_TOKEN, or the one of `hf auth login`.
        endpoint: of the Hub; by default HF_ENDPOINT.
        wait: seconds before the second try; each further wait is twice as long.
        progress: told the list of files before the first request, and the rest.

    Returns:
        The commit's address.

    Raises:
        ValueError: a name that is none; a folder that is not whole, holds other
            files, or gives something away (all before the first request); no
            token, a wrong one, or one without rights; a visibility that does not
            agree; a Hub that does not answer after MAX_ATTEMPTS attempts.
    """
    check_repository(repository)
    parts = list_upload_files(folder)
    token = token or get_token()
    check_secrets(folder, parts, (token,) if token else ())
    progress(format_file_list(parts, repository, private))
    if not token:
        raise ValueError(f"no token of the Hub was found. {LOGIN_HINT}.")
    api = HfApi(endpoint=endpoint, token=token)
    hub = RetryingHub(repository, api.endpoint, wait, progress)
    hub("ask whose token it is", lambda: check_write_access(api))
    there = hub("look it up", lambda: _model_info(api, repository))
    if there is None:
        hub("create it", lambda: api.create_repo(repository, private=private, exist_ok=True))
        there = hub("look it up", lambda: api.model_info(repository))
    if bool(there.private) != private:
        state, flag = ("private", "--private") if there.private else ("public", "--private=false")
        raise ValueError(
            f"{repository} is there and {state}, which is not what this command asks for: give {flag}, "
            f"or change it at {api.endpoint}/{repository}/settings. Nothing was uploaded."
        )
    others = sorted({file.rfilename for file in there.siblings or []} - {part.name for part in parts} - {".gitattributes"})
    if others:
        progress(f"left as they are, not of this export: {', '.join(others)}")

    def commit() -> str:
        files = [CommitOperationAdd(part.name, folder / part.name) for part in parts]  # anew: what a lost answer left undone is found out
        return api.create_commit(repository, files, commit_message=f"Export {folder.resolve().name} by condot").commit_url

    address = hub("upload", commit)
    progress(f"published: {api.endpoint}/{repository} ({'private' if private else 'public'}), {address}")
    return address


def check_repository(repository: str) -> None:
    """Raises ValueError for what is no user/name."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={repository!r} is no repository's name: give user/name ({error}).") from None
    if repository.count("/") != 1:
        raise ValueError(f"push_to_hub={repository!r} names no owner: give user/name, such as ann/{repository}.")


def list_upload_files(folder: Path) -> list[UploadFile]:
    """The files of an exported folder.

    Raises:
        ValueError: no export, missing or changed files, or files that are no part of one; all by name.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no exported folder (no model_index.json): `condot export --run RUN --output {folder}`.")
    listed = check_checksums(folder, every=True)
    names = list_files(folder)
    unexpected = [
        name
        for name in names
        if not any(_matches(name, part) for part in ALLOWED_FILES) or (name not in listed and name not in UNLISTED_FILES)
    ]
    if unexpected:
        raise ValueError(
            f"{folder} holds what no export consists of, so nothing is uploaded: {', '.join(unexpected[:20])}"
            f"{', ...' if len(unexpected) > 20 else ''}. Move {'it' if len(unexpected) == 1 else 'them'} elsewhere."
        )
    return [UploadFile(name, (folder / name).stat().st_size, listed.get(name) or sha256_of(folder / name)) for name in names]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches, part by part."""
    found, wanted = name.split("/"), pattern.split("/")
    return len(found) == len(wanted) and all(map(fnmatchcase, found, wanted))


def check_secrets(folder: Path, parts: list[UploadFile], secrets: tuple[str, ...] = ()) -> None:
    """Look for secrets and local paths in every text, and in what safetensors files say beside their numbers.

    Raises:
        ValueError: each that was found, by file and line.
    """
    found = []
    for part in parts:
        path = folder / part.name
        if path.suffix == ".png":
            continue
        text = (
            json.dumps(read_safetensors_header(path)[0])
            if path.suffix == ".safetensors"
            else path.read_bytes().decode("utf-8", errors="replace")
        )
        found += [f"{part.name} {leak}" for leak in find_secrets(text, secrets)]
    if found:
        raise ValueError(
            f"{folder} gives away what should stay here, so nothing is uploaded: {'; '.join(found[:10])}"
            f"{f'; and {len(found) - 10} more' if len(found) > 10 else ''}. Take it out where it comes from (README.md may be edited), "
            f"then export again."
        )


def format_file_list(parts: list[UploadFile], repository: str, private: bool) -> str:
    """What will be uploaded, as lines: size, the first digits of the hash, name."""
    head = f"{len(parts)} files, {sum(part.size for part in parts):,} bytes, go to {repository} ({'private' if private else 'public'}):"
    return "\n".join([head, *(f"  {part.size:>15,}  {part.sha256[:16]}  {part.name}" for part in parts)])


def check_write_access(api: HfApi) -> None:
    """Raises ValueError for a token that may only read."""
    who = api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"the token of {who['name']} may only read. {LOGIN_HINT}.")


def _model_info(api: HfApi, repository: str) -> ModelInfo | None:
    """What the Hub knows of a repository, or None where this token sees none."""
    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


class RetryingHub:
    """Calls to the Hub, tried again while the fault is the server's or the connection's; every failure becomes one clear error.

    huggingface_hub tries each large file five times more by itself.
    """

    def __init__(self, repository: str, endpoint: str, wait: float, progress: Callable[[str], None]) -> None:
        self.repository, self.endpoint, self.wait, self.progress = repository, endpoint, wait, progress

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """The call's result, after at most MAX_ATTEMPTS attempts.

        Raises:
            ValueError: it failed for good.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return call()
            except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
                cause = _root_cause(error)
                if not _is_transient(cause) or attempt == MAX_ATTEMPTS:
                    raise self.explain(what, cause, attempt) from error
                seconds = self.wait * 2 ** (attempt - 1)
                self.progress(f"could not {what}: {_summary(cause)}; attempt {attempt + 1} of {MAX_ATTEMPTS} in {seconds:g} s")
                time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def explain(self, what: str, cause: BaseException, attempts: int) -> ValueError:
        """Why it failed and what helps."""
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        failed = f"could not {what} ({self.repository} at {self.endpoint}):"
        if status == 401:
            return ValueError(f"{failed} the Hub does not know this token (401). {LOGIN_HINT}.")
        if status == 403:
            return ValueError(f"{failed} the token may not write there (403). Look at the owner's name, or: {LOGIN_HINT}.")
        if isinstance(cause, OfflineModeIsEnabled):
            return ValueError(f"{failed} HF_HUB_OFFLINE is set, so nothing is sent. Unset it.")
        if _is_transient(cause):
            return ValueError(
                f"{failed} no success in {attempts} attempts, the last: {_summary(cause)}. Run the same command again later: "
                f"large files that arrived are not sent twice."
            )
        return ValueError(f"{failed} {_summary(cause)}. Nothing was committed.")


def _root_cause(error: BaseException) -> BaseException:
    """The answer or broken connection behind an error, if there is one: the upload of large files wraps it."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, HTTPError):
            return at
        at = at.__cause__
    return error


def _is_transient(cause: BaseException) -> bool:
    """Whether it may go well the next time: the server's fault, too many requests, or no connection."""
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code >= 500 or cause.response.status_code in (408, 429)
    return isinstance(cause, (HTTPError, json.JSONDecodeError, ConnectionError)) and not isinstance(cause, OfflineModeIsEnabled)


def _summary(cause: BaseException) -> str:
    """A failure in a line."""
    if isinstance(cause, HfHubHTTPError):
        request = cause.response.request
        said = f" ({cause.server_message})" if cause.server_message else ""
        return f"{cause.response.status_code} to {request.method} {request.url.path}{said}"
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
