"""The proxy against the model itself, hooked by hand."""

import threading

import pytest
import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_gemma4.errors import ConfigError, ModelError, UnknownNameError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

VARIANTS = ["ple", "ple_multimodal", "dense_keqv", "moe", "unified"]


def decoder(model):
    return getattr(model.model, "language_model", model.model)


@pytest.fixture(scope="module", params=VARIANTS)
def proxy(request):
    return Gemma4ProxyLM(tiny_gemma4(request.param), tiny_tokenizer())


@pytest.fixture(scope="module")
def ple():
    return Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer())


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(30, 2000, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def record(model, tokens, modules, side="out"):
    """Values at modules by plain torch hooks."""
    seen = {}
    handles = []
    for key, module in modules.items():
        if side == "out":
            handles.append(
                module.register_forward_hook(lambda _m, _a, out, key=key: seen.__setitem__(key, out.clone()))
            )
        else:
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, key=key: seen.__setitem__(key, args[0].clone()))
            )
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_logits_are_the_model_s_own(proxy, tokens):
    expected = proxy.model(input_ids=tokens, use_cache=False).logits
    assert torch.equal(proxy(tokens), expected)


@torch.no_grad()
def test_every_value_is_what_a_hand_made_hook_sees(proxy, tokens):
    layers = decoder(proxy.model).layers
    _, cache = proxy.run_with_cache(tokens)
    outputs = {
        "hook_resid_post": "",
        "hook_attn_out": "post_attention_layernorm",
        "hook_mlp_out": "post_feedforward_layernorm",
        "mlp.hook_out": "mlp",
        "hook_ple_out": "post_per_layer_input_norm",
    }
    checked = 0
    for hook, path in outputs.items():
        modules = {}
        for i, layer in enumerate(layers):
            module = layer if not path else getattr(layer, path, None)
            assert (module is not None) == (f"blocks.{i}.{hook}" in cache)
            if module is not None:
                modules[f"blocks.{i}.{hook}"] = module
        for name, value in record(proxy.model, tokens, modules).items():
            assert torch.equal(cache[name], value)
            checked += 1
    for name, value in record(
        proxy.model, tokens, {f"blocks.{i}.hook_resid_pre": layer for i, layer in enumerate(layers)}, side="in"
    ).items():
        assert torch.equal(cache[name], value)
        checked += 1
    final = record(proxy.model, tokens, {"n": decoder(proxy.model).norm})["n"]
    assert torch.equal(cache["ln_final.hook_out"], final)
    assert checked >= 5 * len(layers)


@torch.no_grad()
def test_the_layer_equation_holds(proxy, tokens):
    """resid_post = (resid_pre + attn_out + mlp_out + ple_out) · layer_scalar."""
    _, cache = proxy.run_with_cache(tokens)
    for i, layer in enumerate(decoder(proxy.model).layers):
        parts = [cache[f"blocks.{i}.{h}"] for h in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        if f"blocks.{i}.hook_ple_out" in cache:
            parts.append(cache[f"blocks.{i}.hook_ple_out"])
        torch.testing.assert_close(
            sum(parts) * layer.layer_scalar, cache[f"blocks.{i}.hook_resid_post"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_out"])
@torch.no_grad()
def test_an_edit_moves_the_logits_as_the_same_edit_by_hand(proxy, tokens, hook):
    layer = decoder(proxy.model).layers[1]
    noise = torch.randn(2, 12, proxy.geometry.d_model)
    path = {
        "hook_attn_out": "post_attention_layernorm",
        "hook_mlp_out": "post_feedforward_layernorm",
        "mlp.hook_out": "mlp",
    }.get(hook)
    module = getattr(layer, path) if path else layer
    if hook == "hook_resid_pre":
        handle = module.register_forward_pre_hook(lambda _m, args: (args[0] + noise, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _a, out: out + noise)
    by_hand = proxy.model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    edited = proxy.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{hook}", lambda acts, hook: acts + noise)])
    assert torch.equal(edited, by_hand)
    assert (edited - proxy(tokens)).abs().max() > 1e-2


def test_both_names_of_a_hook_are_one_hook(ple, tokens):
    _, cache = ple.run_with_cache(tokens, names_filter=["model.layers.2", "blocks.1.hook_resid_post"])
    assert set(cache) == {"blocks.2.hook_resid_post", "blocks.1.hook_resid_post"}
    for name in ("model.layers.2", "model.language_model.layers.2", "blocks.2.hook_resid_post"):
        assert name in cache
        assert torch.equal(cache[name], cache["blocks.2.hook_resid_post"])
    calls = []
    ple.run_with_hooks(tokens, fwd_hooks=[("model.language_model.layers.2", lambda a, hook: calls.append(hook.name))])
    assert calls == ["blocks.2.hook_resid_post"]


def test_any_module_can_be_hooked_by_its_path(ple, tokens):
    name = "model.language_model.layers.1.mlp.gate_proj"
    _, cache = ple.run_with_cache(tokens, names_filter=name)
    expected = record(ple.model, tokens, {"g": decoder(ple.model).layers[1].mlp.gate_proj})["g"]
    assert torch.equal(cache["model.layers.1.mlp.gate_proj"], expected)


def test_nothing_is_left_on_the_model_after_a_forward(ple, tokens):
    ple.run_with_cache(tokens, names_filter=["blocks.1.hook_resid_post"], stop_at_layer=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ple.model.modules())


def test_gradients_flow_to_backward_hooks(ple, tokens):
    grads = {}
    with ple.hooks(bwd_hooks=[("blocks.1.hook_resid_post", lambda grad, hook: grads.update(g=grad.clone()))]):
        ple(tokens, return_type="loss").backward()
    resid = {}

    def keep(_module, _args, out):
        out.retain_grad()
        resid["r"] = out

    handle = decoder(ple.model).layers[1].register_forward_hook(keep)
    logits = ple.model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(grads["g"], resid["r"].grad)


@torch.no_grad()
def test_arguments_reach_the_model(ple, tokens):
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    expected = ple.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    masked = ple(tokens, attention_mask=mask)
    assert torch.equal(masked, expected)
    assert not torch.allclose(masked[:, -1], ple(tokens)[:, -1])
    with pytest.raises(UnknownNameError, match="attention_mask"):
        ple(tokens, attention_msk=mask)


@torch.no_grad()
def test_the_loss_is_in_float32_for_a_bf16_model(tokens):
    proxy = Gemma4ProxyLM(tiny_gemma4("ple").to(torch.bfloat16), tiny_tokenizer())
    logits = proxy(tokens)
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    loss = proxy(tokens, return_type="loss")
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(expected)) < 1e-5


def test_tokens_never_start_with_a_bos_they_were_not_asked_for(ple):
    bos = ple.tokenizer.bos_token_id
    assert ple.tokenizer("import os")["input_ids"][0] == bos
    assert bos not in ple.to_tokens("import os", prepend_bos=False, truncate=False, move_to_device=False)
    assert ple.to_tokens("import os", prepend_bos=True)[0, 0] == bos
    with pytest.raises(ConfigError, match="different lengths"):
        ple.to_tokens(["a", "a much longer text than that"])


@torch.no_grad()
def test_stock_s_activations_store_sees_no_bos_in_mid_context(ple):
    dataset = Dataset.from_dict({"text": ["import os and import sys again and again " * 5] * 40})
    store = ActivationsStore(
        model=ple, dataset=dataset, streaming=False, hook_name="blocks.1.hook_resid_post", hook_head_index=None,
        context_size=32, d_in=ple.geometry.d_model, n_batches_in_buffer=2, total_training_tokens=32,
        store_batch_size_prompts=2, train_batch_size_tokens=32, prepend_bos=True, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32", sequence_separator_token=None,
    )  # fmt: skip
    blocks = store.get_batch_tokens(8)
    assert (blocks[:, 0] == ple.tokenizer.bos_token_id).all()
    assert not (blocks[:, 1:] == ple.tokenizer.bos_token_id).any()
    acts = store.get_activations(blocks)
    _, cache = ple.run_with_cache(blocks)
    assert torch.equal(acts, cache["blocks.1.hook_resid_post"])


def test_an_unknown_hook_raises_everywhere_with_the_nearest(ple, tokens):
    for call in (
        lambda: ple.run_with_cache(tokens, names_filter=["blocks.1.hook_resid_pst"]),
        lambda: ple.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pst", lambda a, hook: a)]),
        lambda: ple.add_hook("blocks.1.hook_resid_pst", lambda a, hook: a),
        lambda: Gemma4ProxyLM(ple.model, ple.tokenizer, hook_names=["blocks.1.hook_resid_pst"]),
    ):
        with pytest.raises(UnknownNameError, match=r"Did you mean 'blocks.1.hook_resid_post'"):
            call()
    with pytest.raises(UnknownNameError):
        ple.run_with_cache(tokens, names_filter=["blocks.99.hook_resid_post"])


def test_a_model_that_is_not_gemma_4_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10))
    with pytest.raises(ModelError, match="gpt2"):
        Gemma4ProxyLM(gpt2, tiny_tokenizer())


def test_wrong_arguments_are_named(ple, tokens):
    with pytest.raises(ConfigError, match="return_type"):
        ple(tokens, return_type="nonsense")
    with pytest.raises(ConfigError, match="stop_at_layer"):
        ple(tokens, stop_at_layer=99)


# --- one run at a time


@torch.no_grad()
def test_threads_take_turns(tokens):
    """Two proxies on one model, hooked differently; without turns they leave the model itself changed."""
    model = tiny_gemma4("ple")
    plain = model(input_ids=tokens, use_cache=False).logits
    names = ["blocks.2.hook_resid_mid", "blocks.3.attn.hook_v_used", "blocks.1.hook_attn_out", "hook_ple_inputs"]
    proxies = [Gemma4ProxyLM(model, tiny_tokenizer()) for _ in names]

    def edit(proxy, name):
        return proxy.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value * 0.5)])

    expected = [edit(proxy, name) for proxy, name in zip(proxies, names, strict=True)]
    wrong = []

    def work(proxy, name, theirs):
        with torch.no_grad():
            wrong.extend(name for _ in range(8) if not torch.equal(edit(proxy, name), theirs))

    threads = [threading.Thread(target=work, args=args) for args in zip(proxies, names, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, plain)


def test_a_hook_that_runs_its_own_model_is_refused_and_leaves_nothing(tokens):
    model = tiny_gemma4("ple")
    outer, inner = Gemma4ProxyLM(model, tiny_tokenizer()), Gemma4ProxyLM(model, tiny_tokenizer())
    with pytest.raises(ConfigError, match="A hook cannot run the model that it hooks"):
        outer.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_mid", lambda value, hook: inner(tokens))])
    assert torch.equal(inner(tokens), tiny_gemma4("ple")(input_ids=tokens, use_cache=False).logits)


def test_gradient_checkpointing_and_hooks_are_refused(tokens):
    """It would compute the layers again after the taps are gone, and the gradients would be others."""
    model = tiny_gemma4("ple").train()
    model.gradient_checkpointing_enable()
    proxy = Gemma4ProxyLM(model, tiny_tokenizer())
    proxy(tokens).sum().backward()
    with pytest.raises(ConfigError, match="Hooks and gradient checkpointing cannot go together"):
        proxy.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_attn_out", lambda value, hook: value * 2)])
