"""What of a listing nobody has to state: it stands in the catalogue, or follows from what is stated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sae_lens_gemma4.catalogue.registry import Release, SAEEntry
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.neuronpedia.names import site_of_hook

CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The account that Neuronpedia's own imports belong to (apps/webapp/prisma/seed.ts)."""
_OWNERS = {"google": "Google"}
_KINDS = {"batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka", "topk": "TopK"}
_PLACES = {
    "res": "Residual Stream",
    "res-pre": "Residual Stream Before the Layer",
    "res-mid": "Residual Stream Between Attention and MLP",
    "res-prescale": "Residual Stream Before Its Scale",
    "att": "Attention Output",
    "mlp": "MLP Output",
    "mlp-neurons": "MLP Neurons",
    "ple": "Per-Layer Embedding Output",
    "moe-dense": "Dense MLP Output Beside Experts",
    "moe-experts": "Experts' Output",
    "final": "After the Final Norm",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def of_catalogue(release: Release, entry: SAEEntry) -> dict[str, Any]:
    """What the catalogue says of an SAE and its release."""
    packaged = release.repo_type == "package"
    author = "sae-lens-gemma4" if packaged else release.repo_id.partition("/")[0]
    kind = _KINDS.get(release.architecture, release.architecture)
    found = {
        "model_name": release.model,
        "hook_name": entry.hook,
        "d_sae": entry.d_sae,
        "hf_repo_id": None if packaged else release.repo_id,
        "hf_folder_id": None if packaged else entry.path,
        "owner": author if packaged else None,
        "release_name": release.name,
        "release_title": f"{kind} SAEs on {release.model.rpartition('/')[2]}",
        "creator_name": author,
        "urls": () if release.url is None else (release.url,),
    }
    return {key: value for key, value in found.items() if value is not None}


def by_rule(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from other facts, where nobody states it."""
    model, hook, d_sae = facts.get("model_name"), facts.get("hook_name"), facts.get("d_sae")
    owner = model.partition("/")[0] if model and _HUB_NAME.fullmatch(model) else None
    repository = facts.get("hf_repo_id")
    found = {
        "owner": _OWNERS.get(owner, owner) if owner else None,
        "website": f"https://huggingface.co/{model}" if owner else None,
        "release_name": facts.get("release"),
        "urls": (f"https://huggingface.co/{repository}",) if repository else (),
        "visibility": "PUBLIC",
        "creator_id": CREATOR_ID,
    }
    if hook and d_sae and (place := _place(hook)):
        found["description"] = f"{place} - {f'{d_sae // 1000}k' if d_sae >= 1000 else d_sae}"
    return found


def _place(hook: str) -> str | None:
    try:
        return _PLACES.get(site_of_hook(hook))
    except ConfigError:
        return None
