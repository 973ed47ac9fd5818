"""`bench …`: the package's speed, as ratios within one run."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Column, Table

from sae_lens_gemma4.cli.group import Group, cli


@cli.group(cls=Group)
def bench() -> None:
    """Measure speed, as ratios within one run on this machine."""


@bench.command("models")
@click.option("--hidden", type=click.IntRange(min=64), default=512, show_default=True, help="A multiple of 64.")
@click.option("--layers", type=click.IntRange(min=6), default=12, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_models(hidden: int, layers: int, tokens: int, rounds: int, device: str, as_json: bool) -> None:
    """Harvest one layer with both model classes and with a bare forward of transformers.

    A ratio of 1 is the speed of a bare forward with one raw hook, the same early stop and the same attention.
    """
    from sae_lens_gemma4.models.bench import TARGETS
    from sae_lens_gemma4.models.bench import bench_models as run

    result = run(hidden, layers, tokens, rounds, device)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    click.echo(
        f"hidden {hidden} × {layers} layers × {tokens} tokens on {device}, {result.threads} threads, "
        f"{rounds} rounds, stopped after layer {result.stop_after_layer}"
    )
    table = Table("class", "attention", "bare ms", "its ms", "ratio", "quartiles", "target")
    for c in result.comparisons:
        low, high = c.ratio_quartiles
        times = (f"{c.bare_ms:.1f}", f"{c.class_ms:.1f}", f"{c.ratio:.3f}", f"{low:.3f}–{high:.3f}")
        table.add_row(c.model_class, c.attention, *times, f"{TARGETS[c.model_class]:.2f}")
    Console().print(table)


@bench.command("loading")
@click.option("--d-sae", type=click.IntRange(min=32), default=65536, show_default=True)
@click.option("--d-in", type=click.IntRange(min=1), default=2560, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--layout", "layouts", multiple=True, help="One layout alone; may be given again. [default: all]")
@click.option("--touch", default="read", show_default=True, help="How every byte is touched: read or write.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="For temporary files, 2.7 GB.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_loading(
    d_sae: int, d_in: int, repeats: int, layouts: tuple[str, ...], touch: str, folder: Path | None, as_json: bool
) -> None:
    """Load a checkpoint of each file form, and the same bytes with safetensors.

    A ratio of 1 is safetensors' speed, every byte touched on either side: there by a caller, here by the search for
    entries that are not finite. "again" is the ratio where a caller then touches them once more. Peak memory is in
    units of the weights.
    """
    from sae_lens_gemma4.catalogue.bench import SPEED_TARGET
    from sae_lens_gemma4.catalogue.bench import bench_loading as run

    costs = run(d_sae, d_in, repeats, layouts or None, touch, folder)
    if as_json:
        click.echo(json.dumps([cost.to_dict() for cost in costs], indent=2))
        return
    names = ("layout", "ours s", "its s", "ratio", "quartiles", "≥", "again", "peak", "≤")
    table = Table(*(Column(name, no_wrap=True) for name in names))
    for c in costs:
        low, high = c.ready_ratio_quartiles
        ratios = (f"{c.ready_ratio:.2f}", f"{low:.2f}–{high:.2f}", "–" if c.transposes else str(SPEED_TARGET))
        times = (f"{c.ready_seconds:.2f}", f"{c.reference_seconds:.2f}")
        peak = "–" if c.peak is None else f"{c.peak:.2f}"
        name = c.layout + " (transposed)" * c.transposes
        table.add_row(name, *times, *ratios, f"{c.ratio:.2f}", peak, str(c.peak_target))
    Console().print(table)


@bench.command("evaluate")
@click.option("--d-sae", type=click.IntRange(min=2), default=65536, show_default=True)
@click.option("--d-in", type=click.IntRange(min=1), default=2560, show_default=True)
@click.option("--k", type=click.IntRange(min=1), default=100, show_default=True, help="About how many latents fire.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--all-tokens", type=click.IntRange(min=1), default=262_144, show_default=True, help="For the peak.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_evaluate(
    d_sae: int, d_in: int, k: int, batch_tokens: int, all_tokens: int, rounds: int, device: str, as_json: bool
) -> None:
    """Measure a batch's activations with an SAE: this package, sae_lens, and the encoder's product alone."""
    from sae_lens_gemma4.evaluation.bench import PEAK_TARGET, TIME_TARGET, bench_evaluation

    r = bench_evaluation(d_in, d_sae, k, batch_tokens, all_tokens, rounds, device)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=2))
        return
    click.echo(
        f"{d_in} × {d_sae}, L0 {r.l0:.1f}, {batch_tokens} tokens a batch on {device}, {r.threads} threads, "
        f"{rounds} rounds"
    )
    low, high = r.ours_by_encoder_quartiles
    table = Table("", "s a batch", "ratio", "target", "peak GB", "target")
    table.add_row("encoder product", f"{r.encoder_seconds:.3f}", "1", "", "", "")
    peaks = ["–" if peak is None else f"{peak:.2f}" for peak in (r.ours_peak_gb, r.stock_peak_gb)]
    ratio = f"{r.ours_by_encoder:.3f} ({low:.3f}–{high:.3f}) of the product"
    table.add_row("this package", f"{r.ours_seconds:.3f}", ratio, f"≤ {TIME_TARGET}", peaks[0], f"≤ {PEAK_TARGET:g}")
    table.add_row("sae_lens", f"{r.stock_seconds:.3f}", f"{r.stock_by_ours:.2f} of this package", "", peaks[1], "")
    Console().print(table)
    click.echo(f"This package's peak is that of {all_tokens:,} tokens with intervals, sae_lens's that of one batch.")


@bench.command("harvest")
@click.option("--hidden", type=click.IntRange(min=64), default=512, show_default=True, help="A multiple of 64.")
@click.option("--layers", type=click.IntRange(min=6), default=12, show_default=True)
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_harvest(hidden: int, layers: int, tokens: int, context: int, rounds: int, device: str, as_json: bool) -> None:
    """Stream three layers of one model in one run, and the deepest of them alone."""
    from sae_lens_gemma4.activations.bench import TARGET
    from sae_lens_gemma4.activations.bench import bench_harvest as run

    r = run(hidden, layers, tokens, context, rounds, device)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=2))
        return
    low, high = r.ratio_quartiles
    click.echo(
        f"hidden {hidden}, layers {', '.join(map(str, r.layers))} of {layers}, {r.tokens:,} tokens on {device}, "
        f"{r.threads} threads, {rounds} rounds: {r.tokens_per_second:,.0f} tokens/s.\n"
        f"Three layers take {r.ratio:.3f} ({low:.3f}–{high:.3f}) of the deepest alone (target ≤ {TARGET})."
    )
