"""`sae-lens-gemma4 …`: the package from the command line.

A wrong name or setting is answered in one line, with the nearest right one, and exit code 2; a traceback here is
a fault of this package. Ctrl-C ends with code 130 and leaves what was saved before as it was.
"""

from __future__ import annotations

import io
import sys
import warnings

import click

from sae_lens_gemma4.cli import (  # noqa: F401  (they add their commands)
    bench,
    evaluating,
    exporting,
    publishing,
    releases,
    restoring,
    running,
    uploading,
    viewing,
)
from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import Gemma4SAEError


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # minus signs on a console that is not UTF-8
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        code = cli.main(standalone_mode=False)  # a command's own exit code, or what it returned
    except click.exceptions.Abort:
        click.echo("\nInterrupted. What was saved before is as it was.", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What was saved before is as it was.", err=True)
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except Gemma4SAEError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
