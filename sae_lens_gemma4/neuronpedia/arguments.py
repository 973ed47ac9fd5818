"""What a caller may state for an export, and of which kind each is.

A recipe, the command line and code all end in the same arguments, so that what is wrong with one is said here, by its
name, before any file is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import ConfigError

ASKED = {
    "model_name": "the model as the hub calls it, such as google/gemma-4-E4B",
    "n_layers": "how many layers the model has",
    "d_model": "the width of its residual stream",
    "d_mlp": "neurons of an MLP",
    "owner": "who made the model",
    "hook_name": "where the SAE reads, such as blocks.21.hook_resid_post",
    "sae_config": "the SAE's config, what its cfg.json holds",
    "release": "the release of sae_lens that the SAE is or will be in",
    "sae_id": "its id in that release",
    "hf_repo_id": "the repository of the hub that holds its weights, such as user/name",
    "hf_folder_id": "the folder of that repository, '' for its root",
    "set_name": "its set, such as atawfeek-matryoshka-res-65k: whose, which kind, where, how wide",
    "release_title": "what people call the release",
    "creator_name": "who made the SAE",
    "description": "what its set is, such as Residual Stream - 65k",
}
"""What a listing cannot do without."""
_TEXTS = (
    "release", "sae_id", "hf_repo_id", "hf_folder_id", "explanation_type", "explanation_model", "model_id", "set_name",
    "suffix", "description", "release_name", "release_title", "creator_name", "creator_email", "creator_id",
    "visibility", "notes", "model_name", "owner", "hook_name",
)  # fmt: skip
_LEAST = {"layer": 0, "n_layers": 1, "d_model": 1, "d_mlp": 1}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an argument of `export_neuronpedia` that is of another kind; None is not stated."""
    for name in _TEXTS:
        if not isinstance(given.get(name), str | None):
            raise ConfigError(f"{name} must be a text, not {given[name]!r}.")
    for name, least in _LEAST.items():
        value = given.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}.")
    urls = given.get("urls")
    if urls is not None and (
        isinstance(urls, str) or not isinstance(urls, Sequence) or not all(isinstance(url, str) for url in urls)
    ):
        raise ConfigError(f"urls must be a list of addresses, not {urls!r}.")
    if not isinstance(given.get("created_at"), datetime | None):
        raise ConfigError(f"created_at must be a datetime, not {given['created_at']!r}.")
    for name in ("dashboards_dir", "out_dir"):
        if name in given and (not isinstance(given[name], str | Path) or "\0" in str(given[name])):
            raise ConfigError(f"{name} must be a path, not {given[name]!r}.")
    _check_config(given.get("sae_config"))


def _check_config(config: Any) -> None:
    if not isinstance(config, Mapping | None):
        raise ConfigError(f"sae_config must be an object, what a cfg.json holds, not {config!r}.")
    for name, kind, in_words in (("metadata", Mapping, "an object"), ("d_sae", int, "an integer")):
        value = (config or {}).get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"sae_config's {name} must be {in_words}, not {value!r}.")
