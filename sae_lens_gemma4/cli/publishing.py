"""`publish`: cards for the SAEs of a run, and their upload."""

from __future__ import annotations

from pathlib import Path

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import ConfigError


@cli.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--push", "repo_id", metavar="REPO_ID", help="Upload to this repository of the hub, and read it back.")
@click.option("--name", "names", multiple=True, help="This SAE of the run; may be repeated. [default: all]")
@click.option("--license", "license_name", help="Of the repository, as the hub names it (apache-2.0).")
@click.option("--private", is_flag=True, help="With --push: a repository that only its owner sees.")
@click.option("--revision", help="With --push: a branch. [default: main]")
@click.option("--ungated", is_flag=True, help="With --push: also SAEs whose gate does not hold, or that have none.")
@click.option("--device", help="With --push: where it is measured again. [default: where it was measured]")
@click.option("--tolerance", type=float, default=1e-6, show_default=True, help="With --push: most that VE may differ.")
def publish(
    run_folder: Path,
    repo_id: str | None,
    names: tuple[str, ...],
    license_name: str | None,
    private: bool,
    revision: str | None,
    ungated: bool,
    device: str | None,
    tolerance: float,
) -> None:
    """Write the model cards of a run's SAEs, say which gates hold, and upload.

    RUN_FOLDER is what train wrote, or the folder of one SAE. What --push uploads is downloaded again and measured on
    the same held-out text; what was found is part of the card.
    """
    given = {"--private": private, "--revision": revision, "--ungated": ungated}
    wrong = [option for option, value in given.items() if value]
    if wrong and repo_id is None:
        raise ConfigError(f"{', '.join(wrong)} need --push: nothing is uploaded without it.")
    from sae_lens_gemma4.publishing.card import write_cards  # slow; after what can be wrong above
    from sae_lens_gemma4.publishing.push import push
    from sae_lens_gemma4.publishing.record import find_folders, read_records

    folders = find_folders(run_folder, names)
    cards = write_cards(folders, license=license_name)
    for record in read_records(folders):
        click.echo(f"{record.name}: {record.gate}")
    for card in cards:
        click.echo(card)
    if repo_id is not None:
        found = push(
            folders,
            repo_id,
            private=private,
            license=license_name,
            revision=revision,
            ungated=ungated,
            device=device,
            tolerance=tolerance,
        )
        click.echo(found.sentence)
        click.echo(f"https://huggingface.co/{repo_id}")
