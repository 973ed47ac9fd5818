"""Text that is too long to hold, as one corpus after another.

A run over a billion tokens can neither hold its text nor begin it again when it was killed. So a stream of shards is a
function of the sources alone: a place in it is a few numbers for each source, and from there on the same shards come,
block for block, as in a run that was never stopped. Nothing is lost between shards: those of one source, one after
another, are the blocks that `build_corpus` would make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Assembly, Corpus, Packer
from sae_lens_gemma4.activations.documents import Documents
from sae_lens_gemma4.activations.packing import Block
from sae_lens_gemma4.activations.sources import Source, fingerprint
from sae_lens_gemma4.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Place:
    """Where the next block of a source begins, in one pass over it.

    Attributes:
        document: documents of it before the one in which that is.
        tokens: tokens of that one before it.
        counted: tokens that count, in this pass so far.
        ended: no block follows.
        revision: commit that is read, on the hub.
    """

    document: int = 0
    tokens: int = 0
    counted: int = 0
    ended: bool = False
    revision: str | None = None


class _Reader:
    """The blocks of one source from a place on; `place` is always that of the next."""

    def __init__(self, source: Source, packer: Packer, place: _Place) -> None:
        self.source, self.packer, self.place = source, packer, place
        self.documents: Documents | None = None
        self._blocks: Iterator[Block] = iter(())
        self._opened_at = place

    def read(self) -> Block | None:
        if self.documents is None:
            self.documents = self.source.documents(self.place.document, revision=self.place.revision)
            self.place = self._opened_at = replace(self.place, revision=self.documents.revision)
            self._blocks = self.packer.blocks(self.documents, skip_tokens=self.place.tokens)
        block = next(self._blocks, None)
        if block is None:
            self.place = replace(self.place, ended=True)
            if not self.place.counted:
                raise DataError(f"No token of {self.source.label!r} counts, in all of its text.")
            return None
        number, tokens = block.end
        self.place = replace(
            self.place,
            document=self._opened_at.document + number,
            tokens=tokens + (self._opened_at.tokens if number == 0 else 0),
            counted=self.place.counted + sum(block.counts),
        )
        return block

    def number(self, place: _Place) -> int:
        """The number, among the documents as they are read now, of the one that `place` is in."""
        return place.document - self._opened_at.document


class CorpusStream:
    """Sources as an endless text, or one of so many passes, in shards of `shard_blocks` blocks.

    Sources are mixed block by block so that the tokens that count stay in the proportion of their `tokens`, which are
    shares here and not limits; equal parts if none states any. A source that has ended is left out for the rest of
    the pass; when all have, the next pass begins, each from its start.

    Args:
        sources: the texts; those on the hub are fetched as they are read.
        tokenizer, context_size, exclude_special_tokens, bos, packed: as of `build_corpus`.
        shard_blocks: blocks that are held, and can be put in another order, at a time.
        passes: how many times all is read; None for no end.

    Raises:
        ConfigError: no sources, some with and some without `tokens`, or numbers that make no sense.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_size: int,
        shard_blocks: int = 1024,
        exclude_special_tokens: bool = True,
        bos: bool = True,
        packed: bool = True,
        passes: int | None = None,
    ) -> None:
        stated = [source.tokens for source in sources if source.tokens is not None]
        if not sources or (stated and len(stated) < len(sources)):
            raise ConfigError("A stream needs sources, and `tokens` of each of them or of none: they are its shares.")
        for name, value in (("shard_blocks", shard_blocks), ("passes", passes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        form = {
            "context_size": context_size,
            "exclude_special_tokens": exclude_special_tokens,
            "bos": bos,
            "packed": packed,
        }
        self.sources = tuple(sources)
        self.context_size, self.shard_blocks, self.passes = context_size, shard_blocks, passes
        self._shares = stated or [1] * len(sources)
        self._packers = [source.packer(tokenizer, **form) for source in sources]
        self.fingerprint = fingerprint(self.sources, tokenizer, shard_blocks=shard_blocks, **form)

    def shards(self, start: Mapping[str, Any] | None = None) -> Iterator[tuple[Corpus, dict[str, Any]]]:
        """Shard after shard, each with where the next one begins: plain data, for `start`.

        Documents of each source are numbered in a shard from the first one in it (`Corpus.locate`).

        Raises:
            ConfigError: `start` is of another stream.
            DataError: a source that cannot be read, or in all of which nothing counts.
        """
        at = self._start(start)
        while self.passes is None or at["pass"] < self.passes:
            readers = [
                _Reader(source, packer, _Place(**place))
                for source, packer, place in zip(self.sources, self._packers, at["sources"], strict=True)
            ]
            blocks = self._mixed(readers)
            while True:
                before = [reader.place for reader in readers]
                parts: dict[int, Assembly] = {}
                for index, block in islice(blocks, self.shard_blocks):
                    label = self.sources[index].label
                    parts.setdefault(index, Assembly(self._packers[index], label)).add(block)
                if not parts:
                    break
                at = self._position(at["pass"], [reader.place for reader in readers])
                corpora = [
                    self._corpus(part, readers[index], before[index])
                    for index, part in sorted(parts.items())
                    if part.counted
                ]
                if corpora:
                    yield corpora[0] if len(corpora) == 1 else Corpus.concat(corpora), at
            at = self._position(at["pass"] + 1, [_Place(revision=reader.place.revision) for reader in readers])

    def _mixed(self, readers: Sequence[_Reader]) -> Iterator[tuple[int, Block]]:
        """Blocks in turn, each of the source that is furthest behind its share."""
        while live := [index for index, reader in enumerate(readers) if not reader.place.ended]:
            index = min(live, key=lambda i: readers[i].place.counted / self._shares[i])
            block = readers[index].read()
            if block is not None:
                yield index, block

    def _corpus(self, part: Assembly, reader: _Reader, first: _Place) -> Corpus:
        assert reader.documents is not None
        skipped = reader.source.skip_documents
        origin = reader.packer.origin(reader.documents, skipped + first.document, skipped + reader.place.document + 1)
        return part.corpus(origin, first_number=reader.number(first))

    def _start(self, start: Mapping[str, Any] | None) -> dict[str, Any]:
        if start is None:
            return self._position(0, [_Place()] * len(self.sources))
        if start.get("stream") != self.fingerprint:
            raise ConfigError(
                "The place to go on from is of another stream: its sources, their files, the tokenizer or the packing "
                "were others."
            )
        return dict(start)

    def _position(self, n_pass: int, places: Sequence[_Place]) -> dict[str, Any]:
        return {"stream": self.fingerprint, "pass": n_pass, "sources": [asdict(place) for place in places]}
