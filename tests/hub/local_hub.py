"""A small Hugging Face Hub on 127.0.0.1 for the real ``huggingface_hub`` client to talk to.

It keeps repositories in memory and speaks the endpoints that the client calls: repository info, file tree, creation,
branches, card validation, preupload, LFS batch, upload and verification, commit, and downloads, which for large files
are redirected to another host name as on the Hub. Faults can be set on any of them.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER_TOKEN = "hf_ownerownerownerownerowner"
STRANGER_TOKEN = "hf_strangerstrangerstranger"
USERS = {OWNER_TOKEN: "owner", STRANGER_TOKEN: "stranger"}


@dataclass
class Fault:
    """What goes wrong with requests whose ``METHOD /path`` matches a pattern."""

    pattern: str
    status: int | None = None
    """Answer with this status."""
    delay: float = 0.0
    """Wait before answering."""
    dies: bool = False
    """Read half of what is sent, then stop the server for good."""


@dataclass
class Repository:
    """Branches and commits, each commit a complete set of files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class LocalHub:
    """The server and everything that it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: list[bytes] = []
        """Every body that was sent here."""
        self.uploads = 0
        """How many large files were sent."""
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen; after the server has died, again on the same port."""
        handler: Callable[..., _Handler] = lambda *args: _Handler(self, *args)  # noqa: E731
        for attempt in range(50):
            try:
                self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
                break
            except OSError:  # connections of the dead server may still hold the port
                if attempt == 49:
                    raise
                time.sleep(0.1)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        repository = Repository(private)
        self.large_files.update({_oid(path, content): content for path, content in (files or {}).items()})
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        self.repositories[repo_id] = repository
        return repository

    def writes(self) -> list[str]:
        """The requests so far that could have changed something."""
        return [request for request in self.requests if not request.startswith(("GET ", "HEAD "))]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, the second held back 40 ms otherwise

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        request = f"{self.command} {self.route}"
        self.hub.requests.append(request)
        fault = next((f for f in self.hub.faults if re.match(f.pattern, request)), None)
        if fault is not None and fault.dies:
            length = int(self.headers.get("Content-Length", 0))
            self.rfile.read(length // 2)
            self.hub.server.server_close()
            threading.Thread(target=self.hub.server.shutdown, daemon=True).start()
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body()
        self.hub.received.append(self.body)
        if fault is not None:
            time.sleep(fault.delay)
            if fault.status is not None:
                # the client waits as long as it is told before it tries again
                self._answer({"error": "as ordered"}, fault.status, {"Retry-After": "0"})
                return
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if method == self.command.replace("HEAD", "GET") and match:
                handle(self, *match.groups())
                return
        self._answer({"error": f"no endpoint {request}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def model_info(self, repo_id: str, revision: str | None = None) -> None:
        repository = self._readable(repo_id)
        files = repository and self._files(repository, revision or "main")
        if repository is None or files is None:
            return
        sha = repository.branches.get(revision or "main", revision)
        info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "tags": []}
        entries = [_tree_entry(path, content) for path, content in files.items()]
        keys = ("lfs",) if "blobs" in self.query else ()
        siblings = [{"rfilename": entry["path"], **{k: entry[k] for k in keys if k in entry}} for entry in entries]
        self._answer({**info, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self._readable(repo_id)
        files = repository and self._files(repository, revision)
        if files is not None:
            self._answer([_tree_entry(path, content) for path, content in (files or {}).items()])

    def create_repository(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user()
        if self._user() is None:
            self._answer({"error": "Invalid credentials"}, 401)
        elif owner != self._user():
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif f"{owner}/{asked['name']}" in self.hub.repositories:
            self._answer({"error": "You already created this model repo"}, 409)
        else:
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.create(f"{owner}/{asked['name']}", private=private)
            self._answer({"url": f"{self.hub.endpoint}/{owner}/{asked['name']}", "name": asked["name"]})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self._writable(repo_id)
        if repository is not None:
            repository.branches[branch] = repository.branches["main"]
            self._answer({})

    def validate_yaml(self) -> None:
        valid = json.loads(self.body)["content"].startswith("---")
        self._answer(
            {"errors": [] if valid else [{"message": "no front matter"}], "warnings": []}, 200 if valid else 400
        )

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self._writable(repo_id)
        files = repository and self._files(repository, revision)
        if files is None:
            return
        modes = []
        for asked in json.loads(self.body)["files"]:
            content = files.get(asked["path"])
            oid = None if content is None else _oid(asked["path"], content)
            mode = "lfs" if _is_large(asked["path"]) else "regular"
            modes.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": modes})

    def lfs_batch(self, repo_id: str) -> None:
        if self._writable(repo_id) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/storage/{oid}"},
                "verify": {"href": f"{self.hub.endpoint}/verify"},
            }
            objects.append({**asked, **({} if oid in self.hub.large_files else {"actions": actions})})
        self._answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer({"error": "the SHA-256 differs"}, 400)
            return
        self.hub.large_files[oid] = self.body
        self.hub.uploads += 1
        self._answer({})

    def verify(self) -> None:
        self._answer({}, 200 if json.loads(self.body)["oid"] in self.hub.large_files else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self._writable(repo_id)
        files = repository and self._files(repository, revision)
        if repository is None or files is None:
            return
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repository.branches[revision]):
            self._answer({"error": "A commit has happened since"}, 412)
            return
        files = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, files, header["value"]["summary"])
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._readable(repo_id)
        files = repository and self._files(repository, revision)
        if repository is None or files is None:
            return
        headers = {"X-Repo-Commit": repository.branches.get(revision, revision)}
        if path not in files:
            self._answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content, etag = files[path], _oid(path, files[path])
        if _is_large(path):
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            location = {"Location": f"http://localhost:{self.hub.port}/storage/{etag}"}
            self._answer(b"", 302, {**headers, **linked, **location})
        else:
            self._answer(content, 200, {**headers, "ETag": f'"{etag}"'})

    def download(self, oid: str) -> None:
        content = self.hub.large_files[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            start, end = map(int, asked.groups())
            part = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            self._answer(content[start : end + 1], 206, part)
        else:
            self._answer(content, 200, {"ETag": f'"{oid}"'})

    def _user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _readable(self, repo_id: str) -> Repository | None:
        token = self.headers.get("Authorization")
        repository = self.hub.repositories.get(repo_id)
        if token is not None and self._user() is None:
            self._answer({}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and self._user() != repo_id.split("/")[0]):
            self._answer({"error": "Repository not found"}, 404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        else:
            return repository
        return None

    def _writable(self, repo_id: str) -> Repository | None:
        repository = self._readable(repo_id)
        if repository is not None and self._user() != repo_id.split("/")[0]:
            self._answer({"error": "You don't have the rights"}, 403)
            return None
        return repository

    def _files(self, repository: Repository, revision: str) -> dict[str, bytes] | None:
        files = repository.commits.get(repository.branches.get(revision, revision))
        if files is None:
            self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return files

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_raw = isinstance(content, bytes)
        body = content if is_raw else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if is_raw else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", rf"/api/models/{_REPO}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)/?", _Handler.tree),
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler.create_branch),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/storage/(\w+)", _Handler.store),
    ("POST", r"/verify", _Handler.verify),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/(datasets/[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/storage/(\w+)", _Handler.download),
]


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".pt"))


def _oid(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    oid = _oid(path, content)
    large = {"lfs": {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 130}} if _is_large(path) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}
