"""What the commands print, and where they write."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.release_table import release_table
from sae_lens_gemma4.report.visible import visible_name
from sae_lens_gemma4.report.words import told_apart, verdict


def make_folder(path: Path, *files: str) -> None:
    """Make a folder in which `files` can be written.

    Raises:
        ConfigError: it cannot be made or written in, or one of the files is a folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be made a folder: {e.strerror}.") from e
    for name in files:
        if (path / name).is_dir():
            raise ConfigError(f"{path / name} cannot be written: it is a folder.")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise ConfigError(f"Nothing can be written in {path}: {e.strerror}.") from e


def number(value: float | None, digits: int = 3) -> str:
    return n.fixed(value, digits)


def print_before_after(title: str, rows: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]]) -> None:
    """A base SAE and what became of it, a corpus two rows; one where there was none before."""
    click.echo(f"\n{visible_name(title)}")
    table = Table()
    for heading in ("held-out corpus", "SAE", "VE", "VE w/o top 1 % SSE", "L0", "never fired", "verdict"):
        table.add_column(heading, justify="left" if heading in ("held-out corpus", "SAE", "verdict") else "right")
    for corpus, before, after in rows:
        name = Text(visible_name(corpus))
        if before is not None:
            table.add_row(name, "base", *_metric_cells(before["metrics"]))
        table.add_row(name if before is None else "", "trained", *_metric_cells(after["metrics"]))
    Console().print(table)


def _metric_cells(metrics: Mapping[str, Any]) -> list[str]:
    return [
        number(metrics["ve"]),
        number(metrics["ve_without_top_sse"].get("0.01")),
        number(metrics["l0"], 1),
        n.count(metrics["dead"]),
        metrics["verdict"] or n.NOT_DEFINED,
    ]


def print_evaluation(result: Mapping[str, Any]) -> None:
    m, corpus, figures = result["metrics"], result["corpus"], (result["intervals"] or {}).get("figures", {})
    title = f"{result['sae']['hook_name']} of {result['model']['name']}, {corpus['name']}, {m['n_tokens']:,} tokens"
    click.echo("\n" + visible_name(f"{title} of {corpus['documents']:,} documents"))
    trained_on = result["sae"]["trained_on"]
    if trained_on and trained_on != result["model"]["name"]:
        click.echo(visible_name(f"The SAE was trained on {trained_on}."))
    table = Table("figure", "value", "95 % interval" if figures else "")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, value: float | None, bounds: Any = None, digits: int = 3) -> None:
        written = "" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}"
        table.add_row(label, number(value, digits), written)

    row("variance explained", m["ve"], figures.get("ve"))
    for key, ve in m["ve_without_top_sse"].items():
        label = f"  without the top {n.top(key, m['n_tokens'])} by SSE, holding {n.percent(m['sse_share'][key])} of it"
        row(label, ve, figures.get("ve_without_top_sse", {}).get(key))
    for key, ve in m["ve_without_high_norm"].items():
        if m["high_norm_share"][key]:
            label = f"  without the {n.percent(m['high_norm_share'][key])} over {n.times(key)} the median norm"
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
    table.add_row("latents that never fired", n.count(m["dead"]), "")
    table.add_row("verdict", verdict(result), "")
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
    headings, *cells = release_table(rows)
    where = [f"{row['after']['sae']['hook_name']}, {row['corpus']}" for row in rows]
    click.echo(f"\n{visible_name(title)}")
    table = Table(*(Column(Text(heading)) for heading in headings))
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)
    for row, label in zip(rows, told_apart(rows, where), strict=True):
        before, after = (verdict(row[state]) for state in ("before", "after"))
        difference = (row["differences"] or {}).get("ve")
        gained = ""
        if difference and difference["interval"]:
            low, high = (number(end) for end in difference["interval"])
            gained = f"; VE changed by {number(difference['value'])} [{low}, {high}]"
        click.echo(f"{visible_name(label)}: {before} → {after}{gained}.")
