"""Batches of activations without end, in an order that a killed run can take up again at any row.

sae_lens mixes tokens in a buffer whose contents are a function of everything that came before, so a run that is
resumed sees other batches, and two runs at two hooks see two orders. Here the order is a function of the seed and of
where in the text one is: blocks are permuted in each shard, tokens in each chunk of blocks, and batches are consecutive
slices of the rows that come of it. One forward serves all hooks, and what was in memory is never written down.

A shard is what is held of the text at once: one epoch of a fixed corpus, or a part of a text that is streamed.

Shapes: `b` blocks, `t` tokens that count, `r` rows still to come of a chunk, `n` batch_size, `d` the hook's width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import finite_rows, harvest
from sae_lens_gemma4.errors import ConfigError, DataError, check_name
from sae_lens_gemma4.models.interface import HookedModel

Batch = dict[str, torch.Tensor]


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
    skipped: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Position:
        return cls(**{**facts, "skipped": tuple(facts["skipped"])})


@dataclass
class _Chunk:
    """Some blocks' activations, and what of them is still to come."""

    acts: Batch
    order_t: torch.Tensor
    places_r: torch.Tensor  # in order_t
    at: Position
    after: Position

    @property
    def position(self) -> Position:
        return replace(self.at, row=int(self.places_r[0])) if len(self.places_r) else self.after

    def take(self, n_rows: int, hook_names: Sequence[str]) -> Batch:
        chosen, self.places_r = self.order_t[self.places_r[:n_rows]], self.places_r[n_rows:]
        return {name: self.acts[name][chosen.to(self.acts[name].device)] for name in hook_names}


class ActivationStream:
    """An iterator of batches: for each hook, `[n, d]` (`d` flattened where a hook has heads). Nothing is dropped: a
    batch may span chunks and shards, and the iterator ends, if at all, where the text has no full batch left.

    All hooks see the same tokens, and the order is the same whichever hooks are asked for. One exception: a token whose
    activations are not finite at one of the hooks is left out at all of them, so that the rows after it move up.

    In memory are one chunk at all hooks, in the model's dtype, and one batch.

    Args:
        model: its forward is run; not with `cache`.
        corpus: a fixed text, or one that comes in shards.
        hook_names: where to read.
        batch_size: rows of a batch.
        seed: of the order. No global generator is read or touched.
        buffer_blocks: blocks of a chunk.
        batch_blocks: blocks of one forward.
        isolate_documents: as `harvest` has it.
        dtype, device: of the batches; chunks are held on `device`.
        max_skipped: share of the tokens of all shards begun that may be left out.
        cache: of the fixed `corpus`, read in the place of forwards.
        position: where to begin: another stream's `position`, made with the same arguments.

    Attributes:
        hook_names: hooks that are still read.
        position: before the next batch.

    Raises:
        ConfigError: numbers that make no sense; a cache or a position of something else.
        UnknownNameError: a hook that the cache does not hold; while iterating, one that the model does not have.
        DataError: while iterating, more than `max_skipped` of the tokens are left out.
    """

    def __init__(
        self,
        model: HookedModel,
        corpus: Corpus | Shards,
        hook_names: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        buffer_blocks: int = 64,
        batch_blocks: int = 16,
        isolate_documents: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_skipped: float = 0.001,
        cache: ActivationCache | None = None,
        position: Position | None = None,
    ) -> None:
        for what, n in {"batch_size": batch_size, "buffer_blocks": buffer_blocks, "batch_blocks": batch_blocks}.items():
            if n < 1:
                raise ConfigError(f"{what} must be at least 1, not {n}.")
        if not 0 <= max_skipped < 1:
            raise ConfigError(f"max_skipped is a share from 0 to less than 1, not {max_skipped}.")
        if not hook_names:
            raise ConfigError("A stream of activations needs at least one hook.")
        if cache is not None:
            if not isinstance(corpus, Corpus):
                raise ConfigError("An activation cache is of a fixed corpus; this text is streamed.")
            cache.require(corpus, hook_names, isolate_documents=isolate_documents)
        self.model, self.corpus, self.cache = model, corpus, cache
        self.hook_names = list(dict.fromkeys(hook_names))
        self.batch_size, self.seed, self.max_skipped = batch_size, seed, max_skipped
        self.buffer_blocks, self.batch_blocks, self.isolate_documents = buffer_blocks, batch_blocks, isolate_documents
        self.dtype, self.device = dtype, device
        self.position = position or Position()
        self._iterator = self._batches()

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Documents with tokens left out: `hook` (the first one asked for at which they are not finite), `corpus`
        and `document` (as `Corpus.locate` has them), `tokens` (each epoch's counted), and the `shard` and `chunk` that
        they were first met in."""
        return [dict(row) for row in self.position.skipped]

    def drop(self, hook_name: str) -> None:
        """Read this hook no more: it is in none of the next batches, and forwards from the next chunk on stop earlier.

        Without any hook left, the stream ends, and what it holds is freed.
        """
        self.hook_names.remove(check_name("hook", hook_name, self.hook_names))
        if not self.hook_names:
            self._iterator.close()

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def _batches(self) -> Generator[Batch, None, None]:
        parts: list[Batch] = []
        missing = self.batch_size
        for chunk in self._chunks():
            while n_rows := min(missing, len(chunk.places_r)):
                parts.append(chunk.take(n_rows, self.hook_names))
                missing -= n_rows
                if missing == 0:
                    self.position = chunk.position
                    missing = self.batch_size
                    yield _joined(parts, self.hook_names, self.dtype)
            chunk.acts.clear()  # before the next one is read

    def _chunks(self) -> Iterator[_Chunk]:
        at = self.position
        for shard, next_start in self._shards():
            chunks = _permutation(shard.n_blocks, self.seed, at.shard).split(self.buffer_blocks)
            if at.chunk >= len(chunks):
                raise ConfigError(
                    f"Chunk {at.chunk} of {len(chunks)}: the position is of another text or buffer_blocks."
                )
            if at.chunk == at.row == 0:
                at = replace(at, tokens=at.tokens + shard.n_tokens)
            next_shard = {"shard": at.shard + 1, "chunk": 0, "row": 0, "corpus": next_start}
            for number in range(at.chunk, len(chunks)):
                step = next_shard if number + 1 == len(chunks) else {"chunk": number + 1, "row": 0}
                if shard.keep_bp[chunks[number]].any():
                    text = shard.take(chunks[number])
                    acts = self._read(text, chunks[number])
                    finite_t, at = self._finite(text, acts, at)
                    order_t = _permutation(text.n_tokens, self.seed, at.shard, number)
                    places_r = finite_t[order_t].nonzero()[:, 0]
                    yield _Chunk(acts, order_t, places_r[places_r >= at.row], at, replace(at, **step))
                at = replace(at, **step)

    def _shards(self) -> Iterator[tuple[Corpus, dict[str, Any] | None]]:
        if isinstance(self.corpus, Corpus):
            return zip(itertools.repeat(self.corpus), itertools.repeat(None))
        return self.corpus.shards(self.position.corpus)

    def _read(self, text: Corpus, blocks: torch.Tensor) -> Batch:
        if self.cache is not None:
            return {name: self.cache.read(name, blocks).to(self.device) for name in self.hook_names}
        acts: Batch = {}
        end = 0
        for part in harvest(
            self.model,
            text,
            self.hook_names,
            batch_blocks=self.batch_blocks,
            isolate_documents=self.isolate_documents,
            require_finite=False,
        ):
            start, end = end, end + len(part.tokens_t)
            for name, part_t in part.acts.items():
                part_td = part_t.flatten(1)
                if name not in acts:
                    acts[name] = part_td.new_empty((text.n_tokens, part_td.shape[1]), device=self.device)
                acts[name][start:end] = part_td
        return acts

    def _finite(self, text: Corpus, acts: Batch, at: Position) -> tuple[torch.Tensor, Position]:
        """Which tokens are finite at all hooks, and the position with those counted that are not."""
        finite_t = torch.ones(text.n_tokens, dtype=torch.bool)
        rows = {(row["hook"], row["corpus"], row["document"]): row for row in map(dict, at.skipped)}
        for name, acts_td in acts.items():
            bad_t = finite_t & ~finite_rows(acts_td).cpu()
            finite_t &= ~bad_t
            if at.row or not bad_t.any():  # a chunk that was begun before is counted already
                continue
            for document, n in zip(*text.document_bp[text.keep_bp][bad_t].unique(return_counts=True), strict=True):
                corpus, number = text.locate(int(document))
                new = {"hook": name, "corpus": corpus, "document": number, "tokens": 0}
                new |= {"shard": at.shard, "chunk": at.chunk}
                rows.setdefault((name, corpus, number), new)["tokens"] += int(n)
        at = replace(at, skipped=tuple(rows.values()))
        n_skipped = sum(row["tokens"] for row in at.skipped)
        if n_skipped > self.max_skipped * at.tokens:
            first = at.skipped[0]
            raise DataError(
                f"{n_skipped:,} of {at.tokens:,} tokens have activations that are not finite, more than max_skipped = "
                f"{self.max_skipped:g} of them; first at {first['hook']} in document {first['document']} of "
                f"{first['corpus']!r}."
            )
        return finite_t, at


def _joined(parts: list[Batch], hook_names: Sequence[str], dtype: torch.dtype) -> Batch:
    """One batch of its parts, which are let go."""
    batch = {name: torch.cat([part.pop(name) for part in parts]).to(dtype) for name in hook_names}
    parts.clear()
    return batch


def _permutation(n: int, *seed: int) -> torch.Tensor:
    """Of 0 … n - 1; a function of `seed` alone."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
