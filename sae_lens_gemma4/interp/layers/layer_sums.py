"""What a pass over a text leaves of every layer's activations: sums over tokens.

Activations of sixty layers are not kept. Their cosines with the tokens are summed by document, so that documents can be
resampled afterwards; norms and what belongs to the mean are summed over all.

Shapes: `t` tokens of a batch that count, `l` hooks, `k` groups of documents, `d` the width.
"""

from __future__ import annotations

import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.evaluation.reading import float64

_CHUNK = 1024
"""Tokens whose activations are float32 at a time."""


class LayerSums:
    """Running sums by hook, in float64; those about the mean are about the first tokens', so that a large mean takes
    nothing from a small variance."""

    def __init__(self, n_hooks: int, n_groups: int) -> None:
        self.n = 0
        self.cosine_lk = torch.zeros(n_hooks, n_groups, dtype=torch.float64)
        self.norm_l, self.square_l, self.centred_square_l = torch.zeros(3, n_hooks, dtype=torch.float64).unbind()
        self.reference_ld: list[torch.Tensor] = []
        self.centred_ld: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []

    def add(self, x_td: torch.Tensor, own_td: torch.Tensor) -> None:
        """The next hook's activations of a batch, and its tokens' own unit rows."""
        n, parts = len(self._rows), []
        if n == len(self.reference_ld):
            reference_d = x_td[:_CHUNK].float().mean(dim=0)
            self.reference_ld.append(reference_d)
            self.centred_ld.append(float64(torch.zeros_like(reference_d)))
        for part_td, own_part_td in zip(x_td.split(_CHUNK), own_td.split(_CHUNK), strict=True):
            part_td = part_td.float()
            norm_t = torch.linalg.vector_norm(part_td, dim=1)
            cosine_t = torch.linalg.vecdot(part_td, own_part_td) / norm_t.clamp(min=1e-30)
            part_td = part_td - self.reference_ld[n]
            self.centred_ld[n] += float64(part_td.sum(dim=0))
            parts.append(torch.stack([cosine_t.clamp(-1, 1), norm_t, torch.linalg.vector_norm(part_td, dim=1)]))
        self._rows.append(torch.cat(parts, dim=1).cpu())

    def close(self, group_t: torch.Tensor, hooks: list[str], batch: Corpus) -> torch.Tensor:
        """All hooks of a batch were added. Returns its tokens' cosines, float32 `[l, t]`."""
        rows_l3t, self._rows = torch.stack(self._rows), []
        cosine_lt, norm_lt, centred_lt = rows_l3t.unbind(dim=1)
        if not norm_lt.isfinite().all():
            n, t = (~norm_lt.isfinite()).nonzero()[0].tolist()
            text, document = batch.locate(int(batch.document_bp[batch.keep_bp][t]))
            raise DataError(f"Activations at {hooks[n]} are not finite, first in document {document} of {text!r}.")
        self.n += norm_lt.shape[1]
        self.cosine_lk.index_add_(1, group_t, cosine_lt.double())
        self.norm_l += norm_lt.double().sum(dim=1)
        self.square_l += norm_lt.double().square().sum(dim=1)
        self.centred_square_l += centred_lt.double().square().sum(dim=1)
        return cosine_lt

    def norms(self) -> tuple[list[float], list[float]]:
        """Mean and root mean square, over all tokens."""
        return (self.norm_l / self.n).tolist(), (self.square_l / self.n).sqrt().tolist()

    def about_mean(self) -> tuple[list[float], list[float | None]]:
        """The mean's norm, and γ."""
        norms, gammas = [], []
        for reference_d, centred_d, squares in zip(
            self.reference_ld, self.centred_ld, self.centred_square_l.tolist(), strict=True
        ):
            norms.append(float((float64(reference_d) + centred_d / self.n).norm()))
            variance = (squares - float(centred_d.square().sum()) / self.n) / self.n
            gammas.append(norms[-1] / variance**0.5 if variance > 0 else None)
        return norms, gammas
