"""What the commands print, and where they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sae_lens_gemma4.errors import ConfigError


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be made a folder: {e.strerror}.") from e


def number(value: float | None, digits: int = 3) -> str:
    return "not defined" if value is None else f"{value:.{digits}f}".replace("-", "−")


def print_before_after(title: str, rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    click.echo(f"\n{title}")
    table = Table()
    for heading in ("held-out corpus", "SAE", "VE", "VE w/o top 1 % SSE", "L0", "never fired", "verdict"):
        table.add_column(heading, justify="left" if heading in ("held-out corpus", "SAE", "verdict") else "right")
    for corpus, before, after in rows:
        table.add_row(Text(corpus), "base", *_metric_cells(before["metrics"]))
        table.add_row("", "adapted", *_metric_cells(after["metrics"]))
    Console().print(table)


def _metric_cells(metrics: Mapping[str, Any]) -> list[str]:
    return [
        number(metrics["ve"]),
        number(metrics["ve_without_top_sse"].get("0.01")),
        number(metrics["l0"], 1),
        "not defined" if metrics["dead"] is None else str(metrics["dead"]),
        metrics["verdict"] or "not defined",
    ]


def print_evaluation(result: Mapping[str, Any]) -> None:
    m, corpus, figures = result["metrics"], result["corpus"], (result["intervals"] or {}).get("figures", {})
    title = f"{result['sae']['hook_name']} of {result['model']['name']}, {corpus['name']}, {m['n_tokens']:,} tokens"
    trained_on = result["sae"]["trained_on"]
    if trained_on and trained_on != result["model"]["name"]:
        title += f"\nThe SAE was trained on {trained_on}."
    click.echo(f"\n{title}")
    table = Table("figure", "value", "95 % interval" if figures else "")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, value: float | None, bounds: Any = None, digits: int = 3) -> None:
        written = "" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}"
        table.add_row(label, number(value, digits), written)

    row("variance explained", m["ve"], figures.get("ve"))
    for key, ve in m["ve_without_top_sse"].items():
        label = f"  without the top {float(key):.2%} by SSE (they hold {number(m['sse_share'][key])})"
        row(label, ve, figures.get("ve_without_top_sse", {}).get(key))
    for key, ve in m["ve_without_high_norm"].items():
        if m["high_norm_share"][key]:
            label = f"  without the {m['high_norm_share'][key]:.2%} above {key} × the median norm"
            row(label, ve, figures.get("ve_without_high_norm", {}).get(key))
    for label, key, digits in (("NMSE", "nmse", 3), ("cosine", "cosine", 3), ("L0", "l0", 1), ("L1", "l1", 1)):
        row(label, m[key], figures.get(key), digits)
    if result["downstream"] is not None:
        excluded = result["downstream"]["excluded"]
        bounds = excluded["intervals"] or {"ce": {}, "ce_recovered": {}}
        row("CE of the model", excluded["ce"]["model"], bounds["ce"].get("model"))
        row("CE with the SAE", excluded["ce"]["sae"], bounds["ce"].get("sae"))
        row(
            "  of the damage of mean ablation, spared",
            excluded["ce_recovered"]["mean"],
            bounds["ce_recovered"].get("mean"),
        )
    table.add_row("latents that never fired", "not defined" if m["dead"] is None else f"{m['dead']:,}", "")
    table.add_row("verdict", m["verdict"] or "not defined", "")
    Console().print(table)
    diagnosis = result["diagnosis"]
    for sentence in (diagnosis["reason"], _screen(diagnosis["norm_screen"]), diagnosis["cause_reason"]):
        if sentence:
            click.echo(sentence)


def _screen(sees: bool | None) -> str | None:
    if sees is None:
        return None
    return "A screen by norm would have seen them." if sees else "No screen by norm would have seen them."


def print_release_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Before and after, a layer a row, and the verdicts."""
    from sae_lens_gemma4.report.release_table import release_table

    headings, *cells = release_table(rows)
    click.echo(f"\n{title}")
    table = Table(*(Column(Text(heading)) for heading in headings))
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)
    for row in rows:
        before, after = (row[state]["metrics"]["verdict"] or "not defined" for state in ("before", "after"))
        hook = row["after"]["sae"]["hook_name"]
        difference = (row["differences"] or {}).get("ve")
        gained = ""
        if difference and difference["interval"]:
            low, high = (number(end) for end in difference["interval"])
            gained = f"; VE changed by {number(difference['value'])} [{low}, {high}]"
        click.echo(f"{hook}, {row['corpus']}: {before} → {after}{gained}.")
