"""What `train --dry-run` says: what a run would do and take, before anybody pays for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def print_plan(plan: Mapping[str, Any]) -> None:
    """The SAEs and their phases, then tokens, memory and disk."""
    names = ("SAE", "reads", "architecture", "d_in × d_sae", "phase", "steps", "tokens")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for sae in plan["saes"]:
        first = [sae["name"], sae["hook_name"], sae["architecture"], f"{sae['d_in']:,} × {sae['d_sae']:,}"]
        for phase in sae["phases"]:
            table.add_row(*map(Text, [*first, phase["name"], f"{phase['steps']:,}", f"{phase['tokens']:,}"]))
            first = [""] * 4
    Console().print(table)
    text = plan["training_tokens"]
    click.echo("Training text: " + ("read in shards" if text is None else f"{text:,} tokens") + "; held out: " + (
        ", ".join(f"{name} {tokens:,}" for name, tokens in plan["heldout_tokens"].items()) + "."
    ))  # fmt: skip
    cache = f", {size(plan['cache_bytes'])} of it cached activations" if plan["cache_bytes"] else ""
    click.echo(f"Memory, besides the model: about {size(plan['memory_bytes'])}.")
    click.echo(f"Disk: up to {size(plan['disk_bytes'])}{cache}; {size(plan['free_bytes'])} are free.")
    if plan["disk_bytes"] > plan["free_bytes"]:
        click.echo("That does not fit.", err=True)
    click.echo("Nothing was trained or written.")


def size(n: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
