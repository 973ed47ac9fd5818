"""Corpora kept on disk, so that a text is tokenized once: by the next run, the resumed one and the evaluation alike.

A cache that answers with another text than was asked for would spoil every figure after it in silence. So each entry
lies under a hash of all that made it, is written as one file that is complete or absent, and is held against its own
digest when it is read. What does not hold is made again.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.documents import commit_of, is_on_hub
from sae_lens_gemma4.activations.sources import Source, fingerprint
from sae_lens_gemma4.errors import DataError


def cached_corpus(
    source: Source,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_size: int,
    exclude_special_tokens: bool,
    bos: bool = True,
    packed: bool = True,
    exact_tokens: bool = False,
) -> Corpus:
    """What `source.to_corpus` makes, read from `folder` if the same was made before, else made and kept there.

    The same is: the same source, unchanged (`fingerprint`); for a dataset on the hub the commit that its revision now
    is, or any where the hub cannot be asked; the same tokenizer, chat template and options.

    Raises:
        As `Source.to_corpus`; and ConfigError if the corpus cannot be written.
    """
    options = {
        "context_size": context_size,
        "exclude_special_tokens": exclude_special_tokens,
        "bos": bos,
        "packed": packed,
        "exact_tokens": exact_tokens,
    }
    place = Path(folder) / fingerprint([source], tokenizer, **options)
    try:
        corpus = Corpus.load(place)
        if _is_current(corpus, source):
            return corpus
    except DataError:  # not there, or broken
        pass
    corpus = source.to_corpus(tokenizer, **options)  # type: ignore[arg-type]
    corpus.save(place)
    return corpus


def _is_current(corpus: Corpus, source: Source) -> bool:
    if source.dataset is None or not is_on_hub(source.dataset):
        return True
    commit = commit_of(source.dataset, source.revision)
    return commit is None or corpus.origin is None or corpus.origin.revision == commit
