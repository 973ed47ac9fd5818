"""`demo`, `train` and `evaluate`: the commands that run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import ConfigError


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="demo-report", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """Run the main job on the embedded models.

    A base model's SAE is measured on the tuned model, trained on, measured again, saved, and read back by stock
    sae_lens, without a network, in two to three minutes on two cores. Writes report.html, report.json and the
    adapted SAEs under --out.
    """
    _make_folder(out)
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
    _print_before_after(f"{cfg.model.name}, {result.tokens:,} tokens", rows)
    click.echo(f"\n{result.path}")


@cli.command()
@click.argument("release_or_path")
@click.argument("sae_id", required=False)
@click.option("--model", "model_name", required=True, help="Name or path of the model.")
@click.option("--model-class", default="Gemma4ProxyLM", show_default=True)
@click.option("--corpus", required=True, help="A dataset's name or path, embedded:text or embedded:chat.")
@click.option("--split", default="train", show_default=True, help="Split of the dataset, as datasets writes it.")
@click.option("--context-size", type=click.IntRange(min=2), help="Tokens a block. [default: the SAE's own]")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to measure. [default: all]")
@click.option("--isolate-documents", is_flag=True, help="Documents packed into one block do not see each other.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", help="The model's, as float32 or bfloat16. [default: the checkpoint's]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.json and report.html here.")
def evaluate(
    release_or_path: str,
    sae_id: str | None,
    model_name: str,
    model_class: str,
    corpus: str,
    split: str,
    context_size: int | None,
    tokens: int | None,
    isolate_documents: bool,
    device: str,
    dtype: str | None,
    out: Path | None,
) -> None:
    """Measure an SAE on a model.

    The SAE is a release and an SAE id of it, or a folder or weights file in any form of docs/releases.md.
    """
    from sae_lens_gemma4.activations.corpus import build_corpus
    from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
    from sae_lens_gemma4.models.loading import load_for_sae_lens
    from sae_lens_gemma4.training.config import Model
    from sae_lens_gemma4.training.restore import load_sae

    if out is not None:
        _make_folder(out)
    wanted = Model(name=model_name, class_name=model_class, device=device, dtype=dtype)
    sae = load_sae(release_or_path, sae_id, device=device)
    model = load_for_sae_lens(model_class, model_name, device, {"dtype": wanted.dtype} if dtype else None)
    context = context_size or sae.cfg.metadata.context_size or 1024
    built = build_corpus(corpus, model.tokenizer, context_size=context, split=split, max_tokens=tokens)
    source = {"release": release_or_path, "sae_id": sae_id} if sae_id else {"path": release_or_path}
    result = evaluate_sae(sae, model, built, isolate_documents=isolate_documents, source=source)
    _print_evaluation(result.to_dict())
    if out is not None:
        result.to_json(out / "report.json")
        result.to_html(out / "report.html")
        click.echo(f"\n{out / 'report.html'}\n{out / 'report.json'}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be made a folder: {e.strerror}.") from e


def _number(value: float | None, digits: int = 3) -> str:
    return "not defined" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _print_before_after(title: str, rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    click.echo(f"\n{title}")
    table = Table()
    for heading in ("held-out corpus", "SAE", "VE", "VE w/o top 1 % SSE", "L0", "never fired", "verdict"):
        table.add_column(heading, justify="left" if heading in ("held-out corpus", "SAE", "verdict") else "right")
    for corpus, before, after in rows:
        table.add_row(Text(corpus), "base", *_metric_cells(before["metrics"]))
        table.add_row("", "adapted", *_metric_cells(after["metrics"]))
    Console().print(table)


def _metric_cells(metrics: Mapping[str, Any]) -> list[str]:
    return [
        _number(metrics["ve"]),
        _number(metrics["ve_without_top_sse"].get("0.01")),
        _number(metrics["l0"], 1),
        "not defined" if metrics["dead"] is None else str(metrics["dead"]),
        metrics["verdict"] or "not defined",
    ]


def _print_demo(report: Mapping[str, Any]) -> None:
    base = report["reference"]["metrics"]
    click.echo(
        f"On its own model's held-out text the base SAE has VE {_number(base['ve'])}, L0 {_number(base['l0'], 1)}: "
        f"{base['verdict']}."
    )
    for shift in report["shifts"]:
        _print_before_after(shift["title"], [(r["corpus"], r["before"], r["after"]) for r in shift["rows"]])
        reload, training = shift["reload"], shift["training"]
        same = "the same bits" if reload["identical"] else f"{reload['max_abs_difference']:.1e} off"
        click.echo(
            f"{training['tokens']:,} tokens in {training['seconds']:.0f} s. "
            f"Read back by stock sae_lens in another process: {same}."
        )


def _print_evaluation(result: Mapping[str, Any]) -> None:
    m, corpus = result["metrics"], result["corpus"]
    title = f"{result['sae']['hook_name']} of {result['model']['name']}, {corpus['name']}, {m['n_tokens']:,} tokens"
    trained_on = result["sae"]["trained_on"]
    if trained_on and trained_on != result["model"]["name"]:
        title += f"\nThe SAE was trained on {trained_on}."
    click.echo(title)
    table = Table("figure", "value")
    table.columns[1].justify = "right"
    table.add_row("variance explained", _number(m["ve"]))
    for fraction, ve in m["ve_without_top_sse"].items():
        share = _number(m["sse_share"][fraction])
        table.add_row(f"  without the top {float(fraction):.2%} by SSE (they hold {share})", _number(ve))
    for label, key, digits in (("NMSE", "nmse", 3), ("cosine", "cosine", 3), ("L0", "l0", 1), ("L1", "l1", 1)):
        table.add_row(label, _number(m[key], digits))
    table.add_row("latents that never fired", str(m["dead"]))
    table.add_row("verdict", m["verdict"] or "not defined")
    Console().print(table)
