"""Two SAEs on the same tokens: what changed, how sure that is, and what was forgotten.

Both see one forward pass, and the draws of documents behind their intervals are the same, so the interval of a
difference is that of paired measurements, far narrower than the two intervals suggest. Results of different
conditions are refused (`protocol.require_same_protocol`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_gemma4.activations.corpus import CorpusLike
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.evaluate import evaluate_saes
from sae_lens_gemma4.evaluation.intervals import Estimate, paired_difference
from sae_lens_gemma4.evaluation.metrics import nested
from sae_lens_gemma4.evaluation.protocol import require_same_protocol
from sae_lens_gemma4.evaluation.result import SCHEMA, SAEEvaluation, write_json, write_page
from sae_lens_gemma4.models.hook_names import canonical_name
from sae_lens_gemma4.models.interface import HookedModel


@dataclass(frozen=True)
class Comparison:
    """One SAE against another on one corpus.

    Attributes:
        corpus: its name.
        before, after: the two results.
    """

    corpus: str
    before: SAEEvaluation
    after: SAEEvaluation

    def __post_init__(self) -> None:
        _require_one_hook(self.before.sae["hook_name"], self.after.sae["hook_name"])
        require_same_protocol(self.before.to_dict(), self.after.to_dict())

    def differences(self) -> dict[str, Any]:
        """after − before of every figure that can have an interval, in the form of the metrics: `Estimate`s or None."""
        before, after, sampling = self.before, self.after, self.before.sampling
        if after.sampling != sampling:
            raise ConfigError(f"The intervals were made differently: {sampling} and {after.sampling}.")
        return nested(
            paired_difference(
                before.figures(),
                after.figures(),
                before.replicates,
                after.replicates,
                sampling,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "differences": _differences(self.differences()),
        }


def _differences(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _differences(inner) for key, inner in value.items()}
    if isinstance(value, Estimate):
        return {"value": float(value), "interval": list(value.interval) if value.interval else None}
    return None


@dataclass(frozen=True)
class ComparisonReport:
    """Comparisons on every corpus and at every hook.

    Attributes:
        rows: on the model that the later SAEs are for.
        forgetting: the same SAEs on the model that the earlier ones were trained on.
    """

    rows: list[Comparison]
    forgetting: list[Comparison] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "comparison",
            "rows": [row.to_dict() for row in self.rows],
            "forgetting": [row.to_dict() for row in self.forgetting],
        }

    def to_json(self, path: str | Path) -> None:
        write_json(self.to_dict(), path)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page."""
        write_page(self.to_dict(), path)


def compare_saes(
    before: Mapping[str, SAE[Any]],
    after: Mapping[str, SAE[Any]],
    model: HookedModel,
    corpora: Mapping[str, CorpusLike],
    *,
    sources_before: Mapping[str, dict[str, Any]] = {},
    sources_after: Mapping[str, dict[str, Any]] = {},
    **settings: Any,
) -> list[Comparison]:
    """Measure pairs of SAEs, those of one name, on every corpus: one forward pass a corpus, whatever their number.

    Args:
        before, after: SAEs by the name of their pair; a pair reads one hook.
        sources_before, sources_after: as `evaluate_saes` takes them.
        settings: of `evaluate_saes`.

    Raises:
        ConfigError: an SAE without its other half, or with one at another hook.
    """
    if set(before) != set(after) or not before:
        raise ConfigError(f"Pairs need both halves; before has {sorted(before)}, after {sorted(after)}.")
    saes = {("before", n): sae for n, sae in before.items()} | {("after", n): sae for n, sae in after.items()}
    sources = {("before", n): s for n, s in sources_before.items()} | {
        ("after", n): s for n, s in sources_after.items()
    }
    hook_names = settings.get("hook_names", {})
    for name in before:
        pair = [(state, name) for state in ("before", "after")]
        _require_one_hook(*(hook_names.get("/".join(key)) or saes[key].cfg.metadata.hook_name for key in pair))
    comparisons = []
    for corpus_name, corpus in corpora.items():
        results = evaluate_saes(
            {"/".join(key): sae for key, sae in saes.items()},
            model,
            corpus,
            sources={"/".join(key): source for key, source in sources.items()},
            references={f"after/{name}": sae for name, sae in before.items() if _same_shape(sae, after[name])},
            **settings,
        )
        for name in before:
            comparisons.append(Comparison(corpus_name, results[f"before/{name}"], results[f"after/{name}"]))
    return comparisons


def _require_one_hook(before: str | None, after: str | None) -> None:
    if None not in (before, after) and canonical_name(str(before)) != canonical_name(str(after)):
        raise ConfigError(f"SAEs at two hooks cannot be compared: {before} and {after}.")


def _same_shape(one: SAE[Any], other: SAE[Any]) -> bool:
    return (one.cfg.d_in, one.cfg.d_sae) == (other.cfg.d_in, other.cfg.d_sae)
