"""What a model, a set of SAEs and one SAE are called on Neuronpedia, and by which rules.

A source is one SAE: `gemma-4-e4b/21-matryoshka-res-65k` is layer 21 of the set `matryoshka-res-65k` on the model
`gemma-4-e4b`, and `__l0-34` may follow where a set has several SAEs a layer. Ids that are in use are the catalogue's
(`neuronpedia` of a release's YAML); what has none yet is named by the conventions of those that have.

The rules are those that Neuronpedia's own forms check: apps/webapp/app/api/model/new/route.tsx and
source-set/new/route.tsx of github.com/hijohnnylin/neuronpedia at ebb8426f.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from sae_lens_gemma4.catalogue.registry import Release, SAEEntry
from sae_lens_gemma4.errors import CatalogueWarning, ConfigError, warn_caller
from sae_lens_gemma4.models.hook_names import canonical_name, layer_of

KNOWN_MODELS = (
    *(f"gemma-2-{size}{tuned}" for size in ("2b", "9b", "27b") for tuned in ("", "-it") if size + tuned != "27b-it"),
    *(f"gemma-3-{size}{tuned}" for size in ("270m", "1b", "4b", "12b", "27b") for tuned in ("", "-it")),
    *(f"gemma-4-{size}" for size in ("e2b", "e4b", "31b")),
)
"""The Gemma models that Neuronpedia has (np_model_to_hf.json of its repository); of Gemma 4, base models alone."""
HOW_TO_ASK = (
    "Its team adds models on request (support@neuronpedia.org); sae-lens-gemma4 upload-neuronpedia --new-model makes "
    "an unlisted one of your own."
)

_SITES = {
    "hook_resid_pre": "res-pre",
    "hook_resid_mid": "res-mid",
    "hook_resid_post": "res",
    "hook_resid_prescale": "res-prescale",
    "hook_attn_out": "att",
    "attn.hook_z": "att",
    "hook_mlp_out": "mlp",
    "mlp.hook_out": "mlp",
    "mlp.hook_post": "mlp-neurons",
    "hook_ple_out": "ple",
    "moe.hook_dense_out": "moe-dense",
    "moe.hook_experts_out": "moe-experts",
    "ln_final.hook_out": "final",
}
_MODEL = re.compile(r"[a-z][a-z0-9.-]*[a-z0-9]")
_SET = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]|[a-z0-9]")
_SUFFIX = re.compile(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?")
_SOURCE = re.compile(r"(\d+)-(.+?)(?:__(.+))?")


class UnknownModelWarning(CatalogueWarning):
    """A model that Neuronpedia does not have."""


@dataclass(frozen=True)
class SourceName:
    """One SAE on Neuronpedia.

    Raises:
        ConfigError: a part that Neuronpedia's rules refuse, with the nearest that they take.
    """

    model_id: str
    layer: int
    set_name: str
    suffix: str | None = None

    def __post_init__(self) -> None:
        _check("model id", self.model_id, _MODEL, "2–32 of a–z, 0–9, '.' and '-', from a letter on", 2, 32)
        _check("set name", self.set_name, _SET, "a–z, 0–9 and single '-', from a letter on", 1, 128)
        if self.set_name == "neurons":
            raise ConfigError("A set cannot be called 'neurons': Neuronpedia keeps that name. Say whose it is.")
        if type(self.layer) is not int or self.layer < 0:
            raise ConfigError(f"Layers are integers, counted from 0, so {self.layer!r} is none.")
        if self.suffix is not None:
            _check("suffix", self.suffix, _SUFFIX, "a–z, 0–9, single '-' and single '_'", 1, 64)

    @property
    def source_id(self) -> str:
        return f"{self.layer}-{self.set_name}" + (f"__{self.suffix}" if self.suffix else "")

    def __str__(self) -> str:
        return f"{self.model_id}/{self.source_id}"

    @staticmethod
    def parse(name: str) -> SourceName:
        """`gemma-4-e4b/21-matryoshka-res-65k` taken apart.

        Raises:
            ConfigError: it is not of this form.
        """
        model_id, slash, source = name.partition("/")
        match = _SOURCE.fullmatch(source)
        if not slash or match is None:
            raise ConfigError(f"{name!r} is no Neuronpedia id; one looks like 'gemma-4-e4b/21-matryoshka-res-65k'.")
        return SourceName(model_id, int(match[1]), match[2], match[3])


def model_id_of(model_name: str) -> str:
    """Neuronpedia's id of a model of the hub: its name in lower case, `-pt` dropped and `-it` kept."""
    return model_name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-pt")


def warn_if_unknown(model_id: str) -> None:
    """Warn of a model that Neuronpedia does not have, and say how it gets one."""
    if model_id not in KNOWN_MODELS:
        known = ", ".join(name for name in KNOWN_MODELS if name.startswith("gemma-4"))
        message = f"Neuronpedia is not known to have a model {model_id!r}; of Gemma 4 it has {known}. {HOW_TO_ASK}"
        warn_caller(message, UnknownModelWarning)


def site_of_hook(hook_name: str) -> str:
    """What Neuronpedia's set names call the place that a hook is: `res`, `mlp`, `att`, ….

    Raises:
        ConfigError: a hook point that has no such word.
    """
    kind = re.sub(r"^blocks\.\d+\.", "", canonical_name(hook_name))
    if kind not in _SITES:
        raise ConfigError(f"There is no usual word for a set of SAEs at {hook_name}; state set_name.")
    return _SITES[kind]


def set_name_of(author: str, architecture: str, hook_name: str, d_sae: int) -> str:
    """The conventional name of a set: whose, of which kind, where, how wide; as `atawfeek-matryoshka-res-65k`."""
    width = f"{d_sae // 1000}k" if d_sae >= 1000 else str(d_sae)
    return slug(f"{author}-{architecture}-{site_of_hook(hook_name)}-{width}")


def catalogue_name(release: Release, entry: SAEEntry, d_sae: int, n_layers: int) -> SourceName:
    """What an SAE of the catalogue is called: its id in use, else one of a set in use, else by convention.

    Args:
        n_layers: of the model; an SAE after the final norm counts as the last layer's.

    Raises:
        ConfigError: its hook has no usual word.
    """
    if entry.neuronpedia is not None:
        return SourceName.parse(entry.neuronpedia)
    layer = layer_of(entry.hook)
    used = [SourceName.parse(e.neuronpedia) for e in release.saes if e.neuronpedia and e.d_sae == entry.d_sae]
    if used and layer is not None:
        return replace(used[0], layer=layer, suffix=None)
    author = re.sub(r"-l\d+$", "", release.name.split(f"-{release.architecture}-", 1)[-1])
    set_name = set_name_of(author, release.architecture, entry.hook, d_sae)
    alike = [e for e in release.saes if (e.hook, e.d_sae) == (entry.hook, entry.d_sae)]
    suffix = None
    if len(alike) > 1:  # what tells it from its siblings is the end of its id
        shared = _shared_words([e.id for e in alike])
        suffix = slug("-".join(entry.id.split("_")[shared:]))
    return SourceName(model_id_of(release.model), n_layers - 1 if layer is None else layer, set_name, suffix)


def slug(text: str) -> str:
    """The nearest text that a set name may be."""
    return re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9]+", "-", text.lower())).strip("-").lstrip("0123456789-")


def _shared_words(ids: list[str]) -> int:
    """How many words, between underscores, all of these begin with; never all of one."""
    words = [i.split("_") for i in ids]
    n = 0
    while n < min(map(len, words)) - 1 and len({w[n] for w in words}) == 1:
        n += 1
    return n - (n > 0 and words[0][n - 1] == "l0")


def _check(kind: str, name: Any, rule: re.Pattern[str], in_words: str, shortest: int, longest: int) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"A {kind} is a text, and {name!r} is none.")
    doubled = [pair for pair in ("--", "..", "__") if pair in name]
    if rule.fullmatch(name) and not doubled and shortest <= len(name) <= longest:
        return
    near = slug(name)[:longest].rstrip("-")
    hint = f" {near!r} would do." if near and near != name else ""
    raise ConfigError(f"Neuronpedia refuses the {kind} {name!r}: {in_words}.{hint}")
