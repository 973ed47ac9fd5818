"""Whatever holds text made into a `Corpus`: tokenized, packed, masked, and told where it came from.

A name, a list or a tensor goes in; what comes out is the same for training and for evaluation, so that the held-out
figures of the one are those of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.blocks import Corpus, Origin
from sae_lens_gemma4.activations.documents import Documents, read_documents
from sae_lens_gemma4.activations.packing import Block, Counting, pack, tokenize
from sae_lens_gemma4.activations.vocabulary import tokenizer_fingerprint
from sae_lens_gemma4.errors import ConfigError, DataError, nearest

__all__ = ["Assembly", "Corpus", "CorpusLike", "Origin", "Packer", "build_corpus"]

CorpusLike = Any  # Corpus | Dataset | str | Path | Sequence[Document] | torch.Tensor
_MAX_ROLES = torch.iinfo(torch.int8).max


@dataclass(frozen=True, kw_only=True)
class Packer:
    """How documents become blocks; each as the argument of `build_corpus` of that name.

    Raises:
        ConfigError: a context without room, or no roles.
    """

    tokenizer: PreTrainedTokenizerBase
    context_size: int
    exclude_special_tokens: bool = True
    bos: bool = True
    packed: bool = True
    roles: Sequence[str] | None = None
    exclude_turn_markers: bool = False

    def __post_init__(self) -> None:
        if self.context_size < 2:
            raise ConfigError(f"context_size must be at least 2 (BOS and one token), not {self.context_size}.")
        if self.roles is not None and (isinstance(self.roles, str) or not self.roles or "" in self.roles):
            raise ConfigError(f"roles must be a list of names as 'assistant', or None for all; not {self.roles!r}.")

    @property
    def special(self) -> frozenset[int]:
        """Ids that do not count."""
        return frozenset(self.tokenizer.all_special_ids if self.exclude_special_tokens else ())

    def blocks(self, documents: Documents, *, skip_tokens: int = 0) -> Iterator[Block]:
        """The blocks of `documents`, of the first of which the first `skip_tokens` tokens are left out."""
        counting = Counting(
            self.special, None if self.roles is None else frozenset(self.roles), not self.exclude_turn_markers
        )
        tokenized = tokenize(documents, self.tokenizer, counting, skip_tokens=skip_tokens)
        bos = self.tokenizer.bos_token_id if self.bos else None
        bos_counts = bos not in self.special and self.roles is None
        return pack(tokenized, bos, self.context_size, packed=self.packed, bos_counts=bos_counts)

    def origin(self, documents: Documents, first_document: int, next_document: int) -> Origin:
        return Origin(
            source=documents.source,
            split=documents.split,
            revision=documents.revision,
            first_document=first_document,
            next_document=next_document,
            exclude_special_tokens=self.exclude_special_tokens,
            bos=self.bos and self.tokenizer.bos_token_id is not None,
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            packed=self.packed,
            roles=None if self.roles is None else tuple(self.roles),
            exclude_turn_markers=self.exclude_turn_markers,
        )


class Assembly:
    """Blocks on their way to a corpus, as tensors: lists of numbers would take five times the memory.

    Attributes:
        n_blocks: how many there are.
        counted: tokens in them that count.
    """

    def __init__(self, packer: Packer, name: str) -> None:
        pad = packer.tokenizer.pad_token_id
        self._packer, self._name, self._pad = packer, name, 0 if pad is None else pad
        self._roles: dict[str, int] = {}
        self._rows: list[tuple[torch.Tensor, ...]] = []
        self.counted = 0

    @property
    def n_blocks(self) -> int:
        return len(self._rows)

    def add(self, block: Block) -> None:
        missing = self._packer.context_size - len(block.tokens)
        roles = self._roles
        indices = [-1 if role is None else roles.setdefault(role, len(roles)) for role in block.roles]
        if len(roles) > _MAX_ROLES:
            raise DataError(
                f"The chats of {self._name!r} have more than {_MAX_ROLES} roles, as {', '.join([*roles][:3])}."
            )
        row = (
            torch.tensor(block.tokens + [self._pad] * missing),
            torch.tensor(block.counts + [False] * missing),
            torch.tensor(block.documents + [-1] * missing),
            torch.tensor(indices + [-1] * missing, dtype=torch.int8),
        )
        self._rows.append(row)
        self.counted += sum(block.counts)

    def corpus(self, origin: Origin, *, most_tokens: int | None = None, first_number: int = 0) -> Corpus:
        """What was added, with documents numbered from `first_number`, and masked after `most_tokens` that count."""
        if not self.counted:
            self._nothing_counts()
        tokens_bp, keep_bp, document_bp, role_bp = map(torch.stack, zip(*self._rows, strict=True))
        if most_tokens is not None:
            keep_bp &= keep_bp.flatten().cumsum(0).view_as(keep_bp) <= most_tokens
        document_bp = torch.where(document_bp >= 0, document_bp - first_number, -1)
        roles = tuple(self._roles)
        return Corpus(tokens_bp, keep_bp, document_bp, self._name, role_bp if roles else None, roles, origin)

    def _nothing_counts(self) -> None:
        wanted = self._packer.roles
        if wanted is None:
            raise DataError(f"Every token of corpus {self._name!r} is masked: nothing is left to read.")
        near = [name for role in wanted for name in nearest(role, self._roles)]
        there = f"its roles are {', '.join(self._roles)}" if self._roles else "none of its tokens has a role"
        raise DataError(
            f"No token of corpus {self._name!r} counts that has a role of {list(wanted)}; {there}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )


def build_corpus(
    source: CorpusLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_size: int,
    name: str | None = None,
    split: str = "train",
    max_tokens: int | None = None,
    exclude_special_tokens: bool = True,
    skip_documents: int = 0,
    revision: str | None = None,
    streaming: bool | None = None,
    bos: bool = True,
    packed: bool = True,
    exact_tokens: bool = False,
    roles: Sequence[str] | None = None,
    exclude_turn_markers: bool = False,
) -> Corpus:
    """Make a `Corpus` of whatever holds text.

    Args:
        source: a `Corpus` (returned as it is), a `datasets.Dataset`, the name of a dataset on the hub or of a
            local file or folder, `embedded:text` or `embedded:chat`, a list of texts, a list of `messages`
            chats, or a `[block, pos]` tensor of tokens (taken as it is, a block a document).
        tokenizer: the model's. Chats go through its chat template.
        context_size: tokens in a block, the BOS that opens it included.
        split: for datasets, in their own words (`"train[:1%]"`); for the embedded text `train` or `heldout`.
        max_tokens: stop at the first whole block with so many tokens that count.
        exclude_special_tokens: mask every token that the tokenizer calls special, turn markers included.
        skip_documents: leave out so many documents at the start; `Origin.next_document` of one corpus makes another
            that has none of its documents.
        revision: of a dataset on the hub: commit, tag or branch. What is recorded is the commit.
        streaming: fetch a dataset of the hub as it is read, instead of downloading it. By default with `max_tokens`,
            if the split is a whole one and there is a network.
        bos: open every block and every document with BOS, if the tokenizer has one.
        packed: documents end to end; else each has blocks of its own.
        exact_tokens: mask what the last block has beyond `max_tokens`, so that just so many count.
        roles: only tokens in turns of these roles count, in the words of the chats (ShareGPT's "gpt" is
            "assistant"). Where a token's role cannot be told (`tokenize_chat`), it does not.
        exclude_turn_markers: mask what the chat template puts around a message's own content: role words, line ends
            and markers, whether or not they are special tokens.

    Raises:
        DataError: no text, not in a form that can be read, nothing that counts, or with `exact_tokens` too little.
        ConfigError: numbers that make no sense, or a revision of something that is not on the hub.
        UnknownNameError: a split or an embedded text that does not exist.
    """
    if isinstance(source, Corpus):
        return source
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}.")
    if exact_tokens and max_tokens is None:
        raise ConfigError("exact_tokens needs max_tokens: how many?")
    if skip_documents < 0:
        raise ConfigError(f"skip_documents must not be negative, as {skip_documents} is.")
    packer = Packer(
        tokenizer=tokenizer,
        context_size=context_size,
        exclude_special_tokens=exclude_special_tokens,
        bos=bos,
        packed=packed,
        roles=roles,
        exclude_turn_markers=exclude_turn_markers,
    )
    if isinstance(source, torch.Tensor):
        return _of_tokens(source, packer.special, name or "tokens")

    label = name or (f"{source} [{split}]" if isinstance(source, str | Path) else "texts")
    documents = read_documents(
        source, split=split, skip=skip_documents, revision=revision, streaming=streaming, in_part=max_tokens is not None
    )
    assembly = Assembly(packer, label)
    for block in packer.blocks(documents):
        assembly.add(block)
        if max_tokens is not None and assembly.counted >= max_tokens:
            break
    if not assembly.n_blocks:
        after = f" after its first {skip_documents:,} documents" if skip_documents else ""
        raise DataError(f"Corpus {label!r} holds no text{after}.")
    if exact_tokens and max_tokens is not None and assembly.counted < max_tokens:
        raise DataError(f"Corpus {label!r} has {assembly.counted:,} tokens that count, fewer than {max_tokens:,}.")
    origin = packer.origin(documents, documents.first, documents.first + documents.n_read)
    return assembly.corpus(origin, most_tokens=max_tokens if exact_tokens else None)


def _of_tokens(tokens: torch.Tensor, special: frozenset[int], name: str) -> Corpus:
    tokens_bp = tokens.long().cpu()
    if tokens_bp.ndim != 2:
        raise DataError(f"A tensor corpus must be [block, pos]; this one is {tuple(tokens_bp.shape)}.")
    document_bp = torch.arange(len(tokens_bp))[:, None].expand_as(tokens_bp).clone()
    keep_bp = ~torch.isin(tokens_bp, torch.tensor(sorted(special), dtype=torch.long))
    return Corpus(tokens_bp, keep_bp, document_bp, name)
