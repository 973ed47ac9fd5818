"""The activations of a chunk of blocks, by forward passes or from a cache, in memory that is written once.

A row goes from the forward's output straight to its place in the chunk. On a CUDA device nothing here waits for the
device but the last line of a chunk, which asks which of its tokens are finite.

Shapes: `b` blocks, `p` positions, `t` tokens of a chunk that count, `d` the hook's width.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import finite_rows, forwards
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.models.interface import HookedModel


class Reading(NamedTuple):
    """What was read of a chunk, in the corpus's order.

    Attributes:
        acts: `[t, d]` of each hook, in the model's dtype or the cache's; `d` flattened where a hook has heads.
        finite: bool `[t]` of each hook, on the CPU: tokens without NaN and infinity.
    """

    acts: dict[str, torch.Tensor]
    finite: dict[str, torch.Tensor]


@dataclass
class Reader:
    """Reads chunks at the hooks that `hook_names` has when a chunk is begun. The settings are `ActivationStream`'s.

    Several ranks share a chunk's forward passes, and each gets all of its rows. A chunk that was begun is then read to
    its end: one that stopped would leave the others waiting.
    """

    model: HookedModel
    hook_names: list[str]
    batch_blocks: int
    isolate_documents: bool
    device: torch.device
    cache: ActivationCache | None
    ranks: Ranks = ALONE

    @property
    def devices(self) -> list[torch.device]:
        """Where the work is done."""
        return [self.device, *(() if self.cache is not None else {p.device for p in self.model.parameters()})]

    @torch.no_grad()
    def read(self, text: Corpus, blocks: torch.Tensor) -> Generator[None, None, Reading]:
        """Read `blocks`, of which `text` consists; yields after each step, and returns what was read."""
        acts = yield from (self._harvested(text) if self.cache is None else self._cached(self.cache, blocks))
        return Reading(acts, {name: finite_rows(acts_td).cpu() for name, acts_td in acts.items()})

    def _cached(self, cache: ActivationCache, blocks: torch.Tensor) -> Generator[None, None, dict[str, torch.Tensor]]:
        acts = {}
        for name in list(self.hook_names):
            read_td = cache.read(name, blocks, pinned=self.device.type == "cuda")
            acts[name] = read_td.to(self.device, non_blocking=True)
            yield
        return acts

    def _harvested(self, text: Corpus) -> Generator[None, None, dict[str, torch.Tensor]]:
        acts: dict[str, torch.Tensor] = {}
        names, shares = self.ranks.first(list(self.hook_names)), self._shares(text)
        whole = slice(0, text.n_blocks), slice(0, text.n_tokens)
        blocks, rows = shares[self.ranks.rank] if shares else whole
        end = rows.start
        for batch, found in forwards(
            self.model,
            text.take(torch.arange(blocks.start, blocks.stop)),
            names,
            batch_blocks=self.batch_blocks,
            isolate_documents=self.isolate_documents,
        ):
            kept_t = batch.keep_bp.flatten().nonzero()[:, 0]
            start, end = end, end + len(kept_t)
            for name, acts_bpd in found.items():
                acts_rd = acts_bpd.flatten(2).flatten(0, 1)
                if name not in acts:
                    acts[name] = acts_rd.new_empty(
                        (text.n_tokens, acts_rd.shape[1]),
                        device=self.device,
                        pin_memory=acts_rd.device.type == "cuda" and self.device.type == "cpu",
                    )
                gather(acts_rd, kept_t, acts[name][start:end])
            if self.ranks.world == 1:
                yield
        for rank, (_, rows) in enumerate(shares):
            for name in names:
                self.ranks.spread(acts[name][rows], rank)
        if self.device.type == "cpu":
            for device in self.devices[1:]:
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        return acts

    def _shares(self, text: Corpus) -> list[tuple[slice, slice]]:
        """Blocks and rows that each rank reads, or none if one had no row to read, and could not tell its shape.

        They are whole batches of blocks, so that rows are what they are in one process.
        """
        n_b = text.keep_bp.sum(dim=1)
        row_b = torch.cat([n_b.new_zeros(1), n_b.cumsum(0)]).tolist()
        shares = []
        for part in self.ranks.parts(-(-text.n_blocks // self.batch_blocks)):
            first, last = part.start * self.batch_blocks, min(part.stop * self.batch_blocks, text.n_blocks)
            shares.append((slice(first, last), slice(row_b[first], row_b[last])))
        return shares if all(rows.stop > rows.start for _, rows in shares) else []


def gather(from_rd: torch.Tensor, rows_t: torch.Tensor, into_td: torch.Tensor) -> None:
    """Write rows of a table to `into_td`, in its dtype and on its device: one move where these are the table's."""
    rows_t = rows_t.to(from_rd.device, non_blocking=True)
    if (from_rd.dtype, from_rd.device) == (into_td.dtype, into_td.device):
        torch.index_select(from_rd, 0, rows_t, out=into_td)
    else:
        into_td.copy_(from_rd.index_select(0, rows_t), non_blocking=True)
