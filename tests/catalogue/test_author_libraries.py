"""Files that the authors' own libraries wrote, read here and compared with those libraries' own encode and decode.

sparsify is a development dependency. dictionary-learning is installed without its dependencies (they pull in a model
server and torchvision); CI does that, and sets REQUIRE_REFERENCES so that nothing is skipped there:

    pip install --no-deps dictionary-learning==0.1.0
"""

import json
import os
import sys
import types
import warnings

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.registry import releases
from tests.catalogue.checkpoints import inputs, keep_largest
from tests.catalogue.local_hub import local_hub
from tests.support import required_module

__all__ = ["local_hub"]
D_IN, D_SAE, K = 12, 48, 5


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.fixture
def sparse_coder(tmp_path):
    """A coder as sparsify saves it, in the folder name that its trainer gives."""
    required_module("sparsify")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = randomised(SparseCoder(D_IN, SparseCoderConfig(expansion_factor=4, k=K, multi_topk=True)))
    coder.save_to_disk(tmp_path / "language_model.layers.17")
    return coder, tmp_path / "language_model.layers.17"


def latents(coder, x):
    """sparsify's own encoder, which gives the largest latents and where they are, as one row."""
    out = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter_(-1, out.top_indices, out.top_acts)


def test_sparsifys_own_files(sparse_coder):
    coder, folder = sparse_coder
    assert json.loads((folder / "cfg.json").read_text())["num_latents"] == 0  # as its trainer leaves it
    sae = SAE.load_from_disk(folder, converter=g4.converter())
    x = inputs(d_in=D_IN)
    with torch.no_grad():
        theirs = latents(coder, x)
        assert torch.equal(theirs != 0, keep_largest(theirs, K) != 0)
        assert (sae.encode(x) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        out = coder.encode(x)
        decoded = coder.decode(out.top_acts, out.top_indices)
    assert (sae(x) - decoded).abs().max() <= 1e-5 * decoded.abs().max()
    assert sae.cfg.metadata.hook_name == "blocks.17.hook_resid_post"


def test_stocks_loader_fails_on_sparsifys_own_files(sparse_coder):
    """The gap: were this to pass one day, stock could read gemma-loupe by itself."""
    _, folder = sparse_coder
    with pytest.raises((RuntimeError, ValueError)):
        SAE.load_from_disk(folder, converter=sparsify_disk_loader)


def test_sparsifys_own_files_from_the_hub(sparse_coder, local_hub):
    coder, folder = sparse_coder
    release = releases()["gemma-4-e2b-res-topk-rhizomatous"]
    entry = release.saes[17]
    local_hub.add(release.repo_id, {f"{entry.path}/{p.name}": p.read_bytes() for p in folder.iterdir()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = SAE.from_pretrained(release.name, entry.id)
    x = inputs(d_in=D_IN)
    assert (sae.encode(x) - latents(coder, x)).abs().max() <= 1e-5 * latents(coder, x).abs().max()


@pytest.fixture
def trainers(monkeypatch):
    """dictionary_learning's trainers; its buffer imports a model server that reading files has no use for."""
    if "nnsight" not in sys.modules:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object
        monkeypatch.setitem(sys.modules, "nnsight", stand_in)
    required_module("dictionary_learning")
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 16, 24]),
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D_IN, D_SAE, K),
    }


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK"])
def test_dictionary_learnings_own_files(trainers, tmp_path, kind):
    theirs = randomised(trainers[kind]())
    theirs.threshold.fill_(4.0)
    config = {"trainer": {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 45,
                          "lm_name": "google/gemma-3-27b-it", "submodule_name": "resid_post_layer_45"}}  # fmt: skip
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = SAE.load_from_disk(tmp_path, converter=g4.converter())
    x = inputs(d_in=D_IN)
    with torch.no_grad():
        expected = theirs.encode(x)
        assert (expected > 0).any() and (expected == 0).any()
        assert torch.equal(sae.encode(x) != 0, expected != 0)
        assert (sae.encode(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (sae(x) - theirs(x)).abs().max() <= 1e-5 * theirs(x).abs().max()
    details = sae.cfg.metadata.training_architecture_details
    assert details["k"] == K
    if kind.startswith("Matryoshka"):
        assert details["matryoshka_widths"] == [8, 24, 48]


def test_continuous_integration_skips_none_of_these():
    if os.environ.get("REQUIRE_REFERENCES"):
        for name in ("sparsify", "dictionary_learning"):
            required_module(name)
