"""Text as data: what a recipe or a protocol says of one source.

Training and evaluation name their text in the same words, so that the one's held-out part can be the other's.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.errors import ConfigError


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
    """

    dataset: str | None = None
    texts: list[str] | None = None
    split: str = "train"
    tokens: int | None = None
    name: str | None = None
    skip_documents: int = 0
    revision: str | None = None

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.texts is None):
            raise ConfigError("A source needs either `dataset` or `texts`.")
        of = self.name or self.dataset or "texts"
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens of {of} must be at least 1, not {self.tokens}.")
        if self.skip_documents < 0:
            raise ConfigError(f"skip_documents of {of} must not be negative, as {self.skip_documents} is.")

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
        )
