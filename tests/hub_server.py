"""A hub on loopback for tests, in this process, with faults on demand; and the real client, told to speak to it."""

import re
import socket
import threading
from contextlib import contextmanager

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from hub.lfs import Uploads
from hub.messages import Answer
from hub.server import Handler, opened
from hub.tokens import User

PIECE = 20_000
"""So small that a tiny model arrives in several pieces."""


class Faulty(Handler):
    """Breaks the next calls that match.

    A status is answered; ``cut`` ends the connection, ``half`` sends half, ``after`` loses the answer, ``pass`` does
    nothing; what can be called is, once a part of the body has come.
    """

    def do_GET(self):
        self.server.calls.append(f"{self.command} {self.path.partition('?')[0]}")
        fault = next((f for f in self.server.faults if re.match(f[0], self.server.calls[-1])), None)
        if fault is None:
            return super().do_GET()
        self.server.faults.remove(fault)
        kind = fault[1]
        if kind == "pass":
            return super().do_GET()
        if kind == "half":
            self.half = True
            return super().do_GET()
        if kind == "after":  # done, but the answer is lost
            self.send = lambda answer: self.connection.shutdown(socket.SHUT_RDWR)
            return super().do_GET()
        self.close_connection = True
        if kind == "cut" or callable(kind):
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            if callable(kind):
                kind()
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.body = type("Unread", (), {"left": 1})
        return self.send(Answer({"error": "injected"}, kind))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def send(self, answer):
        if getattr(self, "half", False) and answer.file:
            self.half = False
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(answer.length))
            self.end_headers()
            self.wfile.write(answer.file.read_bytes()[answer.start : answer.start + answer.length // 2])
            self.wfile.flush()
            return self.connection.shutdown(socket.SHUT_RDWR)
        return super().send(answer)


@contextmanager
def hub_on_loopback(folder, *users):
    """Yields the server and a token for each of the users, (name, role)."""
    with opened(folder, uploads=Uploads(piece=PIECE)) as hub:
        hub.RequestHandlerClass, hub.faults, hub.calls = Faulty, [], []
        hub.handle_error = lambda *_: None
        tokens = [hub.guard.new_token(User(*user)) for user in users]
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub, *tokens
        finally:
            hub.shutdown()
            thread.join()


def client(monkeypatch, hub, token=None):
    """The real client, in this process: what it reads from the environment when imported is set in place."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    plain = _http._http_backoff_base
    monkeypatch.setattr(_http, "_http_backoff_base", lambda **given: plain(**given | {"base_wait_time": 0.01}))
    return HfApi(endpoint=hub.url, token=token or False)
