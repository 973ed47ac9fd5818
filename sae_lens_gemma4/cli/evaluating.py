"""`evaluate`: SAEs on a model, alone or against others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.cli.printing import make_folder, print_evaluation, print_release_table
from sae_lens_gemma4.errors import ConfigError

_FILES, _TABLE = ("report.json", "report.html"), "table.md"


@dataclass(frozen=True)
class Place:
    """Where an SAE is: a release and an id of it, or a path."""

    release_or_path: str
    sae_id: str | None = None

    @property
    def name(self) -> str:
        return self.sae_id or Path(self.release_or_path).name

    def source(self) -> dict[str, Any]:
        if self.sae_id is None:
            return {"path": self.release_or_path}
        return {"release": self.release_or_path, "sae_id": self.sae_id}


@dataclass(frozen=True)
class Text:
    """What to measure on, as the command line says it."""

    protocol: str | None
    replaced: Mapping[str, str]
    corpus: str | None
    split: str
    context_size: int | None
    tokens: int | None

    def __post_init__(self) -> None:
        if self.corpus is not None and (self.protocol is not None or self.replaced):
            raise ConfigError("Measure on a --protocol, whose splits --source replaces, or on a --corpus: not on both.")
        given = {"--split": self.split != "train", "--context-size": self.context_size, "--tokens": self.tokens}
        wrong = [name for name, value in given.items() if value]
        if wrong and self.corpus is None:
            raise ConfigError(
                f"{', '.join(wrong)} need --corpus: a protocol states them. It may be a .yaml file of yours."
            )

    def load(self) -> Any:
        """The protocol, or None for a corpus."""
        from sae_lens_gemma4.evaluation.protocol import load_protocol

        return None if self.corpus is not None else load_protocol(self.protocol or "quick")

    def corpora(self, protocol: Any, tokenizer: Any, saes: Mapping[str, Any]) -> dict[str, Any]:
        if protocol is not None:
            return dict(protocol.corpora(tokenizer, sources=self.replaced))
        from sae_lens_gemma4.activations.corpus import build_corpus

        contexts = [sae.cfg.metadata.context_size or 0 for sae in saes.values()]
        context = self.context_size or max(contexts) or 1024
        built = build_corpus(self.corpus, tokenizer, context_size=context, split=self.split, max_tokens=self.tokens)
        return {built.name: built}


@cli.command()
@click.argument("release_or_path")
@click.argument("sae_ids", nargs=-1, metavar="[SAE_ID]...")
@click.option("--model", "model_name", required=True, help="Name or path of the model.")
@click.option("--model-class", default="Gemma4ProxyLM", show_default=True)
@click.option("--against", nargs=2, multiple=True, metavar="RELEASE SAE_ID",
              help="An SAE to compare with; once for all, or once for each SAE_ID, in their order.")  # fmt: skip
@click.option("--against-path", multiple=True, metavar="PATH", help="The same, for a folder or file.")
@click.option("--base-model", help="With --against: measure both on this model, too, to see what was forgotten.")
@click.option("--protocol", "protocol_name", help="quick (the default), seed-262k, short-clean, or a YAML file.")
@click.option("--source", "replaced", multiple=True, metavar="SPLIT=PATH",
              help="Read a split of the protocol from a local file or folder.")  # fmt: skip
@click.option("--corpus", help="In place of a protocol: a dataset's name or path, embedded:text or embedded:chat.")
@click.option("--split", default="train", show_default=True, help="Split of the corpus, as datasets writes it.")
@click.option("--context-size", type=click.IntRange(min=2), help="Tokens a block. [default: the SAE's own]")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of the corpus to measure. [default: all]")
@click.option("--downstream-tokens", type=click.IntRange(min=0),
              help="Tokens to measure CE and KL on. [default: the protocol's, or 0]")  # fmt: skip
@click.option("--resamples", type=click.IntRange(min=0), help="Draws behind the intervals. [default: 1000]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of those draws. [default: 0]")
@click.option("--isolate-documents", is_flag=True, help="Documents packed into one block do not see each other.")
@click.option("--batch-blocks", type=click.IntRange(min=1), default=16, show_default=True, help="Blocks a forward.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", help="The model's, as float32 or bfloat16. [default: the checkpoint's]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.json and report.html here.")
def evaluate(
    release_or_path: str,
    sae_ids: tuple[str, ...],
    model_name: str,
    model_class: str,
    against: tuple[tuple[str, str], ...],
    against_path: tuple[str, ...],
    base_model: str | None,
    protocol_name: str | None,
    replaced: tuple[str, ...],
    corpus: str | None,
    split: str,
    context_size: int | None,
    tokens: int | None,
    downstream_tokens: int | None,
    resamples: int | None,
    seed: int | None,
    isolate_documents: bool,
    batch_blocks: int,
    device: str,
    dtype: str | None,
    out: Path | None,
) -> None:
    """Measure SAEs on a model, alone or against others on the same tokens.

    SAEs are a release and ids of it, or a folder or weights file in any form of docs/releases.md. All are measured
    in one forward pass. docs/evaluation.md says what the figures mean.
    """
    text = Text(protocol_name, _replaced(replaced), corpus, split, context_size, tokens)
    places = [Place(release_or_path, sae_id) for sae_id in sae_ids] or [Place(release_or_path)]
    others = [*(Place(*pair) for pair in against), *map(Place, against_path)]
    if len({place.name for place in places}) < len(places):
        raise ConfigError("An SAE is named twice; each is measured once.")
    if len(others) not in (0, 1, len(places)):
        raise ConfigError(f"{len(places)} SAEs and {len(others)} to compare with: give one for all, or one for each.")
    if base_model is not None and not others:
        raise ConfigError("--base-model needs --against: what is forgotten is seen against the SAE that knew it.")
    if out is not None:
        make_folder(out, *_FILES, _TABLE)

    from sae_lens_gemma4.evaluation.intervals import Sampling  # slow ones, after what can be wrong above
    from sae_lens_gemma4.models.loading import load_for_sae_lens
    from sae_lens_gemma4.training.config import Model
    from sae_lens_gemma4.training.restore import load_sae

    protocol = text.load()
    wanted = Model(name=model_name, class_name=model_class, device=device, dtype=dtype)
    saes = {place.name: load_sae(place.release_or_path, place.sae_id, device=device) for place in places}
    pairs = dict(zip(saes, others * len(places) if len(others) == 1 else others, strict=False))
    befores = {name: load_sae(place.release_or_path, place.sae_id, device=device) for name, place in pairs.items()}

    def load(name: str) -> Any:
        return load_for_sae_lens(model_class, name, device, {"dtype": wanted.dtype} if dtype else None)

    default = Sampling(protocol.bootstrap_resamples, protocol.bootstrap_seed) if protocol else Sampling()
    if downstream_tokens is None:
        downstream_tokens = protocol.downstream_tokens if protocol else 0
    settings: dict[str, Any] = {
        "batch_blocks": batch_blocks,
        "isolate_documents": isolate_documents,
        "downstream_tokens": downstream_tokens,
        "protocol": protocol.name if protocol else None,
        "sampling": Sampling(
            default.resamples if resamples is None else resamples, default.seed if seed is None else seed
        ),
    }
    sources = {place.name: place.source() for place in places}
    model = load(model_name)
    base = None if base_model is None else load(base_model)  # with the first: a slip in its name costs no measurement
    corpora = text.corpora(protocol, model.tokenizer, saes)
    if not others:
        _alone(saes, model, corpora, {**settings, "sources": sources}, out)
        return
    settings |= {"sources_before": {name: place.source() for name, place in pairs.items()}, "sources_after": sources}
    runs = [("rows", model, corpora)]
    if base is not None:
        same = _same_tokens(model, base)
        runs.append(("forgetting", base, corpora if same else text.corpora(protocol, base.tokenizer, saes)))
    _compare(befores, saes, runs, settings, f"{model_name}, {protocol.name if protocol else corpus}", out)


def _alone(
    saes: Mapping[str, Any], model: Any, corpora: Mapping[str, Any], settings: Mapping[str, Any], out: Path | None
) -> None:
    """Measure and print, corpus by corpus; what one gives is written before the next begins."""
    from sae_lens_gemma4.evaluation.evaluate import evaluate_saes

    several = len(saes) * len(corpora) > 1
    folders = {
        (name, corpus): out / _file_name(name) / _file_name(corpus) if several else out
        for name in saes
        for corpus in corpora
        if out is not None
    }
    for folder in folders.values():
        make_folder(folder, *_FILES)
    for corpus_name, corpus in corpora.items():
        for name, result in evaluate_saes(saes, model, corpus, **settings).items():
            print_evaluation(result.to_dict())
            if folders:
                _write(result, folders[name, corpus_name])
                _say(folders[name, corpus_name])


def _compare(
    befores: Mapping[str, Any],
    saes: Mapping[str, Any],
    runs: Sequence[tuple[str, Any, Mapping[str, Any]]],
    settings: Mapping[str, Any],
    title: str,
    out: Path | None,
) -> None:
    """Compare on each model, corpus by corpus; the report is written anew after each, with all there is so far."""
    from sae_lens_gemma4.evaluation.compare import Comparison, ComparisonReport, compare_saes
    from sae_lens_gemma4.evaluation.result import write_text
    from sae_lens_gemma4.report.release_table import markdown, release_table

    measured: dict[str, list[Comparison]] = {"rows": [], "forgetting": []}
    report = ComparisonReport(**measured)
    for part, model, corpora in runs:
        for name, corpus in corpora.items():
            measured[part] += compare_saes(befores, saes, model, {name: corpus}, **settings)
            if out is not None:
                _write(report, out)
                write_text(markdown(release_table(report.to_dict()["rows"])), out / _TABLE)
    document = report.to_dict()
    print_release_table(title, document["rows"])
    if report.forgetting:
        forgotten_by = report.forgetting[0].after.model["name"]
        print_release_table(f"{forgotten_by}: what was forgotten", document["forgetting"])
    if out is not None:
        _say(out)
        click.echo(out / _TABLE)


def _same_tokens(model: Any, other: Any) -> bool:
    from sae_lens_gemma4.activations.vocabulary import tokenizer_fingerprint

    return tokenizer_fingerprint(model.tokenizer) == tokenizer_fingerprint(other.tokenizer)


def _replaced(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise ConfigError(f"--source takes SPLIT=PATH, not {name + equals + path!r}.")
    return {name: path for name, _, path in pairs}


def _file_name(name: str) -> str:
    """A name of anything as one of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def _write(result: Any, folder: Path) -> None:
    result.to_json(folder / _FILES[0])
    result.to_html(folder / _FILES[1])


def _say(folder: Path) -> None:
    click.echo("\n" + "\n".join(str(folder / name) for name in reversed(_FILES)))
