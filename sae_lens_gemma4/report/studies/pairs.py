"""The page of prompt pairs: which latents each category turns on, and how many pass when the sides mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.study import Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table
from sae_lens_gemma4.report.words import sae_name

Found = Mapping[str, Any]
_LEAST = 1e-12
"""The smallest p-value that is drawn."""


def page(document: Found) -> StudyPage:
    categories, settings, sae = document["categories"], document["settings"], document["sae"]
    name = sae_name({"sae_id": None, "path": None, **sae})
    return StudyPage(
        title="Latents by prompt pairs",
        subject=f"{w.whole(sum(c['pairs'] for c in categories), 'prompt pair')} in "
        f"{w.whole(len(categories), 'category', 'categories')}, read by {name} at {sae['hook_name']} of "
        f"{named_model(document)}.",
        summary=_summary(document),
        sections=[
            _overview(document),
            *(_category(document, number) for number in range(len(categories))),
        ],
        facts=[
            *provenance(document),
            ("Pairs", f"{document['pairs']}, each prompt as {document['template']}"),
            ("Statistic", f"{document['statistic']} of a latent’s activations over a prompt"),
            ("Settings", w.settings(settings)),
            *([("Files", ", ".join(map(str, document["files"].values())))] if document["files"] else []),
        ],
    )


def _summary(document: Found) -> list[str]:
    scrambled = document["scrambled"]
    control = (
        "no analysis with swapped sides was run"
        if scrambled["mean"] is None
        else f"{n.per_token(scrambled['mean'])} pass on average in "
        f"{w.whole(len(scrambled['passed']), 'analysis', 'analyses')} with the sides of pairs swapped at random"
    )
    q, less = document["settings"]["q"], document["less_active"]
    found = [
        f"{n.count(document['passed'])} of {n.count(document['tests'])} tests pass at a false-discovery rate of {q:g}, "
        f"of {w.whole(document['found'], 'latent')}; {control}."
    ]
    if document["settings"]["alternative"] == "two-sided":
        found.append(
            f"Of the latents found, {n.count(document['labelled'])} more active with the property "
            f"{'is' if document['labelled'] == 1 else 'are'} labelled by it, and {n.count(less)} less active with it "
            f"{'is' if less == 1 else 'are'} not labelled."
        )
    for category in document["categories"]:
        said = (
            f"“{category['label']}”: {w.whole(category['found'], 'latent')}, {n.count(category['found_family_wise'])} "
            f"also by the family-wise p, from {w.whole(category['pairs'], 'pair')}"
        )
        if category["longer"]:
            than = "longer" if category["longer"] > 0 else "shorter"
            said += f"; the sides with the property are {n.percent(abs(category['longer']))} {than}"
        found.append(f"{said}.")
    return [
        *found,
        "Effects are of the pairs that the latents were chosen on, so they are too large on average, and intervals do "
        "not take that out.",
    ]


def _overview(document: Found) -> Section:
    rows = [
        (
            category["label"],
            [
                w.cell(category["pairs"], n.count),
                w.cell(category["tests"], n.count),
                w.cell(category["passed"], n.count),
                w.cell(category["found"], n.count),
                w.cell(category["found_family_wise"], n.count),
                w.text_cell(f"{n.real(category['least_p'])}{', exact' if category['exact'] else ''}"),
                w.cell(category["longer"], lambda v: n.signed(v, n.percent)),
            ],
        )
        for category in document["categories"]
    ]
    caption = (
        "A latent that passes in several categories counts as found where its effect is largest. Least p: what so few "
        "pairs can give. Longer: by how much the side with the property is longer in tokens."
    )
    heads = ["Category", "Pairs", "Tests", "Passed", "Found", "By family-wise p", "Least p", "Longer"]
    scrambled = document["scrambled"]
    mean = "not defined" if scrambled["mean"] is None else n.per_token(scrambled["mean"])
    words = (
        f"Passed over all categories: {n.count(document['passed'])}; with sides swapped at random: {mean} on average."
    )
    if scrambled["passed"]:
        words += f" The swapped analyses range from {min(scrambled['passed'])} to {max(scrambled['passed'])}."
    return Section(
        "What passes, and what passes by chance",
        text=[_how(document)],
        panels=[Panel("found", "Tests passed by category, and with sides swapped", words, _found(document))],
        tables=[w.table("Categories", caption, heads, rows)],
    )


def _how(document: Found) -> str:
    """How a latent is found."""
    return (
        "A latent is tested by the paired differences of its activation, with the property less without it, by sign "
        f"flips; the false-discovery rate of {document['settings']['q']:g} is over all latents and categories. The "
        "family-wise p is of any test being as large by chance."
    )


def _found(document: Found) -> Figure:
    categories, scrambled = document["categories"], document["scrambled"]
    names = [category["label"] for category in categories] + ["all"]
    counts = [category["passed"] for category in categories] + [document["passed"]]
    data: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "x": counts,
            "y": list(range(len(names))),
            "name": "passed",
            "marker": {"color": "$after"},
            "text": [
                plots.escaped(f"{name}: {w.whole(c, 'test')} passed") for name, c in zip(names, counts, strict=True)
            ],
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
            "width": 0.55,
        }
    ]
    if scrambled["passed"]:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": list(scrambled["passed"]),
                "y": [len(names) - 1] * len(scrambled["passed"]),
                "marker": {"symbol": "line-ns", "size": 18, "line": {"width": 1.5, "color": "$ink"}},
                "name": "sides swapped, all categories",
                "text": [f"sides swapped: {w.whole(count, 'test')}" for count in scrambled["passed"]],
                "hovertemplate": "%{text}<extra></extra>",
                "cliponaxis": False,
            }
        )
    made = figure(
        data,
        x={"title": title("tests passed"), "rangemode": "tozero"},
        y={
            "tickvals": list(range(len(names))),
            "ticktext": [plots.escaped(plots.shortened(name)) for name in names],
            "range": [len(names) - 0.4, -0.6],
            "showgrid": False,
            "zeroline": False,
        },
        height=110 + 30 * len(names),
    )
    return plots.keyed(made)


def _category(document: Found, number: int) -> Section:
    category = document["categories"][number]
    rows = [
        (
            n.count(found["index"]),
            [
                w.text_cell(_infinite(found["difference"]))
                if found["all_equal"]
                else w.cell(found["effect"], n.fixed3, found["interval"]),
                w.cell(found["difference"], lambda v: n.signed(v, n.real)),
                w.cell(found["p_value"], n.real),
                w.cell(found["q_value"], n.real),
                w.cell(found["p_family"], n.real),
                w.share_cell(found["fires_more"]),
                w.cell(found["length_r"], n.fixed3),
            ],
        )
        for found in category["top"]
    ]
    tables = []
    if rows:
        caption = (
            f"The {w.whole(len(rows), 'latent')} with the largest effects of {n.count(category['found'])} found. "
            "Effect: mean of the paired differences over their standard deviation; ∞ where all are equal."
        )
        heads = ["Latent", "Effect", "Difference", "p", "q", "Family-wise p", "More active in", "r with length"]
        tables = [w.table("Latents found", caption, heads, rows)]
    points = category["points"]
    q = document["settings"]["q"]
    drawn = _drawn(points)
    passed = sum(value is not None and value <= q for _, _, _, value in drawn)
    caption = (
        f"{n.count(category['passed'])} of {n.count(category['tests'])} tests pass; {n.count(len(drawn))} "
        f"are drawn, of which {n.count(passed)} passed, filled."
    )
    if infinite := len(points["index"]) - len(drawn):
        caption += f" Not drawn: {w.whole(infinite, 'latent')} with an infinite effect."
    panels = [Panel(f"points-{number}", "Effect against p", caption, _points(points, q))] if points["index"] else []
    words = [category["description"]] if category["description"] else []
    if not rows:
        words.append(f"No latent was found. The least p that {w.whole(category['pairs'], 'pair')} can give is "
                     f"{n.real(category['least_p'])}.")  # fmt: skip
    return Section(
        category["label"], text=words, panels=panels, tables=tables, more_tables=_elsewhere(document, number)
    )


def _infinite(sign: float) -> str:
    return f"{n.MINUS if sign < 0 else ''}∞"


def _elsewhere(document: Found, number: int) -> list[Table]:
    """In which other categories the latents of a category's table pass too."""
    unknown = "±∞" if document["settings"]["alternative"] == "two-sided" else "∞"
    rows = [
        (n.count(found["index"]), [w.text_cell(name), w.text_cell(unknown if d is None else n.fixed3(d))])
        for found in document["categories"][number]["top"]
        for name, d in found["also"].items()
    ]
    caption = "Latents of the table above, and their effects in other categories in which they pass."
    return [w.table("Found elsewhere too", caption, ["Latent", "Category", "Effect"], rows)] if rows else []


def _drawn(points: Found) -> list[tuple[int, float, float, float | None]]:
    """Index, effect, p and q of what has a place in the plot."""
    rows = zip(points["index"], points["effect"], points["p_value"], points["q_value"], strict=True)
    return [row for row in rows if row[1] is not None and row[2] is not None]


def _points(points: Found, q: float) -> Figure:
    rows = _drawn(points)
    data: list[Figure] = []
    for is_found, name in ((False, "not found"), (True, "found")):
        mine = [row for row in rows if (row[3] is not None and row[3] <= q) == is_found]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [float(f"{effect:.4g}") for _, effect, _, _ in mine],
                "y": [float(f"{-math.log10(max(p, _LEAST)):.4g}") for _, _, p, _ in mine],
                "name": name,
                "marker": {
                    "size": 7 if is_found else 5,
                    "color": "$after" if is_found else "$paper",
                    "opacity": 0.9 if is_found else 0.6,
                    "line": {"width": 1, "color": "$after" if is_found else "$muted"},
                },
                "text": [f"latent {n.count(i)}: effect {n.fixed3(e)}, {w.p_value(p)}" for i, e, p, _ in mine],
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": bool(mine),
            }
        )
    made = figure(
        data,
        x={"title": title("effect, d of the pairs"), "zeroline": True},
        y={"title": title("−log₁₀ p"), "rangemode": "tozero"},
        height=340,
    )
    return plots.keyed(made)
