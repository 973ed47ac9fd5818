"""`dashboard`: a folder of dashboards in the browser, or some of it as one file."""

from __future__ import annotations

import re
from pathlib import Path

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import ConfigError

_MOST = 1_000_000
"""Latents that a range may name; wider than any SAE, so what is longer is a slip of the pen."""


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", type=int, default=8742, show_default=True, help="Of 127.0.0.1; 0 for any that is free.")
@click.option("--no-browser", is_flag=True, help="Print the address and open nothing.")
@click.option("--labels", metavar="FILE", help="What latents are called: a CSV or JSON file, or catalogue.")
@click.option("--single-file", "out", metavar="OUT.html", type=click.Path(dir_okay=False, path_type=Path),
              help="Write one page that needs no server, with the --latents, instead of serving.")  # fmt: skip
@click.option("--latents", metavar="1,5,20-40", help="With --single-file: which.")
def dashboard(
    folder: Path, port: int, no_browser: bool, labels: str | None, out: Path | None, latents: str | None
) -> None:
    """Look at dashboards.

    DIR is a folder of dashboards, or one that has it as its subfolder `dashboards`.
    """
    if (out is None) != (latents is None):
        raise ConfigError("--single-file and --latents go together: the page, and which latents are in it.")
    chosen = None if latents is None else parse_latents(latents)
    from sae_lens_gemma4.neuronpedia.explanations import labels_of
    from sae_lens_gemma4.neuronpedia.folder import Dashboards

    dashboards = Dashboards.find(folder)
    found = {} if labels is None else labels_of(dashboards, labels)
    texts = {index: said[0].text for index, said in found.items() if said}
    if out is not None and chosen is not None:
        from sae_lens_gemma4.neuronpedia.viewer import single_file

        named, ranged = chosen
        alive = set(dashboards.latents["index"])
        click.echo(single_file(folder, out, named | (ranged & alive), texts))
        if passed_over := len(ranged - alive - named):
            click.echo(f"{passed_over:,} latents of the ranges have no dashboard and are not in it.")
        return
    from sae_lens_gemma4.neuronpedia.server import serve

    serve(folder, port=port, labels=texts, open_browser=not no_browser)


def parse_latents(text: str) -> tuple[set[int], set[int]]:
    """`1,5,20-40` as the latents that are named and those that lie in ranges.

    Raises:
        ConfigError: it is not of this form.
    """
    named: set[int] = set()
    ranged: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[-–]\s*(\d{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < _MOST:
            raise ConfigError(f"{part.strip()!r} names no latents; --latents are numbers and ranges, as 1,5,20-40.")
        (ranged if match[2] else named).update(range(first, last + 1))
    return named, ranged
