"""The catalogue as data: one YAML file a release, and its row in sae_lens's own directory.

A release file states facts and leaves out what nobody has stated. sae_lens turns a missing explained variance
or L0 into 1.0 or 0.0 (pretrained_saes_directory.py:46); here the unknown is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from sae_lens_gemma4.errors import ConfigError, check_name


@dataclass(frozen=True)
class SAEEntry:
    """One SAE of a release: its id, where its files are in the repository, and what is stated of it."""

    id: str
    path: str
    hook: str
    d_in: int
    d_sae: int
    variance_explained: float | None = None
    l0: float | None = None
    neuronpedia: str | None = None


@dataclass(frozen=True)
class Release:
    """One release. `repo_type` is `model` or `dataset` for the hub, `package` for what this package carries."""

    name: str
    repo_id: str
    repo_type: Literal["model", "dataset", "package"]
    model: str
    loader: str
    saes: tuple[SAEEntry, ...] = field(repr=False)
    licence: str | None = None
    description: str = ""

    @property
    def sae_ids(self) -> tuple[str, ...]:
        return tuple(sae.id for sae in self.saes)

    def sae(self, sae_id: str) -> SAEEntry:
        check_name(f"SAE id of {self.name}", sae_id, self.sae_ids)
        return next(sae for sae in self.saes if sae.id == sae_id)

    def lookup(self) -> PretrainedSAELookup:
        """This release as a row of sae_lens's directory."""
        return PretrainedSAELookup(
            release=self.name,
            repo_id=self.repo_id,
            model=self.model,
            conversion_func=self.loader,
            saes_map={s.id: s.path for s in self.saes},
            expected_var_explained={s.id: _or_nan(s.variance_explained) for s in self.saes},
            expected_l0={s.id: _or_nan(s.l0) for s in self.saes},
            neuronpedia_id={s.id: s.neuronpedia for s in self.saes if s.neuronpedia is not None},
            norm_scaling_factor={},
            config_overrides=None,
        )


def parse_release(name: str, data: Any) -> Release:
    """A release from its YAML's content; `ConfigError` names the file and the key that is wrong."""
    try:
        saes = tuple(SAEEntry(**_checked(SAEEntry, entry)) for entry in data["saes"])
        return Release(name=name, saes=saes, **_checked(Release, {k: v for k, v in data.items() if k != "saes"}))
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise ConfigError(f"Release file {name}.yaml: {e}") from e


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _checked(cls: type, entry: dict[str, Any]) -> dict[str, Any]:
    for key in entry:
        check_name("key", key, [f.name for f in fields(cls)])
    return entry


@cache
def releases() -> dict[str, Release]:
    """Every release of the catalogue by name."""
    folder = files("sae_lens_gemma4") / "catalogue" / "releases"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {
        (name := f.name.removesuffix(".yaml")): parse_release(name, yaml.safe_load(f.read_text(encoding="utf-8")))
        for f in found
    }
