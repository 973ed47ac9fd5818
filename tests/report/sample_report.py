"""A report in closed form, of the demo's shape, and a reader of the page that is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "img", "link", "hr", "input"}


FRACTIONS = ("0.0001", "0.001", "0.01")
FACTORS = ("2", "5", "10", "100")
QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")
VERDICTS = {"healthy": 0.81, "outlier-dominated": 0.31, "misfit": -1.47}
"""Verdicts, each with the VE that a sample of it has."""
WORDS = (
    "The",
    " quick",
    " brown",
    " fox",
    ".",
    "\n",
    "It",
    " jumped",
    " over",
    " the",
    " <b>",
    " lazy",
    " dog",
    "  ",
    "\n\n",
)


def around(value: float | None, width: float = 0.011) -> list[float] | None:
    return None if value is None else [value - width, value + 2 * width]


def make_evaluation(
    corpus: str = "tuned text",
    model: str = "gemma-4-demo-it",
    *,
    ve: float | None = 0.81,
    verdict: str | None = "healthy",
    dead: int = 17,
    intervals: bool = True,
    downstream: bool = True,
    roles: bool = True,
    optional: bool = True,
) -> dict[str, Any]:
    """An evaluation in closed form: the top f of tokens hold f ** tail of the SSE.

    `optional` is all that is there only for some SAEs: widths, forms and drift.
    """
    tail = 0.25 if verdict == "outlier-dominated" else 0.9
    share = {f: float(f) ** tail for f in FRACTIONS}

    def without(held: float) -> float | None:
        return None if ve is None else 1 - (1 - ve) * (1 - held)

    metrics: dict[str, Any] = {
        "n_tokens": 64123,
        "ve": ve,
        "ve_centred": without(0.01),
        "ve_per_dimension": without(0.02),
        "ve_without_top_sse": {f: without(share[f]) for f in FRACTIONS},
        "ve_without_top_norm": {f: without(share[f] / 2) for f in FRACTIONS},
        "ve_without_high_norm": {c: without(0.2 / float(c)) for c in FACTORS},
        "ve_without_both": {c: {f: without(share[f] / 2 + 0.1 / float(c)) for f in FRACTIONS} for c in FACTORS},
        "sse_share": share,
        "high_norm_share": {c: 0.02 / float(c) for c in FACTORS},
        "high_norm_sse_share": {c: 0.3 / float(c) for c in FACTORS},
        "mse": None if ve is None else (1 - ve) * 41.2,
        "nmse": None if ve is None else (1 - ve) * 0.93,
        "cosine": 0.9312 if ve and ve > 0 else 0.2214,
        "relative_bias": 1.0371,
        "l2_norm_in": 212.74,
        "l2_norm_out": 201.33,
        "l2_ratio": 0.9468,
        "l0": 31.84 + dead / 100,
        "l1": 48.27,
        "dead": dead,
        "gamma": 1.273,
        "error_quantiles": {q: 0.3 * float(q) + 0.02 for q in ("0.01", *QUANTILES, "0.99", "0.999")},
        "never_fired": {"16384": dead + 60, "32768": dead + 20, "64123": dead},
        "verdict": verdict,
    }
    trials = [
        ("none", None, ve, 33.1),
        ("scale", 0.167, 0.71, 30.2),
        ("mean", None, -0.4, 36.5),
        ("threshold", 2.5, -1.1, 12.25),
    ]
    misfit = verdict == "misfit"
    edges = [-6 + i / 4 for i in range(25)]
    return {
        "schema": 2,
        "kind": "evaluation",
        "sae": {
            "release": "gemma-4-demo-res-jumprelu",
            "sae_id": "layer_3_width_1k_l0_32",
            "path": None,
            "architecture": "jumprelu",
            "d_in": 96,
            "d_sae": 1024,
            "hook_name": "blocks.3.hook_resid_post",
            "trained_on": "gemma-4-demo",
            "hash": f"5ae{dead:013x}",
        },
        "model": {"name": model, "class": "Gemma4ProxyLM", "dtype": "float32", "fingerprint": "c0ffee0123456789"},
        "corpus": {
            "name": corpus,
            "tokens": 65536,
            "documents": 311,
            "blocks": 512,
            "context_size": 128,
            "hash": "9f2c4e71a0b3d85566e1c7f0" + f"{len(corpus):08x}",
            "source": "embedded:text",
            "split": "heldout",
            "revision": None,
            "first_document": 40,
            "next_document": 351,
            "exclude_special_tokens": True,
            "bos": None,
            "isolate_documents": False,
        },
        "protocol": "quick",
        "metrics": metrics,
        "intervals": make_intervals(metrics) if intervals else None,
        "diagnosis": {
            "verdict": verdict,
            "reason": f"VE without the top 1 % is {without(share['0.01'])}"
            if verdict
            else "VE is not defined on these tokens.",
            "norm_screen": False if verdict == "outlier-dominated" else None,
            "cause": "scale" if misfit else None,
            "cause_reason": "Activations scaled by 0.167 bring VE to 0.71." if misfit else None,
            "trials": [{"correction": c, "factor": f, "ve": v, "l0": x} for c, f, v, x in trials] if misfit else [],
        },
        "outliers": make_outliers(share["0.001"]),
        "groups": {
            "position": [
                make_group(name, i, without(0.1 / (i + 1))) for i, name in enumerate(("0", "1–15", "16–63", "64–127"))
            ],
            "role": [make_group(name, i, without(0.05 * i)) for i, name in enumerate(("user", "model"))]
            if roles
            else [],
        },
        "widths": [{"width": w, "ve": without(-200 / w), "nmse": 0.2, "l0": w / 32} for w in (256, 512, 1024)]
        if optional
        else [],
        "forms": {
            "k": 32,
            "batch_tokens": 4096,
            "saved": {"ve": ve, "l0": 31.9},
            "batch_topk": {"ve": without(0.02), "l0": 32.0},
        }
        if optional
        else None,
        "downstream": make_downstream(dead / 1000, intervals) if downstream else None,
        "drift": make_drift() if optional else None,
        "curves": {
            "sse_concentration": [[10 ** (-4 + i / 10), 10 ** (tail * (-4 + i / 10))] for i in range(41)],
            "log10_density": {
                "edges": edges,
                "counts": [round(180 * math.exp(-((e + 2 + dead / 500) ** 2))) for e in edges[1:]],
            },
            "norm_against_sse": make_points(verdict),
        },
        "rules": {"misfit_below": 0.5, "outlier_gain": 0.05, "outlier_share": 0.2},
        "versions": {"sae_lens_gemma4": "0.1.0", "torch": "2.13.0"},
    }


def make_intervals(metrics: dict[str, Any]) -> dict[str, Any]:
    """Intervals from value − .011 to value + .022, of those figures that have one."""
    families = ("ve_without_top_sse", "sse_share", "ve_without_high_norm")
    figures: dict[str, Any] = {key: {k: around(v) for k, v in metrics[key].items()} for key in families}
    figures |= {
        key: around(metrics[key]) for key in ("ve", "ve_centred", "nmse", "cosine", "relative_bias", "l0", "l1")
    }
    facts = {"level": 0.95, "resamples": 1000, "seed": 0, "documents": 311, "groups": 311, "verdict_share": 0.973}
    return {**facts, "figures": figures}


def make_outliers(share: float) -> dict[str, Any]:
    tokens = []
    for i in range(8):
        context = [[WORDS[(i + j) % len(WORDS)], ((i + 3 * j) % 13) / 11 if j else None] for j in range(30)]
        at = 10 + i
        context[at][1] = 1.4 + i / 10
        tokens.append(
            {
                "text": context[at][0],
                "token_id": 500 + i,
                "block": 3 * i,
                "position": at,
                "document": 40 + i,
                "role": "user" if i % 2 else None,
                "special": False,
                "sse": 5e4 / (i + 1),
                "sse_share": share / (i + 2),
                "sse_rank": i + 1,
                "norm": 310.5 - i,
                "norm_rank": 1204 + i,
                "first": i == 0,
                "delimiter": i == 4,
                "repeat": i in (4, 5),
                "context": context,
                "at": at,
            }
        )
    kinds = ("first", "delimiter", "repeat", "special")
    shares = {kind: {"top": 0.4 / (i + 1), "all": 0.005 * (i + 1)} for i, kind in enumerate(kinds)}
    return {"fraction": 0.001, "count": 65, "tokens": tokens, "shares": shares}


def make_group(name: str, i: int, ve: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "n_tokens": 512 * 4**i,
        "ve": ve,
        "nmse": 0.21 - i / 100,
        "l0": 40.5 - i,
        "sse_share": 0.1 + i / 10,
    }


def make_downstream(harm: float, intervals: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ce": {"model": 3.412, "sae": 3.412 + harm, "zero": 9.871, "mean": 7.102},
        "kl": {"sae": harm, "zero": 6.604, "mean": 3.811},
        "ce_recovered": {"zero": 1 - harm / 6.459, "mean": 1 - harm / 3.69},
        "kl_recovered": {"zero": 1 - harm / 6.604, "mean": 1 - harm / 3.811},
    }
    bounds = {key: {k: around(v) for k, v in by.items()} for key, by in figures.items()} if intervals else None
    measured = {"n_tokens": 8120, **figures, "intervals": bounds}
    return {
        "n_tokens": 8192,
        "n_blocks": 64,
        "resumed": True,
        "excluded": measured,
        "included": {**measured, "n_tokens": 8192, "ce": {**figures["ce"], "sae": 3.9 + harm}},
    }


def make_drift() -> dict[str, Any]:
    def quantiles(middle: float) -> dict[str, float]:
        return {q: middle + (float(q) - 0.5) / 10 for q in QUANTILES}

    return {
        "reference": "layer_3_width_1k_l0_32",
        "encoder_cosine": quantiles(0.93),
        "decoder_cosine": quantiles(0.94),
        "encoder_norm_ratio": quantiles(1.02),
        "decoder_norm_ratio": quantiles(1.0),
        "b_dec_distance": 0.417,
        "threshold_ratio": None,
    }


def make_points(verdict: str | None) -> list[list[Any]]:
    """Norms about the median and their errors; the top ones are large in error rather than in norm."""
    high = 300.0 if verdict == "outlier-dominated" else 4.0
    top = [[1.02 + i / 40, high * 1.1**i, True] for i in range(20)]
    rest = [[math.exp(math.sin(i) / 3), math.exp(1.2 * math.cos(1.7 * i)), False] for i in range(300)]
    return [*top, *rest, [0.0, 0.0, False]]


def make_shift(name: str, title: str, before_ve: float, after_ve: float) -> dict[str, Any]:
    rows = [
        {
            "corpus": corpus,
            "before": make_evaluation(corpus, ve=before_ve * scale, verdict="misfit", dead=431, optional=False),
            "after": make_evaluation(corpus, ve=after_ve * scale, dead=24),
        }
        for corpus, scale in (("tuned text", 1.0), ("tuned chat", 0.97))
    ]
    history = [
        {
            "tokens": 16384 * (i + 1),
            "loss": 20 * (1 - before_ve) * math.exp(-i / 3) + 2.5,
            "threshold": 1.2 + 0.4 * math.exp(-i / 8),
            "l0": 38 - i / 8,
            "ve": after_ve - (after_ve - before_ve) * math.exp(-i * 0.9),
            "dead": 431 - 8 * i,
        }
        for i in range(48)
    ]
    return {
        "name": name,
        "title": title,
        "description": "What was done to the model, in a sentence.",
        "model": f"gemma-4-demo-{name}",
        "rows": rows,
        "forgetting": [
            {
                "corpus": "base text",
                "before": make_evaluation("base text", "gemma-4-demo", ve=0.874, dead=9, optional=False),
                "after": make_evaluation("base text", "gemma-4-demo", ve=0.702, optional=False),
                "differences": None,
            }
        ],
        "training": {
            "tokens": 786432,
            "steps": 1536,
            "seconds": 61.25,
            "tokens_per_second": 12839.7,
            "history": history,
        },
        "reload": {
            "path": f"out/{name}",
            "identical": True,
            "max_abs_difference": 0.0,
            "ve": {row["corpus"]: row["after"]["metrics"]["ve"] for row in rows},  # type: ignore[index]
        },
    }


def make_report() -> dict[str, Any]:
    return {
        "schema": 2,
        "kind": "demo",
        "seed": 0,
        "seconds": 150.2,
        "rules": {"misfit_below": 0.5, "outlier_gain": 0.05, "outlier_share": 0.2},
        "versions": {"sae_lens_gemma4": "0.1.0", "torch": "2.13.0"},
        "base": {"release": "gemma-4-demo-res-jumprelu", "sae_id": "layer_3_width_1k_l0_32", "model": "gemma-4-demo"},
        "reference": make_evaluation("base text", "gemma-4-demo", ve=0.874, dead=9),
        "shifts": [
            make_shift("tuned", "Instruction tuning", -1.47, 0.812),
            make_shift("rescaled", "Residual stream times 6", -1008.4, 0.794),
        ],
    }


def make_comparison() -> dict[str, Any]:
    """Two corpora with differences, one of which is not defined, and one of what was forgotten, without."""

    def row(
        corpus: str, before: dict[str, Any], after: dict[str, Any], differences: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"corpus": corpus, "before": before, "after": after, "differences": differences}

    old, new = VERDICTS["outlier-dominated"], VERDICTS["healthy"]
    differences = {
        "ve": {"value": new - old, "interval": [0.48, 0.52]},
        "ve_without_top_sse": {"0.001": {"value": 0.141, "interval": [0.1, 0.18]}},
        "sse_share": {"0.001": {"value": -0.1758, "interval": None}},
        "cosine": None,
        "l0": {"value": -4.07, "interval": [-4.3, -3.9]},
    }
    dominated = make_evaluation("pile", ve=old, verdict="outlier-dominated", dead=424, optional=False)
    chat = make_evaluation("chat", ve=old, verdict="outlier-dominated", dead=424, optional=False)
    home = make_evaluation("base text", "gemma-4-demo", ve=0.874, dead=9, intervals=False, optional=False)
    return {
        "schema": 2,
        "kind": "comparison",
        "rows": [
            row("pile", dominated, make_evaluation("pile", roles=False), differences),
            row("chat", chat, make_evaluation("chat"), {"ve": {"value": None, "interval": None}}),
        ],
        "forgetting": [
            row("base text", home, make_evaluation("base text", "gemma-4-demo", ve=0.702, intervals=False), None)
        ],
    }


class Page(HTMLParser):
    """The page as a browser sees it: elements with their attributes and text, raw text of scripts and styles apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.html = html
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[e[0] for e in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str], list[str]] = (tag, {k: v or "" for k, v in attrs}, [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> does not close {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        raw = self._open and self._open[-1][0] in ("script", "style", "title")
        for element in self._open[-1:] if raw else self._open:
            element[2].append(data)

    def find(self, tag: str, **attrs: str) -> Iterator[tuple[dict[str, str], str]]:
        for name, has, text in self.elements:
            if name == tag and all(has.get(k.replace("_", "-")) == v for k, v in attrs.items()):
                yield has, " ".join("".join(text).split())

    def text(self) -> str:
        return next(text for _, text in self.find("main"))

    def rows(self) -> Iterator[list[str]]:
        """The texts of the cells of each table row, headers included."""
        cells: list[str] = []
        for tag, _, text in [*self.elements, ("tr", {}, [])]:
            if tag == "tr":
                if cells:
                    yield cells
                cells = []
            elif tag in ("th", "td"):
                cells.append(" ".join("".join(text).split()))

    def main_rows(self) -> dict[str, list[str]]:
        """`data-row` → the texts of that row's data cells."""
        names = [attrs.get("data-row") for tag, attrs, _ in self.elements if tag == "tr"]
        return {name: cells[1:] for name, cells in zip(names, self.rows(), strict=True) if name}

    def figures(self) -> dict[str, Any]:
        return {a["id"]: json.loads(text) for a, text in self.find("script", type="application/json")}
