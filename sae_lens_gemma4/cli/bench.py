"""`bench …`: the package's speed, as ratios within one run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Column, Table

from sae_lens_gemma4.cli.group import Group, cli

if TYPE_CHECKING:
    from sae_lens_gemma4.bench.disk import Paired


def _integers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers with commas between them, as in 1,2.") from None


def _print(rows: list[list[str]]) -> None:
    head, *others = rows
    table = Table(*head)
    for row in others:
        table.add_row(*row)
    Console().print(table)


@cli.group(cls=Group)
def bench() -> None:
    """Measure speed, as ratios within one run on this machine."""


@bench.command("step")
@click.option("--size", "size_name", help="cpu or seed. [default: cpu on CPUs, seed on CUDA]")
@click.option("--d-in", type=click.IntRange(min=1), help="Instead of the size's own; so with the next four.")
@click.option("--d-sae", type=click.IntRange(min=2))
@click.option("--batch", type=click.IntRange(min=1))
@click.option("--k", type=click.IntRange(min=1))
@click.option("--widths", callback=_integers, help="Matryoshka widths, as in 512,2048,8192.")
@click.option(
    "--device", "devices", multiple=True, help="May be given again. [default: cpu, and cuda where there is one]"
)
@click.option("--threads", callback=_integers, default="1,2", show_default=True, help="On CPUs, one after the other.")
@click.option("--precision", "precisions", multiple=True, help="One alone; may be given again. [default: all]")
@click.option("--against", multiple=True, help="One contestant alone; may be given again. [default: all]")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--warm-steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--whole-runs", type=click.IntRange(min=0), default=3, show_default=True, help="On the embedded pair, for quality."
)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_step(
    size_name: str | None,
    devices: tuple[str, ...],
    threads: tuple[int, ...],
    precisions: tuple[str, ...],
    against: tuple[str, ...],
    rounds: int,
    warm_steps: int,
    whole_runs: int,
    as_json: bool,
    **changed: Any,
) -> None:
    """Take training steps with this package, sae_lens, dictionary_learning and sparsify.

    Prints what the step has to reach and what it reaches; "by ours" is a contestant's time as a multiple of this
    package's.
    """
    import torch

    from sae_lens_gemma4.bench.data import USUAL, size
    from sae_lens_gemma4.bench.machine import device_kind
    from sae_lens_gemma4.bench.step import bench_step as run
    from sae_lens_gemma4.bench.targets import circumstances, races, table

    results = []
    for device in devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]):
        kind = device_kind(device)
        chosen = size(size_name or USUAL[kind], **changed)
        click.echo(f"{device}: {chosen}", err=True)
        numbers = threads if kind == "cpu" else None
        say = partial(click.echo, err=True)
        measured = run(
            chosen, device, numbers, precisions or None, against or None, rounds, warm_steps, whole_runs, say=say
        )
        results.append(measured.to_dict())
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    for result in results:
        for measured_run in result["runs"]:
            click.echo(circumstances(result, measured_run))
            _print(races(measured_run))
    _print(table(results))


@bench.command("train")
@click.option("--model-size", help="tiny or e4b. [default: tiny on a CPU, e4b on CUDA]")
@click.option("--device", help="[default: cuda where there is one, else cpu]")
@click.option("--chunks", type=click.IntRange(min=1), help="Of text a round; 16 blocks with tiny, 64 with e4b.")
@click.option("--rounds", type=click.IntRange(min=1))
@click.option("--prefetch/--no-prefetch", default=None, help="Read the next chunk during steps. [default: on CUDA]")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_train(
    model_size: str | None,
    device: str | None,
    chunks: int | None,
    rounds: int | None,
    prefetch: bool | None,
    as_json: bool,
) -> None:
    """Train SAEs at three layers of a random model, from text on, with this package's steps and with sae_lens's."""
    import torch

    from sae_lens_gemma4.bench.machine import device_kind
    from sae_lens_gemma4.bench.train import TARGET, USUAL
    from sae_lens_gemma4.bench.train import bench_train as run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device_kind(device)
    r = run(model_size or USUAL[kind], device, chunks=chunks, rounds=rounds, prefetch=prefetch)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=1))
        return
    low, high = r.by_ours_quartiles
    target = f" (target ≥ {TARGET:,})" if r.scene == "e4b" and r.kind == "cuda" else ""
    click.echo(
        f"{r.scene}, layers {', '.join(map(str, r.layers))}, {r.size}, {r.tokens:,} tokens a round on {r.name}, "
        f"{r.threads} threads, {r.rounds} rounds: {r.tokens_per_second:,.0f} tokens/s{target}.\n"
        f"Harvest alone takes {r.harvest_share:.2f} of that time, the steps alone {r.steps_share:.2f}.\n"
        f"With sae_lens's steps it takes {r.by_ours:.2f} ({low:.2f}–{high:.2f}) times as long."
    )


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
    from sae_lens_gemma4.bench.models import TARGETS
    from sae_lens_gemma4.bench.models import bench_models as run

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


@bench.command("load")
@click.option("--d-sae", type=click.IntRange(min=32), default=65536, show_default=True)
@click.option("--d-in", type=click.IntRange(min=1), default=2560, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--layout", "layouts", multiple=True, help="One layout alone; may be given again. [default: all]")
@click.option("--touch", default="read", show_default=True, help="How every byte is touched: read or write.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="For temporary files, 2.7 GB.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_load(
    d_sae: int, d_in: int, repeats: int, layouts: tuple[str, ...], touch: str, folder: Path | None, as_json: bool
) -> None:
    """Load a checkpoint of each file form, and the same bytes with safetensors.

    A ratio of 1 is safetensors' speed, every byte touched on either side: there by a caller, here by the search for
    entries that are not finite. "again" is the ratio where a caller then touches them once more. Peak memory is in
    units of the weights.
    """
    from sae_lens_gemma4.bench.loading import SPEED_TARGET, bench_loading

    costs = bench_loading(d_sae, d_in, repeats, layouts or None, touch, folder)
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
    from sae_lens_gemma4.bench.evaluation import PEAK_TARGET, TIME_TARGET, bench_evaluation

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
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="Of a chunk.")
@click.option("--context", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--cache-gb", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Four chunks at least.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="For the cache.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_harvest(
    hidden: int,
    layers: int,
    tokens: int,
    context: int,
    rounds: int,
    cache_gb: float,
    folder: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Stream three layers of one model in one run, the deepest of them alone, and a cache on disk.

    "In turn by ahead" is how much faster reading and steps of the same length are where the next chunk is read in the
    meantime: towards 2 where one hides the other, 1 where nothing is won.
    """
    from sae_lens_gemma4.bench.harvest import bench_harvest as run

    r = run(hidden, layers, tokens, context, rounds, cache_gb, folder, device)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=2))
        return
    click.echo(
        f"hidden {hidden}, layers {', '.join(map(str, r.layers))} of {layers}, {r.tokens:,} tokens on {device}, "
        f"{r.threads} threads, {rounds} rounds: {r.tokens_per_second:,.0f} tokens/s.\n"
        f"A cache of {r.cache.gigabytes:.2f} GB in blocks of {r.cache.block_kb:,.0f} kB, each time "
        f"{'from disk' if r.cache.cold else 'from memory or disk'}: {r.cache.gb_per_second:.2f} GB/s."
    )
    _print_paired(r.ratios)


@bench.command("dashboards")
@click.option("--d-sae", type=click.IntRange(min=2), default=65_536, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=128, show_default=True, help="Of 128 tokens.")
@click.option("--k", type=click.IntRange(min=1), default=100, show_default=True, help="About how many latents fire.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_dashboards(d_sae: int, prompts: int, k: int, rounds: int, device: str, as_json: bool) -> None:
    """Make dashboards of all latents of an SAE on the embedded model: beside forward and encode alone, and beside one
    reading of the activations for each 128 latents."""
    from sae_lens_gemma4.bench.dashboards import MEMORY_TARGET, READS_TARGET, TIME_TARGET
    from sae_lens_gemma4.bench.dashboards import bench_dashboards as run

    r = run(d_sae, prompts, k, rounds, device)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=2))
        return
    click.echo(
        f"{r.d_sae:,} latents, L0 {r.l0:.1f}, {r.tokens:,} tokens on {device}, {r.threads} threads, {rounds} rounds"
    )
    table = Table("", "", "quartiles", "target")
    low, high = r.pass_by_bare_quartiles
    table.add_row("pass by forward + encode", f"{r.pass_by_bare:.3f}", f"{low:.3f}–{high:.3f}", f"≤ {TIME_TARGET}")
    table.add_row("with dashboards, 24,576 prompts", f"{r.whole_by_bare:.3f}", "", f"≤ {TIME_TARGET}")
    table.add_row("activations read, 128 latents a time, by pass", f"{r.reads_by_pass:.0f}", "", f"≥ {READS_TARGET}")
    low, high = r.by_128_by_pass_quartiles
    table.add_row("time of these, by pass", f"{r.by_128_by_pass:.2f}", f"{low:.2f}–{high:.2f}", "")
    table.add_row("a dashboard after the pass, ms", f"{r.latent_ms:.2f}", "", "")
    peak = "–" if r.peak_gb is None else f"{r.peak_gb:.2f}"
    table.add_row("peak memory above model and SAE, GB", peak, "", f"≤ {MEMORY_TARGET:g}")
    Console().print(table)


@bench.command("interp")
@click.option("--hidden", type=click.IntRange(min=64), default=256, show_default=True, help="Width of the 60 layers.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--d-sae", type=click.IntRange(min=2), default=16_384, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def bench_interp(hidden: int, tokens: int, d_sae: int, rounds: int, device: str, as_json: bool) -> None:
    """Read all layers of a random 60-layer model beside its forward alone, and all latents of the embedded SAE's model
    beside one pass over the text."""
    from sae_lens_gemma4.bench.interp import bench_interp as run

    r = run(hidden, tokens=tokens, d_sae=d_sae, rounds=rounds, device=device)
    if as_json:
        click.echo(json.dumps(r.to_dict(), indent=2))
        return
    click.echo(
        f"{r.layers} layers of {r.hidden}, {r.tokens:,} tokens, {r.nearest_tokens:,} of them held against "
        f"{r.vocabulary:,} embeddings; {r.examples.d_sae:,} latents on {r.examples.tokens:,} tokens; {device}, "
        f"{r.threads} threads, {rounds} rounds. Contexts take {r.examples.latent_ms:.2f} ms a latent."
    )
    _print_paired(r.ratios)


def _print_paired(ratios: Iterable[Paired]) -> None:
    rows = [[p.what, f"{p.ratio:.3f}", "–".join(f"{q:.3f}" for q in p.quartiles), p.target or ""] for p in ratios]
    _print([["", "ratio", "quartiles", "target"], *rows])
