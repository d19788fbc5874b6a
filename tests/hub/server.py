"""A Hub in this process: the part of its HTTP protocol with which huggingface_hub creates, uploads to and reads models.

Files up to a few kilobytes travel inside the commit, weights through the LFS batch protocol. Requests that are none of
these are answered with 404 and kept in `Hub.unknown`, so that a test notices them.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    """A model: its branches, oldest commit first."""

    is_private: bool
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By commit, its files."""

    def commit_of(self, revision: str) -> str | None:
        if revision in self.trees:
            return revision
        return (self.branches.get(revision) or [None])[-1]

    def add_commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = repr((branch, len(self.branches[branch]), sorted(files.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.trees[commit] = files
        self.branches[branch].append(commit)
        return commit


class Hub:
    """The server, in a thread, while it is entered."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """What was uploaded as LFS, by its SHA-256."""
        self.unknown: list[str] = []
        self.sent: dict[str, int] = {}
        """Bytes of each file that were read, by repository and path."""
        self.refuses: Callable[[str, str], bool | int] = lambda method, path: False
        """Requests to turn down, as a Hub does that is over its quota; a number is the status to answer with."""

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo].commit_of(revision)
        return {} if commit is None else self.repos[repo].trees[commit]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        refusal = self.hub.refuses(self.command, path)
        if refusal:
            return self._send(403 if refusal is True else refusal, {"error": "storage limit reached"})
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match (self.command, *parts):
            case ("POST", "api", "repos", "create"):
                self._create(json.loads(self.body))
            case ("GET", "api", "whoami-v2"):
                self._send(200 if self._is_owner() else 401, {"name": "somebody", "type": "user"})
            case ("POST", "api", "validate-yaml"):
                self._send(200, {"errors": [], "warnings": []})
            case ("POST", "api", "models", owner, name, "branch", branch):
                self._branch(f"{owner}/{name}", branch)
            case ("POST", "api", "models", owner, name, "preupload", _):
                self._preupload(f"{owner}/{name}")
            case ("POST", owner, name, "info", "lfs", "objects", "batch"):
                self._batch(f"{owner}/{name.removesuffix('.git')}")
            case ("PUT", "lfs", oid):
                self._put(oid)
            case ("POST", "api", "models", owner, name, "commit", branch):
                self._commit(f"{owner}/{name}", branch, is_request="create_pr=1" in urlsplit(self.path).query)
            case ("GET", "api", "models", owner, name):
                self._info(f"{owner}/{name}", "main")
            case ("GET", "api", "models", owner, name, "revision", revision):
                self._info(f"{owner}/{name}", revision)
            case ("GET", "api", "models", owner, name, "tree", revision, *_):
                self._tree(f"{owner}/{name}", revision)
            case ("GET" | "HEAD", owner, name, "resolve", revision, *file):
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case ("GET", "api", "agent-harnesses"):
                self._send(404, {"error": "of no interest here"})
            case _:
                self.hub.unknown.append(f"{self.command} {path}")
                self._send(404, {"error": "not spoken here"})
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, *, to_write: bool = False) -> Repo | None:
        """The repository, if the caller may see it; otherwise it has been answered."""
        repo = self.hub.repos.get(name)
        if to_write and not self._is_owner():
            self._send(403, {"error": "no write access"})
            return None
        if repo is None or (repo.is_private and not self._is_owner()):
            self._send(404 if self._is_owner() else 401, {"error": "Repository not found"}, "RepoNotFound")
            return None
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self._is_owner():
            return self._send(401, {"error": "Invalid username or password."})
        is_new = name not in self.hub.repos
        if is_new:
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos[name] = Repo(bool(is_private))
            self.hub.repos[name].add_commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200 if is_new else 409, {"url": f"{self.hub.endpoint}/{name}"})

    def _branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, to_write=True)
        if repo is None:
            return None
        if branch in repo.branches:
            return self._send(409, {"error": "Reference already exists"})
        repo.branches[branch] = list(repo.branches["main"])
        return self._send(200, {})

    def _preupload(self, name: str) -> None:
        if self._repo(name, to_write=True) is None:
            return
        modes = [
            {"path": file["path"], "shouldIgnore": False, "oid": None}
            | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10_000 else "regular"}
            for file in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": modes})

    def _batch(self, name: str) -> None:
        if self._repo(name, to_write=True) is None:
            return
        asked = json.loads(self.body)["objects"]
        objects = []
        for one in asked:
            upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            is_there = one["oid"] in self.hub.objects
            objects.append({"oid": one["oid"], "size": one["size"]} | ({} if is_there else upload))
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "content does not match its hash"})
        self.hub.objects[oid] = self.body
        return self._send(200, {})

    def _commit(self, name: str, branch: str, *, is_request: bool) -> None:
        repo = self._repo(name, to_write=True)
        if repo is None:
            return
        answer = {}
        if is_request:
            number = 1 + sum(one.startswith("refs/pr/") for one in repo.branches)
            repo.branches[f"refs/pr/{number}"] = list(repo.branches[branch])
            branch = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/{number}"}
        files = dict(self.hub.files(name, branch))
        for line in self.body.splitlines():
            operation = json.loads(line)
            asked = operation["value"]
            match operation["key"]:
                case "file":
                    files[asked["path"]] = base64.b64decode(asked["content"])
                case "lfsFile":
                    files[asked["path"]] = self.hub.objects[asked["oid"]]
                case "deletedFile":
                    del files[asked["path"]]
        commit = repo.add_commit(branch, files)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""} | answer)

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.commit_of(revision)
        if commit is None:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
            return None
        return commit, repo.trees[commit]

    def _info(self, name: str, revision: str) -> None:
        found = self._found(name, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            facts = {"private": self.hub.repos[name].is_private, "tags": [], "downloads": 0, "likes": 0}
            self._send(200, {"_id": "0", "id": name, "modelId": name, "sha": found[0], "siblings": siblings} | facts)

    def _tree(self, name: str, revision: str) -> None:
        found = self._found(name, revision)
        if found is not None:
            self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in sorted(found[1].items())
                ],
            )

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        if file not in files:
            self._send(404, {"error": "Entry not found"}, "EntryNotFound")
            return
        content = files[file]
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), min(int(last) + 1 if last else len(content), len(content))
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.hub.sent[f"{name}/{file}"] = self.hub.sent.get(f"{name}/{file}", 0) + stop - start
            self.wfile.write(content[start:stop])

    def _send(self, status: int, answer: Any, error_code: str | None = None) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error_code is not None:
            self.send_header("X-Error-Code", error_code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
