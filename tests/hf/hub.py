"""A stand-in for the hub's HTTP interface, as far as making a repository and committing files to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40


@dataclass
class Hub:
    """What reached it: the requests that made repositories, and the files of each commit by its message."""

    endpoint: str = ""
    tokens: set[str] = field(default_factory=set)
    repositories: list[dict[str, Any]] = field(default_factory=list)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


@contextmanager
def standing_in() -> Iterator[Hub]:
    """A hub on this machine, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers["Authorization"])
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.hub.repositories.append(wanted)
            self._answer({"url": f"{self.hub.endpoint}/{wanted.get('organization', 'me')}/{wanted['name']}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            self._answer({"files": files})
        elif "/commit/" in path:
            self._commit(
                path.split("/commit/")[0].removeprefix("/api/models/"), [json.loads(line) for line in body.splitlines()]
            )
        else:
            self.send_error(404)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        summary = lines[0]["value"]["summary"]
        self.hub.commits[summary] = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        self._answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _answer(self, found: object) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""
