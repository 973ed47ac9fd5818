"""`upload-neuronpedia`: dashboards to Neuronpedia by its API, or an export as one file for its team."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.report.visible import visible_name

if TYPE_CHECKING:
    from sae_lens_gemma4.neuronpedia.limits import Changes
    from sae_lens_gemma4.neuronpedia.outgoing import Plan

_CHANGES = {
    "cut_labels": "labels cut to 512 characters",
    "dropped_sources": "labels sent without who or what stated them",
    "replaced_tokens": "tokens replaced that the site cannot hold (empty, NUL, no Unicode)",
    "cut_examples": "examples cut to 1,024 tokens",
    "dropped_bounds": "bounds of quantiles left out, outside of what the site takes",
    "dropped_logits": "promoted or suppressed tokens left out, beyond twenty",
}


@cli.command("upload-neuronpedia")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--labels", help="Labels: a CSV, a JSON of texts by latent, or 'catalogue' for those of the release.")
@click.option("--model-id", help="Neuronpedia's id of the model. [default: the folder's]")
@click.option("--layer", type=int, help="The layer. [default: the folder's]")
@click.option("--set-name", help="The set of SAEs. [default: the folder's]")
@click.option("--suffix", help="What follows the set's name after '__'; '' for nothing. [default: the folder's]")
@click.option("--new-model", is_flag=True, help="Make an unlisted model if the site has none of this name.")
@click.option("--description", help="Of a set that is made, up to 128 characters.")
@click.option("--url", help="Of a set that is made: where its SAEs are.")
@click.option("--batch-size", type=int, default=128, show_default=True, help="Most latents of a request.")
@click.option("--state", type=click.Path(dir_okay=False, path_type=Path), help="The ledger. [default: in the folder]")
@click.option("--base-url", help="Another instance's API. [default: https://www.neuronpedia.org/api]")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@click.option("--offline", type=click.Path(path_type=Path), metavar="OUT.tar", help="Write an export as one file.")
@click.pass_context
def upload_neuronpedia(
    ctx: click.Context,
    folder: Path,
    labels: str | None,
    model_id: str | None,
    layer: int | None,
    set_name: str | None,
    suffix: str | None,
    new_model: bool,
    description: str | None,
    url: str | None,
    batch_size: int,
    state: Path | None,
    base_url: str | None,
    dry_run: bool,
    offline: Path | None,
) -> None:
    """Upload dashboards to Neuronpedia, each latent once; called again, it goes on where it was stopped.

    FOLDER is a folder of dashboards, or what export-neuronpedia wrote (its subfolder dashboards); your API key is read
    from NEURONPEDIA_API_KEY. With --offline, an export (subfolder exports) is checked and packed as one file for
    Neuronpedia's team.
    """
    if offline is not None:
        others = [p for p in ctx.params if p not in ("folder", "offline") and _is_given(ctx, p)]
        if others:
            raise click.UsageError(
                f"--offline packs an export as it is; --{others[0].replace('_', '-')} is of uploads."
            )
        from sae_lens_gemma4.neuronpedia.package import pack_for_import

        path = pack_for_import(folder, offline)
        click.echo(f"{path}: {path.stat().st_size:,} bytes. README.txt in it says how it is imported.")
        return
    place = {"model_id": model_id, "layer": layer, "set_name": set_name, "suffix": suffix}
    content = {"explanations": labels, "batch_size": batch_size}
    if dry_run:
        from sae_lens_gemma4.neuronpedia.outgoing import Outgoing

        _print_plan(Outgoing(folder, **place, **content).plan())  # type: ignore[arg-type]
        return
    from sae_lens_gemma4.neuronpedia import upload

    try:
        done = upload.upload_neuronpedia(
            folder,
            **place,  # type: ignore[arg-type]
            **content,  # type: ignore[arg-type]
            new_model=new_model,
            description=description,
            url=url,
            base_url=base_url,
            state=state,
        )
    except KeyboardInterrupt:
        click.echo("\nStopped. The same command goes on from here.", err=True)
        raise
    click.echo(
        f"{done.name}: {done.sent:,} latents sent, {done.already_there:,} were there, {done.dead:,} dead left out."
    )
    _print_labels(done.labels, done.unsent_labels)
    _print_changes(done.changes)
    click.echo(done.url)


def _is_given(ctx: click.Context, parameter: str) -> bool:
    return ctx.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE


def _print_plan(plan: Plan) -> None:
    click.echo(f"{plan.name}: {plan.latents:,} latents, {plan.first} to {plan.last}; {plan.dead:,} dead left out.")
    click.echo(f"{plan.batches:,} requests, {plan.bytes:,} bytes in all.")
    _print_labels(plan.labels, plan.unsent_labels)
    if plan.labels:
        click.echo(f"The longest label has {plan.longest_label} of 512 characters.")
    _print_changes(plan.changes)
    click.echo("Nothing was sent. Whether the site has this model and set was not looked up.")


def _print_labels(sent: int, unsent: int) -> None:
    if sent or unsent:
        click.echo(f"{sent:,} labels; {unsent:,} left out, of latents without a dashboard.")


def _print_changes(changes: Changes) -> None:
    for name, what in _CHANGES.items():
        if count := getattr(changes, name):
            click.echo(f"{count:,} {what}.")
    if changes.dropped_methods:
        methods = ", ".join(map(visible_name, sorted(changes.dropped_methods)))
        click.echo(f"Labels of kinds that the site does not have ({methods}) go without their kind.")
