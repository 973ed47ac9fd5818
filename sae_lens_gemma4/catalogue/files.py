"""Where an SAE's files lie: a local folder, a repository of the hub, or this package.

The hub's client does the work: cache, redirects, resumed transfers, offline mode. This module gives the three places
one face, and turns whatever goes wrong into one error that names the repository and the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

from huggingface_hub import (
    HfApi,
    HfFileSystem,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import repo_folder_name

from sae_lens_gemma4.catalogue.registry import Release
from sae_lens_gemma4.errors import HubError, SAEError, nearest

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_NOT_WEIGHTS = re.compile(r"(^|[/_.-])(sparsity|optimi[sz]er|scheduler|checkpoint_full|activations?_store_state)", re.I)
_CONFIGS = ("cfg.json", "config.json", "meta.json", "sae_config.json")


class Files(Protocol):
    """A folder of files, wherever it is; names are relative to it, with slashes."""

    def names(self) -> list[str]:
        """All files beneath it."""
        ...

    def inside(self, folder: str) -> list[str]:
        """The files of one folder of it, "" for itself."""
        ...

    def fetch(self, name: str) -> Path:
        """The file, on this machine."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The file, to read a few bytes of: nothing more is transferred."""
        ...

    def describe(self, name: str = "") -> str:
        """What errors call it."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """A folder of this machine."""

    folder: Path

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def inside(self, folder: str) -> list[str]:
        there = self.folder / folder
        if not there.is_dir():
            raise SAEError(f"There is no file or folder {there}.")
        return sorted(p.relative_to(self.folder).as_posix() for p in there.iterdir() if p.is_file())

    def fetch(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            close = nearest(name, self.inside("")) if self.folder.is_dir() else []
            hint = " Did you mean " + " or ".join(map(repr, close)) + "?" if close else ""
            raise SAEError(f"There is no file {path}.{hint}")
        return path

    def open(self, name: str) -> BinaryIO:
        return self.fetch(name).open("rb")

    def describe(self, name: str = "") -> str:
        return str(self.folder / name)


def in_package(package: str) -> LocalFiles:
    """The files of an installed Python package."""
    return LocalFiles(Path(str(package_files(package))))


@dataclass(frozen=True)
class HubFiles:
    """A repository of the hub; `repo_type` is `model` or `dataset`."""

    repo_id: str
    repo_type: str = "model"
    revision: str | None = None
    force_download: bool = False

    @cached_property
    def _names(self) -> list[str]:
        where: dict[str, Any] = {"repo_type": self.repo_type, "revision": self.revision}
        try:
            with self._errors():
                return sorted(HfApi().list_repo_files(self.repo_id, **where))
        except HubError:
            try:  # no network: what the cache has of it
                cached = snapshot_download(self.repo_id, **where, local_files_only=True)
            except Exception:
                cached = None
            if cached is None:
                raise
            return LocalFiles(Path(cached)).names()

    def names(self) -> list[str]:
        return self._names

    def inside(self, folder: str) -> list[str]:
        return [name for name in self.names() if name.rpartition("/")[0] == folder]

    def fetch(self, name: str) -> Path:
        with self._errors(name):
            return Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    force_download=self.force_download,
                )
            )

    def open(self, name: str) -> BinaryIO:
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        try:
            with self._errors(name):
                path = f"{prefix}{self.repo_id}/{name}"
                file = cast(BinaryIO, HfFileSystem().open(path, revision=self.revision, block_size=2**16))
                file.read(1)  # the client asks for nothing before; what it is refused is to be told here
                file.seek(0)
                return file
        except HubError:  # no network, perhaps: what the cache has of it
            cached = try_to_load_from_cache(
                self.repo_id, name, repo_type=self.repo_type, revision=self.revision or "main"
            )
            if not isinstance(cached, str):
                raise
            return Path(cached).open("rb")

    def describe(self, name: str = "") -> str:
        pinned = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{pinned}" + (f"/{name}" if name else "")

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """What the hub's client raises, as one `HubError`. Its network errors have no class of their own."""
        try:
            yield
        except Exception as e:
            raise HubError(self._explained(e, name)) from e

    def _explained(self, error: BaseException, name: str) -> str:
        what = f"{name} of {self.describe()}" if name else self.describe()
        text = str(error)
        if isinstance(error, ValueError) and error.__cause__ is not None:  # force_download hides the reason
            return self._explained(error.__cause__, name)
        if isinstance(error, errors.GatedRepoError):
            return f"{self.repo_id} is gated: ask for access on its page at huggingface.co, and log in (hf auth login)."
        if isinstance(error, errors.RepositoryNotFoundError) or "repository not found" in text:
            return (
                f"The hub has no {self.repo_type} repository {self.repo_id}, or it is private: log in (hf auth login)."
            )
        if isinstance(error, errors.RevisionNotFoundError) or "revision not found" in text:
            return f"{self.repo_id} has no revision {self.revision!r}."
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return f"{what} is not in the cache, and the hub cannot be reached."
        if isinstance(error, errors.EntryNotFoundError | FileNotFoundError):
            return f"{self.describe()} has no file {name}.{self._nearest(name)}"
        reason = (text.strip().splitlines() or ["no reason given"])[0]
        return f"{what} cannot be read from the hub: {type(error).__name__}: {reason}"

    def _nearest(self, name: str) -> str:
        try:
            close = nearest(name, self.names())
        except HubError:
            close = []
        return " Did you mean " + " or ".join(map(repr, close)) + "?" if close else ""


def only_match(files: Files, pattern: str, suffixes: tuple[str, ...] = WEIGHTS_SUFFIXES) -> str:
    """The one file whose path the regular expression matches.

    Raises:
        SAEError: none or several match; lists what there is.
    """
    wanted = [n for n in files.names() if n.endswith(suffixes)]
    found = [n for n in wanted if re.search(pattern, n)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found) or 'No'} files of {files.describe()} match {pattern!r}"
    raise SAEError(f"{what}, of: {', '.join((found or wanted)[:12]) or 'none'}. Name one by its path.")


def weights_of(files: Files, path: str) -> str:
    """The weights file that `path` names: itself, or the only one in that folder.

    Raises:
        SAEError: there is none there, or there are several.
    """
    if path.endswith(WEIGHTS_SUFFIXES):
        return path
    folder = path.strip("/")
    inside = files.inside(folder)
    found = [n for n in inside if n.endswith(WEIGHTS_SUFFIXES) and not _NOT_WEIGHTS.search(n)]
    if len(found) == 1:
        return found[0]
    where = files.describe(folder)
    if not found:
        raise SAEError(
            f"{where} has no weights file ({', '.join(WEIGHTS_SUFFIXES)}), only: {', '.join(inside) or 'nothing'}."
        )
    raise SAEError(f"{where} has several weights files: {', '.join(found)}. Name one by its path.")


def config_of(files: Files, weights: str) -> str | None:
    """The JSON config beside a weights file, if there is one: by the file's own name, else by the usual ones."""
    path = PurePosixPath(weights)
    wanted = (f"{path.stem}.json", f"{path.stem}_cfg.json", f"{path.stem}_config.json", *_CONFIGS)
    inside = files.inside(weights.rpartition("/")[0])
    return next((n for w in wanted if (n := (path.parent / w).as_posix()) in inside), None)


def commit_in_cache(repo_id: str, repo_type: str = "model", revision: str | None = None) -> str | None:
    """The commit that a branch or tag was when it was last downloaded; None if it never was."""
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    repository = constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    ref = Path(*repository, "refs", revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def files_of(release: Release, force_download: bool = False) -> Files:
    """Where a release's files are."""
    if release.repo_type == "package":
        return in_package(release.repo_id)
    return HubFiles(release.repo_id, release.repo_type, release.revision, force_download)
