"""`restore`: a published SAE as a folder that stock sae_lens goes on training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.cli.running import set_key
from sae_lens_gemma4.errors import ConfigError, check_name

if TYPE_CHECKING:
    from sae_lens import TrainingSAE


@cli.command()
@click.argument("places", nargs=-1, required=True, metavar="RELEASE [SAE_ID] OUT")
@click.option("--architecture", metavar="NAME", help="How to train it, where the SAE does not say or says otherwise.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting: k=8, matryoshka_widths=[64,512]."
)
@click.option("--dtype", default="float32", show_default=True, help="Of the weights.")
@click.option("--absorb-thresholds", is_flag=True, help="Take thresholds that differ between latents into the weights.")
@click.option("--replace", is_flag=True, help="Replace an SAE that OUT holds.")
def restore(
    places: tuple[str, ...],
    architecture: str | None,
    changes: tuple[str, ...],
    dtype: str,
    absorb_thresholds: bool,
    replace: bool,
) -> None:
    """Make a published SAE trainable.

    RELEASE is a release or hub repository, and then SAE_ID is needed, or a folder or file. Writes a folder to OUT that
    stock's `from_pretrained_path` loads as the class it was trained as. The settings in it are those that stock uses:
    it ignores the `sae` of its own config beside such a path.
    """
    if len(places) not in (2, 3):
        raise click.UsageError("restore takes RELEASE [SAE_ID] OUT.")
    from sae_lens_gemma4.training.forms import FORMS, setting_names
    from sae_lens_gemma4.training.restore import restore_training_sae, write_training_folder
    from sae_lens_gemma4.training.saving import check_place

    *source, out = places
    if architecture is not None:
        check_name("restorable architecture", architecture, FORMS)
    settings: dict[str, Any] = {}
    for change in changes:
        set_key(settings, change)
    known = set().union(*map(setting_names, [architecture] if architecture else FORMS))
    for name in settings:
        check_name("setting", name, known)
    folder = check_place(out, keep=source[0] if len(source) == 1 else None)
    if folder.is_dir() and any(folder.iterdir()) and not replace:
        raise ConfigError(f"Output {folder} holds an SAE; --replace replaces it.")
    sae = restore_training_sae(
        *source, architecture=architecture, dtype=dtype, absorb_thresholds=absorb_thresholds, **settings
    )
    write_training_folder(sae, folder)
    _print_restored(sae, folder)


def _print_restored(sae: TrainingSAE[Any], folder: Path) -> None:
    cfg = sae.cfg
    facts = [cfg.architecture(), f"d_in {cfg.d_in}", f"d_sae {cfg.d_sae}"]
    facts += [f"k {cfg.k:g}"] if hasattr(cfg, "k") else []
    facts += [f"matryoshka_widths {cfg.matryoshka_widths}"] if hasattr(cfg, "matryoshka_widths") else []
    threshold = getattr(sae, "topk_threshold", None)
    facts += [] if threshold is None else [f"threshold {float(threshold):.4g}"]
    click.echo(f"{', '.join(facts)}, {cfg.dtype}")
    click.echo("Lost with the saved form: decoder norms that were folded in, Adam's moments, firing counts.")
    if threshold is not None and "32" not in cfg.dtype and "64" not in cfg.dtype:
        click.echo("Stock casts the threshold to these weights' dtype, and its moving average then stands still.")
    click.echo(f"from_pretrained_path: {folder}")
