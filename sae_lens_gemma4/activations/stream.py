"""Batches of activations without end, in an order that a killed run can take up again at any row.

sae_lens mixes tokens in a buffer whose contents are a function of everything that came before, so a run that is
resumed sees other batches, and two runs at two hooks see two orders. Here the order is a function of the seed and of
where in the text one is: blocks are permuted in each shard, tokens in each chunk of blocks, and batches are consecutive
slices of the rows that come of it. One forward serves all hooks, and what was in memory is never written down.

A row is moved twice: from the forward's output into its chunk, and from there into its batch.

Shapes: `n` batch_size, `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.chunks import Chunk, Position, Shards, read_chunks
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.prefetch import Prefetch, SideStreams
from sae_lens_gemma4.activations.reading import Reader
from sae_lens_gemma4.errors import ConfigError, DataError, check_name
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.models.interface import HookedModel

__all__ = ["ActivationStream", "Batch", "Position", "Shards"]

Batch = dict[str, torch.Tensor]


class ActivationStream:
    """An iterator of batches: for each hook, `[n, d]` (`d` flattened where a hook has heads). Nothing is dropped: a
    batch may span chunks and shards, and the iterator ends, if at all, where the text has no full batch left.

    All hooks see the same tokens, and the order is the same whichever hooks are asked for. One exception: a token whose
    activations are not finite at one of the hooks is left out at all of them, so that the rows after it move up.

    In memory are one chunk at all hooks, in the model's dtype, and one batch; with `prefetch` two chunks.

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
        prefetch: while a chunk is being taken, a thread reads the next (on CUDA devices in streams of its own). Batches
            and positions are the same; autocast, which is a thread's own, is off there. Whoever runs the model in
            between calls `settle` before, and whoever stops reading before the end calls `close`.
        ranks: processes that read the same stream and share the forward passes; each gets all rows. With `prefetch`
            they are of a group that nobody else uses.

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
        prefetch: bool = False,
        ranks: Ranks = ALONE,
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
        self.hook_names = list(dict.fromkeys(hook_names))
        self.batch_size, self.max_skipped, self.dtype = batch_size, max_skipped, dtype
        self.position = position or Position()
        reader = Reader(model, self.hook_names, batch_blocks, isolate_documents, torch.device(device), cache, ranks)
        work = read_chunks(reader, corpus, self.position, seed=seed, buffer_blocks=buffer_blocks)
        self._chunks: Prefetch[Chunk] | Generator[Chunk, None, None]
        if prefetch:
            self._chunks = Prefetch(work, SideStreams(reader.devices))
        else:
            self._chunks = (chunk for chunk in work if chunk is not None)
        self._iterator = self._batches()

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Documents with tokens left out: `hook` (the first one asked for at which they are not finite), `corpus`
        and `document` (as `Corpus.locate` has them), `tokens` (each epoch's counted), and the `shard` and `chunk` that
        they were first met in."""
        return [dict(row) for row in self.position.skipped]

    def drop(self, hook_name: str) -> None:
        """Read this hook no more: it is in none of the next batches, and forwards from the next chunk on that is
        begun stop earlier.

        Without any hook left, the stream ends, and what it holds is freed.
        """
        self.hook_names.remove(check_name("hook", hook_name, self.hook_names))
        if not self.hook_names:
            self.close()

    def settle(self) -> None:
        """Wait for what is being read ahead. The model is not run again until the next batch is asked for."""
        if isinstance(self._chunks, Prefetch):
            self._chunks.settle()

    def close(self) -> None:
        """End the stream: what it holds is freed, and reading ahead ends with the forward that is running."""
        self._iterator.close()

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def _batches(self) -> Generator[Batch, None, None]:
        filling: list[Batch] = []
        missing, skipped = self.batch_size, self.position.skipped
        try:
            for chunk in self._chunks:
                skipped = chunk.take_up(self.hook_names, skipped)
                self._refuse_too_many(chunk.at)
                while n_rows := min(missing, len(chunk.places_r)):
                    if missing == self.batch_size:
                        filling.append({name: self._empty(chunk.read.acts[name]) for name in self.hook_names})
                    start = self.batch_size - missing
                    chunk.take(n_rows, {name: b_nd[start : start + n_rows] for name, b_nd in filling[0].items()})
                    missing -= n_rows
                    if missing == 0:
                        self.position = chunk.position
                        missing = self.batch_size
                        yield filling.pop()
                chunk.free()  # before the next one is read
        finally:
            self._chunks.close()

    def _empty(self, acts_td: torch.Tensor) -> torch.Tensor:
        return acts_td.new_empty((self.batch_size, acts_td.shape[1]), dtype=self.dtype)

    def _refuse_too_many(self, at: Position) -> None:
        n_skipped = sum(row["tokens"] for row in at.skipped)
        if n_skipped > self.max_skipped * at.tokens:
            first = at.skipped[0]
            raise DataError(
                f"{n_skipped:,} of {at.tokens:,} tokens have activations that are not finite, more than max_skipped = "
                f"{self.max_skipped:g} of them; first at {first['hook']} in document {first['document']} of "
                f"{first['corpus']!r}."
            )
