"""Text as data: what a recipe or a protocol says of one source.

Training and evaluation name their text in the same words, so that the one's held-out part can be the other's.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus, Packer, build_corpus
from sae_lens_gemma4.activations.documents import Documents, is_on_hub, read_documents
from sae_lens_gemma4.activations.vocabulary import tokenizer_fingerprint
from sae_lens_gemma4.errors import ConfigError

_FORM = 1  # another number wherever the same text becomes other tokens or another mask than before


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text: whatever `build_corpus` reads by name, or texts as they are, and which part of it to take.

    Attributes:
        dataset: a name on the hub, a local file or folder, `embedded:text` or `embedded:chat`.
        texts: the texts themselves, instead.
        split: in the dataset's own words.
        tokens: tokens to take, counted as `max_tokens` of `build_corpus`.
        name: what to call it in results.
        skip_documents: documents of the split to leave out at its start.
        revision: commit, tag or branch of a dataset on the hub.
        roles: of chats, whose turns alone count; None for all.
        exclude_turn_markers: of chats, that what the template puts around messages does not count.
    """

    dataset: str | None = None
    texts: list[str] | None = None
    split: str = "train"
    tokens: int | None = None
    name: str | None = None
    skip_documents: int = 0
    revision: str | None = None
    roles: list[str] | None = None
    exclude_turn_markers: bool = False

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.texts is None):
            raise ConfigError("A source needs either `dataset` or `texts`.")
        if self.name == "" or self.dataset == "":
            raise ConfigError("The name of a source or of its dataset must not be empty.")
        if self.texts is not None and not self.texts:
            raise ConfigError("The `texts` of a source must be at least one.")
        of = self.label
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens of {of} must be at least 1, not {self.tokens}.")
        if self.skip_documents < 0:
            raise ConfigError(f"skip_documents of {of} must not be negative, as {self.skip_documents} is.")
        if self.texts is not None and self.roles is not None:
            raise ConfigError(f"The source {of} has `texts`, which have no roles; only chats do.")
        if self.roles is not None and (not self.roles or "" in self.roles):
            raise ConfigError(f"roles of {of} must be names as 'assistant', or none be given for all.")

    @property
    def label(self) -> str:
        """What it is called in results and errors."""
        return self.name or ("texts" if self.dataset is None else f"{self.dataset} [{self.split}]")

    def documents(self, at: int = 0, *, revision: str | None = None) -> Documents:
        """Its texts and chats from number `at` of those that it takes; `revision` in place of its own."""
        return read_documents(
            self.texts if self.dataset is None else self.dataset,
            split=self.split,
            skip=self.skip_documents + at,
            revision=revision or self.revision,
            in_part=True,
        )

    def packer(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Packer:
        """How its documents become blocks; `options` as of `Packer`."""
        return Packer(tokenizer=tokenizer, roles=self.roles, exclude_turn_markers=self.exclude_turn_markers, **options)

    def to_corpus(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_size: int,
        exclude_special_tokens: bool,
        bos: bool = True,
        packed: bool = True,
        exact_tokens: bool = False,
    ) -> Corpus:
        """The corpus that this is for a model; arguments and errors as of `build_corpus`."""
        return build_corpus(
            self.texts if self.dataset is None else self.dataset,
            tokenizer,
            context_size=context_size,
            name=self.name,
            split=self.split,
            max_tokens=self.tokens,
            exclude_special_tokens=exclude_special_tokens,
            skip_documents=self.skip_documents,
            revision=self.revision,
            bos=bos,
            packed=packed,
            exact_tokens=exact_tokens,
            roles=self.roles,
            exclude_turn_markers=self.exclude_turn_markers,
        )


def fingerprint(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """16 hex digits of all that makes a text what it is: sources, options of the packing, tokenizer and template.

    Of a local file or folder it is names, sizes and times of change that count, of the embedded text the version of
    Python. What a branch on the hub is now is not asked.
    """
    facts = [
        _FORM,
        [[asdict(source), _state(source)] for source in sources],
        [tokenizer_fingerprint(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.chat_template],
        options,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _state(source: Source) -> Any:
    """What may change in a source while its name does not."""
    if source.dataset is None or is_on_hub(source.dataset):
        return None
    if source.dataset.startswith("embedded:"):
        return platform.python_version()
    path = Path(source.dataset)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.exists()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
