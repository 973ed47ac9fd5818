"""`demo` and `train`: the commands that train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.cli.planning import print_plan
from sae_lens_gemma4.cli.printing import make_folder, number, print_before_after
from sae_lens_gemma4.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_gemma4.training.config import ContinueTrainingConfig

GATE_FAILED = 3
"""Exit code of a run that ended well and whose gate does not hold."""


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
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: training.phases.0.lr=1e-4."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of a run that was stopped.")
@click.option("--replace", is_flag=True, help="Begin anew where the output folder holds a run.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what the run will take, and stop.")
@click.option("--push", metavar="REPO_ID", help="Upload what passed its gate, download it again and measure it there.")
def train(recipe: Path, changes: tuple[str, ...], resume: bool, replace: bool, dry_run: bool, push: str | None) -> None:
    """Train SAEs as RECIPE says: a published one on, or a new one.

    A recipe is YAML; docs/recipes.md has its keys, recipes/ has examples. Ends with exit code 3 if an SAE was trained
    and saved and its gate does not hold.
    """
    from sae_lens_gemma4.mapping import from_mapping, read_yaml
    from sae_lens_gemma4.training.config import ContinueTrainingConfig
    from sae_lens_gemma4.training.parallel import leads

    if resume and replace:
        raise ConfigError("--resume goes on with a run and --replace removes it: choose one.")
    data = read_yaml(recipe, "recipe")
    for change in changes:
        set_key(data, change)
    cfg = from_mapping(ContinueTrainingConfig, data, "recipe")
    from sae_lens_gemma4.training.runner import ContinueTrainingRunner  # slow; after what can be wrong in the recipe

    if push is not None:
        check_push(cfg, push)
    runner = ContinueTrainingRunner(cfg)
    if dry_run:
        from sae_lens_gemma4.training.planning import plan

        if leads():
            print_plan(plan(runner.prepare()))
        return
    try:
        result = runner.run(resume=resume, replace=replace)
    except KeyboardInterrupt:
        click.echo(
            f"\nStopped. What was reached is in {cfg.output}; --resume goes on from its last checkpoint.", err=True
        )
        raise
    if not leads():
        return
    from sae_lens_gemma4.publishing.card import write_cards
    from sae_lens_gemma4.publishing.push import push as push_run

    folders = [sae.path for sae in result.saes.values()]
    write_cards(folders)
    for name, sae in result.saes.items():
        rows = [(n, sae.before[n].to_dict() if n in sae.before else None, e.to_dict()) for n, e in sae.after.items()]
        print_before_after(f"{name} on {cfg.model.name}", rows)
        click.echo(f"{sae.path}: {sae.gate.sentence if sae.gate else 'no gate was asked for.'}")
    passed = [sae.path for sae in result.saes.values() if sae.gate is not None and sae.gate.passed]
    if push is not None and passed:
        a = cfg.activations
        found = push_run(passed, push, model=result.model, corpora=result.heldout, batch_blocks=a.batch_blocks)
        click.echo(f"{found.sentence}\nhttps://huggingface.co/{push}")
    if not result.passed:
        raise click.exceptions.Exit(GATE_FAILED)


def check_push(cfg: ContinueTrainingConfig, repo_id: str) -> None:
    """Raise `ConfigError` where an upload is refused however the training ends."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise ConfigError(f"--push {repo_id}: {e}") from e
    if ungated := [run.name for run in cfg.runs() if run.gate is None]:
        raise ConfigError(f"--push uploads what passes its gate, and {', '.join(ungated)} would have none.")


def set_key(data: Any, change: str) -> None:
    """Put the value of `a.b.0.c=value` into plain data, the value read as YAML; what is not there yet is made."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set takes KEY=VALUE, as training.phases.0.lr=1e-4, not {change!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"The value of --set {path} is not YAML: {text!r}.") from e
    *parents, last = path.split(".")
    for key in parents:
        data = _entry(data, key, path)
    if isinstance(data, list):
        data[_index(data, last, path)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise ConfigError(f"--set {path}: the recipe has no mapping or list there.")


def _entry(data: Any, key: str, path: str) -> Any:
    if isinstance(data, list):
        return data[_index(data, key, path)]
    if not isinstance(data, dict):
        raise ConfigError(f"--set {path}: the recipe has no mapping or list at {key!r}.")
    if data.get(key) is None:
        data[key] = {}
    return data[key]


def _index(data: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(data):
        raise ConfigError(f"--set {path}: {key!r} is no entry of a list of {len(data)}; they are counted from 0.")
    return int(key)


def _print_demo(report: Mapping[str, Any]) -> None:
    from sae_lens_gemma4.report.words import calibration_sentence

    base = report["reference"]["metrics"]
    click.echo(
        f"On its own model's held-out text the base SAE has VE {number(base['ve'])}, L0 {number(base['l0'], 1)}: "
        f"{base['verdict']}."
    )
    for shift in report["shifts"]:
        print_before_after(shift["title"], [(r["corpus"], r["before"], r["after"]) for r in shift["rows"]])
        reload, training = shift["reload"], shift["training"]
        for sentence in calibration_sentence(training["calibration"]):
            click.echo(sentence)
        same = "the same bits" if reload["identical"] else f"{reload['max_abs_difference']:.1e} off"
        click.echo(
            f"{training['tokens']:,} tokens in {training['seconds']:.0f} s. "
            f"Read back by stock sae_lens in another process: {same}."
        )
