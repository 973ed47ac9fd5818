"""What an accumulator has gathered, at rest: the columns, the sums and the rows from which every figure follows.

Shapes: `n` tokens, `k` documents, `m` rows kept, `c` columns (`sums.COLUMNS`), `d` the activations' width, `f` latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sae_lens_gemma4.evaluation.figures import Kept, Sums
from sae_lens_gemma4.evaluation.kept import TopRows
from sae_lens_gemma4.evaluation.robust import VerdictRules
from sae_lens_gemma4.evaluation.sums import COLUMNS


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What an accumulator has gathered, on the CPU, until it is given more; x is about `reference_d` throughout."""

    columns_nc: torch.Tensor
    document_n: torch.Tensor
    sums: Sums
    error_kd: torch.Tensor
    reference_d: torch.Tensor
    by_dimension_2d: torch.Tensor
    worst: TopRows
    largest: TopRows
    above: Mapping[float, tuple[torch.Tensor, torch.Tensor]]
    fired_f: torch.Tensor | None
    first_fired_f: torch.Tensor
    has_documents: bool
    top_fractions: tuple[float, ...]
    norm_multiples: tuple[float, ...]
    rules: VerdictRules

    @property
    def n(self) -> int:
        return len(self.columns_nc)

    def column(self, name: str) -> torch.Tensor:
        return self.columns_nc[:, COLUMNS.index(name)]

    @cached_property
    def median_norm(self) -> float:
        return float(np.median(self.column("norm").numpy()))

    @cached_property
    def mean_d(self) -> torch.Tensor:
        """Mean activation, float64 `[d]`."""
        return self.reference_d + self.sums.x.sum(0) / self.n

    def not_kept(self) -> tuple[float, ...]:
        """Multiples of the median norm above which there are tokens whose activations were not kept."""
        norm_n, kept = self.column("norm"), len(self.largest.value_m)
        return tuple(
            c for c in self.norm_multiples if c not in self.above and int((norm_n > c * self.median_norm).sum()) > kept
        )

    def above_norm(self, c: float) -> Sums:
        """Sums by document of the tokens with a norm above c × the median's; NaN where they were not kept."""
        above_n = self.column("norm") > c * self.median_norm
        zeros = Sums(*(torch.zeros_like(part) for part in self.sums))
        columns = zeros.columns.index_add_(0, self.document_n[above_n], self.columns_nc[above_n])
        if c in self.above:
            return Sums(columns, *self.above[c])
        if c in self.not_kept():
            return Sums(columns, zeros.centred + torch.nan, zeros.x + torch.nan)
        kept, n = self.kept(self.largest), int(above_n.sum())
        centred, x = (
            whole.index_add_(0, kept.document[:n], part[:n])
            for whole, part in ((zeros.centred, kept.sums.centred), (zeros.x, kept.sums.x))
        )
        return Sums(columns, centred, x)

    def kept(self, rows: TopRows) -> Kept:
        x_md = rows.x_md.double() - self.reference_d
        sums = Sums(self.columns_nc[rows.index_m], x_md.square().sum(1, keepdim=True), x_md)
        return Kept(sums, self.document_n[rows.index_m])

    def concentration(self, n_points: int = 60) -> list[tuple[float, float]]:
        """The worst fraction of tokens against the share of squared error they hold, log-spaced from one token."""
        sse = self.column("sse").sort(descending=True).values
        held = sse.cumsum(0) / sse.sum()
        counts = torch.logspace(0, math.log10(len(sse)), n_points, dtype=torch.float64).round().long().unique()
        return [(int(k) / len(sse), float(held[k - 1])) for k in counts] if sse.sum() > 0 else []
