"""Which of the numbers that several processes hold are the largest of all, by counts alone.

Positive floats ascend as their bits do. So the k-th largest is found 16 bits at a time, from the top: how many numbers
have which digits is added up over the ranks (65,536 counts), which tells the k-th's digits; then the same among those
that share them. Two rounds for float32, four for float64, however many numbers there are; no number is sent.

Of equals at the k-th, the first rank's come first: the order of the ranks' batches put one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae_lens_gemma4.kernels.ranks import Ranks

_BITS = 16
_DIGITS = 2**_BITS


class Share(NamedTuple):
    """What of this rank's numbers is among the `k` largest of all: the first `n_mine` of its own largest.

    Attributes:
        n_all: numbers of all ranks, int64, no dimensions.
        least: the k-th largest of all, in their dtype, no dimensions; 0 where there are fewer, infinity if k is 0.
        n_mine: those above `least` and, of those equal to it, what is left for this rank; int64, no dimensions.
    """

    n_all: torch.Tensor
    least: torch.Tensor
    n_mine: torch.Tensor


def share(value_e: torch.Tensor, k: int, ranks: Ranks) -> Share:
    """This rank's share of the `k` largest.

    Args:
        value_e: positive, float32 or float64, infinity allowed and NaN not.
        k: the same on all ranks.
    """
    bits_e = value_e.view(torch.int32 if value_e.dtype == torch.float32 else torch.int64)
    found = torch.zeros((), dtype=torch.int64, device=value_e.device)
    left, n_all = found + k, found
    for shift in reversed(range(0, 8 * value_e.element_size(), _BITS)):
        digit_e = bits_e.bitwise_right_shift(shift).bitwise_and_(_DIGITS - 1)
        counts = ranks.total(torch.bincount(digit_e, minlength=_DIGITS).int())
        descending = counts.flip(0).cumsum(0)
        n_all = torch.maximum(n_all, descending[-1])  # the first round's: later ones count fewer
        place = (descending < left).sum().clamp(max=_DIGITS - 1)
        left = left - torch.where(place > 0, descending[place - 1], 0)
        found = found * _DIGITS + (_DIGITS - 1 - place)
        bits_e = bits_e[digit_e == _DIGITS - 1 - place]  # those that have the digits found so far
    least = found.to(bits_e.dtype).view(value_e.dtype)
    equal_r = found.new_zeros(ranks.world)
    equal_r[ranks.rank] = len(bits_e)
    before = ranks.total(equal_r)[: ranks.rank].sum()
    n_mine = (value_e > least).sum() + torch.minimum((left - before).clamp(min=0), equal_r[ranks.rank])
    if k == 0:
        return Share(n_all, torch.full_like(least, torch.inf), torch.zeros_like(n_mine))
    return Share(n_all, torch.where(n_all < k, 0, least), torch.where(n_all < k, len(value_e), n_mine))


def smallest(number: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The smallest of the ranks' numbers, all positive; NaN if one of them is."""
    number = ranks.least(number.masked_fill(number.isnan(), -1))
    return number.masked_fill(number < 0, torch.nan)
