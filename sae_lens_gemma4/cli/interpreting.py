"""`interp …`: readings of a model and its latents, each as a recipe says it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sae_lens_gemma4.cli.group import Group, cli
from sae_lens_gemma4.cli.running import set_key
from sae_lens_gemma4.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_gemma4.studies.study import Study


class Kind(NamedTuple):
    """A command: the study that its recipes are, and its help."""

    module: str
    study: str
    help: str


KINDS = {
    "profile": Kind(
        "profile", "ProfileStudy",
        "Profile how far layers are from tokens. One forward pass for all; where the curve changes is a test's to say.",
    ),
    "label": Kind(
        "labels", "LabelStudy",
        "Label latents and test the labels. By two judges: profile, selection, labels, tests on documents kept apart, "
        "linear probes, a score and what it means, files, export.",
    ),
    "verify": Kind(
        "labels", "VerifyStudy",
        "Test labels that are there already. A release's own, or a file's.",
    ),
    "probe": Kind(
        "pairs", "PairStudy",
        "Find latents by prompt pairs. Those that tell the two sides apart, at a false-discovery rate, beside what "
        "swapped sides give.",
    ),
    "contrast": Kind(
        "contrast", "ContrastStudy",
        "Contrast two groups of items. At every layer and latent, from one forward pass, against what chance gives.",
    ),
    "steer": Kind(
        "steer", "SteerStudy",
        "Steer answers, and say what that shows. A direction is added while the model answers, and its negative, and "
        "random ones.",
    ),
    "lens": Kind(
        "lens", "LensStudy",
        "Read each layer as if it were the last. Through the final norm and the unembedding: top tokens, ranks, "
        "entropy, commitment.",
    ),
}  # fmt: skip


@cli.group(cls=Group)
def interp() -> None:
    """Read latents: profile, label, verify, probe, contrast, steer, lens.

    Each takes a recipe (YAML); recipes/interp has one for the embedded models and for each public study that these
    came from. docs/interp.md says what is computed.
    """


def _command(name: str, kind: Kind) -> None:
    @interp.command(name, help=f"{kind.help}\n\nRECIPE is YAML; a run that was stopped goes on when it is made again.")
    @click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
    @click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: selection.n=100.")
    @click.option("--out", metavar="DIR", help="The output folder, in place of the recipe's.")
    @click.option("--dry-run", is_flag=True, help="Say what would be done and cost at most, load nothing, and stop.")
    def run(recipe: Path, changes: tuple[str, ...], out: str | None, dry_run: bool) -> None:
        study = _study(kind, recipe, changes, out)
        for sentence in study.plan():
            click.echo(sentence, err=not dry_run)
        if dry_run:
            click.echo("Nothing was loaded, asked or written.")
            return
        try:
            document = study.run()
        except KeyboardInterrupt:
            click.echo("\nStopped. The same command goes on from here.", err=True)
            raise
        _say(document, Path(study.output))


def _study(kind: Kind, recipe: Path, changes: tuple[str, ...], out: str | None) -> Study:
    from sae_lens_gemma4.mapping import from_mapping, read_yaml

    data = read_yaml(recipe, "recipe")
    if not isinstance(data, dict):
        raise ConfigError(f"Recipe {recipe} must be a mapping.")
    for change in changes:
        set_key(data, change)
    if out is not None:
        data["output"] = out
    cls = getattr(importlib.import_module(f"sae_lens_gemma4.studies.{kind.module}"), kind.study)
    study: Study = from_mapping(cls, data, "recipe")
    return study


def _say(document: dict[str, Any], folder: Path) -> None:
    from sae_lens_gemma4.report.study import summary
    from sae_lens_gemma4.report.visible import visible_name
    from sae_lens_gemma4.studies.study import PAGE

    for sentence in summary(document):
        click.echo(visible_name(sentence))
    click.echo(folder / PAGE)


for _name, _kind in KINDS.items():
    _command(_name, _kind)
