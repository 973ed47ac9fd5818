"""`demo` and `train`: the commands that train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.cli.printing import make_folder, number, print_before_after


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="demo-report", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """Run the main job on the embedded models.

    A base model's SAE is measured on the tuned model, trained on, measured again, saved, and read back by stock
    sae_lens, without a network, in two to three minutes on two cores. Writes report.html, report.json and the
    adapted SAEs under --out.
    """
    make_folder(out)
    from sae_lens_gemma4.demo.job import run_demo

    report = run_demo(out, seed, say=lambda line: click.echo(line, err=True))
    _print_demo(report)
    click.echo(f"\n{out / 'report.html'}\n{out / 'report.json'}")


@cli.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
def train(recipe: Path) -> None:
    """Continue training an SAE as RECIPE says.

    A recipe is YAML; docs/recipes.md has its keys, recipes/ has examples.
    """
    from sae_lens_gemma4.training.config import ContinueTrainingConfig

    cfg = ContinueTrainingConfig.from_yaml(recipe)
    from sae_lens_gemma4.training.runner import ContinueTrainingRunner  # slow; after what can be wrong in the recipe

    result = ContinueTrainingRunner(cfg).run()
    rows = [(n, result.before[n].to_dict(), result.after[n].to_dict()) for n in result.after]
    print_before_after(f"{cfg.model.name}, {result.tokens:,} tokens", rows)
    click.echo(f"\n{result.path}")


def _print_demo(report: Mapping[str, Any]) -> None:
    base = report["reference"]["metrics"]
    click.echo(
        f"On its own model's held-out text the base SAE has VE {number(base['ve'])}, L0 {number(base['l0'], 1)}: "
        f"{base['verdict']}."
    )
    for shift in report["shifts"]:
        print_before_after(shift["title"], [(r["corpus"], r["before"], r["after"]) for r in shift["rows"]])
        reload, training = shift["reload"], shift["training"]
        same = "the same bits" if reload["identical"] else f"{reload['max_abs_difference']:.1e} off"
        click.echo(
            f"{training['tokens']:,} tokens in {training['seconds']:.0f} s. "
            f"Read back by stock sae_lens in another process: {same}."
        )
