"""Decompositions that add up, on every shape and in both classes, where stock's miss by more than they explain."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.ActivationCache import ActivationCache

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ConfigError, ModelError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.cache import Gemma4Cache
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4
from tests.models.forms import CLASSES

TOKENS = torch.randint(30, 2000, (2, 20), generator=torch.Generator().manual_seed(1))
each = pytest.mark.parametrize(("variant", "class_name"), [(v, c) for v in VARIANTS for c in CLASSES])


@torch.no_grad()
def run(variant: str, class_name: str) -> Gemma4Cache:
    cache: Gemma4Cache = CLASSES[class_name](tiny_gemma4(variant)).run_with_cache(TOKENS)[1]
    return cache


@each
def test_parts_sum_to_the_residual_stream_at_every_layer(variant: str, class_name: str) -> None:
    cache = run(variant, class_name)
    for layer in range(6):
        parts = g4.decompose_residual(cache, layer)
        expected = cache[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(sum(parts.values()), expected, rtol=1e-5, atol=1e-5)
    kinds = ["attn_out", "mlp_out", "ple_out"] if "ple" in variant else ["attn_out", "mlp_out"]
    assert list(parts) == ["embed", *(f"{n}_{kind}" for n in range(6) for kind in kinds)]
    scalars = [float(layer.layer_scalar) for layer in text_decoder(tiny_gemma4(variant)).layers]
    by_hand = cache["blocks.2.hook_mlp_out"] * torch.tensor(scalars[2:]).prod()
    torch.testing.assert_close(parts["2_mlp_out"], by_hand)
    assert g4.decompose_residual(cache, -1).keys() == parts.keys()


@each
def test_attributions_sum_to_the_logit(variant: str, class_name: str) -> None:
    cache = run(variant, class_name)
    answers = TOKENS.roll(-1, dims=1)
    logits = cache["hook_unembed"]
    for tokens in (7, answers[:, 0], answers):
        by_part = g4.logit_attribution(cache, tokens)
        ids = torch.as_tensor(tokens)
        ids = (ids[:, None] if ids.ndim == 1 else ids).expand(2, 20)
        expected = logits.gather(-1, ids[..., None])[..., 0]
        torch.testing.assert_close(sum(by_part.values()), expected, rtol=1e-4, atol=1e-4)
    difference = sum(g4.logit_attribution(cache, 7, incorrect_tokens=9).values())
    torch.testing.assert_close(difference, logits[..., 7] - logits[..., 9], rtol=1e-4, atol=1e-4)
    capped = 30 * torch.tanh(logits / 30)
    plain = tiny_gemma4(variant)
    if class_name == "Gemma4Bridge":
        plain.set_attn_implementation("eager")
    torch.testing.assert_close(capped, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_transformer_lens_s_own_methods_are_right_too() -> None:
    """And were not: stock's decomposition misses the stream, and its attribution forgets the norm's weight."""
    cache = run("ple", "Gemma4Bridge")
    final = cache["blocks.5.hook_resid_post"]
    stack, labels = cache.decompose_resid(return_labels=True)
    assert labels == list(g4.decompose_residual(cache, 5))
    torch.testing.assert_close(stack.sum(0), final, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.logit_attrs(stack, 7).sum(0), cache["hook_unembed"][..., 7], rtol=1e-4, atol=1e-4)
    of_proxy = run("ple", "Gemma4ProxyLM")
    attributed = of_proxy.logit_attrs(of_proxy.decompose_resid(), TOKENS).sum(0)
    direct = sum(g4.logit_attribution(of_proxy, TOKENS).values())
    torch.testing.assert_close(attributed, direct, rtol=1e-4, atol=1e-4)
    stock = ActivationCache(cache.cache_dict, cache.model)
    assert (stock.decompose_resid().sum(0) - final).abs().max() > 5
    for layer, mlp_input, name in ((3, False, "blocks.3.hook_resid_pre"), (3, True, "blocks.3.hook_resid_mid")):
        stack = cache.decompose_resid(layer, mlp_input=mlp_input)
        torch.testing.assert_close(stack.sum(0), cache[name], rtol=1e-5, atol=1e-5)
        normed = cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
        ln = f"blocks.3.{'ln2' if mlp_input else 'ln1'}.hook_out"
        torch.testing.assert_close(normed.sum(0), cache[ln], rtol=1e-4, atol=1e-4)
    half = cache.apply_slice_to_batch_dim(0)
    torch.testing.assert_close(half.decompose_resid().sum(0), final[0], rtol=1e-5, atol=1e-5)
    for refused in (cache.get_full_resid_decomposition, cache.stack_head_results, cache.stack_neuron_results):
        with pytest.raises(ModelError, match="normalises what heads and neurons put out together"):
            refused()
    with pytest.raises(ConfigError, match=r"layer must lie in 0\.\.6, not 9"):
        cache.decompose_resid(layer=9)
    part, labels = cache.decompose_resid(2, mode="mlp", incl_embeds=False, pos_slice=-1, return_labels=True)
    assert (part.shape, labels) == ((2, 2, 64), ["0_mlp_out", "1_mlp_out"])


def test_without_a_batch_dimension() -> None:
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple"))
    with torch.no_grad():
        cache = bridge.run_with_cache(TOKENS[:1], remove_batch_dim=True)[1]
    assert cache["blocks.2.hook_out"].shape == (20, 64)
    total = sum(g4.decompose_residual(cache, 3).values())
    torch.testing.assert_close(total, cache["blocks.3.hook_resid_post"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_was_not_cached_is_named(class_name: str) -> None:
    model = CLASSES[class_name](tiny_gemma4("ple"))
    _, cache = model.run_with_cache(TOKENS, names_filter=["hook_embed", "blocks.0.hook_attn_out"])
    with pytest.raises(UnknownNameError, match=r"Unknown activation 'blocks\.0\.hook_mlp_out'.* It was not cached"):
        g4.decompose_residual(cache, 0)
    with pytest.raises(ConfigError, match=r"layers 0\.\.5, not 6"):
        g4.decompose_residual(cache, 6)


def test_a_cache_is_read_by_any_name_and_keeps_them_on_the_move() -> None:
    cache = run("ple", "Gemma4Bridge").to("cpu")
    for name in ("blocks.2.hook_resid_post", "blocks.2.hook_out", "model.layers.2", "model.language_model.layers.2"):
        assert name in cache
        assert cache[name] is cache["resid_post", 2]
    assert "blocks.2.hook_resid_pst" not in cache
    assert len(set(cache.keys())) == len(cache)


def test_gradients_have_the_names_too() -> None:
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple"))
    cache = bridge.run_with_cache(TOKENS, names_filter="model.layers.2", incl_bwd=True, return_type="loss")[1]
    assert cache["blocks.2.hook_resid_post_grad"] is cache["model.layers.2_grad"]
    assert cache["blocks.2.hook_out_grad"].abs().max() > 0
