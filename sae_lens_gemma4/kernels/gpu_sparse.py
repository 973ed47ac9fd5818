"""Sparse sums and dot products on CUDA, with as many operations as there are entries.

Rows differ by far: a latent that is always on has an entry for every token of the batch, most have a few. So a long
row is cut into pieces that run side by side, and their sums are added in order: no atomics, hence the same bits on
every run. Where the pieces lie is worked out on the device; the host only knows how many there can be, and waits for
nothing.

Shapes: `r` rows, `e` entries, `c` columns, `d` the table's width, `x` pieces of long rows after their first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_gemma4.kernels.pattern import Pattern

_PIECE = 128
"""Entries of a row that one program adds up."""
OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Triton's default is about to change, and until then it warns."""


def sums(pattern: Pattern, weight_e: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[r] = Σ weight_e · table_cd[column_e]` over the entries of each row: `[rows, d]` in the table's dtype."""
    table_cd, offset_r = bare(table_cd), bare(pattern.offset_r)
    d = table_cd.shape[1]
    operands = (table_cd, bare(weight_e), bare(pattern.column_e))
    first_rd = torch.empty(pattern.n_rows, d, dtype=torch.float32, device=table_cd.device)
    with torch.cuda.device_of(table_cd):
        start_r = offset_r[:-1]
        _add_pieces(first_rd, *operands, start_r, torch.minimum(start_r + _PIECE, offset_r[1:]))
        if n_further := len(pattern.column_e) // _PIECE:
            further = _further(offset_r, n_further)
            further_xd = torch.empty(n_further, d, dtype=torch.float32, device=table_cd.device)
            _add_pieces(further_xd, *operands, further.start_x, further.end_x)
            grid = (n_further, triton.cdiv(d, 512))
            _fold_kernel[grid](first_rd, further_xd, further.row_x, further.last_x, d, BLOCK=512, **OPTIONS)
    return first_rd.to(table_cd.dtype)


def dots(pattern: Pattern, left_rd: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor:
    """`out[e] = left_rd[row of e] · table_cd[column_e]`: `[e]` in the table's dtype."""
    used = pattern.offset_r[-1:]
    return dots_of(pattern.row_e(), pattern.column_e, used, left_rd, table_cd).to(table_cd.dtype)


def dots_of(
    row_e: torch.Tensor, column_e: torch.Tensor, used_1: torch.Tensor, left_rd: torch.Tensor, table_cd: torch.Tensor
) -> torch.Tensor:
    """`dots` of entries in any order, float32; 0 from entry `used_1` on, which the host need not know."""
    left_rd, table_cd = bare(left_rd), bare(table_cd)
    out_e = torch.zeros(len(row_e), dtype=torch.float32, device=table_cd.device)
    if len(out_e):
        grid = (triton.cdiv(len(out_e), 16),)
        with torch.cuda.device_of(out_e):
            _dots_kernel[grid](
                out_e,
                left_rd,
                table_cd,
                bare(row_e),
                bare(column_e),
                used_1,
                table_cd.shape[1],
                len(out_e),
                ENTRIES=16,
                BLOCK=128,
                **OPTIONS,
            )
    return out_e


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """As kernels want it: rows one after the other, and no graph."""
    return tensor.detach().contiguous()


class _Further(NamedTuple):
    """Pieces of long rows after the first; those that are not needed are empty.

    Attributes:
        row_x: whose they are.
        start_x, end_x: their entries.
        last_x: for a row's first of these, where the row's pieces end; for the others their own place.
    """

    row_x: torch.Tensor
    start_x: torch.Tensor
    end_x: torch.Tensor
    last_x: torch.Tensor


def _further(offset_r: torch.Tensor, n_further: int) -> _Further:
    count_r = ((offset_r.diff() - 1) // _PIECE).clamp(min=0)
    end_r = count_r.cumsum(0)
    place_x = torch.arange(n_further, device=offset_r.device)
    row_x = torch.searchsorted(end_r, place_x, right=True).clamp(max=len(end_r) - 1)
    needed_x = place_x < end_r[row_x]
    nth_x = place_x - (end_r - count_r)[row_x]
    start_x = offset_r[row_x] + (nth_x + 1) * _PIECE
    end_x = torch.where(needed_x, torch.minimum(start_x + _PIECE, offset_r[row_x + 1]), start_x)
    return _Further(row_x, start_x, end_x, torch.where(needed_x & (nth_x == 0), end_r[row_x], place_x))


def _add_pieces(
    out_pd: torch.Tensor,
    table_cd: torch.Tensor,
    weight_e: torch.Tensor,
    column_e: torch.Tensor,
    start_p: torch.Tensor,
    end_p: torch.Tensor,
) -> None:
    n_pieces, d = out_pd.shape
    if n_pieces and d:
        grid = (n_pieces, triton.cdiv(d, 512))
        _pieces_kernel[grid](out_pd, table_cd, weight_e, column_e, start_p, end_p, d, ENTRIES=8, BLOCK=512, **OPTIONS)


@triton.jit
def _pieces_kernel(
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    column_ptr: tl.tensor,
    start_ptr: tl.tensor,
    end_ptr: tl.tensor,
    d: tl.tensor,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    piece = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < d
    end = tl.load(end_ptr + piece)
    total = tl.zeros([ENTRIES, BLOCK], dtype=tl.float32)
    for first in range(tl.load(start_ptr + piece), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < end
        column = tl.load(column_ptr + entry, mask=there, other=0)
        weight = tl.load(weight_ptr + entry, mask=there, other=0.0).to(tl.float32)
        at = table_ptr + column[:, None] * d + feature[None, :]
        values = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
        total += weight[:, None] * values.to(tl.float32)
    tl.store(out_ptr + piece * d + feature, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _fold_kernel(
    out_ptr: tl.tensor,
    further_ptr: tl.tensor,
    row_ptr: tl.tensor,
    last_ptr: tl.tensor,
    d: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(last_ptr + place)
    inside = feature < tl.where(place < last, d, 0)
    at = out_ptr + tl.load(row_ptr + place) * d + feature
    total = tl.load(at, mask=inside, other=0.0)
    for piece in range(place, last):
        total += tl.load(further_ptr + piece * d + feature, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit
def _dots_kernel(
    out_ptr: tl.tensor,
    left_ptr: tl.tensor,
    table_ptr: tl.tensor,
    row_ptr: tl.tensor,
    column_ptr: tl.tensor,
    used_ptr: tl.tensor,
    d: tl.tensor,
    n_entries: tl.tensor,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * ENTRIES
    entry = start + tl.arange(0, ENTRIES)
    used = tl.load(used_ptr)
    there = (entry < n_entries) & (entry < used)
    row = tl.load(row_ptr + entry, mask=there, other=0)
    column = tl.load(column_ptr + entry, mask=there, other=0)
    total = tl.zeros([ENTRIES, BLOCK], dtype=tl.float32)
    for first in range(0, tl.where(start < used, d, 0), BLOCK):
        feature = first + tl.arange(0, BLOCK)
        mask = there[:, None] & (feature < d)[None, :]
        left = tl.load(left_ptr + row[:, None] * d + feature[None, :], mask=mask, other=0.0)
        right = tl.load(table_ptr + column[:, None] * d + feature[None, :], mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out_ptr + entry, tl.sum(total, axis=1), mask=entry < n_entries)
