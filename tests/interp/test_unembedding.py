"""The direct path held against the model's own modules, called one after another."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

D = 64


def sae_of(d_in, hook_name, d_sae=5, **metadata):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    torch.nn.init.normal_(sae.W_dec)
    sae.cfg.metadata.hook_name = hook_name
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


def same_direction(ours, by_hand):
    return torch.cosine_similarity(ours.double(), by_hand.double(), dim=1).min() > 1 - 1e-6


@pytest.mark.parametrize("variant", ["ple", "moe", "unified", "ple_multimodal"])
@pytest.mark.parametrize("model_class", ["Gemma4ProxyLM", "Gemma4Bridge"])
def test_at_the_last_layer_logits_are_the_model_s_own(variant, model_class):
    """Before the final norm a direction added to nothing gives, up to its length, the logits it stands for."""
    hf = tiny_gemma4(variant)
    model = getattr(g4, model_class)
    model = model.boot(hf, tiny_tokenizer()) if model_class == "Gemma4Bridge" else model(hf, tiny_tokenizer())
    sae = sae_of(D, "blocks.5.hook_resid_post")
    decoder = getattr(hf.model, "language_model", hf.model)
    with torch.no_grad():
        ours = Unembedding.of(model, sae, "blocks.5.hook_resid_post").logits(sae.W_dec)
        by_hand = hf.lm_head(decoder.norm(sae.W_dec * 1e3))
    assert ours.shape == (5, hf.config.get_text_config().vocab_size)
    assert same_direction(ours, by_hand)
    torch.testing.assert_close(ours, (sae.W_dec * decoder.norm.weight) @ hf.lm_head.weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "variant", "way"),
    [
        ("hook_resid_mid", "moe", lambda layer, x: x),
        ("hook_ple_out", "ple", lambda layer, x: x),
        ("hook_mlp_out", "moe", lambda layer, x: x),
        ("moe.hook_dense_out", "moe", lambda layer, x: layer.post_feedforward_layernorm(x)),
        ("moe.hook_experts_out", "moe", lambda layer, x: layer.post_feedforward_layernorm(x)),
        (
            "mlp.hook_out",
            "moe",
            lambda layer, x: layer.post_feedforward_layernorm(layer.post_feedforward_layernorm_1(x)),
        ),
        ("mlp.hook_out", "ple", lambda layer, x: layer.post_feedforward_layernorm(x)),
        ("mlp.hook_post", "ple", lambda layer, x: layer.post_feedforward_layernorm(layer.mlp.down_proj(x))),
        ("attn.hook_z", "ple", lambda layer, x: layer.post_attention_layernorm(layer.self_attn.o_proj(x))),
    ],
)
def test_on_the_way_to_the_stream_stand_the_layer_s_own_modules(hook, variant, way):
    hf = tiny_gemma4(variant)
    model, layer = g4.Gemma4ProxyLM(hf, tiny_tokenizer()), getattr(hf.model, "language_model", hf.model).layers[1]
    widths = {"mlp.hook_post": layer.mlp.down_proj.in_features, "attn.hook_z": layer.self_attn.o_proj.in_features}
    sae = sae_of(widths.get(hook, D), f"blocks.1.{hook}")
    decoder = getattr(hf.model, "language_model", hf.model)
    with torch.no_grad():
        ours = Unembedding.of(model, sae, f"blocks.1.{hook}").logits(sae.W_dec)
        by_hand = hf.lm_head(decoder.norm(way(layer, sae.W_dec * 1e3) * 1e3))
    assert same_direction(ours, by_hand)


@pytest.mark.parametrize("head", [2, -2, 0])
def test_one_head_s_rows_go_through_that_head_s_columns(head):
    hf = tiny_gemma4("ple")
    layer = hf.model.layers[1]
    sae = sae_of(16, "blocks.1.attn.hook_z", hook_head_index=head)
    with torch.no_grad():
        ours = Unembedding.of(g4.Gemma4ProxyLM(hf, tiny_tokenizer()), sae, "blocks.1.attn.hook_z").logits(sae.W_dec)
        z = torch.zeros(5, 4, 16)
        z[:, head] = sae.W_dec
        stream = layer.post_attention_layernorm(layer.self_attn.o_proj(z.flatten(1) * 1e3)) * 1e3
        by_hand = hf.lm_head(hf.model.norm(stream))
    assert same_direction(ours, by_hand)


def test_after_the_final_norm_its_weight_has_been_applied():
    hf = tiny_gemma4("ple")
    sae = sae_of(D, "ln_final.hook_out")
    ours = Unembedding.of(g4.Gemma4ProxyLM(hf, tiny_tokenizer()), sae, "ln_final.hook_out").logits(sae.W_dec)
    torch.testing.assert_close(ours, (sae.W_dec @ hf.lm_head.weight.T).detach())


def test_what_writes_nowhere_has_no_logits():
    model = g4.Gemma4ProxyLM(tiny_gemma4("moe"), tiny_tokenizer())
    for hook in ("moe.hook_router_logits", "attn.hook_k_used", "mlp.hook_pre"):
        assert Unembedding.of(model, sae_of(8, f"blocks.1.{hook}"), f"blocks.1.{hook}") is None


def test_gemma_3_s_norm_multiplies_by_one_plus_its_weight():
    """The catalogue has SAEs on Gemma 3, which sae_lens loads as a plain transformers model."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    hf = Gemma3ForCausalLM(config).eval()
    torch.nn.init.normal_(hf.model.norm.weight)
    torch.nn.init.normal_(hf.model.layers[1].post_feedforward_layernorm.weight)
    model = HookedProxyLM(hf, tiny_tokenizer())
    for hook, gain in (
        ("model.layers.1", 1.0),
        ("model.layers.1.mlp", 1 + hf.model.layers[1].post_feedforward_layernorm.weight.detach()),
    ):
        sae = sae_of(16, hook)
        ours = Unembedding.of(model, sae, hook).logits(sae.W_dec)
        by_hand = (sae.W_dec * gain * (1 + hf.model.norm.weight)) @ hf.lm_head.weight.T
        torch.testing.assert_close(ours, by_hand.detach(), rtol=1e-4, atol=1e-4)


def test_a_final_norm_that_subtracts_the_mean_and_has_another_name():
    from sae_lens.load_model import HookedProxyLM
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()
    torch.nn.init.normal_(hf.transformer.ln_f.weight)
    torch.nn.init.normal_(hf.transformer.ln_f.bias)
    sae = sae_of(16, "blocks.1.hook_resid_post")
    ours = Unembedding.of(HookedProxyLM(hf, tiny_tokenizer()), sae, "blocks.1.hook_resid_post").logits(sae.W_dec)
    by_hand = (sae.W_dec * hf.transformer.ln_f.weight) @ hf.lm_head.weight.T
    torch.testing.assert_close(ours, by_hand.detach(), rtol=1e-4, atol=1e-4)


def test_transformerlens_s_models_have_them_too():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=32, act_fn="relu", normalization_type="LN"
    )
    model = HookedTransformer(config)
    torch.nn.init.normal_(model.ln_final.w)
    sae = sae_of(16, "blocks.0.hook_resid_post")
    ours = Unembedding.of(model, sae, "blocks.0.hook_resid_post").logits(sae.W_dec)
    torch.testing.assert_close(ours, ((sae.W_dec * model.ln_final.w) @ model.W_U).detach(), rtol=1e-4, atol=1e-4)
    assert Unembedding.of(model, sae_of(64, "blocks.0.mlp.hook_post"), "blocks.0.mlp.hook_post") is None
