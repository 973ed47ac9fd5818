"""The CPU's kernels: numpy where it compares and sorts faster than torch, torch's own sparse operations elsewhere.

Shapes as in `product.py`; `e` entries, `a` candidates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from sae_lens_gemma4.kernels.agreement import Share, share, smallest
from sae_lens_gemma4.kernels.pattern import Pattern, pattern
from sae_lens_gemma4.kernels.product import Chunk, Product
from sae_lens_gemma4.kernels.ranking import Array, first_of_all, first_of_each, kth_of_each
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.kernels.selection import Selection, vouched

with warnings.catch_warnings():  # torch says once in a process that these tensors are new
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0]), torch.tensor([], dtype=torch.long), torch.tensor([]), size=(0, 1))

_GUESS = 0.9  # of what a sample of the tokens says
_SAMPLE = 128
_KEPT = 4  # as many candidates as are wanted, times this, before those that cannot win are let go
_SLACK = 1e-6  # for the few float32 operations between a product and an activation


def sums(pattern: Pattern, weight_e: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[r] = Σ weight_e · table_cd[column_e]` over the entries of each row: `[rows, d]` in the table's dtype."""
    if len(pattern.column_e) == 0:
        return table_cd.new_zeros(pattern.n_rows, table_cd.shape[1])
    out_rd: torch.Tensor = torch.nn.functional.embedding_bag(
        pattern.column_e,
        table_cd,
        pattern.offset_r,
        mode="sum",
        per_sample_weights=weight_e.to(table_cd.dtype),
        include_last_offset=True,
    )
    return out_rd


def dots(pattern: Pattern, left_rd: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[e] = left_rd[row of e] · table_cd[column_e]`: `[e]` in the table's dtype."""
    left_rd, right_cd = _wide(left_rd), _wide(table_cd)
    zeros_rc = torch.sparse_csr_tensor(
        pattern.offset_r,
        pattern.column_e,
        right_cd.new_zeros(len(pattern.column_e)),
        size=(pattern.n_rows, len(table_cd)),
        check_invariants=False,
    )
    out: torch.Tensor = torch.sparse.sampled_addmm(zeros_rc, left_rd, right_cd.T, beta=0.0)
    return out.values().to(table_cd.dtype)


def batch_topk(
    x_nd: torch.Tensor,
    W_fd: torch.Tensor,
    b_f: torch.Tensor,
    scale_f: torch.Tensor | None,
    k_total: int,
    bound: torch.Tensor | float | None = None,
    ranks: Ranks = ALONE,
) -> Selection:
    """The `k_total` largest positive activations of a batch; of equals at the end, the first tokens' first latents.

    Args:
        scale_f: what pre-activations are multiplied with before they are compared; None: 1.
        bound: a guess at what the smallest of them is no less than. It saves time and changes nothing.
        ranks: who has the other parts of the batch. `k_total` and `smallest` are the whole batch's, entries one's own.
    """
    encoder = _Encoder(x_nd, W_fd, b_f, scale_f)
    own_k = -(-k_total // ranks.world)
    tiny, failed = torch.finfo(encoder.x_nd.dtype).tiny, math.inf
    for least in encoder.bounds(own_k, None if bound is None else float(bound)):
        guess = max(_of_all(least, ranks), tiny)
        if guess >= failed:
            continue
        found = encoder.above(guess, k_total)
        mine = found.share(k_total, ranks)
        if mine.n_all >= k_total or guess == tiny:
            break
        failed = guess
    chosen = vouched(found.largest(mine), *encoder.made_of)
    return chosen._replace(smallest=smallest(chosen.smallest, ranks))


def row_topk(
    x_nd: torch.Tensor,
    W_fd: torch.Tensor,
    b_f: torch.Tensor,
    scale_f: torch.Tensor | None,
    k: int,
    latents: torch.Tensor | None = None,
    *,
    positive: bool,
) -> Selection:
    """The `k` largest activations of each token, among `latents` (ascending) if given; of equals the first latents.

    Args:
        positive: leave out what is not positive.
    """
    if latents is not None:
        W_fd, b_f, scale_f = W_fd[latents], b_f[latents], None if scale_f is None else scale_f[latents]
    encoder = _Encoder(x_nd, W_fd, b_f, scale_f)
    found = encoder.largest_of_each(k)
    keep_a = first_of_each(found.act_a, found.token_a, k)
    if positive:
        keep_a &= found.act_a > 0
    chosen = vouched(found.selection(keep_a), *encoder.made_of)
    return chosen if latents is None else chosen._replace(latent_e=latents[chosen.latent_e])


class _Candidates(NamedTuple):
    """Entries that may be selected, with their exact values; in no order until `sorted`."""

    token_a: Array
    latent_a: Array
    pre_a: Array
    act_a: Array

    def take(self, which: Array) -> _Candidates:
        return _Candidates(*(values[which] for values in self))

    def sorted(self) -> _Candidates:
        """By token; within a token they ascend already."""
        return self.take(np.argsort(self.token_a, kind="stable"))

    def at_least(self, k: int) -> float:
        """The `k`-th largest activation; 0 if there are fewer."""
        n = len(self.act_a)
        return float(np.partition(self.act_a, n - k)[n - k]) if 0 < k <= n else 0.0

    def share(self, k: int, ranks: Ranks) -> Share:
        return share(torch.from_numpy(self.act_a), k, ranks)

    def largest(self, mine: Share) -> Selection:
        least = float(mine.least)
        found = self.take(np.flatnonzero(self.act_a >= least)).sorted()
        return found.selection(first_of_all(found.act_a, least, int(mine.n_mine)))

    def selection(self, which: Array) -> Selection:
        found = self.take(which)
        token_e, latent_e, pre_e, act_e = map(torch.from_numpy, found)
        return Selection(token_e, latent_e, pre_e, act_e, act_e.new_tensor(found.act_a.min(initial=np.inf)))


class _Encoder:
    """An encoder and a batch: finds candidates by the approximate product, and computes them again."""

    def __init__(self, x_nd: torch.Tensor, W_fd: torch.Tensor, b_f: torch.Tensor, scale_f: torch.Tensor | None) -> None:
        self.x_nd, self.W_fd = _wide(x_nd), _wide(W_fd)
        self.b_f, self.scale_f = _wide(b_f), None if scale_f is None else _wide(scale_f)
        self.product = Product(self.x_nd, self.W_fd)
        self.made_of = (self.product.norm_n, self.product.norm_f, self.b_f, self.scale_f)

    def above(self, bound: float, k_total: int) -> _Candidates:
        """All entries with an activation of `bound` or more; of these, where they are many, those that may be among
        the `k_total` largest."""
        parts: list[_Candidates] = []
        n_found = 0
        for chunk in self.product.chunks():
            least_f = self._least_hidden(bound, chunk)
            part = self._exact(chunk, np.flatnonzero(_at_least(chunk.hidden_cf, least_f)))
            parts.append(part.take(np.flatnonzero(part.act_a >= bound)))
            n_found += len(parts[-1].act_a)
            if n_found > _KEPT * k_total:
                found = _joined(parts)
                bound = max(bound, found.at_least(k_total))
                parts = [found.take(np.flatnonzero(found.act_a >= bound))]
                n_found = len(parts[0].act_a)
        return _joined(parts) if parts else self._exact(_nothing(self.x_nd, self.W_fd), np.zeros(0, np.int64))

    def bounds(self, k_total: int, guess: float | None) -> Iterator[float]:
        """What the `k_total`-th largest activation may be no less than: a guess, a sample's word, and what is sure."""
        if guess is not None and math.isfinite(guess):
            yield guess
        yield _GUESS * self.lower_bound(k_total, _SAMPLE)
        yield self.lower_bound(k_total)

    def lower_bound(self, k_total: int, sample: int | None = None) -> float:
        """What the `k_total`-th largest activation is no less than; with a `sample`, about what it is.

        The sample is of that many tokens, evenly spread. 0 where there are not so many positive activations for sure.
        """
        n = len(self.x_nd)
        tokens = torch.arange(n) if sample is None or sample >= n else torch.arange(sample) * n // sample
        k = max(1, k_total * len(tokens) // max(n, 1))
        largest = np.zeros(0, np.float32)
        for chunk in self.product.chunks(tokens):
            act_cf, error_f = self._acts(chunk)
            largest = np.concatenate([largest, (act_cf - chunk.rounding * act_cf.abs() - error_f).numpy().ravel()])
            if len(largest) > k:
                largest = np.partition(largest, len(largest) - k)[len(largest) - k :]
        return max(0.0, float(largest.min())) if len(largest) >= k else 0.0

    def largest_of_each(self, k: int) -> _Candidates:
        """Candidates among which are each token's `k` largest activations, by token."""
        parts = []
        for chunk in self.product.chunks():
            act_cf, error_f = self._acts(chunk)
            acts, error = act_cf.numpy(), float(error_f.max())
            least_c = kth_of_each(acts, k)
            for _ in range(2):  # from the approximate k-th to the true one, and from that to what may be approximated
                least_c = least_c - chunk.rounding * np.abs(least_c) - error
            parts.append(self._exact(chunk, np.flatnonzero(acts >= least_c[:, None])))
        return _joined(parts).sorted()

    def _acts(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Approximate activations, and what they may be off besides the relative `rounding`."""
        act_cf = chunk.hidden_cf.to(self.x_nd.dtype).add_(self.b_f)
        error_f = chunk.error_f + (chunk.rounding + _SLACK) * self.b_f.abs()
        if self.scale_f is None:
            return act_cf, error_f
        return act_cf.mul_(self.scale_f), error_f * self.scale_f

    def _least_hidden(self, bound: float, chunk: Chunk) -> torch.Tensor:
        """What an entry's approximate product is no less than if its activation is `bound` or more."""
        least_f = bound - self.b_f if self.scale_f is None else bound / self.scale_f - self.b_f
        least_f = least_f - chunk.error_f - _SLACK * (least_f.abs() + self.b_f.abs())
        return least_f.nan_to_num(math.inf, math.inf, -math.inf)  # a scale of 0 reaches no bound

    def _exact(self, chunk: Chunk, flat_a: Array) -> _Candidates:
        row_a, latent_a = np.divmod(flat_a, chunk.hidden_cf.shape[1])
        where = pattern(torch.from_numpy(row_a), torch.from_numpy(latent_a), len(chunk.token_c))
        pre_a = dots(where, self.x_nd[chunk.token_c], self.W_fd) + self.b_f[where.column_e]
        act_a = pre_a if self.scale_f is None else pre_a * self.scale_f[where.column_e]
        return _Candidates(chunk.token_c.numpy()[row_a], latent_a, pre_a.numpy(), act_a.numpy())


def _of_all(bound: float, ranks: Ranks) -> float:
    """The ranks' smallest: no two make different passes."""
    return float(ranks.least(torch.tensor(bound, dtype=torch.float64)))


def _at_least(hidden_cf: torch.Tensor, least_f: torch.Tensor) -> Array:
    """`hidden_cf >= least_f`, both in the product's dtype: rounding keeps the order.

    bfloat16, which numpy does not have, is compared by its bits; these ascend as positive numbers do.
    """
    if hidden_cf.dtype != torch.bfloat16:
        return np.asarray(np.greater_equal(hidden_cf.numpy(), least_f.numpy()))
    least_f = least_f.bfloat16()
    bits = least_f.view(torch.int16).numpy()
    positive = np.where(bits > 0, bits, np.iinfo(np.int16).max)
    at_least = np.asarray(np.greater_equal(hidden_cf.view(torch.int16).numpy(), positive))
    if len(others := np.flatnonzero(bits <= 0)):
        at_least[:, others] = (hidden_cf[:, others] >= least_f[others]).numpy()
    return at_least


def _joined(parts: list[_Candidates]) -> _Candidates:
    return _Candidates(*map(np.concatenate, zip(*parts, strict=True)))


def _nothing(x_nd: torch.Tensor, W_fd: torch.Tensor) -> Chunk:
    return Chunk(torch.arange(0), x_nd.new_zeros(0, len(W_fd)), x_nd.new_zeros(len(W_fd)), 0.0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
