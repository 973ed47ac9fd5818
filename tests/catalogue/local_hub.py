"""A small Hugging Face hub on this machine, so that tests drive the real client and nothing is faked on its side.

It answers what `hf_hub_download`, the listings of `HfApi`, `HfFileSystem` and the reader of safetensors headers ask.
As on the hub, a commit never changes, large files lie on another origin, an anonymous client is told that a missing
repository needs a login, and a gated repository can be listed but not downloaded.
"""

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote

import pytest
from huggingface_hub import HfFileSystem, close_session, constants, hf_api
from packaging.version import Version

resuming = pytest.mark.skipif(
    Version(version("huggingface_hub")) < Version("2"), reason="this hub client gives up on a broken connection"
)
REPO = "([^/]+(?:/[^/]+)?)"
API = re.compile(f"/api/(model|dataset)s/{REPO}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
RESOLVE = re.compile(f"/(datasets/)?{REPO}/resolve/([^/]+)/(.+)")
STORAGE = re.compile(f"/storage/(model|dataset)/{REPO}/([^/]{{40}})/(.+)")
IN_GIT = (".gitattributes", ".json", ".md", ".txt", ".yaml")
CHUNK = 1000


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, bytes]

    def entry(self, path: str) -> dict:
        """A file as the tree lists it."""
        data = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if not path.endswith(IN_GIT):
            sha256 = hashlib.sha256(data).hexdigest()
            # The tree calls the digest `oid`, the repository's card calls it `sha256`.
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def tree(self) -> dict[str, dict]:
        """Every file and folder by path."""
        entries = {path: self.entry(path) for path in self.files}
        for path in self.files:
            for folder in map(str, PurePosixPath(path).parents[:-1]):
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": self.sha}
        return dict(sorted(entries.items()))


class LocalHub:
    """The repositories and the two servers: the hub, and the storage that large files are redirected to."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None]] = []  # method, path without query, Range
        self.repos: dict[tuple[str, str], dict[str, Commit]] = {}  # by revision and by sha
        self.gated: set[tuple[str, str]] = set()
        self.private: set[tuple[str, str]] = set()
        self.cuts: dict[tuple[str, str, str], list[int]] = {}

    def __enter__(self) -> "LocalHub":
        handler = functools.partial(self.handler(), self)
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def handler(self) -> type["Handler"]:
        return Handler

    def stop(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes | Path], repo_type="model", revision="main") -> str:
        """Commit files on top of a revision, and return the commit's sha; earlier commits stay readable by theirs."""
        commits = self.repos.setdefault((repo_type, repo_id), {})
        added = {path: data.read_bytes() if isinstance(data, Path) else data for path, data in files.items()}
        earlier = commits[revision].files if revision in commits else {}
        sha = hashlib.sha1(f"{repo_type} {repo_id} {revision} {len(commits)}".encode()).hexdigest()
        commits[revision] = commits[sha] = Commit(sha, {**earlier, **added})
        return sha

    def gate(self, repo_id: str, repo_type="model") -> None:
        """Refuse this repository's files from now on."""
        self.gated.add((repo_type, repo_id))

    def cut(self, repo_id: str, path: str, after: int, repo_type="model") -> None:
        """Drop the next transfer of this file after so many bytes; called again, the one after it too."""
        self.cuts.setdefault((repo_type, repo_id, path), []).append(after)


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: LocalHub, *connection: object) -> None:
        self.hub = hub
        super().__init__(*connection)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.requests.append((self.command, unquote(path), self.headers["Range"]))
        try:
            # Split before unquoting: a revision or a path may hold a quoted slash.
            for pattern, answer in ((STORAGE, self.stored), (API, self.api), (RESOLVE, self.resolve)):
                if match := pattern.fullmatch(path):
                    return answer(query, *(group and unquote(group) for group in match.groups()))
            raise Refusal(404, "EntryNotFound", "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            self.reply(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)

    do_HEAD = do_POST = do_GET

    def api(self, query: str, repo_type: str, repo_id: str, about: str, revision: str, folder: str) -> None:
        commit = self.commit((repo_type, repo_id), revision or "main")
        if about == "tree":
            prefix = f"{folder}/" if folder else ""
            answer = [entry for path, entry in commit.tree().items() if path.startswith(prefix)]
            if not answer:
                message = f'{folder} does not exist on "{revision}"'
                raise Refusal(404, "EntryNotFound", message, **{"X-Repo-Commit": commit.sha})
            if "recursive=true" not in query.lower():
                answer = [entry for entry in answer if "/" not in entry["path"][len(prefix) :]]
        elif about == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            answer = [entry for path, entry in commit.tree().items() if path in form["paths"]]
        else:
            entries = [commit.entry(path) for path in sorted(commit.files)]
            answer = {
                "id": repo_id,
                "sha": commit.sha,
                "private": (repo_type, repo_id) in self.hub.private,
                "gated": "manual" if (repo_type, repo_id) in self.hub.gated else False,
                "tags": [],
                "siblings": [{"rfilename": e["path"], "blobId": e["oid"], **e} for e in entries],
            }
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def resolve(self, query: str, datasets: str | None, repo_id: str, revision: str, path: str) -> None:
        repo = ("dataset" if datasets else "model", repo_id)
        commit = self.commit(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if repo in self.hub.gated:
            message = f"Access to {repo[0]} {repo_id} is restricted"
            if self.anonymous:
                message += ". You must have access to it and be authenticated to access it. Please log in."
                raise Refusal(401, "GatedRepo", message)
            raise Refusal(403, "GatedRepo", message + " and you are not in the authorized list.")
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", **headers)
        entry = commit.entry(path)
        if "lfs" in entry:
            headers["X-Linked-ETag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(entry["size"])
            headers["Location"] = f"{self.hub.storage}/storage/{repo[0]}/{repo_id}/{commit.sha}/{quote(path)}"
            self.reply(302, b"", headers)
        else:
            self.transfer(repo, path, commit.files[path], {"ETag": f'"{entry["oid"]}"', **headers})

    def stored(self, query: str, repo_type: str, repo_id: str, sha: str, path: str) -> None:
        repo = (repo_type, repo_id)
        self.transfer(repo, path, self.hub.repos[repo][sha].files[path], {})

    @property
    def anonymous(self) -> bool:
        return "Authorization" not in self.headers

    def commit(self, repo: tuple[str, str], revision: str) -> Commit:
        if repo not in self.hub.repos:
            if self.anonymous:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if revision not in self.hub.repos[repo]:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.hub.repos[repo][revision]

    def transfer(self, repo: tuple[str, str], path: str, data: bytes, headers: dict[str, str]) -> None:
        status, part = 200, data
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, part = 206, data[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        cuts = self.hub.cuts.get((*repo, path))
        return self.reply(status, part, headers, cuts.pop(0) if cuts and self.command == "GET" else None)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        """Send an answer. The connection closes after it, so that a cut one has promised more than it sent."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A running hub that the client in this process takes for huggingface.co, anonymously and with an empty cache."""
    with LocalHub() as hub:
        connect(hub, monkeypatch, tmp_path)
        yield hub
        close_session()


def connect(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the client in this process take a running hub for huggingface.co."""
    sleep = time.sleep
    cache = str(tmp_path / "huggingface")
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": cache,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        # A broken transfer resumes after its last whole chunk: with the client's 10 MiB a small file never would.
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # These copied the endpoint or the cache when they were imported.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", cache)
    monkeypatch.setattr(HfFileSystem, "_cache", {})
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    # The client waits whole seconds before it tries again.
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    close_session()
