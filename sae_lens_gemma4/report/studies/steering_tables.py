"""The tables of a steering run: what each push did, the tests behind the verdict, and what was done both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.tables import Head, Table

Found = Mapping[str, Any]
_PARTS = {
    "opposite": "(a) Adding against subtracting",
    "controls": "(b) Each of the two against random directions",
    "spread": "(c) Beyond the spread of random directions",
    "magnitude": "(d) All pushes against the baseline, by items",
    "directions": "(e) The same, by items and directions",
    "alone": "Each of the two against the baseline; of the rule no part, but it gives a direction effect its sign",
}
"""Part of a verdict → the heading of its tests, with its letter in the rule."""


def scale(length: float) -> str:
    """A length as conditions are called by it: 5 %."""
    return f"{100 * abs(length):g}{n.NBSP}%"


def conditions(document: Found) -> Table:
    rows: list[w.Row] = []
    for c in document["conditions"]:
        change = c["change"]
        compared = [w.text_cell("–")] * 4
        if change is not None:
            compared = [
                w.text_cell(n.count(len(c["recovered"]))),
                w.text_cell(n.count(len(c["broken"]))),
                w.cell(change["change"], _signed, (change["low"], change["high"])),
                w.text_cell(n.real(change["p_value"])),
            ]
        read = [w.cell(c[part]["value"], n.percent) for part in ("answer_found", "cut")]
        rows.append((c["name"], [w.share_cell(c["accuracy"]), *compared, *read]))
    caption = (
        "Recovered: wrong at the baseline and right here; broken: the reverse. p is McNemar’s, exact and not "
        "corrected. Cut: outputs that the limit of tokens ended."
    )
    heads = ["Condition", "Right", "Recovered", "Broken", "Change", "p", "Answer found", "Cut"]
    return w.table("Conditions", caption, heads, rows)


def pushes(document: Found) -> Table:
    rows: list[w.Row] = [
        (c["name"], [w.cell(c["added_norm"], n.real), w.cell(c["mean_tokens"], n.per_token)])
        for c in document["conditions"]
    ]
    caption = "The norm of what is added at each position, and how many tokens an answer has on average."
    return w.table("What was added, and how long answers are", caption, ["Condition", "Norm added", "Tokens"], rows)


def tests(verdict: Found) -> Table:
    groups = [
        (
            heading,
            [
                (
                    test["name"] if test["scale"] is None else f"{test['name']}, {scale(test['scale'])}",
                    [
                        w.cell(test["difference"], _signed),
                        w.cell(test["p_value"], n.real),
                        w.cell(test["adjusted"], n.real),
                        w.text_cell("–" if test["rank"] is None else n.percent(test["rank"])),
                    ],
                )
                for test in verdict[part]
            ],
        )
        for part, heading in _PARTS.items()
        if verdict[part]
    ]
    caption = (
        f"Tests at the level {verdict['alpha']:g}. The last column: random directions that are as far out on the "
        "vector’s side. A trend’s difference is of accuracy by one mean norm."
    )
    heads = [Head(name) for name in ("Test", "Difference", "p", "p, corrected", "Random as far out")]
    return Table("Tests behind the verdict", caption, heads, groups, stacks=True)


def overlaps(found: Sequence[Found]) -> Table:
    rows = [
        (
            f"{scale(o['scale'])}, {o['what']}",
            [
                w.cell(len(o["both"]), n.count),
                w.cell(o["expected"], n.per_token),
                w.cell(len(o["first_only"]), n.count),
                w.cell(len(o["second_only"]), n.count),
                w.cell(o["jaccard"], n.fixed3),
                w.cell(o["p_value"], n.real),
            ],
        )
        for o in found
    ]
    heads = ["Scale", "Both ways", "By chance", "Added only", "Subtracted only", "Jaccard", "p"]
    return w.table("Overlaps", "", heads, rows)


def _signed(value: float | None) -> str:
    return n.signed(value, n.percent)
