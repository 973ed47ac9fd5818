"""The catalogue as data: one YAML file a release, and its row in sae_lens's own directory.

A release file states facts, each with a source, and leaves out what nobody has stated. sae_lens turns a missing
explained variance or L0 into 1.0 or 0.0 (pretrained_saes_directory.py:46); here the unknown is NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from sae_lens_gemma4.catalogue import LOADER
from sae_lens_gemma4.errors import ConfigError, check_name

SEARCH = "search:"

RepoType = Literal["model", "dataset", "package"]
Layout = Literal["d_in d_sae", "d_sae d_in"]


@dataclass(frozen=True)
class Caveat:
    """Something to know before relying on a release. Those of a kind in `SHOWN` are warned of at loading."""

    kind: str
    text: str


CAVEATS = {
    "base_only": "fails on the tuned model",
    "changing": "weights still change",
    "conflict": "sources contradict each other",
    "licence": "restrictive licence",
    "not_residual": "not a residual stream",
    "purpose": "unfit for a use that its name suggests",
    "standardised": "trained on activations that were standardised",
    "quantised": "trained on a quantised model's activations",
    "unstated": "something that matters is not stated",
    "unverified": "not verified to be public",
}
SHOWN = frozenset(CAVEATS) - {"conflict", "unverified"}


@dataclass(frozen=True)
class SAEEntry:
    """One SAE of a release: its id, where its files are in the repository, and what is stated of it.

    `path` is a folder or a weights file. Where the author states none, `search` is a regular expression that the
    path of just one weights file matches. Absent facts are None: nobody has stated them.
    """

    id: str
    hook: str
    """The hook point's canonical name (docs/models.md)."""
    path: str | None = None
    search: str | None = None
    d_in: int | None = None
    d_sae: int | None = None
    k: int | None = None
    """Latents per token, or the target of the training."""
    apply_b_dec_to_input: bool | None = None
    encoder: Layout | None = None
    """How `W_enc` is laid out, where its shape cannot tell."""
    context_size: int | None = None
    prepend_bos: bool | None = None
    exclude_special_tokens: bool | list[int] | None = None
    """All special tokens, or those of these ids."""
    dataset: str | None = None
    variance_explained: float | None = None
    l0: float | None = None
    neuronpedia: str | None = None
    labels: str | None = None
    """Where its labels or examples are: a file, or `search:` and a regular expression."""

    @property
    def folder_name(self) -> str:
        """What sae_lens's directory holds for it, and hands back to the loader."""
        return self.path if self.path is not None else f"{SEARCH}{self.search}"


@dataclass(frozen=True)
class Release:
    """One release. `repo_type` is `model` or `dataset` for the hub, `package` for what this package carries."""

    name: str
    repo_id: str
    repo_type: RepoType
    model: str
    architecture: str
    """As its author trained it."""
    saes: tuple[SAEEntry, ...] = field(repr=False)
    sources: Mapping[str, str] = field(repr=False)
    """Where each fact is stated, by the fact's name; `default` for those not named."""
    form: str | None = None
    """The form its files have (`catalogue.formats`); None where they are recognised by keys and shapes."""
    revision: str | None = None
    """The commit, tag or branch to read; the newest if None."""
    weights: str | None = None
    config: str | None = None
    """Names of the files in an SAE's folder. For a `path` that is a file, `config` lies beside it."""
    label_schema: str | None = None
    caveats: tuple[Caveat, ...] = ()
    licence: str | None = None
    description: str = ""

    @property
    def sae_ids(self) -> tuple[str, ...]:
        return tuple(sae.id for sae in self.saes)

    @property
    def url(self) -> str | None:
        """The repository's page; None for what this package carries."""
        prefix = {"model": "", "dataset": "datasets/", "package": None}[self.repo_type]
        return None if prefix is None else f"https://huggingface.co/{prefix}{self.repo_id}"

    def sae(self, sae_id: str) -> SAEEntry:
        check_name(f"SAE id of {self.name}", sae_id, self.sae_ids)
        return next(sae for sae in self.saes if sae.id == sae_id)

    def lookup(self) -> PretrainedSAELookup:
        """This release as a row of sae_lens's directory."""
        return PretrainedSAELookup(
            release=self.name,
            repo_id=self.repo_id,
            model=self.model,
            conversion_func=LOADER,
            saes_map={s.id: s.folder_name for s in self.saes},
            expected_var_explained={s.id: _or_nan(s.variance_explained) for s in self.saes},
            expected_l0={s.id: _or_nan(s.l0) for s in self.saes},
            neuronpedia_id={s.id: s.neuronpedia for s in self.saes if s.neuronpedia is not None},
            norm_scaling_factor={},
            config_overrides=None,
        )


_PLACEHOLDERS = ("layer", "stage")  # facts that only fill in others' texts


def parse_release(name: str, data: Any) -> Release:
    """A release from its YAML's content.

    `each` holds what all SAEs share. Texts may hold `{layer}`, `{stage}`, `{width}` (⌊d_sae/1000⌋k) and any other
    fact of the SAE; an entry with `layers: 0-34` stands for one of each layer.

    Raises:
        ConfigError: names the file and the key that is wrong.
    """
    try:
        shared = data.get("each", {})
        saes = tuple(_entry(shared | entry) for item in data["saes"] for entry in _of_each_layer(item))
        caveats = tuple(_caveat(c) for c in data.get("caveats", ()))
        rest = {k: v for k, v in data.items() if k not in ("each", "saes", "caveats")}
        release = Release(name=name, saes=saes, caveats=caveats, **_checked(Release, rest))
        check_name("repo_type", release.repo_type, get_args(RepoType))
        if "default" not in release.sources:
            raise ValueError("sources has no default")
        for fact in release.sources.keys() - {"default"}:
            check_name("fact with a source", fact, [f.name for cls in (SAEEntry, Release) for f in fields(cls)])
        for kind, values in (("id", release.sae_ids), ("path", [s.folder_name for s in saes])):
            for value in values:
                if list(values).count(value) > 1:
                    raise ValueError(f"two SAEs have the {kind} {value!r}")
    except (TypeError, KeyError, AttributeError, ValueError, re.error) as e:
        raise ConfigError(f"Release file {name}.yaml: {e}") from e
    return release


def _of_each_layer(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "layers" not in item:
        yield item
        return
    first, last = map(int, str(item["layers"]).split("-"))
    rest = {k: v for k, v in item.items() if k != "layers"}
    for layer in range(first, last + 1):
        yield {"layer": layer} | rest


def _entry(facts: dict[str, Any]) -> SAEEntry:
    known = dict(facts)
    if known.get("d_sae"):
        known.setdefault("width", f"{known['d_sae'] // 1000}k")
    texts = {k: v.format_map(known) if isinstance(v, str) else v for k, v in facts.items() if k not in _PLACEHOLDERS}
    entry = SAEEntry(**_checked(SAEEntry, texts))
    if (entry.path is None) == (entry.search is None):
        raise ValueError(f"{entry.id} needs either a path or a search")
    for pattern in (entry.search, entry.labels):
        re.compile((pattern or "").removeprefix(SEARCH))
    if entry.encoder is not None:
        check_name("layout of W_enc", entry.encoder, get_args(Layout))
    return entry


def _caveat(item: dict[str, str]) -> Caveat:
    ((kind, text),) = item.items()
    check_name("kind of caveat", kind, CAVEATS)
    return Caveat(kind, text)


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


def find(repo_id: str, folder_name: str) -> tuple[Release, SAEEntry] | None:
    """The SAE that lies there, if the catalogue has it."""
    for release in releases().values():
        if release.repo_id == repo_id:
            for entry in release.saes:
                if entry.folder_name.rstrip("/") == folder_name.rstrip("/"):
                    return release, entry
    return None
