"""Paired differences of many latents against chance, by flipping the signs of pairs.

If it is all one to a latent which side of a pair has the property, each pair's difference could as well have had the
other sign. So the sum of the differences is compared with its value under all assignments of signs, or under many drawn
ones. No distribution is assumed, which matters: a latent is zero on most prompts and large on few.

The sum orders assignments of signs as the paired t does, because flips leave the sum of squares as it is. Divided by
the root of that sum, it is on one scale for all latents, and its largest value over latents under each assignment gives
the family-wise p-value (maxT; Westfall and Young 1993), whatever the correlations of the latents.

Shapes: `p` pairs, `f` latents, `b` assignments of signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Alternative = Literal["greater", "two-sided"]

_FLIPS, _LATENTS = 1024, 256
"""Assignments and latents of one product: 2 MiB, which stay in the cache while they are compared."""
_TIE = 1e-10
"""Sums of the normalised differences that are nearer than this are equal."""


class FlipTest(NamedTuple):
    """Of each latent, how often chance does as well.

    Attributes:
        p_f: of this latent alone.
        family_f: of any of the latents; never below `p_f`.
    """

    p_f: Floats
    family_f: Floats


def is_exact(n_pairs: int, permutations: int) -> bool:
    """Whether all assignments of signs are gone through, as there are no more than `permutations`."""
    return n_pairs < 62 and 2**n_pairs <= permutations


def least_p(n_pairs: int, permutations: int, alternative: Alternative = "greater") -> float:
    """The smallest p-value that so many pairs and permutations can give."""
    if not is_exact(n_pairs, permutations):
        return 1 / (1 + permutations)
    return float(1 if alternative == "greater" else 2) * 0.5**n_pairs


def sign_flip_test(
    difference_pf: npt.NDArray[np.floating],
    permutations: int,
    seed: int | list[int],
    alternative: Alternative = "greater",
) -> FlipTest:
    """Test the sum of each latent's differences, float `[p, f]`, against sign flips.

    p-values are shares of all 2^p assignments where these are at most `permutations`; else (1 + k) / (1 + b) of b drawn
    ones (Phipson and Smyth 2010), the same ones for every latent. A latent without any difference has 1.
    """
    n_pairs, n_latents = difference_pf.shape
    unit_pf = torch.from_numpy(difference_pf.astype(np.float64))
    norm_f = torch.linalg.vector_norm(unit_pf, dim=0)
    unit_pf = unit_pf / torch.where(norm_f > 0, norm_f, 1.0)
    sum_f = unit_pf.sum(dim=0)
    two_sided = alternative == "two-sided"
    if two_sided:  # the larger side is up
        unit_pf = unit_pf * torch.where(sum_f < 0, -1.0, 1.0).double()
        sum_f = sum_f.abs()
    parts = [(chunk_pf.contiguous(), at) for at, chunk_pf in enumerate(unit_pf.split(_LATENTS, dim=1))]
    sums = sum_f.split(_LATENTS)
    as_large_f, largest_b, n_flips = torch.zeros(n_latents, dtype=torch.int64), [], 0
    counts = as_large_f.split(_LATENTS)
    for flipped_bp in _flips(n_pairs, permutations, seed):
        n_flips += len(flipped_bp)
        chunk_max_b = torch.full((len(flipped_bp),), -torch.inf, dtype=torch.float64)
        for part_pf, at in parts:
            # A flip takes its difference off twice, so an assignment does as well where what it flips adds up to none.
            taken_bf = flipped_bp @ part_pf
            as_large_bf = taken_bf <= _TIE / 2
            if two_sided:
                as_large_bf |= taken_bf >= sums[at] - _TIE / 2
            counts[at].add_(as_large_bf.sum(dim=0))
            sum_bf = sums[at] - 2 * taken_bf
            torch.maximum(chunk_max_b, (sum_bf.abs() if two_sided else sum_bf).amax(dim=1), out=chunk_max_b)
        largest_b.append(chunk_max_b)
    if not n_latents:
        return FlipTest(np.zeros(0), np.zeros(0))
    ascending_b = torch.cat(largest_b).sort().values
    family_f = n_flips - torch.searchsorted(ascending_b, sum_f - _TIE)
    own = 0 if is_exact(n_pairs, permutations) else 1
    return FlipTest(
        ((as_large_f + own) / (n_flips + own)).double().numpy(), ((family_f + own) / (n_flips + own)).double().numpy()
    )


def _flips(n_pairs: int, permutations: int, seed: int | list[int]) -> Iterator[torch.Tensor]:
    """Which pairs are flipped, 0 or 1 in float64 `[b, p]`: all assignments, or so many drawn ones."""
    if is_exact(n_pairs, permutations):
        for numbers_b in torch.arange(2**n_pairs).split(_FLIPS):
            yield ((numbers_b[:, None] >> torch.arange(n_pairs)) & 1).double()
        return
    generator = np.random.default_rng(seed)
    for first in range(0, permutations, _FLIPS):
        size = (min(_FLIPS, permutations - first), n_pairs)
        yield torch.from_numpy(generator.integers(0, 2, size=size, dtype=np.int8)).double()
