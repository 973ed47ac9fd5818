"""Labels in the forms that other authors' readers take, as plain data for `write_json`.

Each form holds less than a `FeatureLabel`; what it has no place for is left out, and `labels.jsonl` has it all. What is
written is read back by the catalogue's own parser of that form. Who stated a label is written under a key of its own
where the author's form takes it for granted, so that no one's label passes for Claude's or GPT-4's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sae_lens_gemma4.catalogue.label_records import FeatureLabel
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.labels.rows import row_of


def to_adam1010(labels: Iterable[FeatureLabel], layer: int) -> list[dict[str, Any]]:
    """One layer's records of Adam1010/gemma-4-31b-sae-features: `claude_label` is the label, `gpt_label` the first of
    the alternatives, facts are the other keys.

    Left out: descriptions, further alternatives, and of examples all but activation, place and text. Where others than
    "claude" and "gpt" stated the labels, `claude_label_source` and `gpt_label_source` say who.

    Raises:
        DataError: two labels of one latent, a value that cannot be written, or a fact with a key of the form.
    """
    records = []
    for row in _rows(labels):
        record: dict[str, Any] = {
            "feature_id": row["index"],
            "layer": layer,
            "claude_label": row["label"],
            "claude_category": row["category"],
        }
        if row["source"] != "claude":
            record["claude_label_source"] = row["source"]
        for other in row["alternatives"][:1]:
            record["gpt_label"] = other["text"]
            if other["source"] != "gpt":
                record["gpt_label_source"] = other["source"]
        record["examples"] = [
            {"activation": e["activation"], "token_idx": e["token_index"], "context": _shown(e)}
            for e in row["examples"]
        ]
        record["confidence"] = row["confidence"]
        records.append(_with_facts(row, record, {"gpt_label", "claude_label_source", "gpt_label_source"}))
    return records


def to_title_description(labels: Iterable[FeatureLabel]) -> dict[str, dict[str, Any]]:
    """The object of uzaymacar/gemma-3-27b-saes' `feature_labels.json`: title and description by index, and facts.

    Examples are texts, or tokens where there is no text. Left out: categories, confidences, alternatives, activations.
    Where another than "GPT-4" stated the label, `source` says who.

    Raises:
        DataError: as `to_adam1010`.
    """
    found = {}
    for row in _rows(labels):
        record: dict[str, Any] = {"title": row["label"], "description": row["description"]}
        if row["source"] != "GPT-4":
            record["source"] = row["source"]
        shown = [e["tokens"] if e["text"] is None else e["text"] for e in row["examples"]]
        record["examples"] = [one for one in shown if one is not None]
        found[str(row["index"])] = _with_facts(row, record, {"source"})
    return found


def to_feature_map(labels: Iterable[FeatureLabel], *, d_sae: int, sae_path: str = "") -> dict[str, Any]:
    """MettaMazza/gemma4-sae's `feature_map.json`, as probe.rs of github.com/MettaMazza/ErnOSAgent reads it: label,
    category and confidence, all of them required there, by latent.

    `dict_index` is a place in that author's list of concepts: a fact of that name, else a number in order. Left out:
    descriptions, alternatives, examples. Where another than "automated probing" stated the label, `source` says who.

    Args:
        d_sae: latents of the SAE.
        sae_path: where its weights are.

    Raises:
        DataError: as `to_adam1010`; or a latent that has no label, category or confidence, or is none of the SAE's.
    """
    mappings = {}
    for n, row in enumerate(_rows(labels)):
        for key in ("label", "category", "confidence"):
            if row[key] is None:
                raise DataError(f"Latent {row['index']} has no {key}, which a feature map must state. Leave it out.")
        if row["index"] >= d_sae:
            raise DataError(f"There is no latent {row['index']} in an SAE of {d_sae}.")
        record: dict[str, Any] = {"sae_index": row["index"]}
        record |= {key: row[key] for key in ("label", "category", "confidence")}
        if row["source"] != "automated probing":
            record["source"] = row["source"]
        mapping = _with_facts(row, record, {"source"})
        mappings[str(row["index"])] = {"dict_index": n, **mapping}
    return {
        "version": 1,
        "sae_path": sae_path,
        "total_sae_features": d_sae,
        "mapped_count": len(mappings),
        "mappings": mappings,
    }


def _rows(labels: Iterable[FeatureLabel]) -> Iterator[dict[str, Any]]:
    seen = set()
    for label in labels:
        row = row_of(label)
        if row["index"] in seen:
            raise DataError(f"There are two labels of latent {row['index']}.")
        seen.add(row["index"])
        yield row


def _with_facts(row: dict[str, Any], record: dict[str, Any], reserved: set[str]) -> dict[str, Any]:
    facts = json.loads(row["facts"])
    if taken := sorted(facts.keys() & (record.keys() | reserved)):
        raise DataError(f"Latent {row['index']} has a fact {taken[0]!r}, a key that means another thing in this form.")
    return {**record, **facts}


def _shown(example: dict[str, Any]) -> str | None:
    text: str | None = example["text"]
    return "".join(example["tokens"]) if text is None and example["tokens"] is not None else text
