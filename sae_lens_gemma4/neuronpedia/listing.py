"""Everything that Neuronpedia's rows say of an SAE and no single latent, and who is believed about it.

What the caller states counts first, then what the dashboards' own settings say, then the catalogue. What none of them
has is asked for, all of it at once: Neuronpedia's own converter leaves such columns at 0 or empty, and the import never
overwrites a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_gemma4.catalogue.registry import Release, SAEEntry, releases
from sae_lens_gemma4.catalogue.table import upstream_yaml
from sae_lens_gemma4.errors import ConfigError, check_name, nearest
from sae_lens_gemma4.models.hook_names import canonical_name, layer_of
from sae_lens_gemma4.neuronpedia.arguments import ASKED, check_arguments
from sae_lens_gemma4.neuronpedia.defaults import by_rule, of_catalogue
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from sae_lens_gemma4.neuronpedia.names import SourceName, catalogue_name, model_id_of

VISIBILITIES = ("PUBLIC", "UNLISTED", "PRIVATE")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """An SAE as Neuronpedia lists it. Names are those of `export_neuronpedia`'s arguments, which says what each is."""

    name: SourceName
    model_name: str
    n_layers: int
    d_model: int
    d_mlp: int
    owner: str
    website: str | None
    hook_name: str
    d_sae: int | None
    sae_config: Mapping[str, Any]
    release: str
    sae_id: str
    hf_repo_id: str | None
    hf_folder_id: str | None
    release_name: str
    release_title: str
    description: str
    creator_name: str
    creator_email: str | None
    creator_id: str
    urls: tuple[str, ...]
    visibility: str
    dataset: str | None
    n_prompts: int | None
    n_tokens_in_prompt: int | None
    notes: str | None
    created_at: str

    @property
    def upstream_yaml(self) -> str | None:
        """The row of sae_lens's own list by which Neuronpedia's inference server finds the SAE; None off the hub.

        The server wants just one row with this model and this id (apps/inference/neuronpedia_inference/config.py).
        """
        if self.hf_repo_id is None:
            return None
        known = _in_catalogue(self.release, self.sae_id)
        release, entry = known if known is not None else (_saved_by_sae_lens(self), SAEEntry(self.sae_id, ""))
        root = "." if release.form == "sae_lens" else ""  # sae_lens puts a slash behind it
        entry = replace(entry, path=self.hf_folder_id or root, search=None, neuronpedia=str(self.name))
        kind = "model" if release.repo_type == "package" else release.repo_type
        return upstream_yaml(
            replace(release, model=self.model_name, repo_id=self.hf_repo_id, repo_type=kind, saes=(entry,))
        )


def listing_of(source: Dashboards | Mapping[str, Any], given: Mapping[str, Any]) -> Listing:
    """What is said of the SAE in a folder of dashboards.

    Args:
        source: the folder, or the settings that it will have, so that questions can be asked before it is made.
        given: arguments of `export_neuronpedia`; None is what the caller does not state.

    Raises:
        ConfigError: an argument of another kind; something that nobody states, naming all that is missing; or a name
            that Neuronpedia refuses.
        UnknownNameError: a release that is nearly one of the catalogue's, and no repository; or no SAE of the release.
    """
    check_arguments(given)
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(source, Dashboards) and not source.ours:
        header, facts = _header(source), {**_of_sae_dashboard(source), **given}
    else:
        header = source.settings if isinstance(source, Dashboards) else dict(source)
        facts = {**_of_settings(header), **given}
    known = _in_catalogue(facts.get("release"), facts.get("sae_id"))
    if known is None and "hf_repo_id" not in given and nearest(given.get("release", ""), releases()):
        hint = "If it is a release of your own, state its hf_repo_id."
        check_name("release", given["release"], releases(), hint)
    if known is not None:
        if "release" in given or "sae_id" in given:
            _check_same(*known, facts)
        facts = {**of_catalogue(*known), **facts}
    facts["hf_folder_id"] = _hub_folder(facts)
    facts.setdefault("d_sae", (facts.get("sae_config") or {}).get("d_sae"))
    facts["hook_name"] = canonical_name(facts["hook_name"]) if facts.get("hook_name") else None
    for key, value in by_rule(facts).items():
        if facts.get(key) is None:
            facts[key] = value
    facts |= _name_parts(header, given, facts, known)
    if "layer" not in given and facts["hook_name"] and layer_of(facts["hook_name"]) not in (None, facts["layer"]):
        raise ConfigError(
            f"hook_name is {facts['hook_name']}, and these dashboards are of layer {facts['layer']}; state layer if "
            "both are right."
        )
    _require(facts, off_hub=known is not None and known[0].repo_type == "package")
    _check(facts)
    facts["name"] = SourceName(facts["model_id"], facts["layer"], facts["set_name"], facts["suffix"])
    facts["created_at"] = _timestamp(facts.get("created_at"))
    facts["urls"] = tuple(facts["urls"])
    stated: dict[str, Any] = {f.name: facts.get(f.name) for f in fields(Listing)}
    return Listing(**stated)


def place_of(dashboards: Dashboards, given: Mapping[str, Any]) -> SourceName:
    """What a folder of dashboards is called on Neuronpedia.

    Args:
        given: `model_id`, `layer`, `set_name` and `suffix` as the caller states them, which counts first; None is not
            stated, and "" no suffix.

    Raises:
        ConfigError: a part that neither the caller nor the folder states, or that Neuronpedia refuses.
    """
    check_arguments(given)
    parts = _stated_parts(_header(dashboards), given)
    if missing := [key for key in ("model_id", "layer", "set_name") if parts[key] is None]:
        raise ConfigError(f"{dashboards.path} does not say {' and '.join(missing)}; state it.")
    return SourceName(**parts)


def _header(dashboards: Dashboards) -> dict[str, Any]:
    """The parts of its name that a folder states. In sae-dashboard's the set of the header may be a mere release."""
    header, settings = dict(dashboards.header), dashboards.settings
    if not dashboards.ours:
        if isinstance(header["sae_set"], str) and header["sae_set"] in releases():
            header["sae_set"] = None
        header["sae_set"] = settings.get("np_set_name") or header["sae_set"]
        header["sae_id_suffix"] = settings.get("np_sae_id_suffix") or header["sae_id_suffix"]
        if isinstance(header["layer"], str) and header["layer"].isdecimal():  # as its list of dead latents has it
            header["layer"] = int(header["layer"])
    return header


def _stated_parts(header: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a `SourceName` as the caller states them, else as the dashboards do, else None."""
    keys = {"model_id": "model_id", "layer": "layer", "set_name": "sae_set", "suffix": "sae_id_suffix"}
    parts = {part: header.get(key) if given.get(part) is None else given[part] for part, key in keys.items()}
    return {part: None if value == "" else value for part, value in parts.items()}


def _of_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What our own dashboards say."""
    sae, model = settings["sae"], settings["model"]
    found = {
        **{key: sae.get(key) for key in ("release", "sae_id", "d_sae", "hook_name")},
        **{key: model.get(key) for key in ("n_layers", "d_model", "d_mlp")},
        "sae_config": sae.get("config"),
        "model_name": model.get("name"),
        "dataset": settings.get("dataset"),
        "n_prompts": settings.get("n_prompts_total"),
        "n_tokens_in_prompt": settings.get("n_tokens_in_prompt"),
        "notes": _origin(settings),
    }
    return {key: value for key, value in found.items() if value is not None}


def _of_sae_dashboard(dashboards: Dashboards) -> dict[str, Any]:
    """What sae-dashboard's say: little, and nothing of the SAE or the model that could be relied on."""
    settings, first = dashboards.settings, next(dashboards.features(), {})
    found = {
        "dataset": settings.get("huggingface_dataset_path") or first.get("dataset"),
        "n_prompts": settings.get("n_prompts_total") or first.get("n_prompts_total"),
        "n_tokens_in_prompt": settings.get("n_tokens_in_prompt") or first.get("n_tokens_in_prompt"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _origin(settings: Mapping[str, Any]) -> str:
    sae, model, corpus = settings["sae"], settings["model"], settings["corpus"]
    return (
        f"Dashboards by sae-lens-gemma4 {settings.get('version')} from {settings.get('n_tokens'):,} tokens of "
        f"{corpus.get('name')} (hash {corpus.get('hash')}); SAE {sae.get('hash')}; model {model.get('fingerprint')} in "
        f"{model.get('dtype')}."
    )


def _name_parts(
    header: Mapping[str, Any],
    given: Mapping[str, Any],
    facts: Mapping[str, Any],
    known: tuple[Release, SAEEntry] | None,
) -> dict[str, Any]:
    """As `place_of`, and what is stated nowhere by model, hook and catalogue."""
    parts = _stated_parts(header, given)
    hook, n_layers, model = facts["hook_name"], facts.get("n_layers"), facts.get("model_name")
    if parts["model_id"] is None and model:
        parts["model_id"] = model_id_of(model)
    if parts["layer"] is None and hook:
        layer = layer_of(hook)
        parts["layer"] = n_layers - 1 if n_layers and layer is None else layer
    if parts["set_name"] is None and n_layers and known is not None and (facts["d_sae"] or known[1].neuronpedia):
        name = catalogue_name(*known, facts["d_sae"] or 0, n_layers)
        parts |= {"set_name": name.set_name} | ({"suffix": name.suffix} if "suffix" not in given else {})
    return parts


def _check_same(release: Release, entry: SAEEntry, facts: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the dashboards are of another SAE than the release's."""
    for key, there in (("d_sae", entry.d_sae), ("hook_name", canonical_name(entry.hook))):
        here = facts.get(key)
        if key == "hook_name" and here:
            here = canonical_name(here)
        if here and there and here != there:
            raise ConfigError(
                f"{entry.id} of {release.name} has {key} {there}, and these dashboards are of an SAE with {here}."
            )


def _check(facts: Mapping[str, Any]) -> None:
    texts = [f.name for f in fields(Listing) if f.type in ("str", "str | None") and f.name != "created_at"]
    for key in (*texts, "model_id", "set_name", "suffix"):
        if not isinstance(facts.get(key), str | None):
            raise ConfigError(f"{key} must be a text, not {facts[key]!r}.")
    check_name("visibility", facts["visibility"], VISIBILITIES)
    name = facts["release_name"]
    if not re.fullmatch("[A-Za-z0-9-]+", name):
        near = re.sub("[^A-Za-z0-9]+", "-", name).strip("-")
        raise ConfigError(
            f"release_name {name!r} is a part of an address, which has letters, digits and '-'"
            + (f"; {near!r} would do." if near else ".")
        )
    for key, least in (("n_layers", 1), ("d_model", 1), ("d_mlp", 1), ("layer", 0)):
        if type(facts[key]) is not int or facts[key] < least:
            raise ConfigError(f"{key} must be an integer of at least {least}, not {facts[key]!r}.")
    if facts["layer"] >= facts["n_layers"]:
        raise ConfigError(
            f"{facts['model_name']} has {facts['n_layers']} layers, so there is no layer {facts['layer']}."
        )


def _require(facts: Mapping[str, Any], *, off_hub: bool) -> None:
    missing = [key for key in ASKED if facts.get(key) in (None, "", {})]
    if facts.get("hf_folder_id") == "":  # the root
        missing.remove("hf_folder_id")
    if off_hub and facts.get("hf_repo_id") is None:
        missing = [key for key in missing if not key.startswith("hf_")]
    if missing:
        listed = "; ".join(f"{key} ({ASKED[key]})" for key in missing)
        raise ConfigError(
            f"Neither the dashboards nor the catalogue say all that Neuronpedia lists. State {listed}. "
            "From the command line: --set listing.NAME=…"
        )


def _hub_folder(facts: Mapping[str, Any]) -> str | None:
    """Where the weights lie in the repository, "" at its root: as stated, else where they were found in it."""
    found = facts.get("hf_folder_id")
    metadata = (facts.get("sae_config") or {}).get("metadata") or {}
    if found is None and metadata.get("repo_id") == facts.get("hf_repo_id"):
        found = metadata.get("hf_path")
    if not isinstance(found, str):
        return None
    return "/".join(part for part in found.split("/") if part not in ("", "."))


def _timestamp(moment: datetime | None) -> str:
    """In UTC and milliseconds, as the columns hold it; without a zone, it is UTC already."""
    moment = moment or datetime.now(timezone.utc)
    moment = moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _in_catalogue(release: str | None, sae_id: str | None) -> tuple[Release, SAEEntry] | None:
    found = releases().get(release or "")
    if found is not None and sae_id is None:
        raise ConfigError(f"State sae_id, one of {release}'s: {', '.join(found.sae_ids)}.")
    return None if found is None or sae_id is None else (found, found.sae(sae_id))


def _saved_by_sae_lens(listing: Listing) -> Release:
    """A release that the catalogue does not have: sae_lens and this package save alike."""
    return Release(
        name=listing.release,
        repo_id=str(listing.hf_repo_id),
        repo_type="model",
        model=listing.model_name,
        architecture=str(listing.sae_config.get("architecture")),
        saes=(),
        sources={},
        form="sae_lens",
        weights=SAE_WEIGHTS_FILENAME,
        config=SAE_CFG_FILENAME,
    )
