"""The rows of Neuronpedia's tables, column by column, from dashboards and what a `Listing` says of an SAE.

Two of the import's rules shape them (apps/webapp/app/api/admin/import/route.ts and lib/db/import.ts of
github.com/hijohnnylin/neuronpedia at ebb8426f). Rows of release, model, set and source go through Prisma, which refuses
a key that is no column, and are left alone where they exist. Of features, activations and explanations the first line
of a file names the columns for all others, so all rows of a kind have the same keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.neuronpedia.cells import Cell, floats, integer, integers, number, perhaps, put, text, tokens
from sae_lens_gemma4.neuronpedia.explanations import Explanation
from sae_lens_gemma4.neuronpedia.folder import Feature
from sae_lens_gemma4.neuronpedia.listing import Listing

Row = dict[str, Any]

STATISTICS: dict[str, Cell] = {
    "neuron_alignment_indices": integers,
    "neuron_alignment_values": floats,
    "neuron_alignment_l1": floats,
    "correlated_neurons_indices": integers,
    "correlated_neurons_pearson": floats,
    "correlated_neurons_l1": floats,
    "correlated_features_indices": integers,
    "correlated_features_pearson": floats,
    "correlated_features_l1": floats,
    "neg_str": tokens,
    "neg_values": floats,
    "pos_str": tokens,
    "pos_values": floats,
    "freq_hist_data_bar_heights": floats,
    "freq_hist_data_bar_values": floats,
    "logits_hist_data_bar_heights": floats,
    "logits_hist_data_bar_values": floats,
    "decoder_weights_dist": floats,
}
"""Columns of a feature that are a dashboard's own entries; one that a dashboard lacks is an empty list."""
_ALIKE = (
    ("neg_str", "neg_values"),
    ("pos_str", "pos_values"),
    ("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    ("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
)
"""What the site draws side by side."""
_EXAMPLE: dict[str, tuple[str, Cell]] = {
    "tokens": ("tokens", tokens),
    "values": ("values", floats),
    "dfaValues": ("dfa_values", floats),
    "dfaTargetIndex": ("dfa_targetIndex", perhaps(integer)),
    "dfaMaxValue": ("dfa_maxValue", perhaps(number)),
    "lossValues": ("loss_values", floats),
    "logitContributions": ("logit_contributions", perhaps(text)),
    "binMin": ("bin_min", perhaps(number)),
    "binMax": ("bin_max", perhaps(number)),
    "binContains": ("bin_contains", perhaps(number)),
    "qualifyingTokenIndex": ("qualifying_token_index", perhaps(integer)),
}
"""Columns of an activation that are an example's entries, by their names there."""
_SHOWN_CONFIG = ("hook_name", "context_size", "dataset_path", "prepend_bos", "model_name")
_DEFAULT_STRENGTH = 10
"""The column's own default."""


def release_row(listing: Listing) -> Row:
    """Without a default set or source: the site takes the first, and a release may have others."""
    return {
        "name": listing.release_name,
        "description": listing.release_title,
        "descriptionShort": listing.release_title,
        "urls": list(listing.urls),
        "creatorName": listing.creator_name,
        "creatorNameShort": listing.creator_name,
        "creatorEmail": listing.creator_email,
        "creatorId": listing.creator_id,
        "visibility": listing.visibility,
        "isNewUi": False,
        "featured": False,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "defaultUmapSourceIds": [],
        "createdAt": listing.created_at,
    }


def model_row(listing: Listing) -> Row:
    """The default source is left empty: it would refer to rows that are imported after this one."""
    short = listing.model_name.rstrip("/").rpartition("/")[2]
    return {
        "id": listing.name.model_id,
        "displayName": short,
        "displayNameShort": short,
        "instruct": listing.name.model_id.endswith("-it"),
        "layers": listing.n_layers,
        "neuronsPerLayer": listing.d_mlp,
        "dimension": listing.d_model,
        "owner": listing.owner,
        "website": listing.website,
        "tlensId": listing.model_name,
        "creatorId": listing.creator_id,
        "visibility": listing.visibility,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "inferenceEnabled": False,
        "createdAt": listing.created_at,
        "updatedAt": listing.created_at,
    }


def sourceset_row(listing: Listing) -> Row:
    return {
        "modelId": listing.name.model_id,
        "name": listing.name.set_name,
        "description": listing.description,
        "type": "",
        "creatorName": listing.creator_name,
        "creatorEmail": listing.creator_email,
        "creatorId": listing.creator_id,
        "urls": list(listing.urls),
        "releaseName": listing.release_name,
        "visibility": listing.visibility,
        "hasDashboards": True,
        "allowInferenceSearch": True,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
        "createdAt": listing.created_at,
    }


def source_row(listing: Listing) -> Row:
    """The SAE's config is whole; what the site shows of its metadata stands at its top, too, where it looks for it."""
    metadata = listing.sae_config.get("metadata") or {}
    shown = {key: metadata[key] for key in _SHOWN_CONFIG if metadata.get(key) is not None}
    return {
        "id": listing.name.source_id,
        "modelId": listing.name.model_id,
        "setName": listing.name.set_name,
        "creatorId": listing.creator_id,
        "visibility": listing.visibility,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "saelensConfig": {**shown, **listing.sae_config},
        "saelensRelease": listing.release,
        "saelensSaeId": listing.sae_id,
        "hfRepoId": listing.hf_repo_id,
        "hfFolderId": listing.hf_folder_id,
        "num_prompts": put("The dashboards", "n_prompts_total", perhaps(integer), listing.n_prompts),
        "num_tokens_in_prompt": put(
            "The dashboards", "n_tokens_in_prompt", perhaps(integer), listing.n_tokens_in_prompt
        ),
        "dataset": put("The dashboards", "dataset", perhaps(text), listing.dataset),
        "notes": listing.notes,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "createdAt": listing.created_at,
    }


def feature_row(
    listing: Listing, index: int, feature: Feature | None, activations: Sequence[Row], nearest: Sequence[list[Any]]
) -> Row:
    """A row of table Neuron. The weights stay on the hub: a feature with a vector would be steered by that alone.

    Args:
        feature: its dashboard; None of a latent that never fired.
        activations: its `activation_rows`.
        nearest: indices and cosines of the latents most like it.

    Raises:
        DataError: names the latent and the column that cannot be written; or it fires and has no example.
    """
    where, found = f"Latent {index}", feature or {}
    if feature is not None and feature.get("frac_nonzero") is None:
        raise DataError(f"{where}: its dashboard has no frac_nonzero, the fraction of tokens on which it fires.")
    frac_nonzero = put(where, "frac_nonzero", number, found.get("frac_nonzero", 0))
    if frac_nonzero and not activations:
        raise DataError(f"{where} fires on {100 * frac_nonzero:.3g}% of tokens and has no example.")
    most = max((activation["maxValue"] for activation in activations), default=0)
    vector = put(where, "vector", floats, found.get("vector"))
    statistics = {name: put(where, name, kind, found.get(name)) for name, kind in STATISTICS.items()}
    for one, other in _ALIKE:
        if len(statistics[one]) != len(statistics[other]):
            raise DataError(f"{where}: {one} has {len(statistics[one])} entries, and {other} {len(statistics[other])}.")
    return {
        "modelId": listing.name.model_id,
        "layer": listing.name.source_id,
        "index": str(index),
        "sourceSetName": listing.name.set_name,
        "creatorId": listing.creator_id,
        "createdAt": listing.created_at,
        "maxActApprox": most,
        "hasVector": bool(vector),
        "vector": vector,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": most or _DEFAULT_STRENGTH,
        "hookName": listing.hook_name,
        "topkCosSimIndices": put(where, "nearest indices", integers, nearest[0]),
        "topkCosSimValues": put(where, "nearest cosines", floats, nearest[1]),
        "frac_nonzero": frac_nonzero,
        **statistics,
    }


def activation_rows(listing: Listing, index: int, feature: Feature) -> list[Row]:
    """Rows of table Activation: a dashboard's examples, in its order.

    Ids are made of the source, the latent and the place, so that a second import finds them there.

    Raises:
        DataError: names the latent, the example and the column that cannot be written.
    """
    rows = []
    for place, example in enumerate(put(f"Latent {index}", "activations", _examples, feature.get("activations"))):
        where = f"Latent {index}, example {place}"
        entries = {name: put(where, key, kind, example.get(key)) for name, (key, kind) in _EXAMPLE.items()}
        values = entries["values"]
        if not values or len(values) != len(entries["tokens"]):
            raise DataError(f"{where} has {len(entries['tokens'])} tokens, and values of {len(values)}.")
        most = max(values)
        rows.append(
            {
                "id": row_id("activation", listing.name, index, place),
                "modelId": listing.name.model_id,
                "layer": listing.name.source_id,
                "index": str(index),
                "creatorId": listing.creator_id,
                "createdAt": listing.created_at,
                "maxValue": most,
                "maxValueTokenIndex": values.index(most),
                "minValue": min(values),
                "dataIndex": None,
                "dataSource": None,
                **entries,
            }
        )
    return rows


def explanation_rows(listing: Listing, index: int, explanations: list[Explanation]) -> list[Row]:
    """Rows of table Explanation, without embeddings, which the site computes with a model of its own."""
    return [
        {
            "id": row_id("explanation", listing.name, index, e.text, e.type_name, e.model_name, e.notes),
            "modelId": listing.name.model_id,
            "layer": listing.name.source_id,
            "index": str(index),
            "description": e.text,
            "authorId": listing.creator_id,
            "typeName": e.type_name,
            "explanationModelName": e.model_name,
            "notes": e.notes,
            "createdAt": listing.created_at,
        }
        for e in explanations
    ]


def row_id(*parts: object) -> str:
    """An id of the form and length of a cuid, c and 24 digits, the same for the same parts."""
    return "c" + hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:24]


def _examples(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(example, dict) for example in value):
        raise ValueError("is no list of examples")
    return value
