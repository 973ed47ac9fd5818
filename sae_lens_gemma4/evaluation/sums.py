"""Sums over tokens by a key (a document, a range of positions, a role), from which every mean and ratio follows.

One figure on all tokens, the same figure on a thousand resamples of documents, and the same figure by position are
one formula on different sums; so sums are what is kept. They run in float64 and about a reference vector, the median of
the first tokens seen, so that a large mean costs no precision; two sets of sums are joined exactly.

Shapes: `t` tokens, `k` keys, `c` columns, `d` the activations' width.
"""

from __future__ import annotations

import torch

COLUMNS = (
    "n", "sse", "squares", "dot", "squares_hat", "cosine", "cosine_n", "norm", "norm_hat", "ratio", "ratio_n",
    "l0", "l1",
)  # fmt: skip
"""Of a token: 1, ‖x − x̂‖², ‖x‖², x·x̂, ‖x̂‖², cos(x, x̂) and whether it is defined, ‖x‖, ‖x̂‖, ‖x̂‖ / ‖x‖ and whether it is
defined, and the number and absolute sum of its active latents."""


def token_columns(x_td: torch.Tensor, x_hat_td: torch.Tensor, l0_t: torch.Tensor, l1_t: torch.Tensor) -> torch.Tensor:
    """The columns of each token, float64 `[t, c]`."""
    squares, squares_hat = x_td.square().sum(1), x_hat_td.square().sum(1)
    dot = (x_td * x_hat_td).sum(1)
    norm, norm_hat = squares.sqrt(), squares_hat.sqrt()
    product = norm * norm_hat
    defined, nonzero = product > 0, norm > 0
    return torch.stack(
        [
            torch.ones_like(norm),
            (x_td - x_hat_td).square().sum(1),
            squares,
            dot,
            squares_hat,
            torch.where(defined, dot / product.where(defined, torch.ones_like(product)), torch.zeros_like(dot)),
            defined.double(),
            norm,
            norm_hat,
            torch.where(nonzero, norm_hat / norm, torch.zeros_like(norm)),
            nonzero.double(),
            l0_t.double(),
            l1_t.double(),
        ],
        dim=1,
    )


class KeyedSums:
    """Sums for each key.

    Attributes:
        keys: each key's place.
        columns: of `COLUMNS` `[k, c]`.
        centred: of ‖x − reference‖² `[k, 1]`.
        x, error: of x − reference and of x − x̂ `[k, d]`.
    """

    _parts = ("columns", "centred", "x", "error")

    def __init__(self, d_in: int) -> None:
        self.keys: dict[int, int] = {}
        self.columns = torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        self.centred = torch.zeros(0, 1, dtype=torch.float64)
        self.x = torch.zeros(0, d_in, dtype=torch.float64)
        self.error = torch.zeros(0, d_in, dtype=torch.float64)

    def add(
        self, key_t: torch.Tensor, columns_tc: torch.Tensor, centred_td: torch.Tensor, error_td: torch.Tensor
    ) -> torch.Tensor:
        """Add tokens; returns where the sums of each one's key stand, on the CPU."""
        return self._add(key_t, columns_tc, centred_td.square().sum(1, keepdim=True), centred_td, error_td)

    def merge(self, other: KeyedSums, shift_d: torch.Tensor) -> torch.Tensor:
        """Add another's sums, whose reference is this one's plus `shift_d`; returns where each of its keys went."""
        columns, centred, x, error = (part.cpu() for part in other.table())
        n, shift_d = columns[:, :1], shift_d.cpu()
        centred = centred + 2 * (x @ shift_d)[:, None] + n * shift_d.square().sum()
        return self._add(torch.tensor(list(other.keys)), columns, centred, x + n * shift_d, error)

    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Columns, centred, x and error, without the room that is left; keys in the order in which they came."""
        n = len(self.keys)
        return self.columns[:n], self.centred[:n], self.x[:n], self.error[:n]

    def _add(self, key_t: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        unique, inverse = key_t.unique(return_inverse=True)
        known = torch.tensor([self.keys.setdefault(key, len(self.keys)) for key in unique.tolist()])
        places_t = known[inverse.cpu()]
        room = max(len(self.keys) - len(self.columns), 0)
        room = max(room, len(self.columns)) if room else 0  # doubling: rows are copied once on average
        for name, part in zip(self._parts, added, strict=True):
            sums = getattr(self, name).to(part.device)
            sums = torch.cat([sums, sums.new_zeros(room, sums.shape[1])]) if room else sums
            self.__dict__[name] = sums.index_add_(0, places_t.to(part.device), part)
        return places_t
