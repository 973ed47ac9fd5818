"""The model card, written by the program from what it measured.

A card is where a reader learns whether an SAE is good, and where an author is tempted to leave out what went wrong.
Every figure here stands in `result.json` or `cfg.json`; what those do not hold is said to be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.models.loading import MODEL_CLASSES
from sae_lens_gemma4.publishing import caveats, history
from sae_lens_gemma4.publishing.record import CARD_FILENAME, Record, is_on_hub, place, read_records
from sae_lens_gemma4.publishing.round_trip import RoundTrip
from sae_lens_gemma4.report import numbers as n
from sae_lens_gemma4.report.release_table import markdown
from sae_lens_gemma4.report.visible import visible_name

_TAGS = ("sparse-autoencoder", "saelens", "mechanistic-interpretability")
_FRACTION = "0.001"


def model_card(
    folders: Iterable[str | Path],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    round_trip: RoundTrip | None = None,
) -> str:
    """A card for one repository, or one folder, of SAEs.

    Args:
        folders: the SAEs' folders, as a run leaves them.
        repo_id: where they are to be found; None for a card that lies beside the weights.
        license: of the repository, as the hub names it; None is written down as not stated.
        round_trip: what was found when the upload was read back.

    Raises:
        SAEError, ConfigError: as `read_records`; or a licence without a name.
    """
    return write_card(read_records(folders), repo_id, license, round_trip)


def write_cards(folders: Iterable[str | Path], *, license: str | None = None) -> list[Path]:
    """Write a card into each SAE's folder; returns the files. Errors as `model_card`."""
    records = read_records(folders)
    for record in records:
        write_text(write_card([record], None, license, None), record.folder / CARD_FILENAME)
    return [record.folder / CARD_FILENAME for record in records]


def write_card(
    records: Sequence[Record],
    repo_id: str | None,
    license: str | None,
    round_trip: RoundTrip | None,
) -> str:
    if license is not None and not license.strip():
        raise ConfigError("A licence needs a name, such as apache-2.0; leave it out where there is none.")
    sections = {
        "Results": [results_table(records), *caveats.results_notes(records)],
        "Read back": [read_back(round_trip)],
        "Usage": usage(records, repo_id),
        "Training": history.training(records),
        "Incidents": history.incidents(records),
        "Dead latents": history.dead(records),
        "How it was measured": caveats.method(records),
        "Limitations": caveats.limitations(records, round_trip is not None),
        "Licence and lineage": caveats.lineage(records, license),
        "Versions": [caveats.versions(records)],
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    head = "\n\n".join([_front_matter(records, license), f"# {_title(records)}", *_opening(records)])
    return f"{head}\n\n{body}\n"


def results_table(records: Sequence[Record]) -> str:
    """A line for each SAE on each held-out text: before, after with intervals, L0, and the verdict."""
    heads = ["SAE", "held-out text", "VE before", "VE after", "without the top 0.1 % by SSE", "L0 after", "verdict"]
    rows = [
        [
            record.name,
            corpus,
            _figure(record.result["before"].get(corpus), "ve"),
            _figure(after, "ve"),
            _figure(after, "ve_without_top_sse", _FRACTION),
            _figure(after, "l0"),
            _verdict(after),
        ]
        for record in records
        for corpus, after in record.measured
    ]
    return markdown([heads, *([visible_name(cell) for cell in row] for row in rows)]).rstrip()


def _figure(evaluation: dict[str, Any] | None, name: str, at: str | None = None) -> str:
    if evaluation is None:
        return "–"
    write = n.per_token if name == "l0" else n.ve
    value, bounds = evaluation["metrics"][name], ((evaluation["intervals"] or {}).get("figures") or {}).get(name)
    if at is not None:
        value, bounds = value.get(at), (bounds or {}).get(at)
    return f"{write(value)} {n.interval(bounds, write)}" if bounds else write(value)


def _verdict(evaluation: dict[str, Any]) -> str:
    share = (evaluation["intervals"] or {}).get("verdict_share")
    same = "" if share is None else f" ({n.percent(share)} of resamples)"
    return (evaluation["metrics"]["verdict"] or n.NOT_DEFINED) + same


def read_back(round_trip: RoundTrip | None) -> str:
    if round_trip is None:
        return "These files were not read back from a repository and measured again."
    return visible_name(round_trip.sentence)


def usage(records: Sequence[Record], repo_id: str | None) -> list[str]:
    """A snippet that runs, and what it should print."""
    record = records[0]
    corpus, after = next(record.measured)
    model, hook, metadata = record.result["model"], record.result["hook_name"], record.metadata
    name = model["name"] if repo_id is None else place(model["name"])
    inside = f"/{record.name}" if repo_id is not None or len(records) > 1 else ""
    ours = model["class_name"] in MODEL_CLASSES
    quoted = json.dumps
    where = '"."  # this folder' if repo_id is None else f"snapshot_download({quoted(repo_id)})"
    lines = [
        "import torch",
        *(["from huggingface_hub import snapshot_download"] if repo_id else []),
        *(["import sae_lens_gemma4  # gives sae_lens Gemma 4's hook points"] if ours else []),
        "from sae_lens import SAE",
        "from sae_lens.load_model import load_model",
        "",
        f"path = {where}",
        f'sae = SAE.load_from_disk(path + "{inside}")' + _choice(records),
        f'model = load_model({quoted(model["class_name"])}, {quoted(name)}, device="cpu")',
        "",
        'text = open("text.txt", encoding="utf-8").read()  # a few KB of ordinary text',
        f"context = {record.result['data']['context_size']}  # tokens, as in training",
        'tokens = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=context).input_ids',
        "with torch.no_grad():",
        f"    _, cache = model.run_with_cache(tokens, names_filter=[{quoted(hook)}])",
        f"    x = cache[{quoted(hook)}][0].float()",
    ]
    if metadata.get("exclude_special_tokens"):
        lines.append("    x = x[~torch.isin(tokens[0], torch.tensor(model.tokenizer.all_special_ids))]")
    lines += [
        "    acts = sae.encode(x)",
        "    error = (x - sae.decode(acts)).square().sum()",
        "ve = 1 - error / (x - x.mean(0)).square().sum()",
        'print(f"VE {ve:.3f}, L0 {(acts > 0).sum(-1).float().mean():.1f}")',
    ]
    expected = (
        f"On {corpus} {record.name} has VE {n.ve(after['metrics']['ve'])} and L0 "
        f"{n.per_token(after['metrics']['l0'])}; on a short text both scatter."
    )
    return ["```python", *lines, "```", "", visible_name(expected)]


def _choice(records: Sequence[Record]) -> str:
    return f"  # or {', '.join(record.name for record in records[1:])}" if len(records) > 1 else ""


def _title(records: Sequence[Record]) -> str:
    model, hooks = records[0].result["model"]["name"], [record.result["hook_name"] for record in records]
    layers = [layer_of(hook) for hook in hooks]
    known = sorted({layer for layer in layers if layer is not None})
    where = f"layer{'s' * (len(known) > 1)} {', '.join(map(str, known))}" if None not in layers else ", ".join(hooks)
    return visible_name(f"SAE{'s' * (len(records) > 1)} for {place(model)} ({where})")


def _opening(records: Sequence[Record]) -> list[str]:
    """What these are, a line an SAE; then whether they may be called released."""
    heads = ["SAE", "hook point", "architecture", "d_in", "d_sae", "k", "began as"]
    rows = [
        [
            record.name,
            f"`{record.result['hook_name']}`",
            str(record.metadata.get("training_architecture") or record.result["architecture"]),
            *(str(record.result.get(key) or "–") for key in ("d_in", "d_sae", "k")),
            history.base(record.result["base"]),
        ]
        for record in records
    ]
    saved = ", ".join(dict.fromkeys(str(record.cfg.get("architecture")) for record in records))
    return [
        "Sparse autoencoders for sae_lens, trained on this model’s activations. They are saved in the form "
        f"{saved}, in which they were measured.",
        markdown([heads, *([visible_name(cell) for cell in row] for row in rows)]).rstrip(),
        "\n".join(f"- {visible_name(f'{record.name}: {record.gate}')}" for record in records),
    ]


def _front_matter(records: Sequence[Record], license: str | None) -> str:
    model = str(records[0].result["model"]["name"])
    sources = [str(row.get("source") or row.get("dataset")) for r in records for row in r.result["data"]["train"]]
    datasets = sorted({source for source in sources if is_on_hub(source)})
    facts: dict[str, Any] = {
        **({"base_model": model} if is_on_hub(model) else {}),
        **({"datasets": datasets} if datasets else {}),
        "library_name": "saelens",
        **({"license": license.strip()} if license else {}),
        "tags": list(_TAGS) + ["gemma-4"] * bool(re.search(r"gemma-?4", model, re.IGNORECASE)),
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"
