from types import SimpleNamespace

import pytest

from sae_lens_gemma4.training.gate import check_gate
from sae_lens_gemma4.training.phases import Gate


def result(ve=0.9, l0=100.0, dead=10):
    return SimpleNamespace(metrics=SimpleNamespace(ve=ve, l0=l0, dead=dead), sae={"d_sae": 1000})


GATE = Gate(min_ve=0.8, l0_within=0.1, max_dead=0.05)


def test_a_gate_holds_on_every_corpus_or_not_at_all():
    passed = check_gate(GATE, {"a": result(), "b": result(ve=0.8, l0=90.0, dead=50)}, 100)
    assert passed.passed and len(passed.checks) == 6
    assert passed.sentence.startswith("the gate holds: ve on a is 0.900 (asked for at least 0.800), l0 on a is 100.000")
    assert passed.to_dict()["checks"][1] == {
        "corpus": "a", "figure": "l0", "value": 100.0, "at_least": 90.0, "at_most": pytest.approx(110), "passed": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"ve": 0.79}, "ve on b is 0.790 (asked for at least 0.800)"),
        ({"ve": None}, "ve on b is not defined"),
        ({"l0": 89.0}, "l0 on b is 89.000 (asked for at least 90.000 and at most 110.000)"),
        ({"l0": 111.0}, "l0 on b is 111.000"),
        ({"dead": 51}, "dead on b is 0.051 (asked for at most 0.050)"),
        ({"dead": None}, "dead on b is not defined"),
    ],
)
def test_what_does_not_hold_is_said(bad, sentence):
    failed = check_gate(GATE, {"a": result(), "b": result(**bad)}, 100)
    assert not failed.passed
    assert sentence in failed.sentence and failed.sentence.startswith("the gate does not hold: ")


def test_only_what_is_asked_for_is_checked():
    assert [c.figure for c in check_gate(Gate(min_ve=0.5), {"a": result(l0=1.0)}, 100).checks] == ["ve"]
    assert check_gate(Gate(l0_within=0.1), {"a": result()}, None).checks == []
