"""The catalogue's loader as sae_lens calls it, for its own releases, other repositories and local folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from sae_lens_gemma4.catalogue.files import Files, HubFiles, LocalFiles, files_of
from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.catalogue.loading import ARCHITECTURES, load, load_config, log_sparsity
from sae_lens_gemma4.catalogue.locating import Located, locate_entry, locate_path
from sae_lens_gemma4.catalogue.registry import SHOWN, Layout, Release, find
from sae_lens_gemma4.errors import CaveatWarning, SAEError, check_name, warn_caller

FACTS: dict[str, Any] = {
    "k": int, "apply_b_dec_to_input": bool, "encoder": str, "model_name": str, "hook_name": str,
    "architecture": str, "context_size": int, "prepend_bos": bool, "exclude_special_tokens": (bool, list),
}  # fmt: skip
"""What a caller may state of an SAE by hand."""


@dataclass(frozen=True)
class Converter:
    """A loader for sae_lens, of a form that is named or recognised; `converter` makes one.

    It is both kinds that sae_lens knows: `SAE.from_pretrained(…, converter=)` calls it with a repository
    (`PretrainedSaeHuggingfaceLoader`), `SAE.load_from_disk(…, converter=)` with a path (`PretrainedSaeDiskLoader`).
    """

    form: str | None = None
    repo_type: str | None = None
    revision: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        path: str | Path | None = None,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
        *,
        repo_id: str | None = None,
        folder_name: str = "",
    ) -> tuple[Any, ...]:
        """The config and state dict, and for a repository the log sparsity [d_sae] if it has one."""
        overrides = {"device": device, **(cfg_overrides or {})}
        if repo_id is None:
            return load(self._in_folder(Path(path or ".")), overrides)
        located = self.locate(repo_id, folder_name, force_download)
        _show_caveats(located.release)
        cfg, state = load(located, overrides)
        return cfg, state, log_sparsity(located, cfg)

    def config(
        self,
        repo_id: str,
        folder_name: str,
        device: str | None = None,
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config alone, from the headers of the files: a `PretrainedSaeConfigHuggingfaceLoader`."""
        overrides = ({"device": device} if device else {}) | (cfg_overrides or {})
        return load_config(self.locate(repo_id, folder_name, force_download), overrides)

    def locate(self, repo_id: str, folder_name: str = "", force_download: bool = False) -> Located:
        """An SAE of a repository, in the catalogue or not.

        Raises:
            SAEError, HubError: there is no such file, or several that it might be.
        """
        known = find(repo_id, folder_name)
        if known is None:
            files: Files = HubFiles(repo_id, self.repo_type or "model", self.revision, force_download)
            return locate_path(files, folder_name, self.form, self.facts)
        release, entry = known
        files = files_of(release, force_download)
        if release.repo_type != "package" and (self.repo_type or self.revision):
            files = HubFiles(
                repo_id, self.repo_type or release.repo_type, self.revision or release.revision, force_download
            )
        located = locate_entry(release, entry, files)
        facts = {**located.facts, **self.facts}
        return replace(located, form=self.form or located.form, facts=facts, by_hand=self.facts)

    def _in_folder(self, path: Path) -> Located:
        folder, name = (path.parent, path.name) if path.is_file() else (path, "")
        return locate_path(LocalFiles(folder), name, self.form, self.facts)


def converter(
    form: str | None = None, *, repo_type: str | None = None, revision: str | None = None, **facts: Any
) -> Any:  # a Converter; sae_lens types the two calls that it answers apart
    """A `converter=` for `SAE.from_pretrained` and `SAE.load_from_disk`, for files of any form known here.

    Args:
        form: one of `catalogue.formats.FORMS`; recognised by keys and shapes if None.
        repo_type: "model" or "dataset", for repositories that are not in the catalogue.
        revision: a commit, tag or branch of the repository.
        facts: what the files do not state: `k`, `apply_b_dec_to_input`, `encoder` (the layout of a square W_enc,
            "d_in d_sae" or "d_sae d_in"), `architecture` ("topk", "batchtopk", "jumprelu"), `model_name`, `hook_name`,
            `context_size`, `prepend_bos`, `exclude_special_tokens`.

    Raises:
        UnknownNameError: no such form, repository type or fact.
        SAEError: a fact of the wrong type.
    """
    if form is not None:
        check_name("form of SAE files", form, FORMS)
    if repo_type is not None:
        check_name("repo_type", repo_type, ("model", "dataset"))
    for name, value in facts.items():
        wanted = FACTS[check_name("fact of an SAE", name, FACTS)]
        if not isinstance(value, wanted) or (wanted is int and (isinstance(value, bool) or value < 1)):
            words = {int: "a positive whole number", bool: "True or False", str: "a text"}
            raise SAEError(f"{name} must be {words.get(wanted, 'True, False or a list of token ids')}, not {value!r}.")
    if "encoder" in facts:
        check_name("layout of W_enc", facts["encoder"], get_args(Layout))
    if "architecture" in facts:
        check_name("architecture", facts["architecture"], ARCHITECTURES)
    return Converter(form, repo_type, revision, facts)


def _show_caveats(release: Release | None) -> None:
    shown = [] if release is None else [caveat for caveat in release.caveats if caveat.kind in SHOWN]
    if release is not None and shown:
        lines = "\n".join(f"  - {caveat.text}" for caveat in shown)
        warn_caller(f"{release.name}:\n{lines}", CaveatWarning)
