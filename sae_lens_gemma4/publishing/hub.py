"""Writing to a repository of the hub, with the hub's own client, in commits that are whole or absent.

What the client raises is one `HubError` that says what to do, as `catalogue.files` does for reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors, snapshot_download
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_gemma4.errors import ConfigError, Gemma4SAEError, HubError

_MAIN = "main"
_STATUS = {
    401: "log in first (hf auth login)",
    403: "this login may not write there",
    404: "there is no such repository, or this login may not see it",
    409: "it was changed at the same time",
    412: "it was changed at the same time",
    413: "a file is too large",
}


@dataclass(frozen=True)
class Repository:
    """A model repository and a branch of it."""

    repo_id: str
    branch: str | None = None

    def prepare(self, folders: Sequence[str], *, private: bool) -> None:
        """Make it, unless it is there, so that these folders of it may be written.

        Raises:
            ConfigError: it is public and should be private, or it holds other SAEs, whose card would be replaced.
            HubError: it cannot be made or read.
        """
        api = HfApi()
        with self._errors("made"):
            api.create_repo(self.repo_id, private=private, exist_ok=True)
            if private and not api.model_info(self.repo_id).private:
                raise ConfigError(f"{self.repo_id} exists and is public; what is sent to it would be, too.")
            if self.branch is not None and self.branch != _MAIN:
                api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            there = api.list_repo_files(self.repo_id, revision=self.branch)
        saes = [name.rpartition("/")[0] for name in there if name.rpartition("/")[2] == SAE_CFG_FILENAME]
        if others := sorted(set(saes) - set(folders)):
            raise ConfigError(
                f"{self.repo_id} holds other SAEs ({', '.join(name or 'at its root' for name in others)}), and a "
                "repository has one card. Publish all in one go, or these elsewhere."
            )

    def commit(self, files: Mapping[str, Path | bytes], message: str, parent: str | None = None) -> str:
        """Add files, by their paths in the repository, in one commit; returns its sha.

        Args:
            parent: the commit that it must follow; None for whichever is there.
        """
        added = [CommitOperationAdd(path, data) for path, data in files.items()]
        with self._errors("written"):
            info = HfApi().create_commit(
                self.repo_id, added, commit_message=message, revision=self.branch, parent_commit=parent
            )
            return str(info.oid)

    def download(self, commit: str, paths: Sequence[str], into: Path) -> Path:
        """Files of a commit, through an empty cache at `into`, so that each comes from the hub."""
        with self._errors("read back"):
            return Path(snapshot_download(self.repo_id, revision=commit, cache_dir=into, allow_patterns=list(paths)))

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """The client's network errors have no class of their own."""
        try:
            yield
        except Gemma4SAEError:
            raise
        except errors.HFValidationError as e:
            raise ConfigError(f"{self.repo_id!r} is no name of a repository, such as user/name: {e}") from e
        except Exception as e:
            raise HubError(f"{self.repo_id} cannot be {done}: {_explained(e)}.") from e


def _explained(error: BaseException) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub’s client is set to offline mode (HF_HUB_OFFLINE)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
    known = f"{_STATUS[status]}: " if status in _STATUS else ""
    return f"{known}{type(error).__name__}: {reason}"
