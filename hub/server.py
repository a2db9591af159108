"""The hub as a server: HTTP in, HTTP out, a thread a connection; what is asked is the business of ``hub/routes.py``.

Standard library alone; no torch is imported. See ADR 18.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from filelock import FileLock
from filelock import Timeout as LockTimeout

from heedful import UserError
from hub.lfs import Uploads
from hub.messages import Answer, Body, Request, reading
from hub.routes import ROUTES, Route
from hub.storage import KINDS, Refused, Storage
from hub.tokens import FILE, Guard
from sources.files import writing

_LOG = logging.getLogger("heedful.hub")
LINGER_SECONDS = 30
COPY_BUFSIZE = 1 << 16


class Hub(ThreadingHTTPServer):
    """A folder, served.

    Args:
        folder: Made where it is not there.
        host: An address of this machine.
        port: 0 takes a free one.
        uploads: How large files arrive.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, uploads: Uploads | None = None) -> None:
        self.storage, self.guard, self.uploads = Storage(folder), Guard(folder), uploads or Uploads()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """Where it is reached: what HF_ENDPOINT has to be."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that a connection broke; clients come back."""
        _LOG.warning("a connection broke", exc_info=_LOG.isEnabledFor(logging.DEBUG))


@contextmanager
def opened(folder: Path, *, host: str = "127.0.0.1", port: int = 0, uploads: Uploads | None = None) -> Iterator[Hub]:
    """Serve a folder, and no second time; what a kill left in it is cleared first.

    Raises:
        UserError: It is served already, the address can not be had, or others could reach it without a token; see also
            ``prepare``.
    """
    if Guard(folder).is_open and not _is_loopback(host):
        raise UserError(
            "other machines could read and write everything",
            where=f"--host {host}",
            expected="a hub with tokens",
            fix="make one first: heedful serve-hub FOLDER --new-token NAME",
        )
    lock = FileLock(folder / ".lock")
    try:
        prepare(folder)
        with writing(folder):
            _acquire(lock, folder)
            Storage(folder).clear()
        try:
            hub = Hub(folder, host=host, port=port, uploads=uploads)
        except OSError as error:
            raise UserError(f"no server can be there: {error.strerror}", where=f"{host}:{port}") from error
        with hub:
            yield hub
    finally:
        lock.release()


def prepare(folder: Path) -> None:
    """Make a hub's folder where it is not there.

    Raises:
        UserError: It can not be made, or holds other things.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir()} - {".lock", FILE, f".{FILE}", *KINDS}
    if others and not all((folder / kind).is_dir() for kind in KINDS):
        raise UserError("a folder of other things", where=str(folder), expected="a new one, or a hub's")


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except LockTimeout:
        raise UserError("another server serves this folder", where=str(folder), fix="use that one, or end it") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "heedful", ""
    timeout = 60  # seconds in which a client must say something
    server: Hub

    def do_GET(self) -> None:
        """Answer, as every method does."""
        length = self.headers.get("Content-Length", "0")
        self.body = Body(self.rfile.read, self.rfile.readline, int(length) if length.isdecimal() else 0)
        try:
            answer = self.answered()
        except Refused as error:
            words = {"X-Error-Message": re.sub(r"[^ -~]", "?", error.message)}
            code = {"X-Error-Code": error.code} if error.code else {}
            answer = Answer({"error": error.message}, error.status, words | code)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            _LOG.error("%s", error)
            answer = Answer({"error": f"the hub's disk: {error.strerror}"}, 507)
        except Exception:  # the hub's own fault, and no reason to end for the others
            _LOG.exception("%s %s", self.command, self.path.partition("?")[0])
            answer = Answer({"error": "a fault of the hub: its log says more"}, 500)
        self.send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answered(self) -> Answer:
        """Find the route, look whether the caller may take it, and take it."""
        self._refuse_browsers()
        if "Transfer-Encoding" in self.headers or not self.headers.get("Content-Length", "0").isdecimal():
            raise Refused(411, "the length must be said before")
        with reading():
            split = urlsplit(self.path)
        route, names = _find(self.command, split.path)
        base = f"http://{self.headers.get('Host')}"
        user = None if route.needs == "address" else self.server.guard.user(self.headers.get("Authorization"))
        request = Request(
            storage=self.server.storage,
            guard=self.server.guard,
            uploads=self.server.uploads,
            names=names,
            query=dict(parse_qsl(split.query, keep_blank_values=True)),
            headers=self.headers,  # type: ignore[arg-type] # a mapping of any case
            body=self.body,
            base=base,
            user=user,
        )
        if route.needs == "token":
            self.server.guard.check_known(user)
        if route.needs in ("read", "write"):
            self.server.guard.check_read(user, request.repo)
        if route.needs == "write":
            self.server.guard.check_write(user, names["repo"].partition("/")[0])
        return route.answer(request)

    def _refuse_browsers(self) -> None:
        """A page of the web, open in a browser on this machine, must not reach a hub that asks for no token."""
        with reading():
            host = urlsplit(f"//{self.headers.get('Host')}").hostname or ""
        if self.server.guard.is_open and ("Origin" in self.headers or not _is_loopback(host)):
            raise Refused(403, "not for browsers, nor by another name than localhost")

    def send(self, answer: Answer) -> None:
        """Send what was found; the connection ends if the client was not heard out."""
        content = b"" if answer.file else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if answer.file else "application/json")
        self.send_header("Content-Length", str(answer.length if answer.file else len(content)))
        if self.body.left or "Transfer-Encoding" in self.headers:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.file:
            with answer.file.open("rb") as file:
                file.seek(answer.start)
                _copy(file.read, self.wfile.write, answer.length)
        else:
            self.wfile.write(content)
        self._let_finish()

    def _let_finish(self) -> None:
        """Read on for a while what a refused client still sends: cut off in mid-sending, it would see no answer."""
        end = time.monotonic() + LINGER_SECONDS
        while self.body.left and time.monotonic() < end:
            self.body.read(COPY_BUFSIZE)

    def log_message(self, format: str, *args: Any) -> None:
        """Log, without what signs an address."""
        _LOG.info("%s", (format % args).partition("?")[0])


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], Any], length: int) -> None:
    while length and (piece := read(min(length, COPY_BUFSIZE))):
        write(piece)
        length -= len(piece)
    if length:
        raise ConnectionError("the file is shorter than it was")  # and the client notices


def _find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    for route in ROUTES:
        if method in route.methods and (found := route.path.fullmatch(path)):
            names = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
            return route, {"kind": "models"} | names
    raise Refused(404, "no such call")
