"""A stand-in for wandb's server, for tests: keeps the rows of one run, and answers what wandb asks in order to send them."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Server:
    """history: the rows by line number, as wandb's service sends them; config: the run's configuration."""

    def __init__(self) -> None:
        self.history: dict[int, dict] = {}
        self.config: dict = {}
        self.url = ""

    @property
    def rows(self) -> list[dict]:
        return [self.history[line] for line in sorted(self.history)]

    def answer(self, request: dict) -> dict:
        """The answer to a GraphQL request, recognised by the fields it asks for."""
        query, variables = request["query"], request.get("variables") or {}
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": variables.get("name") or "abc", "displayName": "n", "config": "{}", "project": project}
        bucket |= {"historyLineCount": len(self.history), "sweepName": None}
        if "upsertBucket" in query:
            self.config |= json.loads(variables.get("config") or "{}")
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if "historyTail" in query:
            tail = [json.dumps(row) for row in self.rows[-1:]]
            merged: dict = {}
            for row in self.rows:
                merged |= row
            bucket |= {"summaryMetrics": json.dumps(merged), "historyTail": json.dumps(tail), "eventsTail": "[]", "tags": []}
            bucket |= {"eventsLineCount": 0, "logLineCount": 0, "wandbConfig": json.dumps({"t": 1})}
            return {"model": {**project, "bucket": bucket if tail else None}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "abc", "uploadHeaders": [], "files": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}}


@contextmanager
def serving() -> Iterator[Server]:
    """Serves on a free port of this machine during the block."""
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            content: dict = {}
            if "graphql" in self.path:
                content = {"data": server.answer(json.loads(body))}
            elif "file_stream" in self.path:
                sent = (json.loads(body).get("files") or {}).get("wandb-history.jsonl") or {}
                for number, line in enumerate(sent.get("content", []), sent.get("offset", 0)):
                    server.history[number] = json.loads(line)
            answer = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        server.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield server
        httpd.shutdown()
        thread.join()
