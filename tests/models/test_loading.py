import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import sae_lens_gemma4 as g4
from sae_lens_gemma4.embedded import MODELS
from sae_lens_gemma4.errors import ModelError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.geometry import text_decoder
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


# --- a model in memory


CLASSES = {"Gemma4Bridge": Gemma4Bridge.boot, "Gemma4ProxyLM": Gemma4ProxyLM}
both = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@both
@torch.no_grad()
def test_both_classes_take_a_name_a_path_or_a_model_and_an_in_memory_tokenizer(make, saved):
    folder, _ = saved
    tokenizer = tiny_tokenizer()
    by_path, in_memory = make(folder, attn_implementation="eager"), make(load_hf_model(folder)[0], tokenizer)
    difference = by_path(TOKENS) - in_memory(TOKENS)
    assert difference.abs().max() < 1e-4
    assert by_path.tokenizer.decode([300, 301]) == in_memory.tokenizer.decode([300, 301])
    assert make("gemma-4-demo", tokenizer).tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ModelError, match=r"of a processor, pass its \.tokenizer"):
        make(load_hf_model(folder)[0], object())


@both
@pytest.mark.parametrize("variant", ["ple_multimodal", "moe"])
@torch.no_grad()
def test_a_model_in_memory_is_cast_in_a_copy(make, variant):
    """As transformers loads it: rotary frequencies stay in float32, which `model.to(dtype)` would round."""
    model = tiny_gemma4(variant)
    before = {name: (t.dtype, t.data_ptr()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    half = make(model, tiny_tokenizer(), dtype="bfloat16", attn_implementation="eager")
    inner = getattr(half, "original_model", None) or half.model
    assert {name: (t.dtype, t.data_ptr()) for name, t in (*model.named_parameters(), *model.named_buffers())} == before
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert {p.dtype for p in inner.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in inner.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    assert {b.dtype for n, b in inner.named_buffers() if n.endswith("layer_scalar")} == {torch.bfloat16}
    embedding = inner.get_input_embeddings().weight
    assert embedding.data_ptr() == inner.lm_head.weight.data_ptr()  # still tied
    reference = tiny_gemma4(variant)
    for name, tensor in (*reference.named_parameters(), *reference.named_buffers()):
        if "inv_freq" not in name:
            tensor.data = tensor.data.to(torch.bfloat16)
    reference.set_attn_implementation("eager")
    assert torch.equal(half(TOKENS), reference(input_ids=TOKENS, use_cache=False).logits)


@torch.no_grad()
def test_the_proxy_uses_the_model_itself_unless_asked_for_another():
    model = tiny_gemma4("ple")
    assert Gemma4ProxyLM(model, tiny_tokenizer()).model is model
    assert Gemma4ProxyLM(model, tiny_tokenizer(), device="cpu", dtype="float32").model is model
    eager = Gemma4ProxyLM(model, tiny_tokenizer(), attn_implementation="eager")
    assert eager.model is not model
    assert eager.model.lm_head.weight is model.lm_head.weight
    assert model.config._attn_implementation == "sdpa"


def offloaded(model, folder):
    """A device map with two layers on disk, as one with several GPUs: accelerate wraps every module's forward."""
    prefix = "model.language_model." if hasattr(model.model, "language_model") else "model."
    places = {f"{prefix}{name}": "cpu" for name, _ in text_decoder(model).named_children() if name != "layers"}
    places |= {f"{prefix}layers.{n}": "disk" if n in (2, 4) else "cpu" for n in range(6)} | {"lm_head": "cpu"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if prefix != "model."}
    places.pop("model.language_model", None)
    return {"device_map": places, "offload_folder": str(folder)}


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("variant", ["ple", "moe", "unified"])
@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@torch.no_grad()
def test_a_device_map_is_passed_through_and_every_hook_works_under_it(tmp_path, class_name, variant):
    plain = tiny_gemma4(variant)
    plain.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    reference = Gemma4ProxyLM(plain, tiny_tokenizer(), attn_implementation="eager")
    model = g4.load_model(
        tmp_path, class_name, device="cuda", attn_implementation="eager", **offloaded(plain, tmp_path / "off")
    )
    assert torch.equal(model(TOKENS), reference(TOKENS))
    expected, actual = reference.run_with_cache(TOKENS)[1], model.run_with_cache(TOKENS)[1]
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("blocks.2.hook_resid_mid", "blocks.2.attn.hook_k_used", "blocks.4.hook_resid_prescale"):
        hooks = {
            "fwd_hooks": [(name, lambda value, hook: value / 2 if "k_used" not in hook.name else value.roll(1, 1))]
        }
        difference = model.run_with_hooks(TOKENS, **hooks) - reference.run_with_hooks(TOKENS, **hooks)
        assert difference.abs().max() < 1e-5
    hf_model = getattr(model, "original_model", None) or model.model
    with pytest.raises(ModelError, match="placed by a device_map, cannot be cast or moved"):
        Gemma4Bridge.boot(hf_model, dtype="bfloat16")


def test_towers_are_loaded_when_asked_for(tmp_path):
    tiny_gemma4("ple_multimodal").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_hf_model(tmp_path)[0].model.vision_tower is None
    model, _ = load_hf_model(tmp_path, towers=True)
    assert model.model.vision_tower is not None
    assert "vision_encoder.hook_out" in g4.load_model(tmp_path, "Gemma4Bridge", towers=True).hook_dict
