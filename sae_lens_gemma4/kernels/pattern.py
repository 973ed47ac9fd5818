"""Where the entries of a sparse matrix lie, in the one form that every kernel reads.

Decoding, its gradients and the exact values of candidates differ only in what the rows and columns stand for: tokens
and latents, or the other way round. So kernels take a pattern and know neither.

Shapes: `r` rows, `e` entries, `c` columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Pattern(NamedTuple):
    """A CSR pattern: row `r` has the columns `column_e[offset_r[r] : offset_r[r + 1]]`.

    Attributes:
        offset_r: int64 `[rows + 1]`, from 0 to the number of entries.
        column_e: int64 `[e]`.
    """

    offset_r: torch.Tensor
    column_e: torch.Tensor

    @property
    def n_rows(self) -> int:
        return len(self.offset_r) - 1

    def row_e(self) -> torch.Tensor:
        """The row of each entry, int64 `[e]`."""
        rows = torch.arange(self.n_rows, device=self.offset_r.device)
        return rows.repeat_interleave(self.offset_r.diff(), output_size=len(self.column_e))


def pattern(row_e: torch.Tensor, column_e: torch.Tensor, n_rows: int) -> Pattern:
    """The pattern of entries whose rows ascend."""
    rows = torch.arange(n_rows + 1, device=row_e.device)
    return Pattern(torch.searchsorted(row_e, rows), column_e)


def by_column(column_e: torch.Tensor) -> torch.Tensor:
    """The order of entries in which columns ascend, and within a column the entries: int64 `[e]`."""
    if column_e.device.type == "cpu" and len(column_e) and int(column_e.max()) < 2**16:
        return torch.from_numpy(np.argsort(column_e.numpy().astype(np.uint16), kind="stable"))  # a radix sort
    return torch.argsort(column_e, stable=True)
