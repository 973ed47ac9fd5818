"""The gate: what an SAE must reach on held-out text before it may be called released, and in what it fell short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sae_lens_gemma4.evaluation.result import SAEEvaluation
from sae_lens_gemma4.training.phases import Gate


@dataclass(frozen=True)
class Check:
    """One figure on one corpus against its bounds; a figure that is not defined does not pass."""

    corpus: str
    figure: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True)
class GateResult:
    """All checks of one SAE."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def sentence(self) -> str:
        return gate_sentence(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [asdict(c) | {"passed": c.passed} for c in self.checks]}


def gate_sentence(gate: Mapping[str, Any] | None) -> str:
    """Whether a gate holds, and by which figures: of a `GateResult.to_dict`, as `result.json` has it."""
    if gate is None:
        return "no gate was asked for."
    failed = [_words(check) for check in gate["checks"] if not check["passed"]]
    if failed:
        return f"the gate does not hold: {'; '.join(failed)}."
    return f"the gate holds: {', '.join(map(_words, gate['checks']))}."


def _words(check: Mapping[str, Any]) -> str:
    value = "not defined" if check["value"] is None else f"{check['value']:.3f}"
    bounds = [(word, check[key]) for word, key in (("at least", "at_least"), ("at most", "at_most"))]
    asked = " and ".join(f"{word} {bound:.3f}" for word, bound in bounds if bound is not None)
    return f"{check['figure']} on {check['corpus']} is {value} (asked for {asked})"


def check_gate(gate: Gate, results: Mapping[str, SAEEvaluation], k: float | None) -> GateResult:
    """Hold an SAE's results on each corpus against `gate`; `k` is what its L0 should be."""
    return GateResult([check for corpus, result in results.items() for check in _checks(gate, corpus, result, k)])


def _checks(gate: Gate, corpus: str, result: SAEEvaluation, k: float | None) -> Iterator[Check]:
    metrics = result.metrics
    if gate.min_ve is not None:
        yield Check(corpus, "ve", _float(metrics.ve), at_least=gate.min_ve)
    if gate.l0_within is not None and k is not None:
        low, high = k * (1 - gate.l0_within), k * (1 + gate.l0_within)
        yield Check(corpus, "l0", _float(metrics.l0), at_least=low, at_most=high)
    if gate.max_dead is not None:
        dead = None if metrics.dead is None else metrics.dead / result.sae["d_sae"]
        yield Check(corpus, "dead", dead, at_most=gate.max_dead)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
