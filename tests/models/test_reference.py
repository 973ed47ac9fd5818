"""The reference itself, held against transformers: values, edits and identities, on every architecture."""

import functools
import sys
import zlib

import pytest
import torch

from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4
from tests.models.reference import Reference, hook_names, reference

# Longer than the window of 8. With these, no edit below leaves a router within 5e-5 of choosing otherwise.
TOKENS = torch.randint(30, 2000, (2, 20), generator=torch.Generator().manual_seed(1))
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def eager(variant):
    model = tiny_gemma4(variant)
    model.set_attn_implementation("eager")
    return model


@functools.cache
def plain(variant):
    return reference(eager(variant), TOKENS)


def text_of(model):
    return getattr(model.model, "language_model", model.model)


def hugging_face(model, edits=None):
    """transformers' own forward, hooked wherever it has a boundary: what `reference` returns, of fewer names.

    Two taps are no hook points: a router's probabilities cannot be edited here (the layer discards them), and
    `moe.experts` is the output of the experts module.
    """
    edits, values, undo = edits or {}, {}, []
    text = text_of(model)

    def tap(name, value):
        values[name] = value.clone() if name not in edits else edits[name](value.clone())
        return values[name]

    def in_batch(name, value):
        """Some modules see the batch flat."""
        return tap(name, value.view(*TOKENS.shape, -1)).view(value.shape)

    def on_input(module, name):
        undo.append(module.register_forward_pre_hook(lambda _, args: (tap(name, args[0]), *args[1:])))

    def on_output(module, name):
        undo.append(module.register_forward_hook(lambda _, args, out: in_batch(name, out)))

    def on_router(module, block):
        names = [f"{block}.moe.hook_{name}" for name in ("router_probs", "expert_weights", "expert_indices")]

        def hook(_, args, outs):
            return tuple(in_batch(name, out) for name, out in zip(names, outs, strict=True))

        undo.append(module.register_forward_hook(hook))

    def attention(module, query, key, value, mask, scaling, **_):
        block = f"blocks.{module.layer_idx}.attn"
        key = tap(f"{block}.hook_k_used", key.transpose(1, 2)).transpose(1, 2)
        value = tap(f"{block}.hook_v_used", value.transpose(1, 2)).transpose(1, 2)
        key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
        scores = tap(f"{block}.hook_attn_scores", query @ key.transpose(2, 3) * scaling + mask)
        pattern = tap(f"{block}.hook_pattern", scores.softmax(-1))
        return (pattern @ value).transpose(1, 2), pattern

    project = getattr(text, "project_per_layer_inputs", None)
    on_output(text.embed_tokens, "hook_embed")
    on_output(text.norm, "ln_final.hook_out")
    for i, layer in enumerate(text.layers):
        block = f"blocks.{i}"
        on_input(layer, f"{block}.hook_resid_pre")
        on_output(layer, f"{block}.hook_resid_post")
        on_output(layer.post_attention_layernorm, f"{block}.hook_attn_out")
        on_output(layer.mlp, f"{block}.mlp.hook_out")
        on_output(layer.post_feedforward_layernorm, f"{block}.hook_mlp_out")
        if hasattr(layer, "post_per_layer_input_norm"):
            on_output(layer.post_per_layer_input_norm, f"{block}.hook_ple_out")
        if hasattr(layer, "router"):
            on_output(layer.router.proj, f"{block}.moe.hook_router_logits")
            on_router(layer.router, block)
            on_output(layer.experts, f"{block}.moe.experts")
            on_output(layer.post_feedforward_layernorm_1, f"{block}.moe.hook_dense_out")
            on_output(layer.post_feedforward_layernorm_2, f"{block}.moe.hook_experts_out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(text).__module__], "eager_attention_forward", attention)
        if project:
            patch.setattr(text, project.__name__, lambda *args: tap("hook_ple_inputs", project(*args)))
        logits = model(TOKENS, use_cache=False).logits
    for handle in undo:
        handle.remove()
    return Reference(logits, values)


def noise(name, value):
    """Another at every position: the same vector on every key leaves the softmax as it was."""
    return torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def moved(name, value):
    """A value of the name's own kind, elsewhere."""
    if name.endswith("hook_expert_indices"):
        return (value + 1) % 8
    if name.endswith("hook_router_probs"):
        return value * noise(name, value).exp()
    return value + noise(name, value)


def adding(vector):
    return lambda value: value + vector


def move(name):
    return {name: functools.partial(moved, name)}


def close(actual, expected, atol, name):
    """To `atol`, or that much of the largest value: on two threads, sums over experts come in another order."""
    atol *= max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def same(ours, theirs, atol, name=""):
    """The logits, and every value that transformers shows."""
    close(ours.logits, theirs.logits, atol, f"{name} logits")
    for each, value in theirs.values.items():
        if each in ours.values:
            close(ours.values[each], value, atol, f"{name} {each}")


@every_variant
def test_the_logits_are_those_of_transformers(variant):
    close(plain(variant).logits, eager(variant)(TOKENS).logits, 2e-5, "logits")


@every_variant
def test_the_values_are_those_of_transformers(variant):
    theirs = hugging_face(eager(variant))
    same(plain(variant), theirs, 1e-5)
    hidden = {name.split(".", 2)[-1] for name in plain(variant).values.keys() - theirs.values.keys()}
    assert hidden == {"hook_resid_mid", "hook_resid_prescale", *(["moe.hook_expert_outs"] if variant == "moe" else [])}


@every_variant
def test_every_edit_moves_the_logits_and_as_in_transformers(variant):
    model, theirs = eager(variant), hugging_face(eager(variant)).values
    for name in hook_names(model):
        ours = reference(model, TOKENS, move(name))
        assert (ours.logits - plain(variant).logits).abs().max() > 1e-3, name
        if name in theirs and not name.endswith("hook_router_probs"):
            same(ours, hugging_face(model, move(name)), 1e-4, name)


@every_variant
def test_edits_without_a_boundary_in_transformers_are_those_that_come_to_the_same(variant):
    model, values = eager(variant), plain(variant).values
    for i, layer in enumerate(text_of(model).layers):
        block, vector = f"blocks.{i}", noise(f"{i}", values["hook_embed"])
        pairs = {  # name: its edit, and transformers'
            "hook_resid_mid": (adding(vector), "hook_attn_out", adding(vector)),
            "hook_resid_prescale": (adding(vector), "hook_resid_post", adding(vector * layer.layer_scalar)),
        }
        if variant == "moe":
            logits = noise(f"{i}", values[f"{block}.moe.hook_router_logits"])
            outs = noise(f"{i}", values[f"{block}.moe.hook_expert_outs"])
            mix = (values[f"{block}.moe.hook_expert_weights"][..., None] * outs).sum(2)
            # p·eⁿ, renormalised, is the softmax of the logits plus n.
            pairs["moe.hook_router_probs"] = (lambda p, n=logits: p * n.exp(), "moe.hook_router_logits", adding(logits))
            pairs["moe.hook_expert_outs"] = (adding(outs), "moe.experts", adding(mix))
        for name, (edit, instead, other) in pairs.items():
            ours = reference(model, TOKENS, {f"{block}.{name}": edit})
            theirs = hugging_face(model, {f"{block}.{instead}": other})
            close(ours.logits, theirs.logits, 1e-4, f"{block}.{name}")


def test_expert_outs_are_each_expert_run_alone():
    model, values = eager("moe"), plain("moe").values
    for i, layer in enumerate(text_of(model).layers):
        x = layer.pre_feedforward_layernorm_2(values[f"blocks.{i}.hook_resid_mid"]).flatten(0, 1)
        chosen = values[f"blocks.{i}.moe.hook_expert_indices"].flatten(0, 1)
        for k in range(3):
            alone = layer.experts(x, chosen[:, [k]], torch.ones(len(x), 1)).view(*TOKENS.shape, -1)
            close(values[f"blocks.{i}.moe.hook_expert_outs"][:, :, k], alone, 1e-5, f"{i} {k}")


@every_variant
def test_the_identities_hold(variant):
    values, theirs = plain(variant).values, hugging_face(eager(variant)).values
    for i, layer in enumerate(text_of(eager(variant)).layers):
        block = {name.split(".", 2)[2]: value for name, value in values.items() if name.startswith(f"blocks.{i}.")}
        mid, prescale = block["hook_resid_mid"], block["hook_resid_prescale"]
        close(mid, block["hook_resid_pre"] + block["hook_attn_out"], 1e-5, "resid_mid")
        close(prescale, mid + block["hook_mlp_out"] + block.get("hook_ple_out", 0), 1e-5, "resid_prescale")
        close(block["hook_resid_post"], prescale * layer.layer_scalar, 1e-5, "resid_post")
        if variant == "moe":
            mix = (block["moe.hook_expert_weights"][..., None] * block["moe.hook_expert_outs"]).sum(2)
            close(mix, theirs[f"blocks.{i}.moe.experts"], 1e-5, "experts")


@pytest.mark.parametrize("name", ["hook_k_used", "hook_v_used"])
@pytest.mark.parametrize(("source", "sharing"), [(1, (3, 4)), (2, (5,))])
def test_an_edit_of_shared_keys_and_values_is_its_own_layers_alone(name, source, sharing):
    before = plain("ple")
    edited = f"blocks.{source}.attn.{name}"
    after = reference(eager("ple"), TOKENS, {edited: torch.Tensor.zero_})  # in place
    assert not after.values[edited].any() and before.values[edited].any()
    for i in sharing:
        assert torch.equal(before.values[f"blocks.{i}.attn.{name}"], before.values[edited])
        assert torch.equal(after.values[f"blocks.{i}.attn.{name}"], before.values[edited])
        assert not torch.equal(after.values[f"blocks.{i}.hook_resid_pre"], before.values[f"blocks.{i}.hook_resid_pre"])


def test_the_names_are_the_models_own():
    for variant in VARIANTS:
        names = hook_names(eager(variant))
        assert names == list(plain(variant).values)
        assert ("hook_ple_inputs" in names) == ("blocks.0.hook_ple_out" in names) == variant.startswith("ple")
        assert any(".moe." in name for name in names) == (variant == "moe")
    with pytest.raises(KeyError, match=r"blocks\.9\.hook_resid_post"):
        reference(eager("ple"), TOKENS, {"blocks.9.hook_resid_post": torch.zeros_like})
