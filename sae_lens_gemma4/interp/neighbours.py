"""Which latents and which neurons a latent is like.

Three ways of being alike: by what decoder rows write (exact, over all pairs); by when latents fire (Pearson's r and the
cosine of activations, over a sample of the text's blocks, because all pairs on all of a text would cost more than
reading it did); and by the dimensions of the hook that a decoder row writes most to.

Shapes: `f` latents asked about, `g` all latents, `d` the hook's width, `k` neighbours, `s` activations of the sample.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.evaluation.reading import ActiveLatents
from sae_lens_gemma4.interp.firings import Firings

MOST_ACTIVATIONS = 2**25
"""In the sample; 64 bytes each, 2 GiB."""
_VARIES = 1e-10
"""The share of a latent's squares that must be variance, else it does not vary: float64 sums leave less."""


class Nearest(NamedTuple):
    """The nearest, best first: `[f, k]` each."""

    index_fk: torch.Tensor
    value_fk: torch.Tensor


class Aligned(NamedTuple):
    """The dimensions that decoder rows write most to, `[f, k]` each: values, and these as shares of the row's L1."""

    index_fk: torch.Tensor
    value_fk: torch.Tensor
    share_fk: torch.Tensor


class Correlated(NamedTuple):
    """The latents that fire most together with one: Pearson's r, best first, and cosines of activations."""

    index_k: list[int]
    pearson_k: list[float]
    cosine_k: list[float]


def unit_rows(W_gd: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, float32; a row of zeros stays one."""
    unit_gd: torch.Tensor = torch.nn.functional.normalize(W_gd.detach().float(), dim=1, eps=1e-30)
    return unit_gd


def nearest_decoders(unit_gd: torch.Tensor, first: int, end: int, k: int) -> Nearest:
    """Of the latents from `first` to `end`, those others whose `unit_rows` have the greatest cosine with theirs."""
    cosine_fg = unit_gd[first:end] @ unit_gd.T
    cosine_fg[torch.arange(end - first), torch.arange(first, end)] = -torch.inf
    k = min(k, len(unit_gd) - 1)
    value_fk, index_fk = cosine_fg.topk(k, dim=1)
    return Nearest(index_fk.cpu(), value_fk.clamp(-1, 1).cpu())


def aligned_neurons(W_fd: torch.Tensor, k: int) -> Aligned:
    """The `k` dimensions of greatest value in each row (sae-dashboard's `add_neuron_alignment_data`)."""
    W_fd = W_fd.detach().float().cpu()
    value_fk, index_fk = W_fd.topk(min(k, W_fd.shape[1]), dim=1)
    total_f = W_fd.abs().sum(dim=1, keepdim=True)
    return Aligned(index_fk, value_fk, torch.where(total_f > 0, value_fk.abs() / total_f, 0))


class Cofiring:
    """The sample of a text on which latents are compared by when they fire.

    Args:
        most_tokens: the sample is of blocks spread evenly, so many that their tokens that count do not exceed this, nor
            their activations `MOST_ACTIVATIONS`, as they would for an SAE that fires everywhere.
    """

    def __init__(self, firings: Firings, corpus: Corpus, most_tokens: int) -> None:
        share = min(1.0, most_tokens / corpus.n_tokens, MOST_ACTIVATIONS / max(firings.n_activations, 1))
        n_blocks = max(1, int(share * corpus.n_blocks))
        blocks_b = np.unique(np.linspace(0, corpus.n_blocks - 1, n_blocks).round().astype(np.int64))
        self.n_tokens = int(corpus.keep_bp[torch.from_numpy(blocks_b)].sum())
        active: ActiveLatents = firings.by_token(blocks_b)
        self._latent_s, self._value_s = active.latent_a.numpy(), active.value_a.double().numpy()
        token_s = active.token_a.numpy()
        n_places = len(blocks_b) * corpus.context_size
        self._offset_t = np.searchsorted(token_s, np.arange(n_places + 1))
        self._d_sae = firings.d_sae
        self._sum_g = np.bincount(self._latent_s, self._value_s, minlength=self._d_sae)
        self._squares_g = np.bincount(self._latent_s, self._value_s**2, minlength=self._d_sae)
        order = np.argsort(self._latent_s, kind="stable")
        self._token_s, self._own_s = token_s[order], self._value_s[order]
        self._offset_g = np.searchsorted(self._latent_s[order], np.arange(self._d_sae + 1))

    def correlated(self, latent: int, k: int) -> Correlated:
        """The `k` latents that fire most with one; fewer where not so many ever fire with it."""
        own = slice(self._offset_g[latent], self._offset_g[latent + 1])
        low, high = self._offset_t[self._token_s[own]], self._offset_t[self._token_s[own] + 1]
        sizes = high - low
        if not sizes.sum():
            return Correlated([], [], [])
        at = np.repeat(low - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        weight = np.repeat(self._own_s[own], sizes) * self._value_s[at]
        product_g = np.bincount(self._latent_s[at], weight, minlength=self._d_sae)
        n, with_it = self.n_tokens, np.flatnonzero(product_g)
        with_it = with_it[with_it != latent]
        product, sums, squares = product_g[with_it], self._sum_g[with_it], self._squares_g[with_it]
        mine, my_squares = self._sum_g[latent], self._squares_g[latent]
        spread = np.sqrt(_varying(n, mine, my_squares) * _varying(n, sums, squares))
        with np.errstate(divide="ignore", invalid="ignore"):
            pearson = np.where(spread > 0, (n * product - mine * sums) / spread, 0)
        best = np.argsort(-pearson, kind="stable")[:k]
        cosine = product[best] / np.sqrt(my_squares * squares[best])
        return Correlated(with_it[best].tolist(), pearson[best].clip(-1, 1).tolist(), cosine.clip(-1, 1).tolist())


def _varying(n: int, sums: npt.NDArray[np.float64], squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """n² variances of values with these sums; 0 where they are rounding."""
    varies = n * squares - sums**2
    return np.where(varies > _VARIES * n * squares, varies, 0)
