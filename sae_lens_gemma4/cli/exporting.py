"""`export-neuronpedia`: dashboards of an SAE and the folder that Neuronpedia imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.cli.running import set_key
from sae_lens_gemma4.errors import ConfigError

_OPTIONS = {
    "model_name": "model.name",
    "model_class": "model.class_name",
    "device": "model.device",
    "dtype": "model.dtype",
    "corpus": "text.dataset",
    "split": "text.split",
    "prompts": "text.prompts",
    "context_size": "text.context_size",
    "batch_blocks": "text.batch_blocks",
    "labels": "labels",
    "out": "output",
    "keep_firings": "keep_firings",
}
"""The options, and the keys of a recipe that each sets."""


@cli.command("export-neuronpedia")
@click.argument("places", nargs=-1, required=True, metavar="RELEASE [SAE_ID]")
@click.option("--model", "model_name", help="Name or path of the model.")
@click.option("--model-class", help="Gemma4ProxyLM (the default), Gemma4Bridge, or one of sae_lens's.")
@click.option("--corpus", help="A dataset's name or path, embedded:text or embedded:chat.")
@click.option("--split", help="Of the corpus, as datasets writes it. [default: train]")
@click.option("--prompts", type=click.IntRange(min=1), help="[default: 24576]")
@click.option("--context-size", type=click.IntRange(min=2), help="Tokens a prompt. [default: 128]")
@click.option("--batch-blocks", type=click.IntRange(min=1), help="Prompts a forward. [default: 16]")
@click.option("--labels", metavar="FILE", help="A CSV or JSON file of them, or catalogue for the release's own.")
@click.option("--device", help="[default: cpu]")
@click.option("--dtype", help="The model's, as float32 or bfloat16. [default: the checkpoint's]")
@click.option("--out", help="A folder: dashboards and exports go into it.")
@click.option("--keep-firings", is_flag=True, default=None, help="Leave all activations in dashboards/firings.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE",
    help="Any other key of a recipe: listing.creator_name=Me, dashboard.n_strongest=30.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check everything, say what it will take, and stop.")
def export_neuronpedia(places: tuple[str, ...], changes: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Make dashboards of every latent of an SAE, and the folder that Neuronpedia imports.

    RELEASE is a release and SAE_ID an id of it, or RELEASE is a folder or weights file, or a recipe (.yaml), over which
    options win. A call that was stopped goes on when it is made again; one with other --labels makes the export anew
    from the dashboards that are there. docs/neuronpedia.md has the rest.
    """
    if len(places) > 2:
        raise click.UsageError("export-neuronpedia takes RELEASE SAE_ID, a folder, or a recipe.")
    data = _recipe(places)
    for option, value in options.items():
        if value is not None:
            _put(data, _OPTIONS[option], value)
    for change in changes:
        set_key(data, change)
    missing = {"model.name": "--model", "text.dataset": "--corpus", "output": "--out"}
    if lacking := [option for key, option in missing.items() if not _has(data, key)]:
        raise ConfigError(f"{', '.join(lacking)} must be given: no recipe says it.")
    from sae_lens_gemma4.mapping import from_mapping
    from sae_lens_gemma4.neuronpedia.dashboards import is_finished
    from sae_lens_gemma4.neuronpedia.job import NeuronpediaJob, prepare  # slow; after what can be wrong above

    prepared = prepare(from_mapping(NeuronpediaJob, data, "recipe"))
    if dry_run:
        plan, labels = prepared.plan, sum(map(len, prepared.labels.values()))
        if is_finished(prepared.dashboards, plan.document):
            click.echo(f"The dashboards are there, in {prepared.dashboards}.")
        else:
            click.echo(plan.sentence(plan.cost(prepared.dashboards)))
        click.echo(f"{plan.sae.cfg.d_sae:,} latents as {prepared.name}, {labels:,} labels. Nothing was written.")
        return
    try:
        found = prepared.run()
    except KeyboardInterrupt:
        click.echo("\nStopped. The same command goes on from here.", err=True)
        raise
    click.echo(found)
    click.echo(f"sae-lens-gemma4 dashboard {prepared.dashboards}")


def _recipe(places: tuple[str, ...]) -> dict[str, Any]:
    """The plain data of a recipe, whatever the SAE is named by."""
    first, *rest = places
    if rest:
        return {"sae": {"release": first, "sae_id": rest[0]}}
    if Path(first).suffix in (".yaml", ".yml"):
        from sae_lens_gemma4.mapping import read_yaml

        data = read_yaml(first, "recipe")
        if not isinstance(data, dict):
            raise ConfigError(f"Recipe {first} must be a mapping.")
        return data
    if Path(first).exists():
        return {"sae": {"path": first}}
    from sae_lens_gemma4.catalogue.registry import releases
    from sae_lens_gemma4.errors import UnknownNameError

    if first in releases():
        raise ConfigError(f"State an SAE id of {first}: {', '.join(releases()[first].sae_ids[:8])}.")
    raise UnknownNameError("release, folder or recipe", first, releases())


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(data.get(parent), dict):
            data[parent] = {}
        data = data[parent]
    data[last] = value


def _has(data: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(data, dict) or data.get(part) is None:
            return False
        data = data[part]
    return True
