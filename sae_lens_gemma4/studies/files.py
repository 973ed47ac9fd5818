"""The files that a labelling study leaves: the labels in this package's form and in others', and a card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.interp.labels.card import LabelCard, Measured
from sae_lens_gemma4.interp.labels.files import write_labels
from sae_lens_gemma4.interp.labels.forms import to_adam1010, to_title_description
from sae_lens_gemma4.interp.means import Mean
from sae_lens_gemma4.models.hook_names import layer_of

if TYPE_CHECKING:
    from sae_lens_gemma4.studies.labels import LabelStudy
    from sae_lens_gemma4.studies.line import Findings

LABELS = "labels"
ADAM1010, TITLE_DESCRIPTION = "sae_features.json", "feature_labels.json"
"""Named as the authors of these forms name them, but for the model's name before the first."""
MADE = "made.json"
"""What the labels were made from, so that a later test keeps those documents apart."""
_NOT_STATED = (
    "Whether the labels hold on other text than this.",
    "Causal effects: nothing was steered or ablated to make these labels.",
)


def write_files(study: LabelStudy, folder: Path, facts: Mapping[str, Any], found: Findings) -> dict[str, str]:
    """Write `labels/`, and say what is in it, by form.

    Raises:
        ConfigError: it cannot be written.
        DataError: there are no labels.
    """
    sae, model, corpus = facts["sae"], facts["model"], facts["corpus"]
    e = study.examples
    name = sae.get("sae_id") or Path(str(sae.get("path") or sae["hook_name"])).name
    card = LabelCard(
        title=f"Labels of {name} on {model['name']}",
        license=study.licence,
        facts={
            "Model": f"{model['name']} ({model['dtype']}, fingerprint {model['fingerprint']})",
            "SAE": ", ".join(str(sae[k]) for k in ("release", "sae_id", "path", "hash") if sae.get(k)),
            "Hook": sae["hook_name"],
            "Text": f"{corpus['name']}, {corpus['tokens']:,} tokens, hash {corpus['hash']}",
            "Judges": ", ".join(found.labelled.judges),
            "Labelled from": f"up to {e.n_top} strongest contexts and {e.n_quantile} from equal intervals",
            "Tested on": f"up to {e.n_positive} contexts where a latent fires and {e.n_negative} where it does not, of "
            f"other documents (shares {e.labelling:g}, {e.held_out:g}, {e.calibration:g}; seed {e.seed})",
            "Confirmed": f"one-sided Fisher's exact test of where the label applies, p ≤ {study.verification.alpha:g}",
            "Selection": f"{study.selection.rule}, seed {study.selection.seed}",
        },
        measured=list(_measured(found)),
        not_stated=_NOT_STATED,
    )
    place = folder / LABELS
    written = write_labels(found.labels, place, card)
    _write({"corpus": corpus["hash"], "examples": asdict(study.examples)}, place / MADE)
    files = {"jsonl": written.jsonl, "parquet": written.parquet, "card": written.card}
    if (layer := layer_of(sae["hook_name"])) is not None:
        files["adam1010"] = place / ADAM1010
        _write(to_adam1010(found.labels, layer), place / ADAM1010)
    files["title_description"] = place / TITLE_DESCRIPTION
    _write(to_title_description(found.labels), place / TITLE_DESCRIPTION)
    return {form: file.relative_to(folder).as_posix() for form, file in files.items()}


def _measured(found: Findings) -> Iterator[Measured]:
    for judge, tested in found.verification.by_judge.items():
        floor = tested.floor
        by = f"labels by {judge}, tested by {tested.scorer}"
        yield Measured.of_shares(
            f"Share confirmed on held-out contexts, {by}",
            tested.confirmed,
            None if floor is None else floor.confirmed,
            "control: the labels dealt out anew among the latents",
        )
        yield _of_means(f"F1 of detection, {by}", tested.f1, None if floor is None else floor.f1)
    if found.agreed is not None:
        yield _of_means("Cohen's κ of the two labels", found.agreed.kappa, found.agreed.floor_kappa)
    mean, floor = found.scores_record["mean"], found.scores_record["floor"]
    if mean["value"] is not None:
        dealt = None if floor is None else Mean(**floor["mean"])
        yield _of_means("Mean confidence", Mean(**mean), dealt, "control: the score of labels dealt out anew")
    if found.probing is not None and not isinstance(found.probing, str):
        means = found.probing.means
        yield _of_means(
            "Accuracy of linear probes",
            means["probe"]["accuracy"],
            means["shuffled"]["accuracy"],
            "control: shuffled labels; near 1 is expected whatever the label says",
        )


def _of_means(name: str, found: Mean, control: Mean | None, note: str = "") -> Measured:
    other = control or Mean(None, None, None, 0)
    return Measured(name, found.value, found.low, found.high, other.value, other.low, other.high, found.n, note)


def _write(document: Any, path: Path) -> None:
    write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)
