"""A report as one HTML file that can be sent to a colleague: it opens from disk, fetches nothing, and reads on a phone,
in the dark, on paper, and without seeing the plots.

The pages are Jinja templates, which escape whatever they are given; this module chooses what they are given. The
page's content security policy forbids every request, so a self-contained page is not only intended but enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.report import figures, words
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.checking import check, missing_is_an_error
from sae_lens_gemma4.report.outliers import LEGEND, Outliers, outliers
from sae_lens_gemma4.report.plotting import Figure
from sae_lens_gemma4.report.quantities import DEAD, L0, SSE_OF_TOP, VE, VE_WITHOUT_TOP
from sae_lens_gemma4.report.release_table import release_table
from sae_lens_gemma4.report.study import SCHEMA as STUDY_SCHEMA
from sae_lens_gemma4.report.study import STUDIES, Panel, study_page
from sae_lens_gemma4.report.tables import Table, headline, others
from sae_lens_gemma4.report.visible import visible_name
from sae_lens_gemma4.report.words import Evaluation, States

SCHEMA = 2
MAIN_COLUMNS = (VE, VE_WITHOUT_TOP, SSE_OF_TOP, L0, DEAD)
"""The quantities of the table over all corpora."""


class Group(NamedTuple):
    """Rows of the table over all corpora that belong together: (id, corpus, before, after or None)."""

    title: str
    model: str
    rows: list[tuple[str, str, Evaluation, Evaluation | None]]


class View(NamedTuple):
    """All that a page shows of one evaluation, or of two of the same tokens.

    Attributes:
        states: the evaluations by state.
        diagnoses: of each state its verdict and why.
        panels, more_panels: the plots, those read first and the rest.
        headline: the figures that are read first.
        tables: all others.
        outliers: each state's worst tokens.
    """

    states: States
    diagnoses: list[tuple[str, str, str]]
    panels: list[Panel]
    more_panels: list[Panel]
    headline: Table
    tables: list[Table]
    outliers: list[Outliers]


def render_demo(report: Mapping[str, Any]) -> str:
    """The whole page for the demo's report: the base SAE at home, and before and after training on each shift.

    Raises:
        ConfigError: the report is of another kind or schema, incomplete, or holds a number that is not finite.
    """
    check(report, "report", "demo", SCHEMA)
    with missing_is_an_error("report", SCHEMA):
        home, shifts = report["reference"], report["shifts"]
        rows = [row for shift in shifts for row in (*shift["rows"], *shift["forgetting"])]
        evaluations = _checked([home, *_evaluations(rows)])
        at_home = Group(
            "Reference: the base model itself",
            _model_name(home),
            [("reference", home["corpus"]["name"], home, None)],
        )
        return _render(
            "demo.html.j2",
            evaluations,
            report=report,
            summary=words.reference_sentence(home),
            groups=[at_home, *(_group(x["title"], x["model"], x["name"], x["rows"]) for x in shifts)],
            reference=_view("reference", [("base", home)]),
            shifts=[_shift(i, shift) for i, shift in enumerate(shifts)],
        )


def render(document: Mapping[str, Any]) -> str:
    """The page for a document of any kind: `demo`, `evaluation`, `comparison`, or a study's (`report.study.STUDIES`).

    Raises:
        UnknownNameError: it is of another kind.
        ConfigError: as `render_demo`.
    """
    pages = {"demo": render_demo, "evaluation": render_evaluation, "comparison": render_comparison}
    pages |= dict.fromkeys(STUDIES, render_study)
    return pages[check_name("kind of report", str(document.get("kind")), pages)](document)


def render_evaluation(evaluation: Mapping[str, Any]) -> str:
    """One page for one evaluation of one SAE on one corpus. Raises as `render_demo` does."""
    with missing_is_an_error("evaluation", SCHEMA):
        return _render(
            "evaluation.html.j2",
            _checked([evaluation]),
            evaluation=evaluation,
            summary=words.single_sentence(evaluation),
            view=_view("evaluation", [("only", evaluation)]),
        )


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """One page for two SAEs on the same tokens, corpus by corpus, and what the second forgot where that was measured.

    Raises as `render_demo` does, and ConfigError where there is no row.
    """
    check(comparison, "comparison", "comparison", SCHEMA)
    with missing_is_an_error("comparison", SCHEMA):
        rows, forgetting = comparison["rows"], comparison["forgetting"]
        if not rows:
            raise ConfigError("This comparison has no rows: there is nothing to show.")
        groups = [("Where they are compared", "rows", rows), ("Forgetting: the model of the first", "home", forgetting)]
        return _render(
            "comparison.html.j2",
            _checked(_evaluations([*rows, *forgetting])),
            saes=[("before", rows[0]["before"]["sae"]), ("after", rows[0]["after"]["sae"])],
            versions=rows[0]["after"]["versions"],
            groups=[_group(title, _model_name(x[0]["before"]), id, x) for title, id, x in groups if x],
            rows=_rows("r", rows),
            forgetting=_rows("f", forgetting),
            release_table=release_table(rows),
        )


def render_study(document: Mapping[str, Any]) -> str:
    """The page of what an `interp` command found. Raises as `render_demo` does."""
    page = study_page(document)
    with missing_is_an_error("study", STUDY_SCHEMA):
        return _filled("study.html.j2", page=page)


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    return [row[state] for row in rows for state in ("before", "after")]


def _model_name(evaluation: Evaluation) -> str:
    return str(evaluation["model"]["name"] or evaluation["model"]["class"])


def _group(title: str, model: str, id: str, rows: Sequence[Mapping[str, Any]]) -> Group:
    shown = named(rows)
    return Group(title, model, [(f"{id}/{r['corpus']}", r["corpus"], r["before"], r["after"]) for r in shown])


def named(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows, with hook and SAEs in the corpus's name where it takes them to tell rows apart."""
    corpora = [row["corpus"] for row in rows]
    at_hooks = [f"{row['corpus']} at {row['after']['sae']['hook_name']}" for row in rows]
    labels = words.told_apart(rows, corpora, at_hooks)
    return [{**row, "corpus": label} for row, label in zip(rows, labels, strict=True)]


def _rows(prefix: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of before and after, with all that is shown of each and the sentence that sums it up."""
    shown = []
    for i, row in enumerate(named(rows)):
        states = [("before", row["before"]), ("after", row["after"])]
        view = _view(f"{prefix}{i}", states, row.get("differences"))
        shown.append({"corpus": row["corpus"], "view": view, "sentence": words.row_sentence(row)})
    return shown


def _shift(index: int, shift: Mapping[str, Any]) -> dict[str, Any]:
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
        "rows": _rows(f"s{index}r", shift["rows"]),
        "forgetting": _rows(f"s{index}f", shift["forgetting"]),
    }


def _view(prefix: str, states: States, differences: Any = None) -> View:
    return View(
        states=states,
        diagnoses=[(state, words.verdict(e), words.diagnosis(e)) for state, e in states],
        panels=[
            Panel(f"{prefix}-{id}", title, caption(states), figure(states)) for id, title, caption, figure in _PANELS
        ],
        more_panels=list(_more_panels(prefix, states)),
        headline=headline(states, differences),
        tables=others(states),
        outliers=outliers(states),
    )


_PANELS: tuple[tuple[str, str, Callable[[States], str], Callable[[States], Figure]], ...] = (
    ("ve", "Variance explained, worst tokens left out", words.robust_caption, figures.robust_ve),
    ("sse", "Where the squared error is", words.concentration_caption, figures.concentration),
    ("density", "How often latents fire", words.density_caption, figures.density),
)


def _more_panels(prefix: str, states: States) -> Iterator[Panel]:
    yield Panel(
        f"{prefix}-norm",
        "Variance explained, largest norms left out",
        words.norm_caption(states),
        figures.robust_ve_by_norm(states),
    )
    if all(e["groups"]["position"] for _, e in states):
        caption = words.position_caption(states)
        yield Panel(f"{prefix}-position", "Variance explained by position", caption, figures.ve_by_position(states))
    for state, evaluation in states:
        if evaluation["curves"]["norm_against_sse"]:
            title = "Norm against squared error" + ("" if len(states) == 1 else f", {state}")
            caption = words.scatter_caption(evaluation)
            yield Panel(f"{prefix}-scatter-{state}", title, caption, figures.norm_against_sse(states, state))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sae_lens_gemma4.report"),
        autoescape=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) or not isinstance(value, str) else visible_name(value)
        ),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ve": n.ve,
        "count": n.count,
        "per_token": n.per_token,
        "percent": n.percent,
        "scientific": n.scientific,
        "duration": n.duration,
        "verdict": words.verdict,
        "sae_name": words.sae_name,
        "stated": words.stated,
    }
    environment.globals |= {"columns": MAIN_COLUMNS, "paint_legend": LEGEND}
    return environment


def _render(template: str, evaluations: Sequence[Evaluation], **context: Any) -> str:
    saes = {e["sae"]["hash"]: e["sae"] for e in evaluations}
    corpora = {(e["corpus"]["name"], e["corpus"]["hash"]): e["corpus"] for e in evaluations}
    models = {(e["model"]["name"], e["model"]["class"], e["model"]["fingerprint"]): e["model"] for e in evaluations}
    return _filled(
        template,
        **context,
        rules=evaluations[0]["rules"],
        provenance={
            "saes": list(saes.values()),
            "corpora": list(corpora.values()),
            "models": list(models.values()),
            "protocols": list(dict.fromkeys(e["protocol"] for e in evaluations if e["protocol"])),
        },
    )


def _filled(template: str, **context: Any) -> str:
    from plotly.offline import get_plotlyjs

    return _environment().get_template(template).render(context, plotlyjs=Markup(get_plotlyjs()))


def _checked(evaluations: list[Evaluation]) -> list[Evaluation]:
    for evaluation in evaluations:
        check(evaluation, "evaluation", "evaluation", SCHEMA)
    return evaluations
