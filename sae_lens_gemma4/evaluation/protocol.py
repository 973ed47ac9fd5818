"""Protocols: a measurement's conditions as data, so that two figures of one name were measured in one way.

The same SAE reads .89 on a few short clean texts and .19 on long ones; both are its variance explained. Which text,
how much of it, how it is packed and which tokens count belong to the figure. A protocol states them in a YAML file,
and results whose conditions differ are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.mapping import from_yaml

_FOLDER = Path(__file__).parent / "protocols"
_ENDINGS = (".yaml", ".yml")
_CONDITIONS = {
    None: ("protocol",),
    "corpus": (
        "name", "hash", "documents", "source", "split", "revision", "first_document", "next_document", "context_size",
        "exclude_special_tokens", "bos", "packed", "roles", "exclude_turn_markers", "isolate_documents",
    ),
    "metrics": ("n_tokens",),
}  # fmt: skip
_MODEL = {"model": ("name", "fingerprint")}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """On which text, and how, SAEs are measured.

    Attributes:
        name, description: what it is called, and what it is for.
        sources: its splits, each with a name; `tokens` of each is how many of its tokens are measured.
        context_size: tokens a block, BOS included.
        exclude_special_tokens: special tokens do not count.
        bos: BOS opens every block and every document.
        packed: documents end to end; else each has blocks of its own.
        exact_tokens: `tokens` of each source to the token, not to the block.
        downstream_tokens: tokens of each split on which the model's predictions are measured; None for all.
        bootstrap_resamples, bootstrap_seed: of the documents, for intervals.
    """

    name: str
    description: str
    sources: list[Source]
    context_size: int
    exclude_special_tokens: bool = True
    bos: bool = True
    packed: bool = True
    exact_tokens: bool = False
    downstream_tokens: int | None = None
    bootstrap_resamples: int = 1000
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"The sources of protocol {self.name!r} need names, each its own; they have {names}.")
        if self.exact_tokens and any(source.tokens is None for source in self.sources):
            raise ConfigError(f"Protocol {self.name!r} has exact_tokens and a source without tokens.")
        for key, least in (("context_size", 2), ("downstream_tokens", 0), ("bootstrap_resamples", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key} of protocol {self.name!r} must be at least {least}, not {value}.")

    def corpora(
        self, tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, str] | None = None
    ) -> dict[str, Corpus]:
        """The splits, by name, as a model's tokens.

        Args:
            tokenizer: the model's.
            sources: a local file or folder to read instead of a split's dataset, by the split's name. It stands for
                the split: documents that the protocol skips are skipped.

        Raises:
            UnknownNameError: the protocol has no split of that name.
            DataError: a split that cannot be read, or has too little text.
        """
        named = {str(source.name): source for source in self.sources}
        for name, path in (sources or {}).items():
            check_name(f"split of protocol {self.name}", name, named)
            split = "train" if Path(path).is_file() else named[name].split  # what a file holds has no other name
            named[name] = replace(named[name], dataset=path, texts=None, revision=None, split=split)
        return {
            name: source.to_corpus(
                tokenizer,
                context_size=self.context_size,
                exclude_special_tokens=self.exclude_special_tokens,
                bos=self.bos,
                packed=self.packed,
                exact_tokens=self.exact_tokens,
            )
            for name, source in named.items()
        }


@cache
def _packaged() -> dict[str, Protocol]:
    read = [from_yaml(Protocol, path, "protocol") for path in sorted(_FOLDER.glob("*.yaml"))]
    return {protocol.name: protocol for protocol in read}


def protocols() -> dict[str, Protocol]:
    """The protocols of this package, by name."""
    return dict(_packaged())


def load_protocol(name_or_path: str | Path) -> Protocol:
    """One of `protocols()` by name, or the one that a YAML file states.

    Raises:
        UnknownNameError: no protocol of that name, or a key of the file that does not exist.
        ConfigError: a file that cannot be used, or one that takes the name of another protocol.
    """
    if not str(name_or_path).endswith(_ENDINGS):
        return _packaged()[check_name("protocol", str(name_or_path), _packaged(), "Or give a .yaml file.")]
    protocol = from_yaml(Protocol, name_or_path, "protocol")
    if _packaged().get(protocol.name, protocol) != protocol:
        raise ConfigError(
            f"Protocol {name_or_path} calls itself {protocol.name!r} and is not this package's protocol of that name. "
            "Give it a name of its own."
        )
    return protocol


def require_same_protocol(a: Mapping[str, Any], b: Mapping[str, Any], *, same_model: bool = True) -> None:
    """Check that two results (`SAEEvaluation.to_dict`) were measured under the same conditions.

    A revision that one of them does not know is no difference: the hash says whether it was the same text.

    Args:
        same_model: that it must also have been the same model.

    Raises:
        ConfigError: they were not; it lists what differs.
    """
    differences = []
    for part, keys in (_CONDITIONS | (_MODEL if same_model else {})).items():
        first, second = (result if part is None else result.get(part, {}) for result in (a, b))
        for key in keys:
            values = first.get(key), second.get(key)
            if values[0] != values[1] and not (key == "revision" and None in values):
                differences.append(f"{part + '.' if part else ''}{key} is {values[0]!r} and {values[1]!r}")
    if differences:
        raise ConfigError(f"These two results cannot be compared: {'; '.join(differences)}.")
