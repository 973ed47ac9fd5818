"""An evaluation as a record: figures with what they were measured on, as JSON, as a page, and in stock's names."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.downstream import LOSSES, MASKS, stock_keys
from sae_lens_gemma4.evaluation.intervals import MAX_CLUSTERS, Key, Sampling
from sae_lens_gemma4.evaluation.metrics import ReconstructionMetrics
from sae_lens_gemma4.evaluation.robust import VerdictRules

SCHEMA = 2
_VERSIONED = ("sae-lens-gemma4", "sae-lens", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True, kw_only=True)
class SAEEvaluation:
    """The result of `evaluate_sae`. Parts that are mappings have the form of the JSON (docs/evaluation.schema.json).

    `fired_f` is how many tokens each latent fires on, `[d_sae]`; it is too long for the JSON.
    """

    sae: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    protocol: str | None
    metrics: ReconstructionMetrics
    sampling: Sampling
    diagnosis: dict[str, Any]
    outliers: dict[str, Any]
    groups: dict[str, Any]
    widths: list[dict[str, Any]]
    forms: dict[str, Any] | None
    downstream: dict[str, Any] | None
    downstream_replicates: Mapping[Key, torch.Tensor]
    drift: dict[str, Any] | None
    curves: dict[str, Any]
    rules: VerdictRules
    fired_f: torch.Tensor | None

    @property
    def replicates(self) -> dict[Key, torch.Tensor]:
        """Every figure with an interval on each resample, `[resamples]`."""
        return {**self.metrics.replicates, **self.downstream_replicates}

    def figures(self) -> dict[Key, float | None]:
        """Every figure that has an interval where there are enough documents, by its key in `replicates`."""
        values: dict[Key, float | None] = dict(self.metrics.resampled())
        for mask, kind in product(MASKS, LOSSES) if self.downstream else ():
            values |= {("downstream", mask, kind, name): v for name, v in (self.downstream or {})[mask][kind].items()}
        return values

    def to_dict(self) -> dict[str, Any]:
        intervals = None
        if self.metrics.replicates:
            intervals = {
                **asdict(self.sampling),
                "documents": self.corpus["documents"],
                "groups": min(self.corpus["documents"], MAX_CLUSTERS),
                "verdict_share": self.metrics.verdict_share,
                "figures": self.metrics.intervals(),
            }
        return {
            "schema": SCHEMA,
            "kind": "evaluation",
            "sae": self.sae,
            "model": self.model,
            "corpus": self.corpus,
            "protocol": self.protocol,
            "metrics": self.metrics.to_dict(),
            "intervals": intervals,
            "diagnosis": self.diagnosis,
            "outliers": self.outliers,
            "groups": self.groups,
            "widths": self.widths,
            "forms": self.forms,
            "downstream": self.downstream,
            "drift": self.drift,
            "curves": self.curves,
            "rules": asdict(self.rules),
            "versions": versions(),
        }

    def to_stock(self) -> dict[str, dict[str, float | None]]:
        """What sae_lens's `run_evals` also measures, under its names."""
        m = self.metrics
        groups: dict[str, dict[str, float | None]] = {
            **(stock_keys(self.downstream) if self.downstream else {}),
            "reconstruction_quality": {"explained_variance": m.ve, "mse": m.mse, "cossim": m.cosine},
            "shrinkage": {
                "l2_norm_in": m.l2_norm_in,
                "l2_norm_out": m.l2_norm_out,
                "l2_ratio": m.l2_ratio,
                "relative_reconstruction_bias": m.relative_bias,
            },
            "sparsity": {"l0": m.l0, "l1": m.l1},
        }
        return {name: {key: _float(value) for key, value in group.items()} for name, group in groups.items()}

    def to_json(self, path: str | Path) -> None:
        write_json(self.to_dict(), path)

    def to_html(self, path: str | Path) -> None:
        """One self-contained page."""
        write_page(self.to_dict(), path)


def write_page(document: Mapping[str, Any], path: str | Path) -> None:
    from sae_lens_gemma4.report.html import render  # the one arrow to the right: a convenience

    write_text(render(document), path)


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}.") from e


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {**{name.replace("-", "_"): version(name) for name in _VERSIONED}, "python": platform.python_version()}
