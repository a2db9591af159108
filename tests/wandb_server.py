"""As much of a W&B server on loopback as wandb 0.31 calls in a run: GraphQL, the stream of figures, files."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.seen.append((self.path, body))
        answer = {}
        if self.path == "/graphql":
            answer = {"data": self.graphql(**json.loads(body))}
        elif self.path.endswith("/file_stream"):
            self.stream(self.server.runs[self.path.split("/")[-2]], json.loads(body))
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_PUT = do_POST

    def graphql(self, query, variables, **_):
        if "upsertBucket" in query:
            return self.upsert(variables)
        if "createRunFiles" in query:
            where = f"http://127.0.0.1:{self.server.server_port}/stored"
            files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        return {}

    def upsert(self, given):
        fresh = SimpleNamespace(history=[], config={}, name=None, project=None, exitcode=None)
        run = self.server.runs.setdefault(given["name"], fresh)
        run.name, run.project = given["displayName"] or run.name, given["project"] or run.project
        run.config = {key: held["value"] for key, held in json.loads(given["config"] or "{}").items()} or run.config
        project = {"id": "id", "name": run.project, "entity": {"id": "id", "name": "me"}}
        empty = dict.fromkeys(("description", "sweepName", "historyLineCount"))
        bucket = {"id": "id", "name": given["name"], "displayName": run.name, "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": empty | bucket, "inserted": True}}

    def stream(self, run, sent):
        """Lines that are sent again, after an answer that was lost, stand where they stood."""
        if (part := sent.get("files", {}).get("wandb-history.jsonl")) is not None:
            rows = [json.loads(line) for line in part["content"]]
            run.history[part["offset"] : part["offset"] + len(rows)] = rows
        if sent.get("complete"):
            run.exitcode = sent["exitcode"]

    def log_message(self, *_):
        pass


@contextmanager
def wandb_on_loopback():
    """Yields the server: its ``runs`` by id, and all that it has ``seen``; wandb reads its ``url``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.runs, server.seen, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
        server.handle_error = lambda *_: None  # wandb hangs up as it ends
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
