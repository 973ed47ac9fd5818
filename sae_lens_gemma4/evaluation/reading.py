"""What an SAE makes of activations, in bounded memory and without products that are nearly all zeros.

Of 65,536 latents some hundred are active on a token. Stock multiplies all of them with the decoder and keeps them
dense for every token of a batch (1.2 MiB a token); here rows go through in chunks of fixed size, what is active is
read off once, and, where that is little, only those rows of the decoder are added up. The encoder is the SAE's own
`encode`, so every architecture computes what it computes in use.

Shapes: `t` tokens, `f` latents, `a` active ones of a chunk, `d` the activations' width, `w` widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE

from sae_lens_gemma4.kernels.dispatch import kernels_for
from sae_lens_gemma4.kernels.pattern import pattern

CHUNK_LATENTS = 2**25
"""Latent activations held at once: 128 MiB in float32."""
CHUNK_VALUES = 2**23
"""Activations in a chunk: some ten float64 copies of them are made, 64 MiB each."""
_SPARSE_BELOW = 1 / 32
"""The share of active latents from which a dense product is faster than a sum of rows."""
_LINEAR_DECODERS = (GatedSAE.decode, JumpReLUSAE.decode, StandardSAE.decode)
"""Decoders that are `acts @ W_dec + b_dec` where nothing is normalised or reshaped."""


class ActiveLatents(NamedTuple):
    """The latents that are not zero: tokens ascending, and within one token latents ascending.

    Attributes:
        token_a, latent_a: int64.
        value_a: in the SAE's dtype.
    """

    token_a: torch.Tensor
    latent_a: torch.Tensor
    value_a: torch.Tensor

    @staticmethod
    def of(acts_tf: torch.Tensor) -> ActiveLatents:
        acts_tf = acts_tf.to_dense() if acts_tf.is_sparse else acts_tf
        token_a, latent_a = acts_tf.nonzero(as_tuple=True)
        return ActiveLatents(token_a, latent_a, acts_tf[token_a, latent_a])


class Reading(NamedTuple):
    """One chunk of tokens as the SAE sees it.

    Attributes:
        x_td: activations as they came, on the SAE's device.
        x_hat_td: their reconstructions.
        active: the latents that made them.
        x_hat_wtd: reconstructions from the first latents only, one for each width asked for.
    """

    x_td: torch.Tensor
    x_hat_td: torch.Tensor
    active: ActiveLatents
    x_hat_wtd: torch.Tensor | None


@torch.no_grad()
def encode_active(sae: SAE[Any], x_td: torch.Tensor) -> Iterator[tuple[torch.Tensor, ActiveLatents]]:
    """Encode `x_td` in chunks of fixed size: each chunk, on the SAE's device, and its active latents."""
    for chunk_td in _chunks(sae, x_td):
        yield chunk_td, ActiveLatents.of(sae.encode(chunk_td))


@torch.no_grad()
def read(sae: SAE[Any], x_td: torch.Tensor, widths: Sequence[int] = ()) -> Iterator[Reading]:
    """Encode and decode `x_td` in chunks; `widths` as Matryoshka SAEs nest them, ascending, at most `d_sae`."""
    linear = decodes_linearly(sae)
    for chunk_td in _chunks(sae, x_td):
        acts_tf = sae.encode(chunk_td)
        active = ActiveLatents.of(acts_tf)
        if linear:
            few = len(active.value_a) < _SPARSE_BELOW * acts_tf.numel()
            levels = list(dict.fromkeys((*widths, sae.cfg.d_sae)))
            nested = _sums_of_rows(sae, active, len(chunk_td), levels) if few else _products(sae, acts_tf, levels)
            yield Reading(chunk_td, nested[-1], active, nested[: len(widths)] if widths else None)
            continue
        x_hat_td, x_hat_wtd = sae.decode(acts_tf), None
        if widths:  # encoded again: one that normalises forgets what it did once it has decoded
            x_hat_wtd = torch.stack([sae.decode(_first(sae.encode(chunk_td), width)) for width in widths])
        yield Reading(chunk_td, x_hat_td, active, x_hat_wtd)


@contextmanager
def flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Heads are flattened here, so the SAE must not; sae_lens's evaluation does the same (evals.py, `run_evals`)."""
    reshapes = sae.hook_z_reshaping_mode
    if reshapes:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()


def float64(x: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def reconstruct(sae: SAE[Any], x_td: torch.Tensor) -> torch.Tensor:
    """The SAE's forward pass `[t, d]`, in chunks."""
    return torch.cat([reading.x_hat_td for reading in read(sae, x_td)])


def decodes_linearly(sae: SAE[Any]) -> bool:
    """Whether `decode` is a product with `W_dec` and nothing else."""
    return (
        type(sae).decode in _LINEAR_DECODERS
        and sae.cfg.normalize_activations == "none"
        and not sae.hook_z_reshaping_mode
        and not sae.hook_sae_recons.fwd_hooks
    )


def _chunks(sae: SAE[Any], x_td: torch.Tensor) -> Sequence[torch.Tensor]:
    rows = max(1, min(CHUNK_LATENTS // sae.cfg.d_sae, CHUNK_VALUES // x_td[0].numel())) if len(x_td) else 1
    chunks: Sequence[torch.Tensor] = x_td.to(sae.W_dec.device).split(rows)
    return chunks


def _sums_of_rows(sae: SAE[Any], active: ActiveLatents, n_tokens: int, widths: Sequence[int]) -> torch.Tensor:
    """Reconstructions `[w, t, d]` from the latents below each width; every row of the decoder is read once."""
    n = len(widths)
    edges = torch.tensor(widths, device=active.latent_a.device)
    level_a = torch.bucketize(active.latent_a, edges, right=True)
    inside = level_a < n
    rows = pattern((active.token_a * n + level_a)[inside], active.latent_a[inside], n_tokens * n)
    parts = kernels_for(sae.W_dec.device).sums(rows, active.value_a[inside], sae.W_dec)
    return parts.view(n_tokens, n, -1).cumsum(1).movedim(1, 0) + sae.b_dec


def _products(sae: SAE[Any], acts_tf: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """The same by one product for each range between two widths: as much work as one dense decoding."""
    acts_tf = acts_tf.to_dense() if acts_tf.is_sparse else acts_tf
    x_hat_wtd = [sae.b_dec.expand(len(acts_tf), -1)]
    for low, high in pairwise((0, *widths)):
        x_hat_wtd.append(torch.addmm(x_hat_wtd[-1], acts_tf[:, low:high], sae.W_dec[low:high]))
    return torch.stack(x_hat_wtd[1:])


def _first(acts_tf: torch.Tensor, width: int) -> torch.Tensor:
    acts_tf = acts_tf.to_dense() if acts_tf.is_sparse else acts_tf.clone()
    acts_tf[..., width:] = 0
    return acts_tf
