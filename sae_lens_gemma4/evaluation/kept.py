"""The rows that a top fraction may leave out, kept beside the sums: exact, in bounded memory, and mergeable.

Shapes: `m` rows kept, `t` tokens, `d` the activations' width.
"""

from __future__ import annotations

import torch


class TopRows:
    """The `n_kept` tokens with the largest value, with their activations in the dtype they came in.

    Of equal values the token with the smaller index is the larger one.

    Attributes:
        value_m: float64, descending.
        index_m: the tokens' numbers in the stream.
        x_md: their activations, on the CPU.
    """

    def __init__(self, n_kept: int, d_in: int) -> None:
        self.n_kept = n_kept
        self.value_m = torch.zeros(0, dtype=torch.float64)
        self.index_m = torch.zeros(0, dtype=torch.long)
        self._slot_m = torch.zeros(0, dtype=torch.long)  # rows stay where they were put, so that few are moved
        self._slots_d = torch.zeros(0, d_in)

    @property
    def x_md(self) -> torch.Tensor:
        return self._slots_d[self._slot_m]

    def add(self, value_t: torch.Tensor, index_t: torch.Tensor, x_td: torch.Tensor) -> None:
        """Offer tokens; values and indices on the CPU, indices larger than all before."""
        n_before = len(self.value_m)
        if n_before == self.n_kept:
            better = value_t > self.value_m[-1]
            if not better.any():
                return
            value_t, index_t, x_td = value_t[better], index_t[better], x_td[better.to(x_td.device)]
        order = torch.cat([self.value_m, value_t]).argsort(descending=True, stable=True)[: self.n_kept]
        new = order >= n_before
        slot_m = torch.empty_like(order)
        slot_m[~new] = self._slot_m[order[~new]]
        self._make_room(len(order), x_td.dtype)
        free = torch.ones(len(self._slots_d), dtype=torch.bool)
        free[slot_m[~new]] = False
        slot_m[new] = free.nonzero()[: int(new.sum()), 0]
        rows = x_td[(order[new] - n_before).to(x_td.device)].cpu()
        self._slots_d[slot_m[new]] = rows.to(self._slots_d.dtype)
        self._slot_m = slot_m
        self.value_m, self.index_m = (
            torch.cat([old, more])[order] for old, more in ((self.value_m, value_t), (self.index_m, index_t))
        )

    def _make_room(self, n: int, dtype: torch.dtype) -> None:
        """At least `n` slots, in a dtype that holds what is there and what comes."""
        slots_d = self._slots_d
        dtype = torch.promote_types(slots_d.dtype, dtype) if len(slots_d) else dtype
        if len(slots_d) < n or slots_d.dtype != dtype:
            room = max(n, min(self.n_kept, 2 * len(slots_d)))
            self._slots_d = torch.zeros(room, slots_d.shape[1], dtype=dtype)
            self._slots_d[: len(slots_d)] = slots_d.to(dtype)

    def merged(self, other: TopRows, offset: int) -> TopRows:
        """Both together; `offset` is added to the other's indices."""
        total = TopRows(self.n_kept, self._slots_d.shape[1])
        for part, shift in ((self, 0), (other, offset)):
            if len(part.value_m):
                total.add(part.value_m, part.index_m + shift, part.x_md)
        return total
