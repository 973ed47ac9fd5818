"""Uploads through the hub's real client, to a hub on this machine, and back."""

import json
import re

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load, save

from sae_lens_gemma4.errors import ConfigError, DataError, HubError, ModelError, SAEError
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.models.loading import load_model
from sae_lens_gemma4.publishing.push import push
from tests.publishing.sample_run import change, heldout, make_run, model
from tests.publishing.upload_hub import upload_hub

__all__ = ["upload_hub"]
REPO = "somebody/gemma-4-demo-it-saes"
WEIGHTS = "layer_3/sae_weights.safetensors"


@pytest.fixture
def folders(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def one(folders):
    return folders[:1]


def send(folders, repo_id=REPO, **settings):
    return push(folders, repo_id, **{"model": model(), "progress": False, **settings})


def test_what_is_uploaded_is_what_was_measured(upload_hub, folders, tmp_path):
    found = send(folders, license="apache-2.0")
    assert found.passed
    assert found.same_weights
    first, head = upload_hub.repos["model", REPO][found.commit], upload_hub.head(REPO)
    assert upload_hub.messages == ["Add layer_1, layer_3", "Say that the files were read back"]
    files = ("cfg.json", "recipe.yaml", "result.json", "sae_weights.safetensors", "sparsity.safetensors")
    expected = {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in folders for name in files}
    assert {k: v for k, v in first.files.items() if "/" in k} == expected
    assert set(first.files) - set(expected) == {".gitattributes", "README.md"}
    assert b"were not read back" in first.files["README.md"]
    assert f"Commit {found.commit} was downloaded" in head.files["README.md"].decode()
    # An independent round trip: the hub's own bytes, stock's loader, the corpus as it was built, not rebuilt.
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes(head.files[f"layer_3/{name}"])
    ve = evaluate_sae(SAE.load_from_disk(tmp_path), model(), heldout()["it_chat"], progress=False).metrics.ve
    recorded = json.loads((folders[0] / "result.json").read_text())["after"]["it_chat"]["metrics"]["ve"]
    [figure] = [f for f in found.figures if (f.name, f.corpus, f.figure) == ("layer_3", "it_chat", "ve")]
    assert figure.measured == figure.recorded == recorded == float(ve)
    assert len(found.figures) == 8


def test_every_download_comes_from_the_hub(upload_hub, one):
    send(one)
    fetched = [path for method, path, _ in upload_hub.requests if method == "GET" and "/storage/" in path]
    assert sum(path.endswith("sae_weights.safetensors") for path in fetched) == 1


def test_other_weights_in_the_repository_are_an_error_and_on_the_card(upload_hub, one):
    state = load((one[0] / "sae_weights.safetensors").read_bytes())
    upload_hub.spoil = {WEIGHTS: save(state | {"b_dec": state["b_dec"] + 0.05 * torch.arange(96)})}
    with pytest.raises(SAEError, match=r"NOT what was measured.*ve of layer_3 on it_chat is .* and was "):
        send(one)
    card = upload_hub.head(REPO).files["README.md"].decode()
    assert "it is NOT what was measured before the upload. " in card
    assert "Do not use it." in card
    assert upload_hub.messages[-1] == "Say that the files are not what was measured"


def test_other_bits_within_the_tolerance_are_told(upload_hub, one):
    state = load((one[0] / "sae_weights.safetensors").read_bytes())
    upload_hub.spoil = {WEIGHTS: save(state | {"b_dec": state["b_dec"] * (1 + 1e-6)})}
    found = send(one)
    assert found.passed
    assert not found.same_weights
    assert "the weights are not the same bits" in upload_hub.head(REPO).files["README.md"].decode()


def test_weights_that_do_not_load_are_an_error(upload_hub, one):
    upload_hub.spoil = {WEIGHTS: b"cut off"}
    with pytest.raises(SAEError, match="cannot be loaded again from layer_3"):
        send(one)


FAILED = {
    "passed": False,
    "checks": [{"figure": "ve", "corpus": "it_pile", "value": 0.71, "at_least": 0.8, "at_most": None, "passed": False}],
}


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (FAILED, "the gate does not hold: ve on it_pile is 0.710 (asked for at least 0.800)"),
        (None, "no gate was asked"),
    ],
)
def test_only_what_passed_its_gate_is_sent(upload_hub, one, gate, message):
    change(one[0], gate=gate)
    with pytest.raises(SAEError, match=re.escape(f"layer_3: {message}")):
        send(one)
    assert upload_hub.requests == []
    assert send(one, ungated=True).passed
    assert message in upload_hub.head(REPO).files["README.md"].decode()


def test_all_that_can_be_known_before_is_refused_before_anything_is_sent(upload_hub, folders):
    with pytest.raises(ModelError, match="fingerprint"):
        send(folders, model=load_model("gemma-4-demo", "Gemma4ProxyLM"))
    with pytest.raises(DataError, match=r"'it_pile' of layer_1 has hash .* \(corpora=\)"):
        send(folders, corpora={"it_pile": heldout()["it_chat"]})
    with pytest.raises(ConfigError, match="tolerance"):
        send(folders, tolerance=float("nan"))
    changed = json.loads((folders[0] / "result.json").read_text())["after"]
    changed["it_chat"]["corpus"] |= {"source": None, "hash": "another"}
    change(folders[0], after=changed)
    with pytest.raises(DataError, match="'it_chat' was in memory"):
        send(folders)
    assert upload_hub.requests == []


def test_texts_in_memory_can_be_given(upload_hub, one):
    for folder in one:
        after = json.loads((folder / "result.json").read_text())["after"]
        for result in after.values():
            result["corpus"]["source"] = None
        change(folder, after=after)
    assert send(one, corpora=heldout()).passed


def test_the_model_is_loaded_as_it_was_recorded(upload_hub, one):
    assert send(one, model=None).same_weights


def test_a_branch_of_a_private_repository(upload_hub, one):
    send(one, private=True, revision="candidate")
    assert ("model", REPO) in upload_hub.private
    assert set(upload_hub.head(REPO).files) == {".gitattributes"}
    assert WEIGHTS in upload_hub.head(REPO, "candidate").files


def test_again_replaces_and_a_public_one_stays_refused(upload_hub, one):
    send(one)
    with pytest.raises(ConfigError, match="exists and is public"):
        send(one, private=True)
    n_uploads = len(upload_hub.uploads)
    assert send(one).passed
    assert len(upload_hub.uploads) == n_uploads


def test_other_saes_of_a_repository_keep_their_card(upload_hub, folders):
    send(folders[:1])
    card = upload_hub.head(REPO).files["README.md"]
    with pytest.raises(ConfigError, match=r"holds other SAEs \(layer_3\)"):
        send(folders[1:])
    assert upload_hub.head(REPO).files["README.md"] == card


@pytest.mark.parametrize(
    ("repo_id", "error", "message"),
    [
        ("a/b/c", ConfigError, "no name of a repository"),
        ("somebody-else/saes", HubError, "cannot be made: this login may not write there"),
    ],
)
def test_repositories_that_cannot_be_written(upload_hub, one, repo_id, error, message):
    with pytest.raises(error, match=message):
        send(one, repo_id)
    assert upload_hub.messages == []


def test_without_a_login_or_a_network(upload_hub, one, monkeypatch):
    with monkeypatch.context() as without:
        without.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=r"log in first \(hf auth login\)"):
            send(one)
    upload_hub.stop()
    with pytest.raises(HubError, match=f"{REPO} cannot be made"):
        send(one)


def test_a_licence_that_the_hub_does_not_know(upload_hub, one):
    with pytest.raises(HubError, match=r'cannot be written: .*"license" must be one of'):
        send(one, license="my own")
    assert upload_hub.messages == []
