"""The local hub with its other half: what `create_repo`, `create_branch` and `create_commit` ask of the hub.

As on the hub, a write needs a login, a card's front matter is checked before files are taken, large files go to the
storage by their digest and are named in the commit, and a commit on a parent that is no longer the newest is refused.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import close_session, constants

from tests.catalogue.local_hub import IN_GIT, REPO, Commit, Handler, LocalHub, Refusal, connect

WRITE = re.compile(f"/api/(model|dataset)s/{REPO}/(preupload|commit|branch)/([^/]+)")
BATCH = re.compile(f"/{REPO}[.]git/info/lfs/objects/batch")
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")


class UploadHub(LocalHub):
    """Attributes: `uploads`, large files by SHA-256; `messages`, of every commit; `spoil`, what a file is stored as
    instead of what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.spoil: dict[str, bytes] = {}

    def handler(self) -> type[Handler]:
        return UploadHandler

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repos["model", repo_id][branch]


class UploadHandler(Handler):
    hub: UploadHub
    asked = ""  # the repository that was to be made, whose address a refusal tells

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        handlers = {"/api/repos/create": self.create, "/api/validate-yaml": self.validate}
        answer = handlers.get(path)
        groups = ()
        for pattern, write in ((WRITE, self.write), (BATCH, self.batch)):
            if match := pattern.fullmatch(path):
                answer, groups = write, tuple(map(unquote, match.groups()))
        if answer is None:
            return super().do_GET()
        self.hub.requests.append((self.command, unquote(path), None))
        sent = self.body()
        try:
            if self.anonymous:
                raise Refusal(401, "", "Invalid username or password.")
            self.reply(200, json.dumps(answer(sent, *groups)).encode(), {"Content-Type": "application/json"})
        except Refusal as refusal:
            errors = {
                "error": str(refusal),
                "errors": [{"message": str(refusal)}],
                "url": f"{self.hub.url}/{self.asked}",
            }
            self.reply(refusal.status, json.dumps(errors).encode(), refusal.headers)

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.uploads[oid] = data
        self.reply(200, b"", {})

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def create(self, sent: bytes) -> dict:
        asked = json.loads(sent)
        repo = (asked.get("type") or "model", "/".join(filter(None, (asked.get("organization"), asked["name"]))))
        if repo[1].startswith("somebody-else/"):
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        if repo in self.hub.repos:
            self.asked = repo[1]
            raise Refusal(409, "", "You already created this model repo")
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repo)
        self.hub.add(repo[1], {".gitattributes": b""}, repo[0])
        return {"url": f"{self.hub.url}/{repo[1]}"}

    def validate(self, sent: bytes) -> dict:
        content = json.loads(sent)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        facts = yaml.safe_load(head[1]) if head else {}
        if facts.get("license", "other") not in LICENCES:
            raise Refusal(400, "", f'"license" must be one of {", ".join(LICENCES)}')
        return {"errors": [], "warnings": []}

    def write(self, sent: bytes, repo_type: str, repo_id: str, what: str, branch: str) -> dict:
        repo = (repo_type, repo_id)
        if what == "branch":
            if branch in self.hub.repos[repo]:
                raise Refusal(409, "", "Reference already exists")
            self.hub.repos[repo][branch] = self.commit(repo, "main")
            return {}
        head = self.commit(repo, branch)
        if what == "preupload":
            known = head.tree()
            return {
                "files": [
                    {
                        "path": (path := file["path"]),
                        "uploadMode": "regular" if path.endswith(IN_GIT) else "lfs",
                        "shouldIgnore": False,
                        "oid": known[path].get("lfs", known[path])["oid"] if path in known else None,
                    }
                    for file in json.loads(sent)["files"]
                ]
            }
        lines = [json.loads(line) for line in sent.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = self.hub.add(repo_id, files | {p: d for p, d in self.hub.spoil.items() if p in files}, repo_type, branch)
        self.hub.messages.append(header["summary"])
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def batch(self, sent: bytes, repo_id: str) -> dict:
        objects = json.loads(sent)["objects"]
        for stored in objects:
            if stored["oid"] not in self.hub.uploads:
                stored["actions"] = {"upload": {"href": f"{self.hub.storage}/upload/{stored['oid']}"}}
        return {"transfer": "basic", "objects": objects}


@pytest.fixture
def upload_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A running hub that can be written to, for a client that is logged in."""
    with UploadHub() as hub:
        connect(hub, monkeypatch, tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield hub
        close_session()
