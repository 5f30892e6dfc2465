"""A web server on this machine that misbehaves when told to, and counts."""

import re
import socket
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer."""

    status: int = 0
    """Answered instead of the file."""
    retry_after: str = ""
    stall_at: int = -1
    """Bytes sent, then silence until the client leaves."""
    cut_at: int = -1
    """Bytes sent, then the connection is reset."""
    flip: int = -1
    """This byte of the file is another."""
    length: int = 0
    """What Content-Length adds to the truth; the body ends where it says, or where the file does."""
    unsized: bool = False
    """No Content-Length: the end of the connection is the end of the file."""
    seconds: float = 0.0
    """Before the answer."""


class Server:
    """Files by name; `faults[name]` is used up from its front, one each request, and `always[name]` is for ever."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.ranges = True
        self.requests: list[tuple[str, int]] = []
        """(name, first byte asked for) of every GET."""
        self.queries: set[str] = set()
        self.authorisations: set[str | None] = set()
        self.sent: Counter[str] = Counter()
        """Bytes of bodies."""
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def asked(self, name: str) -> int:
        return sum(n == name for n, _ in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, _, query = handler.path.lstrip("/").partition("?")
        span = re.match(r"bytes=(\d+)-(\d*)$", handler.headers.get("Range", ""))
        start = int(span[1]) if span and self.ranges else 0
        with self._lock:
            self.queries.add(query)
            self.authorisations.add(handler.headers.get("Authorization"))
            self.requests.append((name, int(span[1]) if span else 0))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults[name].pop(0) if self.faults[name] else self.always.get(name, Fault())
        try:
            time.sleep(fault.seconds)
            if fault.status or name not in self.files:
                handler.send_response(fault.status or 404)
                if fault.retry_after:
                    handler.send_header("Retry-After", fault.retry_after)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
            else:
                end = int(span[2]) if span and self.ranges and span[2] else len(self.files[name]) - 1
                self._body(handler, name, start, end, bool(span) and self.ranges, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _body(self, handler, name, start, end, partial, fault):
        whole = self.files[name]
        if fault.flip >= 0:
            whole = whole[: fault.flip] + bytes([whole[fault.flip] ^ 1]) + whole[fault.flip + 1 :]
        body = whole[start : end + 1]
        handler.send_response(206 if partial else 200)
        if partial:
            handler.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        if not fault.unsized:
            handler.send_header("Content-Length", str(len(body) + fault.length))
        handler.send_header("Connection", "close")
        handler.end_headers()
        broken = max(fault.cut_at, fault.stall_at)
        stop = min(len(body), len(body) + fault.length) if broken < 0 else max(0, broken - start)
        with self._lock:
            self.sent[name] += len(body[:stop])
        handler.wfile.write(body[:stop])
        handler.wfile.flush()
        if fault.stall_at >= 0:
            self.closing.wait(10)
        time.sleep(0.05 if broken >= 0 or fault.length else 0)  # aiohttp throws away what is unread when the connection breaks
        if fault.cut_at >= 0 and not fault.unsized:
            handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True


@contextmanager
def serving():
    """A server, and its URL as `server.url`."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(BrokenPipeError, ConnectionResetError):
                server.answer(self)

        def log_message(self, *words):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{web.server_port}"
    try:
        yield server
    finally:
        server.closing.set()
        web.shutdown()
        web.server_close()
