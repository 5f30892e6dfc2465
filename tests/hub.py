"""The Hub on 127.0.0.1, in memory: what huggingface_hub asks for to create, upload, look up and download models.

It checks tokens, fails when told to, and writes down every request. Large
files go through Git LFS; there is no xet (HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_writer00000000000000", "hf_reader00000000000000", "hf_other000000000000000"
"""Tokens: ann's, which may write; ann's, which may read; bob's."""
TOKENS = {WRITER: ("ann", "write"), READER: ("ann", "read"), STRANGER: ("bob", "write")}
LARGE = (".safetensors", ".bin", ".pt", ".npz", ".tar")
"""Kinds of files that are large whatever their size, as a new repository's .gitattributes says."""
LARGE_FROM = 10_000_000
"""Bytes from which every file is."""


@dataclass
class Repository:
    """The newest commit of one."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])


@dataclass
class Request:
    """One that came, and its answer."""

    method: str
    path: str
    status: int = 0
    """0: the connection was cut, or is still open."""


class Hub:
    """Repositories and large objects; `fail` and `cut` say what goes wrong, in order, by a pattern of `METHOD path`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.received: Counter[str] = Counter()
        """Bytes of uploads, by large object."""
        self.faults: list[tuple[str, int | str]] = []
        self.holding = threading.Event()
        """An upload is being held."""
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next so many requests that match with a status."""
        self.faults += [(pattern, status)] * times

    def cut(self, pattern: str) -> None:
        """Break the connection in the middle of the next upload that matches."""
        self.faults.append((pattern, "cut"))

    def hold(self, pattern: str) -> None:
        """Stop reading in the middle of the next upload that matches, until the client has gone."""
        self.faults.append((pattern, "hold"))

    def fault_of(self, request: Request) -> int | str:
        """What goes wrong with this one; 0 for nothing."""
        with self.lock:
            for i, (pattern, _) in enumerate(self.faults):
                if re.search(pattern, f"{request.method} {request.path}"):
                    return self.faults.pop(i)[1]
        return 0

    def asked(self, pattern: str) -> list[Request]:
        """The requests that match."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]


def git_hash(content: bytes) -> str:
    """How git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size >= LARGE_FROM


class Answers(BaseHTTPRequestHandler):
    """One connection; `hub` is put in by `serving_hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.request_seen = Request(self.command, unquote(parts.path))
        self.hub.requests.append(self.request_seen)
        fault = self.hub.fault_of(self.request_seen)
        path = self.request_seen.path
        if fault in ("cut", "hold"):
            self.break_off(path, str(fault))
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/objects/") and self.command == "PUT":
            self.hub.received[path.removeprefix("/objects/")] += len(body)
        if fault:
            self.refuse(int(fault), "Ordered")
            return
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                act(self, body, *found.groups())
                return
        self.refuse(404, "UnknownEndpoint")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def break_off(self, path: str, fault: str) -> None:
        """Read half of an upload, then cut the connection, or wait until the client does."""
        half = self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.hub.received[path.removeprefix("/objects/")] += len(half)
        if fault == "hold":
            self.hub.holding.set()
            self.hub.closing.wait(60)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def send(self, status: int, content: bytes | dict | list, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.request_seen.status = status
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (named | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def who(self) -> tuple[str, str] | None:
        """Name and role behind the request's token."""
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def readable(self, name: str) -> Repository | None:
        """A repository that the request may see; otherwise it is refused."""
        repository, who = self.hub.repositories.get(name), self.who()
        if repository is None or (repository.private and (who or ("", ""))[0] != name.split("/")[0]):
            self.refuse(404 if who else 401, "RepoNotFound")
            return None
        return repository

    def writable(self, name: str) -> Repository | None:
        """A repository that the request may write; otherwise it is refused."""
        who = self.who()
        if who is None:
            self.refuse(401, "Unauthorized")
        elif who != (name.split("/")[0], "write"):
            self.refuse(403, "Forbidden")
        else:
            return self.readable(name)
        return None

    def whoami(self, body: bytes) -> None:
        who = self.who()
        if who is None:
            self.refuse(401, "Unauthorized")
        else:
            self.send(200, {"type": "user", "name": who[0], "auth": {"accessToken": {"role": who[1]}}})

    def validate_yaml(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        who = self.who()
        name = f"{wanted.get('organization') or (who or ('', ''))[0]}/{wanted['name']}"
        if who is None:
            self.refuse(401, "Unauthorized")
        elif who != (name.split("/")[0], "write"):
            self.refuse(403, "Forbidden")
        elif name in self.hub.repositories:
            self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[name] = Repository(private)
            self.send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def information(self, body: bytes, name: str, revision: str | None = None) -> None:
        repository = self.readable(name)
        if repository is None:
            return
        if revision not in (None, "main", *repository.commits):
            self.refuse(404, "RevisionNotFound")
            return
        files = [{"rfilename": path} for path in sorted(repository.files)]
        told = {"id": name, "sha": repository.commits[-1], "private": repository.private, "siblings": files, "tags": []}
        self.send(200, told | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self.readable(name)
        if repository is not None:
            self.send(200, [self.entry(path, content) for path, content in sorted(repository.files.items())])

    def entry(self, path: str, content: bytes) -> dict:
        """A file as the tree lists it."""
        told = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
        return told | (large if is_large(path, len(content)) else {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self.writable(name)
        if repository is not None:
            self.send(200, {"files": [self.plan(repository, file["path"], file["size"]) for file in json.loads(body)["files"]]})

    def plan(self, repository: Repository, path: str, size: int) -> dict:
        """How a file is to be sent, and what is there already."""
        large, there = is_large(path, size), repository.files.get(path)
        known = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": known}

    def batch(self, body: bytes, name: str) -> None:
        if self.writable(name) is None:
            return
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}", "header": {}}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "WrongContent")
            return
        self.hub.objects[oid] = body
        self.send(200, b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.writable(name)
        if repository is None:
            return
        files = dict(repository.files)
        for line in filter(None, body.decode().split("\n")):
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.refuse(400, "MissingObject")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind != "header":
                self.refuse(400, "UnknownOperation")
                return
        repository.files = files
        repository.commits.append(hashlib.sha1(body + repository.commits[-1].encode()).hexdigest())
        self.send(200, {"commitOid": repository.commits[-1], "commitUrl": f"{self.hub.url}/{name}/commit/{repository.commits[-1]}"})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        if repository is None:
            return
        if revision not in ("main", *repository.commits) or path not in repository.files:
            self.refuse(404, "EntryNotFound" if revision in ("main", *repository.commits) else "RevisionNotFound")
            return
        content = repository.files[path]
        tag = hashlib.sha256(content).hexdigest() if is_large(path, len(content)) else git_hash(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": repository.commits[-1], "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{tag}"', "Content-Type": "application/octet-stream"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            self.send(206, content[first : last + 1], **headers, Content_Range=f"bytes {first}-{last}/{len(content)}")
        else:
            self.send(200, content, **headers)

    def log_message(self, *words: object) -> None:
        pass


NAME, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Answers.whoami),
    ("POST", "/api/validate-yaml", Answers.validate_yaml),
    ("POST", "/api/repos/create", Answers.create),
    ("GET", f"/api/models/{NAME}", Answers.information),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Answers.information),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Answers.tree),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Answers.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Answers.batch),
    ("PUT", r"/objects/([0-9a-f]{64})", Answers.put_object),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Answers.commit),
    ("GET HEAD", f"/{NAME}/resolve/{REVISION}/(.+)", Answers.resolve),
)


class Quiet(ThreadingHTTPServer):
    """A server that says nothing of clients that hang up."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving_hub():
    """A hub, with its address as `hub.url`."""
    hub = Hub()
    web = Quiet(("127.0.0.1", 0), type("Bound", (Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        web.shutdown()
        web.server_close()
