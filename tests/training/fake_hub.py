"""A Hub on the loopback interface: the few routes that creating and pushing a repository call."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request as it came over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub:
    """What the server received; large files are those that git would keep in LFS.

    Attributes:
        refuse: part of a path whose requests are answered 403.
    """

    url: str = ""
    refuse: str | None = None
    requests: list[Request] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)

    def arrived(self) -> dict[str, bytes]:
        """Path and content of every file in the last commit."""
        return self.commits[-1]["files"]

    def answer(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Status and JSON body for a request."""
        self.requests.append(request)
        if self.refuse and self.refuse in request.path:
            return 403, {"error": "you may not"}
        for part, reply in _ROUTES.items():
            if part in request.path:
                return 200, reply(self, request)
        return 404, {"error": f"the fake Hub has no route {request.path}"}


def _create(hub: FakeHub, request: Request) -> dict[str, Any]:
    name = json.loads(request.body)["name"]
    return {"url": f"{hub.url}/somebody/{name}", "id": "1"}


def _preupload(hub: FakeHub, request: Request) -> dict[str, Any]:
    paths = [file["path"] for file in json.loads(request.body)["files"]]
    large = {path: path.endswith((".safetensors", ".png")) for path in paths}
    modes = {path: "lfs" if large[path] else "regular" for path in paths}
    files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
    return {"files": files}


def _batch(hub: FakeHub, request: Request) -> dict[str, Any]:
    objects = [
        entry | {"actions": {"upload": {"href": f"{hub.url}/storage/{entry['oid']}"}}}
        for entry in json.loads(request.body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def _store(hub: FakeHub, request: Request) -> dict[str, Any]:
    hub.uploads[request.path.removeprefix("/storage/")] = request.body
    return {}


def _commit(hub: FakeHub, request: Request) -> dict[str, Any]:
    files: dict[str, bytes] = {}
    summary = ""
    for line in request.body.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            summary = value["summary"]
        elif entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.uploads[value["oid"]]
        else:
            raise ValueError(f"unexpected entry {entry['key']!r} in a commit")
    hub.commits.append({"summary": summary, "files": files})
    return {"commitUrl": f"{hub.url}/somebody/x/commit/abc", "commitOid": "abc"}


_ROUTES = {
    "/api/repos/create": _create,
    "/api/validate-yaml": lambda hub, request: {"errors": [], "warnings": []},
    "/preupload/": _preupload,
    "/info/lfs/objects/batch": _batch,
    "/storage/": _store,
    "/commit/": _commit,
}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _serve(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self._body())
            status, reply = hub.answer(request)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running fake Hub; its address is ``hub.url``."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
