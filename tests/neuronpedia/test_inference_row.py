"""Neuronpedia's inference server finds an SAE in sae_lens's own directory, by model and id, and wants just one."""

import pandas as pd
import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import sae_lens_gemma4 as g4

MODELS = {"gemma-4-e2b": "google/gemma-4-E2B", "gemma-4-e4b": "google/gemma-4-E4B", "gemma-4-31b": "google/gemma-4-31B"}
"""Neuronpedia's np_model_to_hf.json."""
IN_USE = {
    "gemma-4-e2b/17-matryoshka-res-65k": ("gemma-4-e2b-res-matryoshka-decoderesearch", "layer_17_width_65k_l0_100"),
    "gemma-4-e4b/21-matryoshka-res-65k": ("gemma-4-e4b-res-matryoshka-decoderesearch", "layer_21_width_65k_l0_100"),
    "gemma-4-31b/30-res-matryoshka-131k": ("gemma-4-31b-res-matryoshka-decoderesearch", "layer_30_width_131k_l0_100"),
}


@pytest.mark.parametrize("name", IN_USE)
def test_every_id_in_use_is_found_once_in_the_directory_with_this_package(name):
    """As `get_sae_lens_ids_from_neuronpedia_id` of apps/inference does, on a table of the same columns."""
    model_id, _, source = name.partition("/")
    rows = [
        (entry.model, entry.release, sae_id, neuronpedia)
        for entry in get_pretrained_saes_directory().values()
        for sae_id, neuronpedia in entry.neuronpedia_id.items()
    ]
    table = pd.DataFrame(rows, columns=["model", "release", "sae_lens_id", "neuronpedia_id"])
    mine = table[(table.model == MODELS[model_id]) & table.neuronpedia_id.str.endswith(f"/{source}", na=False)]
    assert [tuple(row) for row in mine[["release", "sae_lens_id"]].values] == [IN_USE[name]]


def test_ids_in_use_are_all_that_the_catalogue_states():
    stated = {sae.neuronpedia for release in g4.releases().values() for sae in release.saes if sae.neuronpedia}
    assert stated == set(IN_USE)
