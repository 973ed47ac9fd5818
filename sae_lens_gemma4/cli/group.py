"""The command that all others hang from, and how a wrong name is answered."""

from __future__ import annotations

import difflib

import click

from sae_lens_gemma4 import __version__


class Group(click.Group):
    """Commands that answer a typo with the nearest command, on every click."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:
            close = difflib.get_close_matches(cmd_name, self.commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(self.commands))}."
            ctx.fail(f"No such command {cmd_name!r}.{hint}")
        return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sae-lens-gemma4")
def cli() -> None:
    """Sparse autoencoders on Gemma 4: find, evaluate and continue training them with SAELens."""
