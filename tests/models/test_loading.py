import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import sae_lens_gemma4 as g4
from sae_lens_gemma4.embedded import MODELS
from sae_lens_gemma4.errors import ModelError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.loading import load_hf_model
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

TOKENS = torch.randint(30, 2000, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["ple", "ple_multimodal", "dense_keqv", "moe", "unified"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_gemma4(request.param)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_a_saved_model_comes_back_without_its_towers(saved):
    folder, model = saved
    loaded, tokenizer = load_hf_model(folder)
    assert not any("vision_tower" in n or "audio_tower" in n for n, _ in loaded.named_modules())
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not loaded.training


@torch.no_grad()
def test_by_class_name(saved):
    folder, _ = saved
    proxy = g4.load_model(str(folder), "Gemma4ProxyLM", dtype="bfloat16")
    assert isinstance(proxy, Gemma4ProxyLM)
    assert proxy(TOKENS).dtype == torch.bfloat16
    assert proxy.model_name == str(folder)


def test_the_bridge_by_class_name():
    bridge = g4.load_model("gemma-4-demo", "Gemma4Bridge")
    assert isinstance(bridge, Gemma4Bridge)
    assert bridge.cfg.model_name == "gemma-4-demo"


@pytest.mark.parametrize("name", list(MODELS))
def test_embedded_models_load_in_float32(name):
    model, tokenizer = load_hf_model(name)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert any(float(layer.layer_scalar) != 1 for layer in model.model.layers)


def test_attention_implementation_is_passed_through():
    model, _ = load_hf_model("gemma-4-demo", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-4-demo-ti", "gemma-4-demo-it"),
        ("google/gemma-4-27b-it", r"cannot be loaded\. Did you mean 'google/gemma-4-"),
        ("/no/such/folder", "cannot be loaded"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(name, message):
    with pytest.raises(ModelError, match=message):
        load_hf_model(name)


def test_missing_weights_are_named_and_never_random(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (lost,) = [name for name in weights if name.endswith("layers.2.mlp.gate_proj.weight")]
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights .*layers\.2\.mlp\.gate_proj\.weight"):
        load_hf_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dtype": "bf16"}, UnknownNameError, "dtype 'bf16'"),
        ({"device": "cpuu"}, ModelError, "cpuu"),
        ({"nonsense": 1}, ModelError, "nonsense"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        load_hf_model("gemma-4-demo", **kwargs)


def test_another_model_is_refused_before_its_weights_are_read(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="gpt2"):
        load_hf_model(tmp_path)


def test_an_unknown_class_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'Gemma4ProxyLM'"):
        g4.load_model("gemma-4-demo", "Gemma4Proxy")
    import sae_lens.llm_sae_training_runner as runner

    with pytest.raises(UnknownNameError, match="'Gemma4Bridge'"):
        runner.load_model("Gemma4Brige", "gemma-4-demo")
    with pytest.raises(UnknownNameError, match="'HookedTransformer'"):
        runner.load_model("HookedTransfomer", "gpt2")
    with pytest.raises(UnknownNameError, match=r"blocks\.3\.hook_resid_post"):
        runner.load_model("Gemma4ProxyLM", "gemma-4-demo", device="cpu", hook_names=["blocks.3.hook_resid_psot"])
