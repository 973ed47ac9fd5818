"""Which latents a step selects, and how large they are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """Selected latents `e`: tokens ascending, and within one token latents ascending.

    Attributes:
        token_e, latent_e: int64.
        pre_e: float32, `x · w + b`.
        act_e: float32, `pre_e` times the scale of its latent. Positive, except for entries that a GPU's fixed shapes
            leave over where there are too few positive ones: these are 0, and stand for nothing.
        smallest: float32, no dimensions: the smallest activation selected; infinity where there is none; NaN where
            weights or inputs are not finite, which a selection alone would not show.
    """

    token_e: torch.Tensor
    latent_e: torch.Tensor
    pre_e: torch.Tensor
    act_e: torch.Tensor
    smallest: torch.Tensor


def vouched(selection: Selection, *made_of: torch.Tensor | None) -> Selection:
    """With `smallest` not a number unless everything that the selection was made of is finite."""
    total = torch.stack([tensor.sum() for tensor in made_of if tensor is not None]).sum()
    return selection._replace(smallest=selection.smallest.masked_fill(~total.isfinite(), torch.nan))
