"""How numbers are written: a true minus sign, no decimals that say nothing, and words where there is no number."""

from __future__ import annotations

import pytest

from sae_lens_gemma4.report import numbers as n


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (n.ve(-1.4701), "−1.470"),
        (n.ve(-1008.44), "−1,008.4"),
        (n.ve(-21.876), "−21.88"),
        (n.ve(-0.0001), "0.000"),
        (n.ve(None), "not defined"),
        (n.real(0.0), "0.000"),
        (n.real(-0.00031), "−3.1\u00a0×\u00a010⁻⁴"),
        (n.percent(0.3421), "34.2\u00a0%"),
        (n.percent(0.00248), "0.25\u00a0%"),
        (n.percent(None), "not defined"),
        (n.top_percent("0.0001"), "0.01\u00a0%"),
        (n.top("0.001", 1000), "0.1\u00a0%"),
        (n.top("0.001", 999), "0.1\u00a0% (1 token of 999)"),
        (n.count(262144), "262,144"),
        (n.scientific(0.0), "0"),
        (n.percent(-0.1758), "−17.6\u00a0%"),
        (n.times("5"), "5×"),
        (n.interval([0.8011, 0.8229], n.ve), "[0.801, 0.823]"),
        (n.interval(None, n.ve), "[not defined]"),
        (n.interval([None, 0.5], n.ve), "[not defined, 0.500]"),
        (n.signed(0.0123, n.ve), "+0.012"),
        (n.signed(-0.0123, n.ve), "−0.012"),
        (n.signed(0.0001, n.ve), "0.000"),
        (n.signed(None, n.ve), "not defined"),
        (" ".join(n.ascending(["10", "2", "0.001", "100"])), "0.001 2 10 100"),
        (n.both([("before", "0.194"), ("after", "0.812")]), "0.194 before and 0.812 after"),
        (n.both([("only", "0.194")]), "0.194"),
        (n.duration(150.2), "150\u00a0s"),
        (n.duration(779.6), "13\u00a0min 0\u00a0s"),
    ],
)
def test_numbers_are_written_one_way(written: str, expected: str) -> None:
    assert written == expected
