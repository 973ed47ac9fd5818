"""The page of a study: of what `sae-lens-gemma4 interp …` found, with the controls beside each figure.

All kinds of studies share one template. What a kind shows is chosen by its own module in `report/studies`, which makes
of the result's JSON a `StudyPage`: sentences, tables and plots.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import check_name
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.checking import check, missing_is_an_error
from sae_lens_gemma4.report.plotting import Figure
from sae_lens_gemma4.report.tables import Table

SCHEMA = 1
STUDIES = {
    "layer_profile": "profile",
    "latent_labels": "labels",
    "contrast_by_layer": "contrast",
    "steering": "steering",
    "prompt_pairs": "pairs",
    "logit_lens": "lens",
}
"""Kind of a study → the module of `report/studies` whose `page` makes its page."""


class Panel(NamedTuple):
    """A plot with the words beside it."""

    id: str
    title: str
    caption: str
    figure: Figure


class Token(NamedTuple):
    """A piece of a context: how strongly the latent fires on it, 0 to 1, and what is said when it is pointed at."""

    text: str
    strength: float
    says: str
    peak: bool = False


class Card(NamedTuple):
    """One latent: its label, what is known of it, and contexts. Also an item and what was answered.

    Attributes:
        facts: (name, value) pairs.
        contexts: each its tokens.
        texts: (name, text) pairs.
    """

    title: str
    text: str
    facts: Sequence[tuple[str, str]]
    contexts: Sequence[Sequence[Token]] = ()
    texts: Sequence[tuple[str, str]] = ()


class Section(NamedTuple):
    """A part of the page. What is `folded` is shown on demand, as are `more_tables`, `more_cards` and long tables."""

    title: str
    text: Sequence[str] = ()
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()
    more_tables: Sequence[Table] = ()
    more_cards: Sequence[Card] = ()
    folded: bool = False


class StudyPage(NamedTuple):
    """All that a page shows.

    Attributes:
        subject: what was studied, in a sentence.
        summary: what was found, in sentences.
        verdict: a word or two and why, where the study comes to one.
        facts: (name, value) pairs: what all of it rests on.
    """

    title: str
    subject: str
    summary: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]]
    verdict: tuple[str, str] | None = None


def study_page(document: Mapping[str, Any]) -> StudyPage:
    """What the page of a study's result shows.

    Raises:
        UnknownNameError: a kind that is no study's.
        ConfigError: another schema, a number that is not finite, or something is missing.
    """
    kind = check_name("kind of study", str(document.get("kind")), STUDIES)
    what = f"study ({kind})"
    check(document, what, kind, SCHEMA)
    module = importlib.import_module(f"sae_lens_gemma4.report.studies.{STUDIES[kind]}")
    with missing_is_an_error(what, SCHEMA):
        page: StudyPage = module.page(document)
    return page


def summary(document: Mapping[str, Any]) -> list[str]:
    """The page's summary as plain sentences, the verdict first, with names as they came; raises as `study_page`."""
    page = study_page(document)
    return [*([": ".join(page.verdict)] if page.verdict else []), *page.summary]


def provenance(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What every study's result states of model, SAE, text and versions, as far as it does."""
    rows: list[tuple[str, str]] = []
    model, sae, corpus = (document.get(name) or {} for name in ("model", "sae", "corpus"))
    if model:
        rows.append(("Model", described_model(document)))
    if sae:
        known = [str(sae[name]) for name in ("release", "sae_id", "path", "hook_name", "hash") if sae.get(name)]
        rows.append(("SAE", ", ".join(known)))
    if corpus:
        size = f"{n.count(corpus['tokens'])} tokens of {n.count(corpus['documents'])} documents"
        rows.append(("Text", f"{corpus['name']}, {size}, {corpus['hash']}"))
    items = document.get("items")
    if isinstance(items, Mapping) and items.get("source") is not None:
        known = [str(items[name]) for name in ("source", "hash") if items.get(name) is not None]
        rows.append(("Items", ", ".join([n.count(items["n"]), *known])))
    if document.get("seed") is not None:
        rows.append(("Seed", str(document["seed"])))
    if document.get("versions"):
        rows.append(("Versions", ", ".join(f"{name} {v}" for name, v in document["versions"].items())))
    return rows


def described_model(document: Mapping[str, Any]) -> str:
    """A model's facts, or the name alone where a result states no more."""
    model = document["model"]
    if not isinstance(model, Mapping):
        return ", ".join(str(part) for part in (model, document.get("model_fingerprint")) if part)
    return ", ".join(str(model[name]) for name in ("name", "class", "dtype", "fingerprint") if model.get(name))


def named_model(document: Mapping[str, Any]) -> str:
    model = document["model"]
    return str((model.get("name") or model.get("class")) if isinstance(model, Mapping) else model)
