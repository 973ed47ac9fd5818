"""A report as one HTML file that can be sent to a colleague: it opens from disk, fetches nothing, and reads on a phone,
in the dark, on paper, and without seeing the plots.

The pages are Jinja templates, which escape whatever they are given; this module chooses what they are given. The
page's content security policy forbids every request, so a self-contained page is not only intended but enforced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import figures, words
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.words import Evaluation, States

SCHEMA = 1


class Panel(NamedTuple):
    """A plot with the words beside it."""

    id: str
    title: str
    caption: str
    figure: figures.Figure


class Column(NamedTuple):
    """A quantity of the main table: its name and how one evaluation's value is written."""

    name: str
    write: Callable[[Evaluation], str]


MAIN_COLUMNS = (
    Column("VE", lambda e: n.ve(e["metrics"]["ve"])),
    Column(f"VE without top {n.top_percent('0.01')}", lambda e: n.ve(e["metrics"]["ve_without_top_sse"]["0.01"])),
    Column("L0", lambda e: n.per_token(e["metrics"]["l0"])),
    Column("Dead latents", lambda e: n.count(e["metrics"]["dead"])),
)


def render_demo(report: Mapping[str, Any]) -> str:
    """The whole page for the demo's report: the base SAE at home, and before and after training on each shift."""
    _check(report, "report")
    if report.get("kind") != "demo":
        raise ConfigError(f"This report is of kind {report.get('kind')!r}; render_demo takes kind 'demo'.")
    with _missing_is_an_error("report"):
        reference = report["reference"]
        evaluations = [reference, *(row[s] for x in report["shifts"] for row in x["rows"] for s in ("before", "after"))]
        for evaluation in evaluations:
            _check(evaluation, "evaluation in this report")
        at_home = [("base", reference)]
        return _render(
            "demo.html.j2",
            evaluations,
            report=report,
            columns=MAIN_COLUMNS,
            summary=words.reference_sentence(reference),
            reference={"panels": _panels("reference", at_home), "metrics": _metric_rows(at_home)},
            shifts=[_shift(i, shift) for i, shift in enumerate(report["shifts"])],
        )


def render_evaluation(evaluation: Mapping[str, Any]) -> str:
    """One page for one evaluation of one SAE on one corpus."""
    _check(evaluation, "evaluation")
    with _missing_is_an_error("evaluation"):
        states = [("only", evaluation)]
        return _render(
            "evaluation.html.j2",
            [evaluation],
            evaluation=evaluation,
            summary=words.single_sentence(evaluation),
            panels=_panels("evaluation", states),
            metrics=_metric_rows(states),
        )


def _shift(index: int, shift: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for i, row in enumerate(shift["rows"]):
        states = [("before", row["before"]), ("after", row["after"])]
        panels = _panels(f"s{index}r{i}", states)
        rows.append({"corpus": row["corpus"], "panels": panels, "metrics": _metric_rows(states)})
    history = shift["training"]["history"]
    curves = [
        Panel(f"s{index}-{key}", name, words.training_caption(history, key), figures.training(history, key))
        for key, (name, _) in words.TRAINING.items()
        if history
    ]
    return {
        "data": shift,
        "summary": words.shift_sentences(shift),
        "reload": words.reload_sentence(shift["reload"]),
        "training": curves,
        "rows": rows,
    }


def _panels(prefix: str, states: States) -> list[Panel]:
    shown = (
        ("ve", "Variance explained, worst tokens left out", words.robust_caption, figures.robust_ve),
        ("sse", "Where the squared error is", words.concentration_caption, figures.concentration),
        ("density", "How often latents fire", words.density_caption, figures.density),
    )
    return [Panel(f"{prefix}-{id}", title, caption(states), figure(states)) for id, title, caption, figure in shown]


def _metric_rows(states: States) -> list[tuple[str, list[str]]]:
    """Every metric of a schema-1 evaluation: its name and, per state, its value as written."""
    metrics = [evaluation["metrics"] for _, evaluation in states]
    fractions = sorted(metrics[0]["ve_without_top_sse"], key=float)
    written: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("Tokens", lambda m: n.count(m["n_tokens"])),
        ("VE", lambda m: n.ve(m["ve"])),
        *((f"VE without top {n.top_percent(f)}", lambda m, f=f: n.ve(m["ve_without_top_sse"][f])) for f in fractions),
        *((f"SSE held by top {n.top_percent(f)}", lambda m, f=f: n.percent(m["sse_share"][f])) for f in fractions),
        ("NMSE", lambda m: n.real(m["nmse"])),
        ("Cosine similarity", lambda m: n.fixed(m["cosine"], 3)),
        ("L0", lambda m: n.per_token(m["l0"])),
        ("L1", lambda m: n.real(m["l1"])),
        ("Dead latents", lambda m: n.count(m["dead"])),
    ]
    return [(name, [write(m) for m in metrics]) for name, write in written]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sae_lens_gemma4.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ve": n.ve,
        "count": n.count,
        "per_token": n.per_token,
        "scientific": n.scientific,
        "duration": n.duration,
        "verdict": words.verdict,
    }
    return environment


def _render(template: str, evaluations: Sequence[Evaluation], **context: Any) -> str:
    from plotly.offline import get_plotlyjs

    corpora = {(e["corpus"]["name"], e["corpus"]["hash"]): e["corpus"] for e in evaluations}
    models = {(e["model"]["name"], e["model"]["class"]): e["model"] for e in evaluations}
    return (
        _environment()
        .get_template(template)
        .render(
            context,
            rules=evaluations[0]["rules"],
            plotlyjs=Markup(get_plotlyjs()),
            corpora=list(corpora.values()),
            models=list(models.values()),
        )
    )


def _check(document: Mapping[str, Any], what: str) -> None:
    """Refuse another schema, and numbers that JSON does not have."""
    if document.get("schema") != SCHEMA:
        raise ConfigError(f"This {what} has schema {document.get('schema')!r}; this version reads schema {SCHEMA}.")
    for path, value in _leaves(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"This {what} holds {value} at {path}; what is not defined is None in a report.")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


@contextmanager
def _missing_is_an_error(what: str) -> Iterator[None]:
    try:
        yield
    except KeyError as missing:
        raise ConfigError(f"This {what} lacks {missing}, which schema {SCHEMA} has.") from missing
    except UndefinedError as missing:
        raise ConfigError(f"This {what} is not complete by schema {SCHEMA}: {missing}.") from missing
