"""Where a stream is in its text, and the chunks that it reads there, each in an order that is a function of its place.

A shard is what is held of the text at once: one epoch of a fixed corpus, or a part of a text that is streamed. Blocks
are permuted in each shard, and tokens in each chunk of blocks.

Shapes: `t` tokens of a chunk that count, `r` rows still to come of it, `d` the hook's width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.reading import Reader, Reading, gather
from sae_lens_gemma4.errors import ConfigError

Skipped = tuple[dict[str, Any], ...]


class Shards(Protocol):
    """A text too large to hold, such as `CorpusStream`."""

    def shards(self, start: dict[str, Any] | None) -> Iterator[tuple[Corpus, dict[str, Any] | None]]:
        """Its parts from `start` on (None: the first), each with the start of the next."""
        ...


@dataclass(frozen=True)
class Position:
    """Where the next row comes from, as plain data for a checkpoint.

    Attributes:
        shard: number of the shard; of a fixed corpus, of the epoch.
        chunk: number of the chunk in the shard.
        row: in the chunk's permutation, rows that are skipped counted too.
        corpus: where the shard starts in the streamed text; None for a fixed corpus, and for the first shard.
        tokens: that count, in all shards begun.
        skipped: documents with tokens left out so far; see `ActivationStream.skipped`.
    """

    shard: int = 0
    chunk: int = 0
    row: int = 0
    corpus: dict[str, Any] | None = None
    tokens: int = 0
    skipped: Skipped = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Position:
        return cls(**{**facts, "skipped": tuple(facts["skipped"])})


@dataclass
class Chunk:
    """Some blocks' activations, and what of them is still to come once it is taken up.

    Attributes:
        order_t: in which rows come.
        at: where the chunk begins, or is gone on with; what was skipped is known once it is taken up.
        after: where the next begins.
        places_r: in `order_t`, on the CPU.
        rows_r: of the activations, on their device.
    """

    text: Corpus
    read: Reading
    order_t: torch.Tensor
    at: Position
    after: Position
    places_r: torch.Tensor = field(init=False)
    rows_r: torch.Tensor = field(init=False)

    def take_up(self, hook_names: Sequence[str], skipped: Skipped) -> Skipped:
        """Begin with the rows that are finite at all of these hooks. Returns `skipped` with what is left out here."""
        finite_t, skipped = self._finite(hook_names, skipped)
        self.at, self.after = replace(self.at, skipped=skipped), replace(self.after, skipped=skipped)
        places_r = finite_t[self.order_t].nonzero()[:, 0]
        self.places_r = places_r[places_r >= self.at.row]
        for acts_td in self.read.acts.values():
            if acts_td.is_cuda:  # it may have been made on another stream than it is used on
                acts_td.record_stream(torch.cuda.current_stream(acts_td.device))
        self.rows_r = self.order_t[self.places_r].to(self.read.acts[hook_names[0]].device)
        return skipped

    @property
    def position(self) -> Position:
        return replace(self.at, row=int(self.places_r[0])) if len(self.places_r) else self.after

    def take(self, n_rows: int, into: Mapping[str, torch.Tensor]) -> None:
        """Write the next rows into `[n_rows, d]` of each hook."""
        for name, part_nd in into.items():
            gather(self.read.acts[name], self.rows_r[:n_rows], part_nd)
        self.places_r, self.rows_r = self.places_r[n_rows:], self.rows_r[n_rows:]

    def free(self) -> None:
        """Let the activations go, whoever else holds the chunk."""
        self.read.acts.clear()

    def _finite(self, hook_names: Sequence[str], skipped: Skipped) -> tuple[torch.Tensor, Skipped]:
        finite_t = torch.ones(self.text.n_tokens, dtype=torch.bool)
        rows = {(row["hook"], row["corpus"], row["document"]): row for row in map(dict, skipped)}
        for name in hook_names:
            bad_t = finite_t & ~self.read.finite[name]
            finite_t &= ~bad_t
            if self.at.row or not bad_t.any():  # a chunk that was begun before is counted already
                continue
            document_t = self.text.document_bp[self.text.keep_bp]
            for document, n in zip(*document_t[bad_t].unique(return_counts=True), strict=True):
                corpus, number = self.text.locate(int(document))
                new = {"hook": name, "corpus": corpus, "document": number, "tokens": 0}
                new |= {"shard": self.at.shard, "chunk": self.at.chunk}
                rows.setdefault((name, corpus, number), new)["tokens"] += int(n)
        return finite_t, tuple(rows.values())


def read_chunks(
    reader: Reader, corpus: Corpus | Shards, at: Position, *, seed: int, buffer_blocks: int
) -> Generator[Chunk | None, None, None]:
    """The chunks from a position on, and None wherever the work may be stopped.

    Raises:
        ConfigError: a position that the text does not have.
    """
    for shard, next_start in _shards(corpus, at):
        chunks = _permutation(shard.n_blocks, seed, at.shard).split(buffer_blocks)
        if at.chunk >= len(chunks):
            raise ConfigError(f"Chunk {at.chunk} of {len(chunks)}: the position is of another text or buffer_blocks.")
        if at.chunk == at.row == 0:
            at = replace(at, tokens=at.tokens + shard.n_tokens)
        next_shard = {"shard": at.shard + 1, "chunk": 0, "row": 0, "corpus": next_start}
        for number in range(at.chunk, len(chunks)):
            step = next_shard if number + 1 == len(chunks) else {"chunk": number + 1, "row": 0}
            after = replace(at, **step)
            if shard.keep_bp[chunks[number]].any():
                text = shard.take(chunks[number])
                read = yield from reader.read(text, chunks[number])
                yield Chunk(text, read, _permutation(text.n_tokens, seed, at.shard, number), at, after)
            at = after


def _shards(corpus: Corpus | Shards, at: Position) -> Iterator[tuple[Corpus, dict[str, Any] | None]]:
    if isinstance(corpus, Corpus):
        return zip(itertools.repeat(corpus), itertools.repeat(None))
    return corpus.shards(at.corpus)


def _permutation(n: int, *seed: int) -> torch.Tensor:
    """Of 0 … n - 1; a function of `seed` alone."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
