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
        (n.count(262144), "262,144"),
        (n.scientific(0.0), "0"),
        (n.duration(150.2), "150\u00a0s"),
        (n.duration(779.6), "13\u00a0min 0\u00a0s"),
    ],
)
def test_numbers_are_written_one_way(written: str, expected: str) -> None:
    assert written == expected
