"""A run that is taken up in the middle gives the logits of the whole model with hooks, on every shape and hook."""

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_gemma4.errors import UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.models.resume import runs_at
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

TOKENS = torch.arange(100, 126).view(2, 13)
HOOKS = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
OF_VARIANT = {"moe": ("moe.hook_router_logits",), "ple": ("hook_ple_out",), "ple_multimodal": ("hook_ple_out",)}
N = 3


def watch(value, hook):
    return None


def edit(value, hook):
    """Another edit in each of the copies, none of them small."""
    factor = torch.tensor([0.0, 2.0, -1.0]).repeat_interleave(len(value) // N)
    return value * factor.view(-1, *[1] * (value.ndim - 1))


def logits(run):
    return run.logits(torch.arange(run.end.shape[:2].numel()))


@torch.no_grad()
def check(model, hook, tokens=TOKENS, **arguments):
    runs = runs_at(model, hook, **arguments)
    assert runs.resumed
    clean = model.run_with_hooks(tokens, fwd_hooks=[], **arguments)
    torch.testing.assert_close(logits(runs.first(tokens, watch)), clean.flatten(0, 1), rtol=1e-5, atol=1e-5)
    edited = model.run_with_hooks(tokens.repeat(N, 1), fwd_hooks=[(hook, edit)], **arguments)
    for _ in range(2):  # what was kept is as good as new
        torch.testing.assert_close(logits(runs.again(N, edit)), edited.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert (edited[: len(tokens)] - clean).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_at_every_layer(variant):
    proxy = Gemma4ProxyLM(tiny_gemma4(variant), tiny_tokenizer())
    for layer in range(6):
        for hook in (*HOOKS, *OF_VARIANT.get(variant, ())):
            check(proxy, f"blocks.{layer}.{hook}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bridge_is_resumed_too(variant):
    bridge = Gemma4Bridge.boot(tiny_gemma4(variant), tiny_tokenizer())
    for hook in ("blocks.0.hook_resid_post", "blocks.2.hook_resid_mid", "blocks.4.hook_mlp_out", "blocks.5.hook_in"):
        check(bridge, hook)


@pytest.mark.parametrize("blocks", [1, 2])
def test_one_block_or_several_and_either_attention_function(blocks):
    for attention in ("eager", "sdpa"):
        proxy = Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer(), attn_implementation=attention)
        check(proxy, "model.layers.2", TOKENS[:blocks])


@pytest.mark.parametrize("model_class", [Gemma4ProxyLM, Gemma4Bridge.boot])
def test_documents_stay_isolated(model_class):
    tokens = TOKENS.clone()
    tokens[:, 0] = tokens[0, 5] = tokens[1, 8] = 2
    model = model_class(tiny_gemma4("ple"), tiny_tokenizer())
    check(model, "blocks.1.hook_resid_post", tokens, isolate_documents=True)
    with torch.no_grad():
        runs = runs_at(model, "blocks.1.hook_resid_post", isolate_documents=True)
        runs.first(tokens, watch)
        again = runs.again(1, watch).logits(torch.arange(5, 13))
        alone = model(tokens[:1, 5:])[0]
    torch.testing.assert_close(again, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_before_the_hook_run_once():
    proxy = Gemma4ProxyLM(tiny_gemma4("dense_keqv"), tiny_tokenizer())
    ran = []
    for i, layer in enumerate(proxy.model.model.language_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    runs = runs_at(proxy, "blocks.4.hook_mlp_out")
    runs.first(TOKENS, watch)
    runs.again(N, edit)
    assert ran == [0, 1, 2, 3, 4, 5, 4, 5]


@torch.no_grad()
@pytest.mark.parametrize("model_class", [Gemma4ProxyLM, Gemma4Bridge.boot])
def test_hooks_that_stand_elsewhere_count(model_class):
    """At the layer's own input too, where twice would be wrong, and behind the last layer."""
    model = model_class(tiny_gemma4("ple"), tiny_tokenizer())
    before = model(TOKENS)
    for name in ("blocks.1.hook_mlp_out", "blocks.3.hook_resid_pre", "blocks.5.hook_attn_out", "ln_final.hook_out"):
        model.add_hook(name, lambda value, hook: value * 1.5)
    check(model, "blocks.3.hook_resid_post")
    assert (model(TOKENS) - before).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("positions", ["standard", "rotary", "shortformer"])
def test_a_hooked_transformer_is_resumed(positions):
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=13, d_head=8, d_vocab=200, act_fn="gelu", device="cpu", seed=0,
        positional_embedding_type=positions, output_logits_soft_cap=5.0, initializer_range=0.5,
    )  # fmt: skip
    for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"):
        check(HookedTransformer(cfg), hook)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["hook_embed", "ln_final.hook_out", "lm_head"])
def test_the_whole_model_runs_for_hooks_outside_the_layers(hook):
    proxy = Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer())
    runs = runs_at(proxy, hook)
    assert not runs.resumed
    assert torch.equal(logits(runs.first(TOKENS, watch)), proxy(TOKENS).flatten(0, 1))
    edited = proxy.run_with_hooks(TOKENS.repeat(N, 1), fwd_hooks=[(hook, edit)])
    assert torch.equal(logits(runs.again(N, edit)), edited.flatten(0, 1))


def test_a_hook_that_the_model_lacks_is_named():
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post"):
        runs_at(Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer()), "blocks.1.hook_resid_psot")
