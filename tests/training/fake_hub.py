"""A Hub on the loopback interface: the few routes that creating, pushing and downloading a
repository call, and the ways in which they fail; with a store for Xet's blocks, for uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import huggingface_hub


@dataclass(frozen=True)
class Request:
    """One request as it came over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# Status, headers and content of an answer
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class FakeHub:
    """What the server received; large files are those that git would keep in LFS.

    Attributes:
        refuse: part of a path whose requests are answered 403.
        token: the only one that is let in; None: any, or none.
        busy: how many requests are still answered 429, by a part of their path.
        dropped: how many connections are still dropped, likewise.
        files: of the one repository that there is, as the commits left them.
    """

    url: str = ""
    refuse: str | None = None
    token: str | None = None
    busy: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def arrived(self) -> dict[str, bytes]:
        """Path and content of every file in the last commit."""
        return self.commits[-1]["files"]

    def asked(self, part: str) -> int:
        """How many requests came for a path."""
        return sum(part in request.path for request in self.requests)

    def drops(self, path: str) -> bool:
        """Whether the connection of a request is dropped without an answer."""
        return _counted(self.dropped, path)

    def answer(self, request: Request) -> Answer:
        """The answer to a request."""
        self.requests.append(request)
        if self.refuse and self.refuse in request.path:
            return _json(403, {"error": "you may not"})
        # by its address, or by a token of its own
        is_signed = "/storage/" in request.path or request.path.startswith("/v")
        if (
            self.token
            and not is_signed
            and request.headers.get("authorization") != f"Bearer {self.token}"
        ):
            return _json(401, {"error": "Invalid username or password."})
        if _counted(self.busy, request.path):
            status, headers, content = _json(429, {"error": "too many requests"})
            return status, headers | {"Retry-After": "0"}, content
        if "/resolve/" in request.path:
            return _resolve(self, request)
        for part, reply in _ROUTES.items():
            if part in request.path:
                return _json(200, reply(self, request))
        return _json(404, {"error": f"the fake Hub has no route {request.path}"})


def _json(status: int, content: Any) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _counted(left: Counter[str], path: str) -> bool:
    """Whether a part of the path has a number left, which is counted down."""
    part = next((part for part in left if part in path and left[part] > 0), None)
    if part is not None:
        left[part] -= 1
    return part is not None


def _resolve(hub: FakeHub, request: Request) -> Answer:
    """A file of the repository."""
    name = request.path.partition("/resolve/")[2].partition("/")[2]
    if name not in hub.files:
        status, headers, content = _json(404, {"error": "Entry not found"})
        return status, headers | {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _SHA}, content
    content = hub.files[name]
    etag = hashlib.sha256(content).hexdigest()
    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _SHA}, content


def _info(hub: FakeHub, request: Request) -> dict[str, Any]:
    return {"id": "somebody/x", "sha": _SHA, "tags": [], "private": False}


def _tree(hub: FakeHub, request: Request) -> list[dict[str, Any]]:
    kind = {"type": "file", "oid": "b" * 40}
    return [kind | {"path": name, "size": len(content)} for name, content in hub.files.items()]


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
        entry
        if entry["oid"] in hub.uploads  # which is not sent again
        else entry | {"actions": {"upload": {"href": f"{hub.url}/storage/{entry['oid']}"}}}
        for entry in json.loads(request.body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def _store(hub: FakeHub, request: Request) -> dict[str, Any]:
    hub.uploads[request.path.removeprefix("/storage/")] = request.body
    return {}


def _xet_token(hub: FakeHub, request: Request) -> dict[str, Any]:
    expires = int(time.time()) + 3600
    return {"casUrl": hub.url, "exp": expires, "accessToken": "for_blocks"}


def _store_block(hub: FakeHub, request: Request) -> dict[str, Any]:
    """A block of one file: chunks with a header of 8 bytes, here never compressed."""
    content, rest = b"", request.body
    while rest:
        size, scheme = int.from_bytes(rest[1:4], "little"), rest[4]
        if scheme:
            raise ValueError("the fake Hub reads no compressed chunks: send random bytes")
        content, rest = content + rest[8 : 8 + size], rest[8 + size :]
    hub.uploads[hashlib.sha256(content).hexdigest()] = content
    return {"was_inserted": True}


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
    hub.files |= files
    return {"commitUrl": f"{hub.url}/somebody/x/commit/abc", "commitOid": "abc"}


_SHA = "a" * 40
_ROUTES = {
    "/api/repos/create": _create,
    "/api/validate-yaml": lambda hub, request: {"errors": [], "warnings": []},
    "/preupload/": _preupload,
    "/info/lfs/objects/batch": _batch,
    "/storage/": _store,
    "/xet-write-token/": _xet_token,
    "/v1/xorbs/": _store_block,
    "/v1/shards": lambda hub, request: {"result": 1},
    "/commit/": _commit,
    "/revision/": _info,
    "/tree/": _tree,
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
            if hub.drops(self.path):
                self.close_connection = True
                return
            status, told, content = hub.answer(request)
            self.send_response(status)
            for name, value in told.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler


@contextmanager
def reachable(hub: FakeHub, xet: bool) -> Iterator[FakeHub]:
    """While huggingface_hub, which tests keep offline, may talk to a fake Hub."""
    # before 1.0, sessions keep what they were made with
    forget = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    # before 1.0, addresses of repositories are read as that one's
    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": not xet, "ENDPOINT": hub.url}
    forget()
    with mock.patch.multiple(huggingface_hub.constants, **settings):
        yield hub
    forget()


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
