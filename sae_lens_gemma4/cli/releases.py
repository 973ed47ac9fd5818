"""`releases`: the catalogue in a terminal."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import check_name

if TYPE_CHECKING:
    from sae_lens_gemma4.catalogue.registry import Release
    from sae_lens_gemma4.catalogue.table import Grid


@cli.command()
@click.argument("pattern", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Every fact, as JSON.")
@click.option("--upstream-yaml", metavar="NAME", help="Print a release as an entry of sae_lens's pretrained_saes.yaml.")
@click.option("--verify", metavar="NAME", help="Compare a release with its files; exit code 1 if they differ.")
def releases(pattern: tuple[str, ...], as_json: bool, upstream_yaml: str | None, verify: str | None) -> None:
    """List the catalogue, or show one release in full.

    PATTERN is a part of a name, repository, author or model, or a kind of caveat.
    """
    from sae_lens_gemma4.catalogue import table
    from sae_lens_gemma4.catalogue.registry import releases as all_releases

    if [pattern or None, upstream_yaml, verify].count(None) < 2:
        raise click.UsageError("PATTERN, --upstream-yaml and --verify do not go together.")
    for name in (upstream_yaml, verify):
        if name is not None:
            check_name("release", name, all_releases())
    if verify is not None:
        sys.exit(_verify(all_releases()[verify], as_json))
    if upstream_yaml is not None:
        click.echo(table.upstream_yaml(all_releases()[upstream_yaml]), nl=False)
        return
    found = table.matching(" ".join(pattern))
    if as_json:
        click.echo(json.dumps([asdict(r) for r in found], indent=2, ensure_ascii=False))
    elif len(found) == 1:
        click.echo(table.in_words(found[0]) + "\n")
        _print_grid(table.saes(found[0]))
    else:
        _print_grid(table.summary(found))
        click.echo(f"\n{len(found)} releases. {table.HINT}")


def _print_grid(grid: Grid) -> None:
    """As many columns as the console has room for, each whole; all of them where it is no console."""
    from sae_lens_gemma4.catalogue.table import NUMERIC

    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        grid = grid.fitting(console.width, gap=2)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in grid.columns:
        table.add_column(name, justify="right" if name in NUMERIC else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    Console(width=10_000).print(table)


def _verify(release: Release, as_json: bool) -> bool:
    """Print where a release and its files differ and what only the files state; whether they differ."""
    from sae_lens_gemma4.catalogue.table import shown
    from sae_lens_gemma4.catalogue.verify import CHECKED, together, verify

    found = verify(release)
    if as_json:
        click.echo(json.dumps([asdict(d) for d in found], indent=2, ensure_ascii=False))
        return any(d.kind == "differs" for d in found)
    table = Table("", Column("SAE", no_wrap=True), Column("fact", no_wrap=True), "stated", "found")
    for d, ids in together(found):
        which = ids[0] + (f" and {len(ids) - 1} more" if len(ids) > 1 else "")
        table.add_row(*map(Text, (d.kind, which, d.fact, shown(d.stated), shown(d.found))))
    if found:
        Console().print(table)
    differing = sum(d.kind == "differs" for d in found)
    if differing:
        click.echo(f"Differences: {differing}.")
    else:
        n = f"{len(release.saes)} SAE{'s' * (len(release.saes) > 1)}"
        click.echo(f"{n} of {release.name}: {CHECKED} do not differ from what the files state.")
    return differing > 0
