"""A small Hub on 127.0.0.1: what huggingface_hub asks of the real one, for pulling and publishing, and ways to fail.

Large files (.safetensors, .onnx, .png) are answered as on the Hub: by a redirect to another origin (here "localhost"),
with their sha256 as etag. Commits, branches, private and gated repositories are there; Xet is not.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".onnx", ".png")
WRITER, READER = "hf_writer", "hf_reader"


def commit_of(files: Mapping[str, bytes], parent: str = "") -> str:
    digest = hashlib.sha1(parent.encode())
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def etag_of(name: str, content: bytes) -> str:
    return (hashlib.sha256(content) if name.endswith(LFS) else
            hashlib.sha1(f"blob {len(content)}\0".encode() + content)).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], message: str = "") -> str:
        sha = commit_of(files, self.refs.get("main", ""))
        self.commits[sha], self.refs["main"] = dict(files), sha
        self.messages.append(message)
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    kind: str  # a status ("503"), or: silent, stall, drip, drop, reset, short, long, flip
    pattern: str = ""
    method: str = "GET"
    times: int = 10**9


class Hub:
    """`with Hub() as hub:` serves; hub.url is the endpoint, hub.log every request as (method, path, token)."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients may leave
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=lambda: self.server.serve_forever(0.05), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **options: bool) -> str:
        """A repository, or another commit of it; its commit."""
        repo = self.repos.setdefault(name, Repo(**options))
        self.lfs.update({hashlib.sha256(content).hexdigest(): content for content in files.values()})
        return repo.commit(files)

    def fail(self, kind: str, pattern: str = "", method: str = "GET", times: int = 10**9) -> None:
        self.faults.append(Fault(kind, pattern, method, times))

    def fault(self, method: str, path: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order."""
        return [path.rsplit("name=", 1)[-1] if "/cdn/" in path else path.split("/", 5)[5]
                for method, path, _ in self.log if method == "GET" and ("/resolve/" in path or "/cdn/" in path)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path)
        self.hub.log.append((self.command, path, self.token()))
        self.body = self.read_body()
        self.kind = self.hub.fault(self.command, path)
        if self.kind == "silent":
            self.hub.closing.wait()
            self.close_connection = True
        elif self.kind and self.kind.isdigit():
            self.error(int(self.kind))
        else:
            for pattern, route in ROUTES:
                match = re.fullmatch(pattern, urlsplit(path).path)
                if match:
                    route(self, **match.groupdict())
                    return
            self.error(404)

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, headers: Mapping[str, Any], body: bytes = b"", announced: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str = "") -> None:
        self.send(status, {"X-Error-Code": code} if code else {}, b"{}")

    def json(self, value: Any) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    # ---- who may ----

    def readable(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token() not in (READER, WRITER)):
            self.error(404 if self.token() else 401, "RepoNotFound")
        elif repo.gated and self.token() not in (READER, WRITER):
            self.error(403 if self.token() else 401, "GatedRepo")
        else:
            return repo
        return None

    def writable(self, name: str) -> Repo | None:
        if self.token() != WRITER:
            self.error(403 if self.token() else 401)
            return None
        if name not in self.hub.repos:
            self.error(404, "RepoNotFound")
        return self.hub.repos.get(name)

    # ---- pulling ----

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self.readable(repo)
        if found is None:
            return
        files = found.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        commit = found.refs.get(revision, revision)
        if name not in files:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}")
        content = files[name]
        headers = {"ETag": f'"{etag_of(name, content)}"', "X-Repo-Commit": commit}
        if name.endswith(LFS):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content)),
                        "Location": f"http://localhost:{self.hub.port}/cdn/{digest}?name={name}"}
            return self.send(302, headers)
        return self.content(headers, content)

    def cdn(self, digest: str) -> None:
        self.content({"ETag": f'"{digest}"'}, self.hub.lfs[digest])

    def content(self, headers: Mapping[str, str], content: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        status = 206 if match else 200
        if match:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        if self.kind == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.kind == "short":
            body = body[:-1]
        if self.kind == "long":
            body += b"\n"
        if self.kind not in ("stall", "drop", "reset", "drip") or self.command == "HEAD":
            return self.send(status, headers, body)
        self.close_connection = True
        if self.kind == "drip":
            self.send(status, headers, b"", len(body))
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                if self.hub.closing.wait(0.2):
                    return None
            return None
        self.send(status, headers, body[: len(body) // 2], len(body))
        self.wfile.flush()
        if self.kind == "stall":
            self.hub.closing.wait()
        elif self.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return None

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.readable(repo)
        if found is None:
            return None
        files = found.files(revision)
        if files is None and found.refs:
            return self.error(404, "RevisionNotFound")
        return self.json({"id": repo, "modelId": repo, "sha": found.refs.get(revision, revision),
                          "private": found.private, "gated": found.gated, "tags": [],
                          "siblings": [{"rfilename": name} for name in files or ()]})

    def tree(self, repo: str, revision: str) -> None:
        found = self.readable(repo)
        if found is None:
            return None
        files = found.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        return self.json([{"type": "file", "path": name, "size": len(content), "oid": etag_of(name, content)}
                          for name, content in files.items()])

    # ---- publishing ----

    def whoami(self) -> None:
        role = {WRITER: "write", READER: "read"}.get(self.token() or "")
        if role is None:
            return self.error(401)
        return self.json({"type": "user", "name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}],
                          "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token() != WRITER:
            return self.error(403 if self.token() else 401)
        if name in self.hub.repos:
            return self.send(409, {}, json.dumps({"error": "You already created this model repo",
                                                  "url": f"{self.hub.url}/{name}"}).encode())
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if found is not None:
            files = found.files(revision) or {}
            self.json({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                 "shouldIgnore": False,
                 "oid": etag_of(f["path"], files[f["path"]]) if f["path"] in files else None}
                for f in json.loads(self.body)["files"]]})

    def batch(self, repo: str) -> None:
        if self.writable(repo) is not None:
            self.json({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], **({} if o["oid"] in self.hub.lfs else {"actions": {
                    "upload": {"href": f"{self.hub.url}/upload/{o['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"}}})}
                for o in json.loads(self.body)["objects"]]})

    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.error(400)
        self.hub.lfs[digest] = self.body
        return self.send(200, {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        self.send(200 if len(self.hub.lfs.get(asked["oid"], b"")) == asked["size"] else 404, {}, b"{}")

    def commit(self, repo: str, revision: str) -> None:
        found = self.writable(repo)
        if found is None:
            return None
        files = dict(found.files(revision) or {})
        header = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self.error(400)
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files, header.get("summary", ""))
        return self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (r"/cdn/(?P<digest>[0-9a-f]{64})", _Handler.cdn),
    (rf"/api/models/{REPO}", _Handler.info),
    (rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/upload/(?P<digest>[0-9a-f]{64})", _Handler.upload),
    (r"/verify", _Handler.verify),
    (rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
]


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
