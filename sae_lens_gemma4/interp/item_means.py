"""One forward pass over items, and of each the mean of what every layer holds and of what every SAE makes of it.

Contrasts and prompt pairs compare items, so what is kept is one row an item and hook: sums, never tokens. Items are
read in the order of their lengths, each batch no wider than its longest: models are causal, so padding on the right
changes nothing.

Shapes: `n` items, `t` tokens that count, `d` a hook's width, `f` latents or, of a site, whatever it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.blocks import Corpus
from sae_lens_gemma4.activations.harvest import Harvest, harvest
from sae_lens_gemma4.activations.vocabulary import check_tokenizer
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError, check_name
from sae_lens_gemma4.evaluation.measuring import check_sae, sae_rows
from sae_lens_gemma4.evaluation.reading import encode_active, flat_heads
from sae_lens_gemma4.models.interface import HookedModel, model_name

Kind = Literal["activations", "latents"]
Statistic = Literal["mean", "max", "last"]
_KINDS, _STATISTICS = ("activations", "latents"), ("mean", "max", "last")


class Site(NamedTuple):
    """What one hook, or one SAE there, gave.

    Attributes:
        hook_name: as it was asked for.
        kind: the hook's own dimensions, or the latents of its SAE.
        values_nf: float32, one row an item.
    """

    hook_name: str
    kind: Kind
    values_nf: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ItemMeans:
    """One row an item at every site, from one forward pass.

    Attributes:
        sites: activations of every hook in the order asked for, then the latents of every SAE.
        tokens_n: int64, how many tokens of each item counted.
        statistic: what a row is, of an item's tokens that count.
        facts: what was read: model, corpus, statistic, as plain data.
    """

    sites: tuple[Site, ...]
    tokens_n: npt.NDArray[np.int64]
    statistic: str
    facts: dict[str, Any]

    @property
    def n_items(self) -> int:
        return len(self.tokens_n)

    def of(self, hook_name: str, kind: Kind = "activations") -> npt.NDArray[np.float32]:
        """The rows `[n, f]` of one site. Raises `UnknownNameError` for one that was not read."""
        for site in self.sites:
            if site.hook_name == hook_name and site.kind == kind:
                return site.values_nf
        raise UnknownNameError(f"site of {kind}", hook_name, [s.hook_name for s in self.sites if s.kind == kind])

    def only(self, kind: Kind) -> ItemMeans:
        """The sites of one kind. Raises `DataError` where there are none."""
        check_name("kind of site", kind, _KINDS)
        chosen = tuple(site for site in self.sites if site.kind == kind)
        if not chosen:
            raise DataError(f"These item means have no {kind}; ask item_means for them.")
        return replace(self, sites=chosen)

    def take(self, at: npt.NDArray[np.int64] | Sequence[int]) -> ItemMeans:
        """The same of some items, in the order given."""
        at = np.asarray(at, dtype=np.int64)
        sites = tuple(site._replace(values_nf=site.values_nf[at]) for site in self.sites)
        return replace(self, sites=sites, tokens_n=self.tokens_n[at])


@torch.no_grad()
def item_means(
    model: HookedModel,
    items_corpus: Corpus,
    hook_names: Sequence[str],
    saes: Mapping[str, SAE[Any]] | None = None,
    *,
    batch_blocks: int = 16,
    statistic: Statistic = "mean",
    progress: bool = False,
) -> ItemMeans:
    """Read items once; of each the mean (or maximum, or last) over its tokens that count, at every hook and SAE.

    Args:
        items_corpus: of `item_corpus`: one item a block.
        hook_names: hooks whose activations are wanted; may be empty where there are SAEs.
        saes: by the hook that each reads, which need not be among `hook_names`.
        batch_blocks: items a forward.
        statistic: "mean" is over all tokens that count, also those on which a latent is silent; "last" is the last
            token that counts.

    Raises:
        DataError: blocks that hold more than one item or none, another tokenizer's tokens, values that are not finite.
        ConfigError: nothing asked for, a hook asked for twice, or no items a batch.
        SAEError, UnknownNameError: as `check_sae`, `sae_rows` and `harvest` do.
    """
    saes = dict(saes or {})
    check_name("statistic", statistic, _STATISTICS)
    if not hook_names and not saes:
        raise ConfigError("Name at least one hook or SAE whose item means are wanted.")
    if len(set(hook_names)) < len(hook_names):
        raise ConfigError(f"Each hook is read once; {', '.join(hook_names)} repeats one.")
    if batch_blocks < 1:
        raise ConfigError(f"batch_blocks must be at least 1, not {batch_blocks}.")
    _check_items(items_corpus)
    check_tokenizer(items_corpus, model.tokenizer)
    for hook_name, sae in saes.items():
        check_sae(sae, hook_name)
    tokens_n = items_corpus.keep_bp.sum(dim=1)
    n = items_corpus.n_blocks
    acts_of: dict[str, torch.Tensor] = {}
    latents_of = {name: torch.zeros(n, sae.cfg.d_sae) for name, sae in saes.items()}
    bar = tqdm(total=n, desc="Reading the items", unit="item", disable=not progress)
    with bar:
        for at_n, batch in _batches(model, items_corpus, [*dict.fromkeys((*hook_names, *saes))], batch_blocks):
            counts = tokens_n[at_n].tolist()
            for name in hook_names:
                rows_nd = _reduced(batch.acts[name].flatten(1), counts, statistic)
                acts_of.setdefault(name, torch.zeros(n, rows_nd.shape[1]))[at_n] = rows_nd
            for name, sae in saes.items():
                with flat_heads(sae):
                    latents_of[name][at_n] = _latents(sae, name, batch, counts, statistic)
            bar.update(len(at_n))
    sites = [Site(name, "activations", acts_of[name].numpy()) for name in hook_names]
    sites += [Site(name, "latents", rows_nf.numpy()) for name, rows_nf in latents_of.items()]
    facts = {"model": model_name(model), "corpus": items_corpus.facts(), "statistic": statistic}
    return ItemMeans(tuple(sites), tokens_n.numpy(), statistic, facts)


def length_correlation(value_n: npt.NDArray[np.floating], tokens_n: npt.NDArray[np.int64]) -> float | None:
    """Pearson's r of some figure of items with their numbers of tokens; None where either is the same for all."""
    if np.ptp(value_n) == 0 or np.ptp(tokens_n) == 0:
        return None
    return float(np.corrcoef(value_n.astype(np.float64), tokens_n)[0, 1])


def _check_items(corpus: Corpus) -> None:
    for number, (document_p, keep_p) in enumerate(zip(corpus.document_bp, corpus.keep_bp, strict=True)):
        if len(document_p[document_p >= 0].unique()) > 1:
            raise DataError(f"Block {number} of {corpus.name!r} holds more than one item; make it with item_corpus.")
        if not keep_p.any():
            raise DataError(f"No token of item {number} of {corpus.name!r} counts.")


def _batches(
    model: HookedModel, corpus: Corpus, hook_names: Sequence[str], n_blocks: int
) -> Iterator[tuple[torch.Tensor, Harvest]]:
    """Numbers of items, shortest first, and what the model makes of them."""
    end_n = ((corpus.document_bp >= 0) * torch.arange(1, corpus.context_size + 1)).amax(dim=1)
    for at_n in torch.argsort(end_n, stable=True).split(n_blocks):
        part, end = corpus.take(at_n), int(end_n[at_n].max())
        cut = replace(
            part,
            tokens_bp=part.tokens_bp[:, :end],
            keep_bp=part.keep_bp[:, :end],
            document_bp=part.document_bp[:, :end],
            role_bp=None if part.role_bp is None else part.role_bp[:, :end],
        )
        yield from ((at_n, batch) for batch in harvest(model, cut, hook_names, batch_blocks=len(at_n)))


def _reduced(x_td: torch.Tensor, counts: list[int], statistic: str) -> torch.Tensor:
    """Rows of tokens, item by item, to one float32 row an item, on the CPU."""
    parts = x_td.split(counts)
    if statistic == "mean":
        return torch.stack([part.mean(dim=0, dtype=torch.float32) for part in parts]).cpu()
    return torch.stack([part[-1] if statistic == "last" else part.amax(dim=0) for part in parts]).float().cpu()


def _latents(sae: SAE[Any], hook_name: str, batch: Harvest, counts: list[int], statistic: str) -> torch.Tensor:
    """One float32 row `[n, d_sae]` an item, on the CPU; a latent that never fires there is 0."""
    counts_n = torch.tensor(counts)
    item_t = torch.arange(len(counts)).repeat_interleave(counts_n)
    last_t = torch.zeros(len(item_t), dtype=torch.bool)
    last_t[counts_n.cumsum(0) - 1] = True
    rows = torch.zeros(len(counts) * sae.cfg.d_sae)
    begun = 0
    for chunk_td, active in encode_active(sae, sae_rows(sae, hook_name, batch)):
        if not active.value_a.isfinite().all():
            latent = int(active.latent_a[~active.value_a.isfinite()][0])
            raise DataError(f"The SAE's activations at {hook_name} are not finite, first those of latent {latent}.")
        fires_a = active.value_a > 0
        token_a, latent_a, value_a = (part[fires_a].cpu() for part in active)
        token_a, value_a = token_a + begun, value_a.float()
        begun += len(chunk_td)
        place_a = item_t[token_a] * sae.cfg.d_sae + latent_a
        if statistic == "mean":
            rows.index_add_(0, place_a, value_a / counts_n[item_t[token_a]])
        elif statistic == "max":
            rows.scatter_reduce_(0, place_a, value_a, "amax")
        else:
            rows[place_a[last_t[token_a]]] = value_a[last_t[token_a]]
    return rows.view(len(counts), sae.cfg.d_sae)
