"""A corpus is packed blocks of tokens, plus what every later figure needs to know about each token.

sae_lens streams tokens and forgets where they came from; evaluation needs to know which tokens count, which
document and which turn of a chat each belongs to, and where the text can be found again; training needs blocks that
start with BOS exactly once. So both read one `Corpus`: tokens, a mask, document numbers, roles, an origin, and a hash
that says which text it was.

Shapes: `b` blocks, `p` positions, `t` tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_lens_gemma4.errors import ConfigError, DataError

CORPUS_FILENAME = "corpus.safetensors"
_TENSORS = ("tokens_bp", "keep_bp", "document_bp", "role_bp")


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
        packed: whether documents stand end to end; else each has blocks of its own.
        roles: whose turns alone count; None for all, and for text that is no chat.
        exclude_turn_markers: whether what the chat template puts around messages is masked.
    """

    source: str | None
    split: str | None
    revision: str | None
    first_document: int
    next_document: int
    exclude_special_tokens: bool
    bos: bool
    tokenizer: str
    packed: bool = True
    roles: tuple[str, ...] | None = None
    exclude_turn_markers: bool = False


class Part(NamedTuple):
    """One of the corpora that were joined: its name, the number that its first document has, and its origin."""

    name: str
    first_number: int
    origin: Origin | None


@dataclass(frozen=True, eq=False)
class Corpus:
    """Blocks of tokens for one model.

    Attributes:
        tokens_bp: int64 `[block, pos]`.
        keep_bp: bool `[block, pos]`, the tokens that count: not padding, and not what was masked.
        document_bp: int64 `[block, pos]`, number of the token's document, from that of the first one read; -1 for
            padding.
        name: what the text is, for reports; a dataset's name and split unless given.
        role_bp: int8 `[block, pos]`, index into `roles` of the turn that the token belongs to; -1 where there is none.
            None if no token has a role, as in plain text.
        roles: the roles there are, in the words of the chats.
        origin: where the text came from, if known.
        joined: the corpora of which this one was made by `concat`; empty if it was not.
    """

    tokens_bp: torch.Tensor
    keep_bp: torch.Tensor
    document_bp: torch.Tensor
    name: str
    role_bp: torch.Tensor | None = None
    roles: tuple[str, ...] = ()
    origin: Origin | None = None
    joined: tuple[Part, ...] = ()

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

    @property
    def parts(self) -> tuple[Part, ...]:
        """The corpora that were joined, in the order of their documents' numbers; itself if none were."""
        return self.joined or (Part(self.name, 0, self.origin),)

    def locate(self, document: int) -> tuple[str, int]:
        """Of a document by its number here: which text it is in, and its number there."""
        part = next(part for part in reversed(self.parts) if part.first_number <= document)
        return part.name, document - part.first_number + (part.origin.first_document if part.origin else 0)

    def facts(self) -> dict[str, Any]:
        """What a report says of this corpus; None of what is not known."""
        known = _plain(self.origin) or {}
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
        documents, joined, offset = [], [], 0
        for c in corpora:
            documents.append(torch.where(c.document_bp >= 0, c.document_bp + offset, -1))
            joined += [part._replace(first_number=part.first_number + offset) for part in c.parts]
            offset += int(c.document_bp.max()) + 1
        return Corpus(
            torch.cat([c.tokens_bp for c in corpora]),
            torch.cat([c.keep_bp for c in corpora]),
            torch.cat(documents),
            " + ".join(c.name for c in corpora),
            torch.cat([c._role_among(roles) for c in corpora]) if roles else None,
            roles,
            corpora[0].origin if len({c.origin for c in corpora}) == 1 else None,
            tuple(joined),
        )

    def _role_among(self, roles: tuple[str, ...]) -> torch.Tensor:
        """`role_bp` with indices into `roles`, which has all of this corpus's."""
        if self.role_bp is None:
            return torch.full_like(self.tokens_bp, -1, dtype=torch.int8)
        index_r = torch.tensor([*map(roles.index, self.roles), -1], dtype=torch.int8)  # -1 is the last
        return index_r[self.role_bp.long()]

    def save(self, folder: str | Path) -> Path:
        """Write all of it into `folder`, as one file that is complete or absent; what `load` reads.

        Raises:
            ConfigError: it cannot be written; a corpus that is there already stays.
        """
        folder = Path(folder)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS if getattr(self, name) is not None}
        facts = {
            "name": self.name,
            "roles": self.roles,
            "origin": _plain(self.origin),
            "joined": [[part.name, part.first_number, _plain(part.origin)] for part in self.joined],
            "digest": _digest(tensors),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".corpus-", dir=folder) as partial:
                file = Path(partial) / CORPUS_FILENAME
                save_file(tensors, file, {"corpus": json.dumps(facts)})
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())
                file.replace(folder / CORPUS_FILENAME)
        except (OSError, SafetensorError) as e:
            raise ConfigError(f"Corpus {self.name!r} cannot be written to {folder}: {e}") from e
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Corpus:
        """The corpus that `save` wrote.

        Raises:
            DataError: there is none, or it is not all there, or not as it was written.
        """
        file = Path(folder) / CORPUS_FILENAME
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in set(_TENSORS) & set(opened.keys())}
                facts = json.loads((opened.metadata() or {})["corpus"])
            if facts["digest"] != _digest(tensors):
                raise DataError("its contents are not those that were written")
            return cls(
                **tensors,
                name=facts["name"],
                roles=tuple(facts["roles"]),
                origin=_origin(facts["origin"]),
                joined=tuple(Part(name, first, _origin(origin)) for name, first, origin in facts["joined"]),
            )
        except (OSError, SafetensorError, DataError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"There is no corpus that can be read in {folder}: {e}") from e


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _plain(origin: Origin | None) -> dict[str, Any] | None:
    """As JSON has it: lists for tuples."""
    return None if origin is None else asdict(origin) | {"roles": None if origin.roles is None else [*origin.roles]}


def _origin(plain: dict[str, Any] | None) -> Origin | None:
    if plain is None:
        return None
    return Origin(**plain | {"roles": None if plain["roles"] is None else tuple(plain["roles"])})
