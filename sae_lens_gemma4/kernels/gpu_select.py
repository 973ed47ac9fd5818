"""Batch top-k and row top-k on CUDA, in fixed shapes, so that nothing has to wait for a count.

A batch's selection is launched as a whole. Whether it is proven comes back as one flag, copied on the side: whoever
needs the selection asks for it as late as possible (`begin(...)`, then `result()`). If the guess was wrong, a bound
that cannot be is taken from the product itself, and the pass made again.

Shapes as in `gpu_filter.py`; `e` selected entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sae_lens_gemma4.kernels.gpu_filter import ROUNDING, SLACK, Filter
from sae_lens_gemma4.kernels.gpu_sparse import OPTIONS, bare, dots_of
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.kernels.selection import Selection, vouched

_CHUNK = 2**26
"""Products that are held at a time."""
_DENSE_CHUNK = 2**24
"""The same where a bound is sought, which takes a few float32 copies."""
_GUESS = 0.9  # of what a sample of the tokens says
_SAMPLE = 64
_SPARE = 4096
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Pending:
    """A selection that is being computed."""

    selection: Selection
    _encoder: _Encoder | None
    _k_total: int
    _proven: torch.Tensor
    _copied: torch.cuda.Event | None

    def result(self) -> Selection:
        """Waits for the proof alone; without one, selects again and waits for that."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._proven and self._encoder is not None:
            with torch.no_grad(), torch.cuda.device_of(self.selection.act_e):
                self.selection = self._encoder.select_surely(self._k_total)
        self._encoder = None  # and with it the weights' copy
        return self.selection


@torch.no_grad()
def begin(
    x_nd: torch.Tensor,
    W_fd: torch.Tensor,
    b_f: torch.Tensor,
    scale_f: torch.Tensor | None,
    k_total: int,
    bound: torch.Tensor | float | None = None,
) -> Pending:
    """Launches `batch_topk` and waits for nothing. Inputs must stay as they are until `result()`."""
    k_total = min(k_total, len(x_nd) * len(W_fd))
    if not k_total:
        return Pending(_nothing(x_nd), None, 0, torch.tensor(True), None)
    with torch.cuda.device_of(x_nd):
        encoder = _Encoder(x_nd, W_fd, b_f, scale_f)
        guess = encoder.guess(k_total) if bound is None else torch.as_tensor(bound).float()
        selection, proven, _ = encoder.select(guess, k_total, encoder.capacity(k_total))
        if not x_nd.is_cuda:
            return Pending(selection, encoder, k_total, proven, None)
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(proven, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return Pending(selection, encoder, k_total, on_host, copied)


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

    There are always `k_total` entries. If fewer are positive, the last ones are the last token's last latent with an
    activation of 0.

    Args:
        scale_f: what pre-activations are multiplied with before they are compared, none negative; None: 1.
        bound: a guess at what the smallest of them is no less than. It saves time and changes nothing.
        ranks: one alone; `dispatch.kernels_for` gives several another module.
    """
    assert ranks.world == 1
    return begin(x_nd, W_fd, b_f, scale_f, k_total, bound).result()


class _Encoder:
    """An encoder and a batch: finds candidates by the approximate product, and computes them again."""

    def __init__(self, x_nd: torch.Tensor, W_fd: torch.Tensor, b_f: torch.Tensor, scale_f: torch.Tensor | None) -> None:
        self.x_nd, self.W_fd, self.b_f = bare(x_nd), bare(W_fd), bare(b_f).float()
        self.scale_f = torch.ones_like(self.b_f) if scale_f is None else bare(scale_f).float()
        self.filter = Filter(self.x_nd, self.W_fd)

    def capacity(self, k_total: int) -> int:
        return min(2 * k_total + _SPARE, len(self.x_nd) * len(self.W_fd))

    def select(self, bound: torch.Tensor, k_total: int, capacity: int) -> tuple[Selection, torch.Tensor, torch.Tensor]:
        """The largest of the candidates, whether these are proven to be the batch's, and the number of candidates."""
        n, f = len(self.x_nd), len(self.W_fd)
        device = self.x_nd.device
        bound = bound.clamp(min=_TINY)
        need_f = bound / self.scale_f
        least_f = need_f - self.b_f - SLACK * (need_f + self.b_f.abs())
        key_q = torch.full((capacity,), n * f, device=device)
        count_1 = torch.zeros(1, dtype=torch.int64, device=device)
        for first, hidden_cf in self.filter.chunks(_CHUNK):
            self.filter.candidates(hidden_cf, least_f, first, key_q, count_1)
        key_q = key_q.sort().values
        token_q, latent_q = (key_q // f).clamp(max=n - 1), key_q % f
        pre_q = dots_of(token_q, latent_q, count_1, self.x_nd, self.W_fd) + self.b_f[latent_q]
        act_q = pre_q * self.scale_f[latent_q]
        act_q = act_q.masked_fill(~((key_q < n * f) & (act_q > 0)), -torch.inf)

        smallest = act_q.topk(k_total, sorted=False).values.min()
        above_q = act_q > smallest
        level_q = (act_q == smallest) & (act_q > 0)
        chosen_q = above_q | (level_q & (level_q.cumsum(0) <= k_total - above_q.sum()))
        place_q = (chosen_q.cumsum(0) - 1).masked_fill(~chosen_q, k_total)

        def placed(value_q: torch.Tensor, rest: float) -> torch.Tensor:
            out = torch.full((k_total + 1,), rest, dtype=value_q.dtype, device=device)
            return out.scatter_(0, place_q, value_q)[:k_total]

        selection = Selection(
            placed(token_q, n - 1),
            placed(latent_q, f - 1),
            placed(pre_q, 0),
            placed(act_q, 0),
            act_q.masked_fill(~chosen_q, torch.inf).min(),
        )
        selection = vouched(selection, self.filter.x.norm, self.filter.W.norm, self.b_f, self.scale_f)
        enough = ((act_q >= bound).sum() >= k_total) | (bound <= _TINY)
        return selection, enough & (count_1[0] <= capacity), count_1

    def select_surely(self, k_total: int) -> Selection:
        bound = self.lower_bound(k_total)
        capacity = self.capacity(k_total)
        selection, _, count_1 = self.select(bound, k_total, capacity)
        if (count := int(count_1)) > capacity:
            selection, _, _ = self.select(bound, k_total, count)
        return selection

    def guess(self, k_total: int) -> torch.Tensor:
        """A little less than the smallest that is selected of some tokens, spread over the batch."""
        n = len(self.x_nd)
        n_sample = min(n, _SAMPLE)
        token_c = torch.arange(n_sample, device=self.x_nd.device) * n // n_sample
        hidden_cf = torch.mm(self.filter.x.coarse[token_c], self.filter.W.coarse.T)
        act_cf = (hidden_cf + self.b_f) * self.scale_f
        return _GUESS * act_cf.flatten().topk(max(1, k_total * n_sample // n), sorted=False).values.min()

    def lower_bound(self, k_total: int) -> torch.Tensor:
        """What at least `k_total` activations reach, however far the product is off; 0 if nothing positive is sure."""
        best = torch.zeros(k_total, device=self.x_nd.device)
        for first, hidden_cf in self.filter.chunks(_DENSE_CHUNK):
            hidden_cf = hidden_cf.float()
            off_cf = self.filter.error(slice(first, first + len(hidden_cf)))
            off_cf += (ROUNDING + SLACK) * hidden_cf.abs() + SLACK * self.b_f.abs()
            least_cf = (hidden_cf - off_cf + self.b_f) * self.scale_f
            best = torch.cat([best, least_cf.flatten()]).topk(k_total, sorted=False).values
        return best.min() * (1 - SLACK)


@torch.no_grad()
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

    Every token has `k` entries, or as many as there are latents. The product is torch's, in float32 or as
    `torch.set_float32_matmul_precision` says.

    Args:
        positive: leave out what is not positive. In its place stand entries of the last latent with an activation of 0.
    """
    if latents is not None:
        W_fd, b_f, scale_f = W_fd[latents], b_f[latents], None if scale_f is None else scale_f[latents]
    n, f = len(x_nd), len(W_fd)
    k = min(k, f)
    if not n * k:
        return _nothing(x_nd)
    W_df, b_f = bare(W_fd).float().T, bare(b_f).float()
    latent_nk = torch.full((n, k), f - 1, device=x_nd.device)
    pre_nk = torch.zeros(n, k, device=x_nd.device)
    act_nk = torch.zeros(n, k, device=x_nd.device)
    rows = max(16, _CHUNK // f)
    with torch.cuda.device_of(x_nd):
        for first in range(0, n, rows):
            here = slice(first, first + rows)
            pre_cf = torch.addmm(b_f, bare(x_nd[here]).float(), W_df)
            act_cf = pre_cf if scale_f is None else pre_cf * bare(scale_f)
            smallest_c = act_cf.topk(k, sorted=False).values.amin(dim=1)
            _take_kernel[(len(pre_cf),)](
                latent_nk[here],
                pre_nk[here],
                act_nk[here],
                pre_cf,
                act_cf,
                smallest_c,
                f,
                k,
                POSITIVE=positive,
                BLOCK=1024,
                **OPTIONS,
            )
    act_e = act_nk.flatten()
    smallest = (act_e.masked_fill(act_e <= 0, torch.inf) if positive else act_e).min()
    token_e = torch.arange(n, device=x_nd.device)[:, None].expand(n, k).flatten()
    latent_e = latent_nk.flatten() if latents is None else latents[latent_nk.flatten()]
    chosen = Selection(token_e, latent_e, pre_nk.flatten(), act_e, smallest)
    return vouched(chosen, x_nd, W_fd, b_f, scale_f)


def _nothing(x_nd: torch.Tensor) -> Selection:
    no_index = torch.empty(0, dtype=torch.int64, device=x_nd.device)
    no_value = torch.empty(0, device=x_nd.device)
    return Selection(no_index, no_index, no_value, no_value, torch.full((), torch.inf, device=x_nd.device))


@triton.jit
def _take_kernel(
    latent_ptr: tl.tensor,
    pre_out_ptr: tl.tensor,
    act_out_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    act_ptr: tl.tensor,
    smallest_ptr: tl.tensor,
    f: tl.tensor,
    k: tl.tensor,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: all above its `k`-th largest, and the first of its equals that there is room for."""
    row = tl.program_id(0).to(tl.int64)
    smallest = tl.load(smallest_ptr + row)
    n_above = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, f, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        act = tl.load(act_ptr + row * f + latent, mask=latent < f, other=-float("inf"))
        n_above += (act > smallest).to(tl.int32)
    room = k - tl.sum(n_above, axis=0)
    taken = room * 0
    n_level = room * 0
    for first in range(0, f, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        inside = latent < f
        act = tl.load(act_ptr + row * f + latent, mask=inside, other=-float("inf"))
        level = (inside & (act == smallest)).to(tl.int32)
        take = (act > smallest) | ((level > 0) & (n_level + tl.cumsum(level, axis=0) <= room))
        if POSITIVE:
            take = take & (act > 0)
        take = take.to(tl.int32)
        place = row * k + taken + tl.cumsum(take, axis=0) - 1
        pre = tl.load(pre_ptr + row * f + latent, mask=take > 0, other=0.0)
        tl.store(latent_ptr + place, latent.to(tl.int64), mask=take > 0)
        tl.store(pre_out_ptr + place, pre, mask=take > 0)
        tl.store(act_out_ptr + place, act, mask=take > 0)
        taken += tl.sum(take, axis=0)
        n_level += tl.sum(level, axis=0)
