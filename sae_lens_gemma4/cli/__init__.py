"""`sae-lens-gemma4 …`: the package from the command line.

A wrong name or setting is answered in one line, with the nearest right one, and exit code 2; a traceback here is
a fault of this package. Ctrl-C ends with code 130 and leaves what was saved before as it was.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import TextIO

import click

from sae_lens_gemma4.cli import (  # noqa: F401  (they add their commands)
    bench,
    evaluating,
    exporting,
    interpreting,
    publishing,
    releases,
    restoring,
    running,
    uploading,
    viewing,
)
from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import CatalogueWarning, Gemma4SAEError


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # minus signs on a console that is not UTF-8
    with warnings.catch_warnings():  # puts back the two lines that follow
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = _say
        sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        code = cli.main(standalone_mode=False)  # a command's own exit code, or what it returned
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("\nInterrupted. What was saved before is as it was.", err=True)
        return 130
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except Gemma4SAEError as e:
        click.echo(f"Error: {e}", err=True)
        return 2
    return code if isinstance(code, int) else 0


def _say(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of this package without the line that it came from, which is click's; others with their kind."""
    del filename, lineno, file, line
    kind = "Warning" if issubclass(category, CatalogueWarning) else category.__name__
    click.echo(f"{kind}: {message}", err=True)
