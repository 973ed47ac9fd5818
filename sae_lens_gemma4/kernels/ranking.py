"""The k largest of many numbers in numpy, ties settled by order.

`np.partition` finds the k-th largest of a row without sorting it, and most of its time goes into numbers that are far
from it. Where a row is long, a sample of its columns says first which these are; a count then shows whether it was
right.

Shapes: `r` rows, `c` columns, `a` values of several rows, one row's after another's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_STRIDE = 8
"""One column in this many is in the sample."""


def kth_of_each(values_rc: Array, k: int) -> Array:
    """The `k`-th largest of each row, `k` at most the number of columns."""
    n_rows, n_columns = values_rc.shape
    place = 3 * k // (2 * _STRIDE) + 6  # so far down the sample that nearly every row has k as large in all
    if place > n_columns // _STRIDE:
        return _kth(values_rc, k)
    least_r = _kth(values_rc[:, ::_STRIDE], place)
    flat_a = np.flatnonzero(values_rc >= least_r[:, None])
    row_a = flat_a // n_columns
    count_r = np.bincount(row_a, minlength=n_rows)
    kth_r = _kth(_table(values_rc.ravel()[flat_a], row_a, count_r, k), k)
    wrong_r = count_r < k
    if wrong_r.any():
        kth_r[wrong_r] = _kth(values_rc[wrong_r], k)
    return kth_r


def first_of_each(value_a: Array, row_a: Array, k: int) -> Array:
    """Which values are among the `k` largest of their row, the first ones of equals; rows ascend. Bool `[a]`."""
    if not len(row_a):
        return np.zeros(0, bool)
    count_r = np.bincount(row_a)
    kth_a = _kth(_table(value_a, row_a, count_r, k), k)[row_a]
    above_a, equal_a = value_a > kth_a, value_a == kth_a
    left_r = k - np.bincount(row_a, weights=above_a)
    before_a = np.cumsum(equal_a) - equal_a  # equals before this one, from the first row on
    starts_r = np.minimum(np.cumsum(count_r) - count_r, len(row_a) - 1)
    first_a: Array = above_a | (equal_a & (before_a - before_a[starts_r][row_a] < left_r[row_a]))
    return first_a


def first_of_all(value_a: Array, kth: float, k: int) -> Array:
    """Of values no less than `kth`, the `k`-th largest: those above it and the first that equal it. Indices."""
    chosen_a = value_a > kth
    chosen_a[np.flatnonzero(value_a == kth)[: k - int(np.count_nonzero(chosen_a))]] = True
    return np.flatnonzero(chosen_a)


def _kth(values_rc: Array, k: int) -> Array:
    place = values_rc.shape[1] - k
    kth_r: Array = np.partition(values_rc, place, axis=1)[:, place]
    return kth_r


def _table(value_a: Array, row_a: Array, count_r: Array, width: int) -> Array:
    """One row each, filled up with -∞ to at least `width`."""
    table_rc = np.full((len(count_r), max(int(count_r.max(initial=0)), width)), -np.inf, value_a.dtype)
    starts_r = np.cumsum(count_r) - count_r
    table_rc[row_a, np.arange(len(row_a)) - starts_r[row_a]] = value_a
    return table_rc
