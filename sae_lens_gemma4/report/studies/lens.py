"""The page of a logit lens: what each layer would say, how sure it is, and where the model settles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.plotting import Figure, title
from sae_lens_gemma4.report.studies import plots
from sae_lens_gemma4.report.studies import writing as w
from sae_lens_gemma4.report.studies.plots import Curve
from sae_lens_gemma4.report.study import Card, Panel, Section, StudyPage, named_model, provenance
from sae_lens_gemma4.report.tables import Table, Value
from sae_lens_gemma4.report.visible import visible

Found = Mapping[str, Any]
_TOKENS = {
    "final": ("the model’s own top token", "after", "solid"),
    "target": ("the target", "before", "5px,3px"),
    "following": ("the text’s next token", "muted", "2px,2px"),
}
_SHORT = {"final": "final token", "target": "target", "following": "next token"}
_STYLES = (
    ("after", "solid"),
    ("before", "5px,3px"),
    ("muted", "2px,2px"),
    ("good", "solid"),
    ("warn", "7px,2px,2px,2px"),
)
"""Of scripts, the most frequent first; others are in the table."""
_OPEN = 2
"""Positions whose tokens stand open."""


def page(document: Found) -> StudyPage:
    settings = document["settings"]
    norm = "the final norm" if settings["final_norm"] else "no norm"
    cap = "" if settings["softcap"] is None else f" and the soft cap of {settings['softcap']:g}"
    return StudyPage(
        title="Logit lens",
        subject=f"What each layer of {named_model(document)} would say were it the last, through {norm}, the "
        f"unembedding{cap}: {w.whole(document['n_positions'], 'position')} of the prompts ({settings['positions']}).",
        summary=_summary(document),
        sections=[
            _by_layer(document),
            _commitment(document),
            _scripts(document),
            _positions(document),
            *_decoder(document.get("decoder")),
        ],
        facts=[
            *provenance(document),
            ("Settings", w.settings(settings)),
        ],
    )


def _summary(document: Found) -> list[str]:
    curves, last = document["curves"], len(document["layers"]) - 1
    found = [
        f"Entropy goes from {_at(curves['entropy'], 0)} nats at {_place(document, 0)} to "
        f"{_at(curves['entropy'], last)} at {_place(document, last)}; the distance from the model’s own distribution, "
        f"KL(final ‖ layer), from {_at(curves['kl'], 0)} to {_at(curves['kl'], last)} nats.",
        *_committed(document["commitment"], "top token"),
        *_committed(document["script_commitment"], "script of the top token"),
    ]
    for name in ("target", "following"):
        if f"{name}_probability" in curves:
            rank = curves[f"{name}_median_rank"]["values"]
            found.append(
                f"The probability of {_TOKENS[name][0]} is {_at(curves[f'{name}_probability'], last, n.percent)} at "
                f"{_place(document, last)}; its median rank goes from {_rank(rank[0])} to {_rank(rank[last])}."
            )
    return found


def _committed(found: Found, what: str) -> list[str]:
    if found["median_is_embeddings"]:
        where = "from the embeddings on"
    elif found["median_layer"] is None:
        where = "at no layer read"
    else:
        where = f"from layer {found['median_layer']} on"
    run = w.with_interval(found["mean_layers_run"], found["mean_layers_run_interval"], n.per_token)
    mean = "" if found["mean_layers_run"] is None else f", after {run} layers in the mean"
    never = "" if not found["never"] else f"; at {w.whole(found['never'], 'position')} it never is"
    return [
        f"In the median position the {what} is the final one {where}{mean}{never}. At the last layer it is so by "
        "construction."
    ]


def _place(document: Found, at: int) -> str:
    return plots.layer_name(document["layers"][at])


def _rank(value: float) -> str:
    return n.fixed(value, 0 if float(value).is_integer() else 1)


def _at(curve: Found, at: int, write: w.Write = n.real) -> str:
    return w.with_interval(curve["values"][at], _interval(curve, at), write)


def _interval(curve: Found, at: int) -> Sequence[float] | None:
    intervals = curve.get("intervals")
    found: Sequence[float] | None = intervals[at] if intervals else None
    return found


def _curve(name: str, found: Found, colour: str, dash: str, write: w.Write) -> Curve:
    return Curve(name, found["values"], found.get("intervals"), colour, dash, write)


def _by_layer(document: Found) -> Section:
    curves = document["curves"]
    known = [name for name in _TOKENS if f"{name}_probability" in curves]
    last = len(document["layers"]) - 1
    distances = [
        _curve("entropy", curves["entropy"], "after", "solid", n.real),
        _curve("KL from the final", curves["kl"], "before", "5px,3px", n.real),
    ]
    probabilities = [_curve(_SHORT[x], curves[f"{x}_probability"], *_TOKENS[x][1:], n.percent) for x in known]
    ranks = [Curve(_SHORT[x], curves[f"{x}_median_rank"]["values"], None, *_TOKENS[x][1:], _rank) for x in known]
    is_top = [_curve(_SHORT[x], curves[f"{x}_is_top"], *_TOKENS[x][1:], n.percent) for x in known]
    at_last = "; ".join(f"{_TOKENS[x][0]} {_at(curves[f'{x}_probability'], last, n.percent)}" for x in known)
    of_rank = "; ".join(f"{_TOKENS[x][0]} {_rank(curves[f'{x}_median_rank']['values'][last])}" for x in known)
    tops = "; ".join(f"{_TOKENS[x][0]} {_at(curves[f'{x}_is_top'], last, n.percent)}" for x in known)
    end = _place(document, last)
    log: Figure = {"type": "log", "dtick": 1, "title": title("median rank, log scale")}
    shares: Figure = {"tickformat": ".0%", "rangemode": "tozero"}
    panels = [
        Panel("entropy", "Entropy and distance", _summary(document)[0],
              _plot(document, distances, {"title": title("nats"), "rangemode": "tozero"})),
        Panel("probability", "Mean probability", f"At {end}: {at_last}.",
              _plot(document, probabilities, shares | {"title": title("probability")})),
        Panel("rank", "Median rank", f"1 is the top token. At {end}: {of_rank}.", _plot(document, ranks, log)),
        Panel("top", "How often it is the top token", f"At {end}: {tops}.",
              _plot(document, is_top, shares | {"title": title("positions")})),
    ]  # fmt: skip
    tables = [_table(document), *([_followed_table(document, known)] if known else [])]
    return Section("By layer", panels=panels, tables=tables)


def _plot(document: Found, shown: Sequence[Curve], yaxis: Figure) -> Figure:
    x, axis = plots.layer_axis(document["layers"])
    says = [_place(document, at) for at in range(len(x))]
    return plots.curves(x, shown, says, xaxis=axis, yaxis=yaxis)


_Column = tuple[str, Found, w.Write]
_ROWS = "“in” is the embeddings; other rows are what leaves each layer. Intervals are over prompts"


def _table(document: Found) -> Table:
    curves = document["curves"]
    columns: list[_Column] = [
        ("Entropy, nats", curves["entropy"], n.real),
        ("KL, nats", curves["kl"], n.real),
        ("Committed by", document["commitment"]["committed_by"], n.percent),
    ]
    return _columns(document, "Figures by layer", f"{_ROWS}.", columns)


def _followed_table(document: Found, known: Sequence[str]) -> Table:
    curves = document["curves"]
    columns: list[_Column] = []
    for name in known:
        columns.append((f"P of {_SHORT[name]}", curves[f"{name}_probability"], n.percent))
        columns.append((f"Rank of {_SHORT[name]}", curves[f"{name}_median_rank"], _rank))
    return _columns(document, "Tokens followed by layer", f"{_ROWS}; ranks are medians.", columns)


def _columns(document: Found, name: str, caption: str, columns: Sequence[_Column]) -> Table:
    rows = [
        (
            "in" if layer is None else str(layer),
            [w.cell(c["values"][at], write, _interval(c, at)) for _, c, write in columns],
        )
        for at, layer in enumerate(document["layers"])
    ]
    return w.table(name, caption, ["Layer", *(head for head, _, _ in columns)], rows)


def _commitment(document: Found) -> Section:
    parts = (("top token", "commitment", "after", "solid"), ("its script", "script_commitment", "before", "5px,3px"))
    shown = [_curve(name, document[key]["committed_by"], colour, dash, n.percent) for name, key, colour, dash in parts]
    definitions = document["definitions"]
    words = [
        f"Commitment: {definitions['commitment']}. Of the script: {definitions['script_commitment']}.",
        f"Rank: {definitions['rank']}. Entropy: {definitions['entropy']}. KL: {definitions['kl']}. Intervals: "
        f"{definitions['intervals']}.",
    ]
    caption = " ".join([*_committed(document["commitment"], "top token")])
    yaxis: Figure = {"title": title("positions committed"), "tickformat": ".0%", "range": [-0.02, 1.04]}
    return Section(
        "Commitment",
        words,
        [Panel("committed", "Positions committed by layer", caption, _plot(document, shown, yaxis))],
    )


def _scripts(document: Found) -> Section:
    scripts = document["scripts"]
    by_layer, vocabulary = scripts["top_k_by_layer"], scripts["vocabulary"]
    total: dict[str, float] = {}
    for shares in by_layer:
        for script, value in shares.items():
            total[script] = total.get(script, 0) + value
    names = sorted(total, key=lambda script: -total[script])
    shown = [
        Curve(name, [shares.get(name, 0.0) for shares in by_layer], None, colour, dash, n.percent)
        for name, (colour, dash) in zip(names, _STYLES, strict=False)
    ]
    rows = [
        (
            name,
            [
                w.cell(vocabulary.get(name, 0.0), n.percent),
                *(w.cell(by_layer[at].get(name, 0.0), n.percent) for at in _some(len(by_layer))),
                w.cell(scripts["last_layer_top"].get(name, 0.0), n.percent),
            ],
        )
        for name in names
    ]
    heads = [_place(document, at) for at in _some(len(by_layer))]
    caption = "A script is not a language. Beside the vocabulary’s own shares, of the top tokens at some layers."
    made = w.table("Scripts", caption, ["Script", "Vocabulary", *heads, "Last layer’s first"], rows)
    first = "; ".join(f"{name} {n.percent(by_layer[-1].get(name, 0.0))}" for name in names[: len(_STYLES)])
    words = f"At {_place(document, len(by_layer) - 1)}: {first}. Of the vocabulary: " + "; ".join(
        f"{name} {n.percent(vocabulary.get(name, 0.0))}" for name in names[: len(_STYLES)]
    )
    yaxis: Figure = {"title": title("of the top tokens"), "tickformat": ".0%", "rangemode": "tozero"}
    panel = Panel("scripts", "Scripts of the top tokens", f"{words}.", _plot(document, shown, yaxis))
    return Section("Scripts", panels=[panel], tables=[made])


def _some(count: int) -> list[int]:
    """At most five of so many places, the first and the last among them."""
    return sorted({round(i * (count - 1) / 4) for i in range(5)})


def _positions(document: Found) -> Section:
    tables = [_position_table(document, shown) for shown in document["shown"]]
    words = f"The first {w.whole(len(tables), 'position')} of {n.count(document['n_positions'])}."
    return Section("Top tokens by layer", [words], tables=tables[:_OPEN], more_tables=tables[_OPEN:])


def _position_table(document: Found, shown: Found) -> Table:
    known = [name for name in _TOKENS if shown[name] is not None]
    top = max((len(tokens) for tokens in shown["top"]), default=0)
    rows = []
    for at, layer in enumerate(document["layers"]):
        tokens = [[Value(visible(t["token"]), n.percent(t["probability"]))] for t in shown["top"][at]]
        ranks = [w.text_cell(n.count(shown[name]["rank"][at])) for name in known]
        rows.append(
            (
                "in" if layer is None else str(layer),
                [
                    *tokens,
                    *[w.text_cell("–")] * (top - len(tokens)),
                    w.cell(shown["entropy"][at], n.real),
                    *ranks,
                ],
            )
        )
    where = shown["commitment"]
    settled = "never" if where is None else f"at {_place(document, where)}"
    said = [f"{_TOKENS[name][0]} is {visible(shown[name]['token'])}" for name in known]
    caption = f"Committed {settled}; {w.listed(said)}."
    name = f"Prompt {n.count(shown['prompt'])}, position {n.count(shown['position'])}, after {visible(shown['token'])}"
    heads = ["Layer", *(f"Top {i + 1}" for i in range(top)), "Entropy", *(f"Rank of {_SHORT[x]}" for x in known)]
    return w.table(name, caption, heads, rows, stacks=False)


def _decoder(decoder: Found | None) -> list[Section]:
    if decoder is None:
        return []
    cards = [
        Card(
            title=f"Latent {n.count(latent['latent'])}",
            text="",
            facts=(),
            texts=[
                (name, "; ".join(f"{visible(p['token'])} {n.signed(p['z'], n.fixed3)}" for p in latent[key]))
                for name, key in (("Raises", "promoted"), ("Lowers", "suppressed"))
            ],
        )
        for latent in decoder["latents"]
    ]
    sae = decoder["sae"]
    of = ", ".join(str(sae[key]) for key in ("release", "sae_id", "path", "hook_name", "hash") if sae.get(key))
    words = (
        f"Tokens whose logits a latent’s decoder row moves most by the direct path, with the logit in standard "
        f"deviations of that row’s over the vocabulary. SAE: {of}."
    )
    return [Section("Decoder rows", [words], cards=cards)]
