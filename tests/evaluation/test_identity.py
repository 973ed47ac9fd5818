"""Equal hashes mean equal weights, and unequal ones unequal weights."""

import copy

import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.evaluation.identity import model_fingerprint, sae_hash
from sae_lens_gemma4.testing import tiny_gemma4
from tests.evaluation.test_reading import built


@pytest.fixture
def sae():
    return built("jumprelu")


def test_a_copy_has_the_same_hash_and_where_it_came_from_is_no_part_of_it(sae):
    assert len(sae_hash(sae)) == 16
    other = copy.deepcopy(sae)
    other.cfg.metadata.model_name, other.cfg.device = "another", "cuda"
    assert sae_hash(other) == sae_hash(sae)


@torch.no_grad()
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_one_changed_weight_changes_the_hash(sae, name):
    before, flat = sae_hash(sae), getattr(sae, name).view(-1)
    for i in (0, len(flat) // 2, -1):
        value = flat[i].clone()
        flat[i] = torch.nextafter(value, torch.tensor(torch.inf))
        assert sae_hash(sae) != before
        flat[i] = value
    assert sae_hash(sae) == before


def test_dtype_shape_and_settings_are_part_of_it(sae):
    hashes = {sae_hash(sae), sae_hash(copy.deepcopy(sae).to(dtype=torch.bfloat16))}
    without_b_dec = copy.deepcopy(sae)
    without_b_dec.cfg.apply_b_dec_to_input = False
    hashes |= {sae_hash(without_b_dec)}
    for architecture in ("standard", "topk", "abstopk"):
        hashes |= {sae_hash(built(architecture))}
    more = built("topk")
    more.cfg.k = 6  # in no tensor
    assert len(hashes | {sae_hash(more)}) == 7


def test_tensors_in_parts_hash_as_whole(sae, monkeypatch):
    before = sae_hash(sae)
    monkeypatch.setattr("sae_lens_gemma4.evaluation.identity._CHUNK", 5)
    assert sae_hash(sae) == before


def test_both_classes_on_one_model_have_one_fingerprint_and_other_models_another():
    proxy, bridge = (g4.load_model("gemma-4-demo", name) for name in ("Gemma4ProxyLM", "Gemma4Bridge"))
    assert model_fingerprint(proxy) == model_fingerprint(bridge)
    assert model_fingerprint(proxy) != model_fingerprint(g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM"))


@torch.no_grad()
def test_any_scaling_of_any_parameter_changes_the_fingerprint():
    """As a step of training would: of each parameter some values are looked at, first and last among them."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 50), "b": torch.nn.LayerNorm(3)})
    before = model_fingerprint(model)
    for parameter in model.parameters():
        for part in (slice(None), slice(1), slice(-1, None)):
            changed = parameter.view(-1)[part]
            changed += 1e-3
            assert model_fingerprint(model) != before
            changed -= 1e-3
            parameter.copy_(parameter)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert model_fingerprint(half) != before


def test_equal_values_in_another_dtype_are_another_model():
    half = tiny_gemma4("ple").to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))
    assert model_fingerprint(half) != model_fingerprint(whole)
