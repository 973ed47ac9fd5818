"""A corpus is packed blocks of tokens, plus what every later figure needs to know about each token.

sae_lens streams tokens and forgets where they came from; evaluation needs to know which tokens count, which
document and which turn of a chat each belongs to, and where the text can be found again; training needs blocks that
start with BOS exactly once. So both read one `Corpus`: tokens, a mask, document numbers, roles, an origin, and a hash
that says which text it was.

Shapes: `b` blocks, `p` positions, `t` tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.documents import read_documents
from sae_lens_gemma4.activations.packing import pack, tokenize
from sae_lens_gemma4.activations.vocabulary import tokenizer_fingerprint
from sae_lens_gemma4.errors import ConfigError, DataError

CorpusLike = Any  # Corpus | Dataset | str | Path | Sequence[Document] | torch.Tensor
_MAX_ROLES = torch.iinfo(torch.int8).max


@dataclass(frozen=True)
class Origin:
    """Where a corpus's text is found, and how it was made into tokens.

    Attributes:
        source: name or path of the dataset; None for what was in memory.
        split: of the dataset; None where it has none.
        revision: commit of the hub's repository; None elsewhere, and where it cannot be known.
        first_document: number, in the split, of the first document read.
        next_document: of the first one not read: where a text that has nothing in common with this one can begin.
        exclude_special_tokens: whether special tokens are masked.
        bos: whether BOS opens every block and document.
        tokenizer: `tokenizer_fingerprint` of the one that made the tokens.
    """

    source: str | None
    split: str | None
    revision: str | None
    first_document: int
    next_document: int
    exclude_special_tokens: bool
    bos: bool
    tokenizer: str


@dataclass(frozen=True, eq=False)
class Corpus:
    """Blocks of tokens for one model.

    Attributes:
        tokens_bp: int64 `[block, pos]`.
        keep_bp: bool `[block, pos]`, the tokens that count: not special, not padding.
        document_bp: int64 `[block, pos]`, number of the token's document, from that of the first one read; -1 for
            padding.
        name: what the text is, for reports; a dataset's name and split unless given.
        role_bp: int8 `[block, pos]`, index into `roles` of the turn that the token belongs to; -1 where there is none.
            None if no token has a role, as in plain text.
        roles: the roles there are, in the words of the chats.
        origin: where the text came from, if known.
    """

    tokens_bp: torch.Tensor
    keep_bp: torch.Tensor
    document_bp: torch.Tensor
    name: str
    role_bp: torch.Tensor | None = None
    roles: tuple[str, ...] = ()
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if self.tokens_bp.ndim != 2 or self.tokens_bp.numel() == 0:
            raise DataError(
                f"Corpus {self.name!r} has tokens of shape {tuple(self.tokens_bp.shape)}, not [block, pos]."
            )
        if not self.tokens_bp.shape == self.keep_bp.shape == self.document_bp.shape:
            raise DataError(f"Tokens, mask and document numbers of corpus {self.name!r} differ in shape.")
        if self.role_bp is not None and self.role_bp.shape != self.tokens_bp.shape:
            raise DataError(f"Tokens and roles of corpus {self.name!r} differ in shape.")
        if not self.keep_bp.any():
            raise DataError(f"Every token of corpus {self.name!r} is masked: nothing is left to read.")

    @property
    def n_blocks(self) -> int:
        return self.tokens_bp.shape[0]

    @property
    def context_size(self) -> int:
        return self.tokens_bp.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.keep_bp.sum())

    @property
    def n_documents(self) -> int:
        return int(torch.unique(self.document_bp[self.keep_bp]).numel())

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of tokens and mask: the same text, the same hash."""
        digest = hashlib.sha256(str(tuple(self.tokens_bp.shape)).encode())
        digest.update(self.tokens_bp.contiguous().numpy().tobytes())
        digest.update(self.keep_bp.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """What a report says of this corpus; None of what is not known."""
        known = asdict(self.origin) if self.origin else {}
        return {
            "name": self.name,
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "blocks": self.n_blocks,
            "context_size": self.context_size,
            "hash": self.hash,
            **{f.name: known.get(f.name) for f in fields(Origin) if f.name != "tokenizer"},
        }

    def batches(self, n_blocks: int, *, shuffle: torch.Generator | None = None) -> Iterator[Corpus]:
        """The same corpus `n_blocks` blocks at a time, in order or shuffled by `shuffle`."""
        order = torch.arange(self.n_blocks) if shuffle is None else torch.randperm(self.n_blocks, generator=shuffle)
        for chosen in order.split(n_blocks):
            if self.keep_bp[chosen].any():
                yield self.take(chosen)

    def take(self, blocks: torch.Tensor) -> Corpus:
        return replace(
            self,
            tokens_bp=self.tokens_bp[blocks],
            keep_bp=self.keep_bp[blocks],
            document_bp=self.document_bp[blocks],
            role_bp=None if self.role_bp is None else self.role_bp[blocks],
        )

    @staticmethod
    def concat(corpora: Sequence[Corpus]) -> Corpus:
        """One corpus of all blocks. Documents keep numbers of their own, and an origin is kept that all share."""
        if not corpora:
            raise DataError("A mixture needs at least one corpus.")
        sizes = {c.context_size for c in corpora}
        if len(sizes) > 1:
            raise DataError(f"Corpora of different context sizes cannot be joined: {sorted(sizes)}.")
        roles = tuple(dict.fromkeys(role for c in corpora for role in c.roles))
        documents, offset = [], 0
        for c in corpora:
            documents.append(torch.where(c.document_bp >= 0, c.document_bp + offset, -1))
            offset += int(c.document_bp.max()) + 1
        return Corpus(
            torch.cat([c.tokens_bp for c in corpora]),
            torch.cat([c.keep_bp for c in corpora]),
            torch.cat(documents),
            " + ".join(c.name for c in corpora),
            torch.cat([c._role_among(roles) for c in corpora]) if roles else None,
            roles,
            corpora[0].origin if len({c.origin for c in corpora}) == 1 else None,
        )

    def _role_among(self, roles: tuple[str, ...]) -> torch.Tensor:
        """`role_bp` with indices into `roles`, which has all of this corpus's."""
        if self.role_bp is None:
            return torch.full_like(self.tokens_bp, -1, dtype=torch.int8)
        index_r = torch.tensor([*map(roles.index, self.roles), -1], dtype=torch.int8)  # -1 is the last
        return index_r[self.role_bp.long()]


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

    Raises:
        DataError: no text, not in a form that can be read, or with `exact_tokens` too little of it.
        ConfigError: numbers that make no sense, or a revision of something that is not on the hub.
        UnknownNameError: a split or an embedded text that does not exist.
    """
    if isinstance(source, Corpus):
        return source
    if context_size < 2:
        raise ConfigError(f"context_size must be at least 2 (BOS and one token), not {context_size}.")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}.")
    if exact_tokens and max_tokens is None:
        raise ConfigError("exact_tokens needs max_tokens: how many?")
    if skip_documents < 0:
        raise ConfigError(f"skip_documents must not be negative, as {skip_documents} is.")
    special = frozenset(tokenizer.all_special_ids) if exclude_special_tokens else frozenset()
    if isinstance(source, torch.Tensor):
        return _of_tokens(source, special, name or "tokens")

    label = name or (f"{source} [{split}]" if isinstance(source, str | Path) else "texts")
    documents = read_documents(
        source, split=split, skip=skip_documents, revision=revision, streaming=streaming, in_part=max_tokens is not None
    )
    opening = tokenizer.bos_token_id if bos else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    names: dict[str, int] = {}
    tokens, numbers, roles, counted = [], [], [], 0
    for block in pack(tokenize(documents, tokenizer), opening, context_size, packed=packed):
        missing = context_size - len(block.tokens)
        indices = [-1 if role is None else names.setdefault(role, len(names)) for role in block.roles]
        if len(names) > _MAX_ROLES:
            raise DataError(f"The chats of {label!r} have more than {_MAX_ROLES} roles, as {', '.join([*names][:3])}.")
        tokens.append(torch.tensor(block.tokens + [pad] * missing))
        numbers.append(torch.tensor(block.documents + [-1] * missing))
        roles.append(torch.tensor(indices + [-1] * missing, dtype=torch.int8))
        counted += sum(token not in special for token in block.tokens)
        if max_tokens is not None and counted >= max_tokens:
            break
    if not tokens:
        after = f" after its first {skip_documents:,} documents" if skip_documents else ""
        raise DataError(f"Corpus {label!r} holds no text{after}.")
    tokens_bp, document_bp = torch.stack(tokens), torch.stack(numbers)
    keep_bp = _keep(tokens_bp, special) & (document_bp >= 0)
    if exact_tokens and max_tokens is not None:
        if counted < max_tokens:
            raise DataError(f"Corpus {label!r} has {counted:,} tokens that count, fewer than {max_tokens:,}.")
        keep_bp &= keep_bp.flatten().cumsum(0).view_as(keep_bp) <= max_tokens
    origin = Origin(
        source=documents.source,
        split=documents.split,
        revision=documents.revision,
        first_document=documents.first,
        next_document=documents.first + documents.n_read,
        exclude_special_tokens=exclude_special_tokens,
        bos=opening is not None,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    return Corpus(tokens_bp, keep_bp, document_bp, label, torch.stack(roles) if names else None, tuple(names), origin)


def _of_tokens(tokens: torch.Tensor, special: frozenset[int], name: str) -> Corpus:
    tokens_bp = tokens.long().cpu()
    if tokens_bp.ndim != 2:
        raise DataError(f"A tensor corpus must be [block, pos]; this one is {tuple(tokens_bp.shape)}.")
    document_bp = torch.arange(len(tokens_bp))[:, None].expand_as(tokens_bp).clone()
    return Corpus(tokens_bp, _keep(tokens_bp, special), document_bp, name)


def _keep(tokens_bp: torch.Tensor, special: frozenset[int]) -> torch.Tensor:
    return ~torch.isin(tokens_bp, torch.tensor(sorted(special), dtype=torch.long))
