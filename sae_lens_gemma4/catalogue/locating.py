"""Which files an SAE is made of, and what is known of it before they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens_gemma4.catalogue.files import Files, config_of, files_of, only_match, weights_of
from sae_lens_gemma4.catalogue.registry import SEARCH, Release, SAEEntry

METADATA = ("context_size", "prepend_bos", "exclude_special_tokens")
"""Facts that go into sae_lens's metadata under the same names."""


@dataclass(frozen=True)
class Located:
    """One SAE's files, and what is known of it."""

    files: Files
    weights: str
    config: str | None = None
    form: str | None = None
    """None: recognised by keys and shapes."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the catalogue or the caller states, by the names of `converter.FACTS`."""
    by_hand: Mapping[str, Any] = field(default_factory=dict)
    """Those of the caller alone, which files may not contradict."""
    release: Release | None = None
    entry: SAEEntry | None = None

    @property
    def where(self) -> str:
        """What errors call it."""
        return self.files.describe(self.weights)


def locate_entry(release: Release, entry: SAEEntry, files: Files | None = None) -> Located:
    """An SAE of the catalogue, in its release's files if no others are given.

    Raises:
        SAEError, HubError: it has no stated path, and not just one file is what it might be.
    """
    files = files_of(release) if files is None else files
    if entry.search is not None:
        weights = only_match(files, entry.search)
        config = config_of(files, weights)
    else:
        folder, _, name = str(entry.path).rpartition("/")
        if release.weights is not None:
            folder, name = str(entry.path), release.weights
        weights = f"{folder}/{name}".lstrip("/")
        config = None if release.config is None else f"{folder}/{release.config}".lstrip("/")
    return Located(files, weights, config, release.form, _facts_of(release, entry), release=release, entry=entry)


def locate_path(files: Files, path: str, form: str | None, facts: Mapping[str, Any]) -> Located:
    """An SAE that is in no catalogue: a weights file, or the only one of a folder, and the config beside it.

    Raises:
        SAEError, HubError: there is no such file, or several that it might be.
    """
    weights = only_match(files, path.removeprefix(SEARCH)) if path.startswith(SEARCH) else weights_of(files, path)
    return Located(files, weights, config_of(files, weights), form, facts, facts)


def _facts_of(release: Release, entry: SAEEntry) -> dict[str, Any]:
    facts = {name: getattr(entry, name) for name in ("k", "apply_b_dec_to_input", "encoder", *METADATA)}
    facts |= {"model_name": release.model, "hook_name": entry.hook, "architecture": release.architecture}
    return {name: value for name, value in facts.items() if value is not None}
