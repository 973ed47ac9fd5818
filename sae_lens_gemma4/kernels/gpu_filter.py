"""The encoder's product as a filter on CUDA: bfloat16 by cuBLAS, and one pass that keeps what may matter.

`product.py` says why the product need not be exact, and has the bound on what it is off. Here every token has a bound
of its own: that is two multiplications for each entry that is read, and tokens keep their order. Candidates go to a
buffer of fixed size. They are counted beyond it, and the host need not know their number.

Shapes: `n` tokens, `d` the input's width, `f` latents, `c` tokens of a chunk, `q` places of the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_gemma4.kernels.gpu_sparse import OPTIONS, bare

_PER_TERM = 2.0**-22
"""What one term of a float32 sum may add to its error, relative to the norms: four times what Higham's bound says."""
_NORMS = 1.01
"""The norms are float32 sums themselves."""
ROUNDING = _NORMS * 2.0**-8
"""What rounding a product to bfloat16 may change, relative to it."""
SLACK = 2.0**-22
"""For the few float32 operations between a product and an activation."""


class Rounded(NamedTuple):
    """A table in bfloat16, the norms of its rows, and those of what was rounded off."""

    coarse: torch.Tensor
    norm: torch.Tensor
    off: torch.Tensor


class Filter:
    """`x_nd · W_fdᵀ`, approximately, in chunks of consecutive tokens."""

    def __init__(self, x_nd: torch.Tensor, W_fd: torch.Tensor) -> None:
        self.x, self.W = rounded(x_nd), rounded(W_fd)
        far_n = _PER_TERM * x_nd.shape[1] * self.x.norm
        self.by_norm_n = _NORMS * (self.x.off + far_n)
        self.by_off_n = _NORMS * (self.x.norm + self.x.off)

    def chunks(self, n_entries: int) -> Iterator[tuple[int, torch.Tensor]]:
        """First token and products of each chunk of about `n_entries`; the next chunk overwrites them."""
        n, f = len(self.x.coarse), len(self.W.coarse)
        rows = min(n, max(16, n_entries // f), 2**16)
        buffer_cf = torch.empty(rows, f, dtype=torch.bfloat16, device=self.x.coarse.device)
        for first in range(0, n, rows):
            hidden_cf = buffer_cf[: min(rows, n - first)]
            with _sums_in_float32():
                torch.mm(self.x.coarse[first : first + rows], self.W.coarse.T, out=hidden_cf)
            yield first, hidden_cf

    def error(self, tokens: slice) -> torch.Tensor:
        """How far a product may be from float32's, before it was rounded to bfloat16: `[c, f]`."""
        by_norm_c, by_off_c = self.by_norm_n[tokens], self.by_off_n[tokens]
        return by_norm_c[:, None] * self.W.norm + by_off_c[:, None] * self.W.off

    def candidates(
        self, hidden_cf: torch.Tensor, least_f: torch.Tensor, first: int, key_q: torch.Tensor, count_1: torch.Tensor
    ) -> None:
        """Appends `token · f + latent` of each product that may be `least_f` or more to `key_q`, in any order.

        Args:
            hidden_cf: products of the tokens from `first` on, in bfloat16.
            least_f: float32.
            key_q, count_1: int64. The count goes on where the buffer is full.
        """
        c, f = hidden_cf.shape
        grid = (triton.cdiv(f, 1024), triton.cdiv(c, 16))
        _candidates_kernel[grid](
            key_q,
            count_1,
            hidden_cf,
            least_f,
            self.W.norm,
            self.W.off,
            self.by_norm_n,
            self.by_off_n,
            first,
            c,
            f,
            len(key_q),
            ROUNDING=ROUNDING,
            ROWS=16,
            BLOCK=1024,
            **OPTIONS,
        )


def rounded(table: torch.Tensor) -> Rounded:
    """Rounds rows to bfloat16 in one pass that also measures them."""
    table = bare(table)
    coarse = torch.empty_like(table, dtype=torch.bfloat16)
    norm = torch.empty(len(table), dtype=torch.float32, device=table.device)
    off = torch.empty_like(norm)
    if len(table):
        _round_kernel[(triton.cdiv(len(table), 8),)](
            coarse, norm, off, table, *table.shape, ROWS=8, BLOCK=256, **OPTIONS
        )
    return Rounded(coarse, norm, off)


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """cuBLAS may add up parts of a product in bfloat16, unless it is told not to; the bound would not hold."""
    settings = torch.backends.cuda.matmul
    allowed = settings.allow_bf16_reduced_precision_reduction
    split = getattr(settings, "allow_bf16_reduced_precision_reduction_split_k", None)
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = allowed if split is None else (allowed, split)


@triton.jit
def _round_kernel(
    coarse_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    off_ptr: tl.tensor,
    table_ptr: tl.tensor,
    n_rows: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    square_off = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, d, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        at = row[:, None] * d + feature[None, :]
        inside = (row < n_rows)[:, None] & (feature < d)[None, :]
        fine = tl.load(table_ptr + at, mask=inside, other=0.0).to(tl.float32)
        coarse = fine.to(tl.bfloat16)
        off = fine - coarse.to(tl.float32)
        square += fine * fine
        square_off += off * off
        tl.store(coarse_ptr + at, coarse, mask=inside)
    tl.store(norm_ptr + row, tl.sqrt(tl.sum(square, axis=1)), mask=row < n_rows)
    tl.store(off_ptr + row, tl.sqrt(tl.sum(square_off, axis=1)), mask=row < n_rows)


@triton.jit
def _candidates_kernel(
    key_ptr: tl.tensor,
    count_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    least_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    off_ptr: tl.tensor,
    by_norm_ptr: tl.tensor,
    by_off_ptr: tl.tensor,
    first: tl.tensor,
    c: tl.tensor,
    f: tl.tensor,
    capacity: tl.tensor,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts what a tile keeps, takes that many places at once, and fills them latent by latent."""
    start = tl.program_id(1).to(tl.int64) * ROWS
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = latent < f
    least = tl.load(least_ptr + latent, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + latent, mask=inside, other=0.0)
    off = tl.load(off_ptr + latent, mask=inside, other=0.0)
    kept = tl.zeros([BLOCK], dtype=tl.int32)  # a bit for each row
    n_kept = tl.zeros([BLOCK], dtype=tl.int32)
    for row in range(ROWS):
        here = inside & (latent < tl.where(start + row < c, f, 0))
        token = tl.minimum(first + start + row, first + c - 1)
        hidden = tl.load(hidden_ptr + (start + row) * f + latent, mask=here, other=0.0).to(tl.float32)
        lowest = least - tl.load(by_norm_ptr + token) * norm - tl.load(by_off_ptr + token) * off
        keep = (here & (hidden >= lowest - ROUNDING * tl.abs(lowest))).to(tl.int32)
        kept |= keep << row
        n_kept += keep
    total = tl.sum(n_kept, axis=0)
    if total > 0:
        place = tl.atomic_add(count_ptr, total.to(tl.int64)) + tl.cumsum(n_kept, axis=0) - n_kept
        for row in range(ROWS):
            keep = (kept >> row) & 1
            key = (first + start + row) * f + latent
            tl.store(key_ptr + place, key, mask=(keep > 0) & (place < capacity))
            place += keep
