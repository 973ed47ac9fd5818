"""A report in closed form, of the demo's shape, and a reader of the page that is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "img", "link", "hr", "input"}


def make_evaluation(
    corpus: str = "tuned text",
    model: str = "gemma-4-demo-it",
    *,
    ve: float | None = 0.81,
    tail: float = 0.9,
    dead: int = 17,
) -> dict[str, Any]:
    """An evaluation in closed form: the top f of tokens hold f ** tail of the SSE."""
    fractions = ("0.0001", "0.001", "0.01")
    share = {f: float(f) ** tail for f in fractions}
    robust = {f: None if ve is None else 1 - (1 - ve) * (1 - share[f]) for f in fractions}
    at_one_percent = robust["0.01"]
    edges = [-6 + i / 4 for i in range(25)]
    return {
        "schema": 1,
        "sae": {
            "release": "gemma-4-demo-res-jumprelu",
            "sae_id": "layer_3_width_1k_l0_32",
            "path": None,
            "architecture": "jumprelu",
            "d_in": 96,
            "d_sae": 1024,
            "hook_name": "blocks.3.hook_resid_post",
            "trained_on": "gemma-4-demo",
        },
        "model": {"name": model, "class": "Gemma4ProxyLM"},
        "corpus": {
            "name": corpus,
            "tokens": 65536,
            "documents": 311,
            "blocks": 512,
            "context_size": 128,
            "hash": "9f2c4e71a0b3d85566e1c7f0" + f"{len(corpus):08x}",
        },
        "metrics": {
            "n_tokens": 64123,
            "ve": ve,
            "ve_without_top_sse": robust,
            "sse_share": share,
            "nmse": None if ve is None else (1 - ve) * 0.93,
            "cosine": 0.9312 if ve and ve > 0 else 0.2214,
            "l0": 31.84 + dead / 100,
            "l1": 48.27,
            "dead": dead,
            "verdict": None if at_one_percent is None else "misfit" if at_one_percent < 0.5 else "healthy",
        },
        "curves": {
            "sse_concentration": [[10 ** (-4 + i / 10), 10 ** (tail * (-4 + i / 10))] for i in range(41)],
            "log10_density": {
                "edges": edges,
                "counts": [round(180 * math.exp(-((e + 2 + dead / 500) ** 2))) for e in edges[1:]],
            },
        },
        "rules": {"misfit_below": 0.5, "outlier_gain": 0.05, "outlier_share": 0.2},
        "versions": {"sae_lens_gemma4": "0.1.0", "torch": "2.13.0"},
    }


def make_shift(name: str, title: str, before_ve: float, after_ve: float) -> dict[str, Any]:
    rows = [
        {
            "corpus": corpus,
            "before": make_evaluation(corpus, ve=before_ve * scale, tail=0.6, dead=431),
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
        "schema": 1,
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


class Page(HTMLParser):
    """The page as a browser sees it: elements with their attributes and text, raw text of scripts and styles apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
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
