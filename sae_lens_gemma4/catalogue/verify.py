"""The catalogue held against the files it describes, for whoever keeps it.

A release states what its author said; the files say what they are. Both are read here and laid side by side, and what
only the files state is told as well. Listings, configs and the headers of weights files are read, never the weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from sae_lens_gemma4.catalogue.files import Files, config_of, files_of
from sae_lens_gemma4.catalogue.formats import FORMS, Checkpoint, form_of
from sae_lens_gemma4.catalogue.loading import checkpoint_of, load_config
from sae_lens_gemma4.catalogue.locating import locate_entry
from sae_lens_gemma4.catalogue.registry import SEARCH, Release, SAEEntry
from sae_lens_gemma4.errors import CatalogueWarning, HubError, SAEError, nearest
from sae_lens_gemma4.models.hook_names import canonical_name, layer_of

CHECKED = "files, form, widths, k, b_dec, model, hook and labels"
_WORDS = {
    "model": ("model_name", "model_id", "model"),
    "hook": ("hook_name", "hook_point"),
    "context_size": ("context_size",),
    "apply_b_dec_to_input": ("apply_b_dec_to_input",),
    "prepend_bos": ("prepend_bos",),
    "exclude_special_tokens": ("exclude_special_tokens",),
    "dataset": ("dataset_path", "dataset"),
    "variance_explained": ("variance_explained", "explained_variance", "ev"),
    "l0": ("l0", "mean_l0"),
    "neuronpedia": ("neuronpedia_id",),
}
"""What authors' configs call the facts of the catalogue."""
_SECTIONS = ("metadata", "final_metrics")
_SAME_KEYS = {("ernos", "plain"), ("ernos", "linear_encoder"), ("plain", "sae_lens")}
"""Forms that keys alone do not tell apart: the first is used where it is named, the second is what is recognised."""


@dataclass(frozen=True)
class Difference:
    """One fact that the files state otherwise than the catalogue, or that only they state (`new`)."""

    sae_id: str
    fact: str
    stated: Any
    found: Any
    kind: Literal["differs", "new"] = "differs"


def verify(release: Release, sae_ids: Sequence[str] | None = None) -> list[Difference]:
    """Where a release of the catalogue and its files differ, and what only the files state.

    Args:
        sae_ids: only these SAEs.

    Raises:
        UnknownNameError: it has no such SAE.
        HubError: the repository is gone, gated, or cannot be reached.
    """
    entries = release.saes if sae_ids is None else [release.sae(sae_id) for sae_id in sae_ids]
    files = files_of(release)
    found: list[Difference] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CatalogueWarning)
        files.names()
        for entry in entries:
            found += _of_sae(release, entry, files)
    return found


def together(differences: Iterable[Difference]) -> list[tuple[Difference, list[str]]]:
    """What holds of several SAEs alike, once, with their ids."""
    alike: dict[str, tuple[Difference, list[str]]] = {}
    for d in differences:
        alike.setdefault(repr(replace(d, sae_id="")), (d, []))[1].append(d.sae_id)
    return list(alike.values())


def _of_sae(release: Release, entry: SAEEntry, files: Files) -> list[Difference]:
    found = list(_labels(entry, files))
    try:
        located = locate_entry(release, entry, files)
        by_itself = replace(located, facts={"encoder": entry.encoder} if entry.encoder else {})
        checkpoint = checkpoint_of(by_itself, header_only=True)
        recognised = _recognised(checkpoint)
        if release.form is None and recognised is not None:
            found.append(Difference(entry.id, "form", None, recognised, "new"))
        elif recognised not in (None, release.form) and (release.form, recognised) not in _SAME_KEYS:
            found.append(Difference(entry.id, "form", release.form, recognised))
        as_loaded = replace(checkpoint, tensors=dict(checkpoint.tensors), facts=located.facts)
        cfg = load_config(located, {}, as_loaded)  # raises whatever loading would
        facts = _facts(checkpoint, release.form or str(recognised), cfg)
    except (HubError, SAEError) as e:
        if isinstance(e, HubError) and not _is_missing(e):
            raise
        return [*found, Difference(entry.id, "files", entry.folder_name, str(e))]
    if entry.path is None:
        found.append(Difference(entry.id, "path", entry.folder_name, located.weights, "new"))
    if located.config is None and (config := config_of(files, located.weights)) is not None:
        found.append(Difference(entry.id, "config", None, config, "new"))
    for fact, value in facts.items():
        stated = {"model": release.model, "layer": layer_of(entry.hook)}.get(fact, getattr(entry, fact, None))
        if stated is None or not _agree(fact, stated, value):
            found.append(Difference(entry.id, fact, stated, value, "new" if stated is None else "differs"))
    return found


def _is_missing(error: HubError) -> bool:
    """Whether the repository was reached and lacks the file."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError | FileNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def _labels(entry: SAEEntry, files: Files) -> Iterable[Difference]:
    if entry.labels is None:
        return
    names = files.names()
    if entry.labels.startswith(SEARCH):
        pattern = entry.labels.removeprefix(SEARCH)
        if not any(re.search(pattern, name) for name in names):
            yield Difference(entry.id, "labels", entry.labels, "no file matches")
    elif entry.labels not in names:
        close = nearest(entry.labels, names)
        hint = f"; the nearest is {close[0]}" if close else ""
        yield Difference(entry.id, "labels", entry.labels, f"no such file{hint}")


def _recognised(checkpoint: Checkpoint) -> str | None:
    try:
        return form_of(checkpoint).name
    except SAEError:
        return None  # a form that is named may read it all the same


def _facts(checkpoint: Checkpoint, form: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the files state, by the catalogue's names."""
    weights = FORMS[form].convert(checkpoint)
    said = dict(checkpoint.stated)
    for section in _SECTIONS:
        if isinstance(inner := said.get(section), Mapping):
            said |= inner
    for name in ("model_name", "hook_name", "context_size"):  # a form may know where its files say so
        if name in weights.metadata:
            said[name] = weights.metadata[name]
    facts: dict[str, Any] = {"d_in": cfg["d_in"], "d_sae": cfg["d_sae"]}
    details = weights.metadata.get("training_architecture_details") or {}
    facts["k"] = details.get("k") if weights.k is None else weights.k
    for fact, words in _WORDS.items():
        facts[fact] = next((said[w] for w in words if isinstance(said.get(w), bool | int | float | str | list)), None)
    if facts["hook"] is None and isinstance(said.get("layer"), int):
        facts["layer"] = said["layer"]
    return {fact: value for fact, value in facts.items() if value is not None}


def _agree(fact: str, stated: Any, found: Any) -> bool:
    if fact == "model":
        return str(stated).rsplit("/", 1)[-1].lower() == str(found).rsplit("/", 1)[-1].lower()
    if fact == "hook":
        return canonical_name(stated) == canonical_name(str(found))
    if fact in ("dataset", "variance_explained", "l0"):
        return True  # an author's words against a name, and measurements on other text
    return bool(stated == found)
