"""Releases of the catalogue against small repositories in the layout that their authors chose."""

import io
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from sae_lens_gemma4.catalogue import registry
from sae_lens_gemma4.catalogue.verify import Difference, together, verify
from sae_lens_gemma4.errors import HubError, UnknownNameError
from tests.catalogue.local_hub import local_hub

__all__ = ["local_hub"]

D_IN, D_SAE = 64, 1024
ATAWFEEK = "gemma-4-e4b-it-res-matryoshka-atawfeek"


@pytest.fixture
def catalogue(monkeypatch):
    """A release of the catalogue by name, with the sizes and other facts that a test gives it."""

    def change(name, of_release=None, **facts):
        release = registry.releases()[name]
        saes = tuple(replace(sae, **{"d_in": D_IN, "d_sae": D_SAE, **facts}) for sae in release.saes)
        changed = replace(release, saes=saes, **(of_release or {}))
        monkeypatch.setattr(registry, "releases", lambda: {name: changed})
        return changed

    return change


def weights(d_sae=D_SAE, d_in=D_IN):
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def sae_lens_folder(path, layer, d_sae=D_SAE, **config):
    """An SAE in sae_lens's own form, as it saves one that was trained as BatchTopK."""
    metadata = {"model_name": "google/gemma-4-E4B-it", "hook_name": f"model.language_model.layers.{layer}"}
    cfg = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "metadata": {"sae_lens_version": "6.54.12", **metadata}}  # fmt: skip
    cfg["metadata"].update(config.pop("metadata", {}))
    tensors = weights(d_sae) | {"threshold": torch.zeros(d_sae)}
    return {f"{path}/cfg.json": json.dumps(cfg | config).encode(), f"{path}/sae_weights.safetensors": save(tensors)}


def atawfeek(**of_layer):
    """The three folders of the real repository; `l21={...}` changes one of them."""
    files = {}
    for layer in (7, 21, 35):
        files |= sae_lens_folder(f"btk-mat-layer-{layer}-k-100", layer, **of_layer.get(f"l{layer}", {}))
    return files


def pt(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def told(differences):
    return {(d.sae_id, d.fact): (d.stated, d.found, d.kind) for d in differences}


def test_files_that_are_as_stated_are_read_without_their_weights(local_hub, catalogue):
    release = catalogue(ATAWFEEK)
    files = atawfeek()
    local_hub.add(release.repo_id, files)
    assert verify(release) == []
    spans = [span for _, path, span in local_hub.requests if path.startswith("/storage/")]
    read = sum(int(last) - int(first) + 1 for first, last in (span.removeprefix("bytes=").split("-") for span in spans))
    assert 3 <= len(spans) <= 12
    assert read < sum(map(len, files.values())) / 3


def test_every_fact_that_differs_is_named_with_both_values(local_hub, catalogue):
    release = catalogue(ATAWFEEK)
    wrong = {
        "d_sae": 512,
        "apply_b_dec_to_input": False,
        "metadata": {"model_name": "google/gemma-4-E4B", "hook_name": "blocks.20.hook_resid_post", "context_size": 128,
                     "training_architecture_details": {"k": 64}},
    }  # fmt: skip
    local_hub.add(release.repo_id, atawfeek(l21=wrong))
    sae_id = "layer_21_width_65k_l0_100"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what loading would warn of is told as a difference
        found = told(verify(release))
    assert found == {
        (sae_id, "d_sae"): (1024, 512, "differs"),
        (sae_id, "k"): (100, 64, "differs"),
        (sae_id, "apply_b_dec_to_input"): (True, False, "differs"),
        (sae_id, "model"): ("google/gemma-4-E4B-it", "google/gemma-4-E4B", "differs"),
        (sae_id, "hook"): ("blocks.21.hook_resid_post", "blocks.20.hook_resid_post", "differs"),
        (sae_id, "context_size"): (1024, 128, "differs"),
    }


def test_a_missing_file_is_the_difference_of_its_sae_alone(local_hub, catalogue):
    release = catalogue(ATAWFEEK, labels="labels.json")
    files = atawfeek()
    del files["btk-mat-layer-7-k-100/sae_weights.safetensors"], files["btk-mat-layer-35-k-100/cfg.json"]
    local_hub.add(release.repo_id, files | {"feature_labels.json": b"{}"})
    found = told(verify(release))
    assert {key for key in found if key[1] == "files"} == {(release.sae_ids[i], "files") for i in (0, 2)}
    assert "has no file btk-mat-layer-7-k-100/sae_weights.safetensors" in found[release.sae_ids[0], "files"][1]
    assert "has no file btk-mat-layer-35-k-100/cfg.json" in found[release.sae_ids[2], "files"][1]
    assert found[release.sae_ids[1], "labels"] == (
        "labels.json", "no such file; the nearest is feature_labels.json", "differs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("happens", "reason"),
    [("stopped", "cannot be read"), ("none", "has no model repository"), ("gated", "is gated"), ("offline", "not in")],
)
def test_a_repository_out_of_reach_is_an_error_and_no_difference(local_hub, catalogue, monkeypatch, happens, reason):
    release = catalogue(ATAWFEEK)
    if happens != "none":
        local_hub.add(release.repo_id, atawfeek())
    if happens == "stopped":
        local_hub.stop()
    if happens == "gated":
        local_hub.gate(release.repo_id)
    if happens == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"{release.repo_id}.*{reason}|{reason}.*{release.repo_id}"):
        verify(release)


def test_no_release_is_compared_with_anything_where_there_is_no_network():
    for release in registry.releases().values():
        if release.repo_type != "package":
            with pytest.raises(HubError, match=release.repo_id):
                verify(release)


def test_a_search_gives_the_path_and_a_form_that_is_not_stated_is_told(local_hub, catalogue):
    release = catalogue("gemma-4-31b-it-final-topk-ddasd", variance_explained=None)
    name = "gemma4_31b_fp8block_finaltoken_sae_final"
    config = {"k": 128, "d_model": D_IN, "ev": 0.875, "mean_l0": 127.5}
    files = {f"{name}.safetensors": save(weights() | {"last_fired": torch.zeros(D_SAE)})}
    local_hub.add(release.repo_id, files | {f"{name}_cfg.json": json.dumps(config).encode()})
    sae_id = release.sae_ids[0]
    assert told(verify(release)) == {
        (sae_id, "form"): (None, "plain", "new"),
        (sae_id, "path"): (release.saes[0].folder_name, f"{name}.safetensors", "new"),
        (sae_id, "variance_explained"): (None, 0.875, "new"),
        (sae_id, "l0"): (None, 127.5, "new"),
    }


def test_a_search_that_matches_nothing_lists_what_there_is(local_hub, catalogue):
    release = catalogue("gemma-4-31b-it-final-topk-ddasd")
    local_hub.add(release.repo_id, {"other.safetensors": save(weights())})
    (found,) = verify(release)
    assert found.fact == "files"
    assert "other.safetensors" in found.found


def test_a_pickled_file_is_read_by_its_header_too(local_hub, catalogue):
    release = catalogue("gemma-4-e4b-res-topk-caiovicentino1", d_sae=None)
    config = {"d_model": D_IN, "d_sae": 4 * D_SAE, "k": 128, "model": "google/gemma-4-e4b", "layer": 20}
    files = {"sae_final.pt": pt({**weights(4 * D_SAE), "k": 128}), "sae_final.json": json.dumps(config).encode()}
    local_hub.add(release.repo_id, files)
    sae_id = release.sae_ids[0]
    assert told(verify(release)) == {
        (sae_id, "d_sae"): (None, 4 * D_SAE, "new"),
        (sae_id, "layer"): (21, 20, "differs"),
    }
    spans = [span for _, path, span in local_hub.requests if path.startswith("/storage/")]
    read = sum(int(last) - int(first) + 1 for first, last in (span.removeprefix("bytes=").split("-") for span in spans))
    assert read < len(files["sae_final.pt"]) / 2


def test_files_of_another_form_than_stated(local_hub, catalogue):
    release = catalogue(ATAWFEEK, of_release={"form": "sparsify"})
    local_hub.add(release.repo_id, atawfeek())
    found = verify(release, release.sae_ids[:1])
    assert told(found)[release.sae_ids[0], "form"] == ("sparsify", "sae_lens", "differs")
    assert "has no tensor encoder.bias" in told(found)[release.sae_ids[0], "files"][1]
    assert {d.sae_id for d in found} == {release.sae_ids[0]}


def test_a_config_beside_the_weights_that_nobody_named_is_told(local_hub, catalogue):
    release = catalogue("gemma-4-26b-a4b-it-final-jumprelu-mettamazza")
    files = {"gemma4_sae_1m.safetensors": save(weights()), "feature_map.json": b"{}", "config.json": b"{}"}
    local_hub.add(release.repo_id, files)
    sae_id = release.sae_ids[0]
    assert told(verify(release)) == {(sae_id, "config"): (None, "config.json", "new")}


def test_an_sae_that_is_not_in_the_release(catalogue):
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_7_width_65k_l0_100'"):
        verify(catalogue(ATAWFEEK), ["layer_7_width_65k_l0_10"])


def test_what_this_package_carries_is_as_stated():
    found = verify(registry.releases()["gemma-4-demo-res-matryoshka-embedded"])
    assert {d.kind for d in found} == {"new"}
    assert ("dataset", "embedded:text") in {(d.fact, d.found) for d in found}


def test_what_several_have_alike_is_told_once():
    alike = [Difference(sae_id, "d_sae", None, 8, "new") for sae_id in "ab"]
    other = Difference("c", "d_sae", None, 9, "new")
    assert together([*alike, other]) == [(alike[0], ["a", "b"]), (other, ["c"])]
