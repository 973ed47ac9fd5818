"""The encoder's product as a filter: which latents may matter on which token, with a proof.

Of 268 million pre-activations a step keeps 0.15 %, so the product need not be exact where it only has to tell which
these are. It is made in bfloat16 where the processor multiplies that fast, a few rows at a time into a buffer that is
used again, and each chunk comes with a bound on what it may be off. Whoever keeps an entry computes it again.

The bound, for a token x and a latent w, with x', w' what they are rounded to: by Cauchy and Schwarz
|x·w − x'·w'| ≤ ‖x − x'‖·‖w‖ + ‖x'‖·‖w − w'‖, with the norms of what was really rounded off; and sums of d products in
float32, in whatever order, add at most d·2⁻²⁴·‖x‖·‖w‖ (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), of
which four are allowed for: two sums, and room for units that add less exactly.

Shapes: `n` tokens, `d` the input's width, `f` latents, `c` tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

_CHUNK_ENTRIES = 2**21
"""Pre-activations of a chunk: few enough to stay in a processor's cache, unless that made products too narrow."""
_CHUNK_ROWS = 128
_OFF_ROWS = 1024
_PER_TERM = 2.0**-22


class Chunk(NamedTuple):
    """Some tokens' approximate products.

    Attributes:
        token_c: which tokens, int64.
        hidden_cf: `x · w` without the bias, in the filter's dtype; overwritten by the next chunk.
        error_f: no sum of a latent, before it was rounded to the filter's dtype, is farther than this from the float32
            product.
        rounding: the relative error of that last rounding.
    """

    token_c: torch.Tensor
    hidden_cf: torch.Tensor
    error_f: torch.Tensor
    rounding: float


class Product:
    """`x_nd · W_fdᵀ` in chunks of tokens of like norm, so that one large token does not widen the others' bound.

    Args:
        x_nd: float32 or float64.
        W_fd: the encoder's weights, latent by latent, in the same dtype.
        fast: whether to multiply in bfloat16; None: where the processor does that in hardware.

    Attributes:
        norm_n, norm_f: of tokens and latents.
    """

    def __init__(self, x_nd: torch.Tensor, W_fd: torch.Tensor, *, fast: bool | None = None) -> None:
        fast = has_fast_bfloat16(x_nd.device) if fast is None else fast
        self.dtype = torch.bfloat16 if fast else x_nd.dtype
        self._x_nd, self._W_fd = x_nd, W_fd.to(self.dtype)
        self.norm_n, self.norm_f = _norms(x_nd), _norms(W_fd)
        self._off_n = _rounded_off(x_nd, x_nd.to(self.dtype)) if fast else torch.zeros_like(self.norm_n)
        self._off_f = _rounded_off(W_fd, self._W_fd) if fast else torch.zeros_like(self.norm_f)

    def chunks(self, token_n: torch.Tensor | None = None) -> Iterator[Chunk]:
        """All tokens, or those of `token_n`."""
        token_n = torch.arange(len(self.norm_n)) if token_n is None else token_n
        token_n = token_n[self.norm_n[token_n].argsort()]
        d_sae, d_in = self._W_fd.shape
        rows = min(max(_CHUNK_ROWS, _CHUNK_ENTRIES // d_sae), len(token_n))
        buffer_cf = torch.empty(rows, d_sae, dtype=self.dtype)
        for token_c in token_n.split(rows) if rows else ():
            x_cd = self._x_nd[token_c].to(self.dtype)
            hidden_cf = torch.mm(x_cd, self._W_fd.T, out=buffer_cf[: len(token_c)])
            norm, off = self.norm_n[token_c].max(), self._off_n[token_c].max()
            error_f = (off + d_in * _PER_TERM * norm) * self.norm_f + (norm + off) * self._off_f
            yield Chunk(token_c, hidden_cf, error_f, torch.finfo(self.dtype).eps / 2)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a processor has instructions for products of bfloat16 (AVX-512 BF16, AMX)."""
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _norms(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _rounded_off(rows: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Norms of what rounding took away, a few rows at a time."""
    pairs = zip(rows.split(_OFF_ROWS), rounded.split(_OFF_ROWS), strict=True)
    return torch.cat([_norms(fine - coarse) for fine, coarse in pairs])
