"""SAEs on the bridge: stock's five faults, each shown on stock and mended here, and everything else about attaching."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sae_lens_gemma4.errors import SAEError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.testing import tiny_gemma4
from tests.models.forms import BOTH_NAMES, FORMS, TOKENS, eager_logits, layer_2_output, random_sae

POST = "blocks.2.hook_resid_post"
THREE_NAMES = pytest.mark.parametrize("name", [POST, "blocks.2.hook_out", "model.language_model.layers.2"])


@pytest.fixture
def bridge() -> Gemma4Bridge:
    return Gemma4Bridge.boot(tiny_gemma4("ple"), model_name="google/gemma-4-E4B-it")


def stock_bridge() -> SAETransformerBridge:
    """sae_lens's own, without `boot`, which would install torchvision."""
    model = tiny_gemma4("ple")
    stock = build_bridge_from_module(model, "Gemma4ForCausalLM", hf_config=model.config)
    stock.__class__ = SAETransformerBridge
    stock._acts_to_saes, stock._transcoder_output_hooks = {}, {}
    return stock


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def firings(model: Any, name: str, run: Callable[[Any], Any]) -> int:
    """How often a hook that was added to `name` fires in `run`."""
    fired: list[str] = []
    model.add_hook(name, lambda value, hook: fired.append(hook.name))
    run(model)
    return len(fired)


# --- the five faults: what stock does, and what the bridge does


def fault_a(model: Any) -> int:
    """Aliases never fire."""
    fired: list[str] = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, hook: fired.append(hook.name))])
    return len(fired) + len(model.run_with_cache(TOKENS, names_filter=POST)[1].keys())


def fault_b(model: Any) -> int:
    """After `run_with_saes` an alias leads to a hook point that is no longer there."""
    model.run_with_saes(TOKENS, saes=random_sae(POST))
    return firings(model, POST, lambda m: m(TOKENS))


def fault_c(model: Any) -> int:
    """After a reset, the new hook point has a wrong name, and temporary hooks do not find it."""
    model.run_with_saes(TOKENS, saes=random_sae("blocks.2.hook_out"))
    fired: list[str] = []
    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.hook_out", lambda value, hook: fired.append(hook.name))])
    return len(fired)


def fault_d(model: Any) -> int:
    """A user's hook at the SAE's own point is lost while the SAE is attached, and after."""
    sae = random_sae("blocks.2.hook_out")

    def run(model: Any) -> None:
        model.add_sae(sae)
        model(TOKENS)
        model.reset_saes()
        model(TOKENS)

    return firings(model, "blocks.2.hook_out", run)


def fault_e(model: Any) -> int:
    """An SAE whose hook is unknown is skipped: 0 where the run goes on without it, 1 where it raises."""
    try:
        model.run_with_saes(TOKENS, saes=random_sae("blocks.2.hook_resid_pst"))
    except UnknownNameError:
        return 1
    return 0


@pytest.mark.parametrize(("fault", "here"), [(fault_a, 2), (fault_b, 1), (fault_c, 1), (fault_d, 2), (fault_e, 1)])
def test_five_faults_of_stock(bridge: Gemma4Bridge, fault: Callable[[Any], int], here: int) -> None:
    assert fault(stock_bridge()) == 0
    assert fault(bridge) == here


# --- attaching


@THREE_NAMES
@pytest.mark.parametrize("form", FORMS)
def test_an_sae_is_spliced_in(form: str, name: str) -> None:
    sae = random_sae(name)
    bridge = Gemma4Bridge.boot(FORMS[form]())
    expected = eager_logits(FORMS[form](), replace_layer_2=sae)
    assert (bridge.run_with_saes(TOKENS, saes=sae) - expected).abs().max() == 0
    assert (bridge(TOKENS) - eager_logits(FORMS[form]())).abs().max() == 0
    bridge.add_sae(sae)
    assert (bridge(TOKENS) - expected).abs().max() == 0
    assert bridge.acts_to_saes[name] is sae
    assert list(bridge.acts_to_saes) == [POST]
    bridge.reset_saes(name)
    assert (bridge(TOKENS) - eager_logits(FORMS[form]())).abs().max() == 0


@THREE_NAMES
def test_its_hooks_have_names_of_their_own(bridge: Gemma4Bridge, name: str) -> None:
    sae = random_sae(name)
    inner = {f"{n}.hook_sae_acts_post" for n in (POST, "blocks.2.hook_out", "model.layers.2")}
    with bridge.saes(sae):
        acts = sae.encode(layer_2_output())
        for key in (*inner, bridge.get_sae_hook_name(sae)):
            cache = bridge.run_with_cache(TOKENS, names_filter=key)[1]
            assert list(cache.keys()) == [f"{POST}.hook_sae_acts_post"]
            assert (cache[key] - acts).abs().max() == 0
        cut = bridge.run_with_hooks(TOKENS, fwd_hooks=[(key, lambda value, hook: value * 0)])
    assert (
        cut - eager_logits(tiny_gemma4("ple"), replace_layer_2=lambda out: sae.b_dec.expand_as(out))
    ).abs().max() == 0
    assert not any("hook_sae" in key for key in bridge.hook_dict)
    assert set(sae.run_with_cache(layer_2_output())[1]) >= {"hook_sae_input", "hook_sae_acts_post"}  # its own names


@BOTH_NAMES
def test_a_users_hook_at_the_saes_own_point_comes_first(bridge: Gemma4Bridge, name: str) -> None:
    """It sees what the model computed, and the SAE reads what it leaves."""
    sae, seen = random_sae(name), []
    with bridge.saes(sae), bridge.hooks([(name, lambda value, hook: (seen.append(value), value / 2)[1])]):
        logits, cache = bridge.run_with_cache(TOKENS, names_filter=[name, f"{name}.hook_sae_input"])
    assert (seen[0] - layer_2_output()).abs().max() == 0
    assert (cache[f"{name}.hook_sae_input"] - layer_2_output() / 2).abs().max() == 0
    assert (logits - eager_logits(tiny_gemma4("ple"), replace_layer_2=lambda out: sae(out / 2))).abs().max() == 0


def test_hook_points_stay_what_they_are(bridge: Gemma4Bridge) -> None:
    """One object by every name, before, while and after; and reshaping goes on (stock's new points reshape nothing)."""
    point, z = bridge.blocks[2].hook_out, "blocks.1.attn.hook_z"
    shape = bridge.run_with_cache(TOKENS, names_filter=z)[1][z].shape
    for _ in range(2):
        with bridge.saes([random_sae(POST), random_sae(z)]):
            assert bridge.blocks[2].hook_out is bridge.blocks[2].hook_resid_post is bridge.hook_point(POST) is point
            assert bridge.run_with_cache(TOKENS, names_filter=z)[1][z].shape == shape == (2, 12, 4, 16)
        assert bridge.blocks[2].hook_resid_post is point
        assert (point.name, type(point).__name__) == ("blocks.2.hook_out", "HookPoint")
    assert bridge.run_with_cache(TOKENS, names_filter=z)[1][z].shape == shape


def test_one_that_reads_the_same_hook_is_replaced_whatever_its_name(bridge: Gemma4Bridge) -> None:
    first, second = random_sae(POST), random_sae("model.layers.2")
    bridge.add_sae(first)
    during, after = bridge.run_with_saes(TOKENS, saes=second), bridge(TOKENS)
    assert (during - eager_logits(tiny_gemma4("ple"), replace_layer_2=second)).abs().max() == 0
    assert (after - eager_logits(tiny_gemma4("ple"), replace_layer_2=first)).abs().max() == 0
    bridge.add_sae(second)
    assert (bridge(TOKENS) - during).abs().max() == 0
    assert list(bridge.acts_to_saes.values()) == [second]


def test_nested_and_repeated(bridge: Gemma4Bridge) -> None:
    plain = bridge(TOKENS)
    one, two, three = random_sae("blocks.1.hook_resid_post"), random_sae(POST), random_sae(POST)
    with bridge.saes(one, use_error_term=True):
        with bridge.saes(three):
            assert bridge.acts_to_saes[POST] is three
            with bridge.saes(two, reset_saes_end=False):
                pass
            assert bridge.acts_to_saes[POST] is two
        assert list(bridge.acts_to_saes.values()) == [one]
        assert (bridge(TOKENS) - plain).abs().max() < 1e-4  # the error term
        with pytest.raises(ZeroDivisionError), bridge.saes(two):
            raise ZeroDivisionError
    assert bridge.acts_to_saes == {}
    assert (bridge(TOKENS) - plain).abs().max() == 0


def test_the_error_term_in_run_with_hooks_with_saes(bridge: Gemma4Bridge) -> None:
    """Stock forgets it there (sae_transformer_bridge.py:379)."""
    run: dict[str, Any] = {"saes": random_sae(POST), "fwd_hooks": [], "use_error_term": True}
    assert (bridge.run_with_hooks_with_saes(TOKENS, **run) - bridge(TOKENS)).abs().max() < 1e-4
    assert (stock_bridge().run_with_hooks_with_saes(TOKENS, **run) - bridge(TOKENS)).abs().max() > 1e-2


# --- transcoders


def test_a_transcoder_reads_one_point_and_writes_to_another(bridge: Gemma4Bridge) -> None:
    transcoder = random_sae("blocks.1.hook_resid_post", POST)
    inputs: list[torch.Tensor] = []
    model = tiny_gemma4("ple")
    model.model.layers[1].register_forward_hook(lambda _m, _args, out: inputs.append(out.clone()))
    expected = eager_logits(model, replace_layer_2=lambda out: transcoder(inputs[-1]))
    fired: list[str] = []
    for name in ("blocks.1.hook_resid_post", POST):
        bridge.add_hook(name, lambda value, hook: fired.append(hook.name))
    assert (bridge.run_with_saes(TOKENS, saes=transcoder) - expected).abs().max() == 0
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0
    assert fired == ["blocks.1.hook_out", "blocks.2.hook_out"] * 2  # stock's reset takes the first one's hooks away


def test_a_transcoder_reads_what_an_sae_leaves(bridge: Gemma4Bridge) -> None:
    """Where the MLP's input is an SAE's output, so is the input of what stands in for the MLP."""
    read, written = "blocks.2.ln2.hook_out", "blocks.2.mlp.hook_out"
    sae, transcoder = random_sae("blocks.2.ln2.hook_in"), random_sae(read, written)
    with bridge.saes([sae, transcoder]):
        inner = [f"{written}.hook_sae_input", f"{written}.hook_sae_output"]
        cache = bridge.run_with_cache(TOKENS, names_filter=[read, *inner])[1]
        with pytest.raises(SAEError, match=r"attached as blocks\.2\.ln2\.hook_out already writes to blocks\.2\.mlp\.h"):
            bridge.add_sae(random_sae(written))
    assert (cache[f"{written}.hook_sae_input"] - cache[read]).abs().max() == 0
    assert (cache[f"{written}.hook_sae_output"] - transcoder(cache[read])).abs().max() == 0
    later = random_sae("blocks.1.hook_resid_post", POST)
    bridge.add_sae(later)
    writer = random_sae("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    bridge.add_sae(writer)  # writes where `later` reads
    name = "blocks.1.hook_resid_post.hook_sae_output"
    cache = bridge.run_with_cache(TOKENS, names_filter=[name, f"{POST}.hook_sae_input"])[1]
    assert (cache[f"{POST}.hook_sae_input"] - cache[name]).abs().max() == 0


# --- what is refused, and what is said


def test_saes_that_cannot_be_attached(bridge: Gemma4Bridge) -> None:
    with pytest.raises(SAEError, match="no hook_name"):
        bridge.add_sae(random_sae(None))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'blocks\.2\.hook_resid_post'"):
        bridge.add_sae(random_sae("blocks.2.hook_resid_pst"))
    with pytest.raises(UnknownNameError, match=r"Unknown hook 'model\.layers\.9'"):
        bridge.run_with_saes(TOKENS, saes=[random_sae(POST), random_sae("model.layers.9")])
    assert bridge.acts_to_saes == {}
    bridge.add_sae(random_sae(POST))
    with pytest.raises(UnknownNameError, match=r"Unknown attached SAE .*1.* Did you mean 'blocks.2"):
        bridge.reset_saes("blocks.1.hook_resid_post")  # stock logs a line
    bridge.reset_saes()


def test_one_sae_is_in_one_place_at_a_time(bridge: Gemma4Bridge) -> None:
    """Its hook points are its own and bear the names of one place; stock's second attaching renames the first's."""
    sae, other = random_sae(POST), Gemma4Bridge.boot(tiny_gemma4("ple"))
    bridge.add_sae(sae)
    with pytest.raises(SAEError, match=r"attached at blocks\.2\.hook_resid_post already: detach it .* copy\.deepcopy"):
        other.add_sae(sae)
    own = random_sae(POST)
    other.add_sae(own)
    with pytest.raises(SAEError, match="already"):
        other.add_sae(sae)
    assert other.acts_to_saes[POST] is own  # what failed took nothing away
    other.add_sae(copy.deepcopy(sae))
    bridge.add_sae(sae)  # again, in its own place
    bridge.reset_saes()
    name = f"{POST}.hook_sae_acts_post"
    assert (other.run_with_cache(TOKENS, names_filter=name)[1][name] - sae.encode(layer_2_output())).abs().max() == 0
    with pytest.raises(SAEError, match=r"Two of these SAEs read blocks\.2\.hook_resid_post"):
        bridge.run_with_saes(TOKENS, saes=[random_sae(POST), random_sae("model.layers.2", "blocks.3.hook_resid_post")])
    assert bridge.acts_to_saes == {}


def test_widths_and_kinds_that_do_not_fit(bridge: Gemma4Bridge) -> None:
    wide = StandardSAE(StandardSAEConfig(d_in=65, d_sae=8, metadata=random_sae(POST).cfg.metadata))
    with pytest.raises(SAEError, match=r"blocks\.2\.hook_resid_post is 64 wide; this SAE reads 65"):
        bridge.add_sae(wide)
    with pytest.raises(SAEError, match="A str cannot be attached"):
        bridge.add_sae("x")  # type: ignore[arg-type]
    with pytest.raises(SAEError, match="A str cannot be attached"):
        bridge.run_with_saes(TOKENS, saes=["x"])  # type: ignore[list-item]
    backwards = random_sae("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
    with pytest.raises(SAEError, match=r"writes before blocks\.3\.hook_out, which it reads, is computed"):
        bridge.run_with_saes(TOKENS, saes=backwards)
    moe = Gemma4Bridge.boot(tiny_gemma4("moe"))
    for name in ("blocks.2.moe.hook_expert_indices", "blocks.2.moe.hook_router_probs"):
        with pytest.raises(SAEError, match=rf"reads 64 dimensions; {name} is torch"):
            moe.run_with_saes(TOKENS, saes=random_sae(name))
    assert (moe(TOKENS) - eager_logits(tiny_gemma4("moe"))).abs().max() == 0


@pytest.mark.parametrize("name", ["blocks.2.attn.hook_z", "blocks.0.attn.hook_k_used", "blocks.2.moe.hook_expert_outs"])
def test_heads_are_one_axis_to_an_sae_that_is_so_wide(name: str) -> None:
    """As stock's store flattens them for training; single experts' outputs are as wide as the stream already."""
    moe = Gemma4Bridge.boot(tiny_gemma4("moe"))
    value = moe.run_with_cache(TOKENS, names_filter=name)[1][name]
    d_in = 64 if name.endswith("outs") else value.shape[2:].numel()
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=32, metadata=random_sae(name).cfg.metadata))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.1)
    by_hand = sae(value if d_in == 64 and value.shape[-1] == 64 else value.flatten(2)).reshape(value.shape)
    expected = moe.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: by_hand)])
    torch.testing.assert_close(moe.run_with_saes(TOKENS, saes=sae), expected, rtol=0, atol=1e-5)


def test_a_copy_of_a_bridge_is_a_bridge_of_its_own(bridge: Gemma4Bridge) -> None:
    twin = copy.deepcopy(bridge)
    plain = bridge(TOKENS)
    for name in ("blocks.2.hook_resid_mid", "hook_ple_inputs", "blocks.4.attn.hook_k_used", POST):
        with twin.hooks([(name, lambda value, hook: value.roll(1, 1) * 0.5)]):
            assert (twin(TOKENS) - plain).abs().max() > 1e-2, name
            assert (bridge(TOKENS) - plain).abs().max() == 0, name
    with bridge.saes(random_sae(POST)):
        assert (twin(TOKENS) - plain).abs().max() == 0


def of_model(name: str | None) -> StandardSAE:
    sae = random_sae(POST)
    sae.cfg.metadata.model_name = name
    return sae


def test_a_base_models_sae_on_the_tuned_model_warns_once(bridge: Gemma4Bridge) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            bridge.run_with_saes(TOKENS, saes=of_model("google/gemma-4-E4B"))
    [warning] = said
    assert "was trained on google/gemma-4-E4B and is attached to google/gemma-4-E4B-it" in str(warning.message)
    assert "sae-lens-gemma4 train" in str(warning.message)
    with pytest.warns(UserWarning, match="trained on google/gemma-4-31B-it .* mean nothing there"):
        bridge.add_sae(of_model("google/gemma-4-31B-it"))


@pytest.mark.parametrize(
    "name", ["google/gemma-4-E4B-it", "gemma-4-e4b-it", "/models/gemma-4-E4B-it", None, "my-model"]
)
def test_an_sae_of_the_same_or_an_unknown_model_does_not(bridge: Gemma4Bridge, name: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge.add_sae(of_model(name))


# --- numbers


def test_gradients_reach_the_latents(bridge: Gemma4Bridge) -> None:
    """By a forward hook that keeps the latents, and by a backward hook; against the SAE run by hand."""
    sae, kept, seen = random_sae(POST), [], []
    name = f"{POST}.hook_sae_acts_post"

    def keep(value: torch.Tensor, hook: Any) -> None:
        value.retain_grad()
        kept.append(value)

    with torch.enable_grad(), bridge.saes(sae):
        hooks = {"fwd_hooks": [(name, keep)], "bwd_hooks": [(name, lambda grad, hook: seen.append(grad.clone()))]}
        with bridge.hooks(**hooks):
            bridge(TOKENS)[:, -1].logsumexp(-1).sum().backward()
    assert (seen[0] - kept[0].grad).abs().max() == 0
    model = tiny_gemma4("ple")
    model.set_attn_implementation("eager")
    acts: list[torch.Tensor] = []

    def splice(_m: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        acts.append(sae.encode(out))
        acts[0].retain_grad()
        return sae.decode(acts[0])

    model.model.layers[2].register_forward_hook(splice)
    with torch.enable_grad():
        model(TOKENS).logits[:, -1].logsumexp(-1).sum().backward()
    assert (kept[0].grad - acts[0].grad).abs().max() <= 1e-5 * acts[0].grad.abs().max()
    assert acts[0].grad.abs().max() > 0


def test_a_float32_sae_in_a_bfloat16_model(bridge: Gemma4Bridge) -> None:
    """Stock hands the SAE's float32 on, and the next layer fails."""
    half = Gemma4Bridge.boot(tiny_gemma4("ple"), dtype="bfloat16")
    sae: SAE[Any] = random_sae(POST)
    logits = half.run_with_saes(TOKENS, saes=sae)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_an_sae_on_the_embeddings(bridge: Gemma4Bridge) -> None:
    """Stock does not resolve `hook_embed` and attaches nothing."""
    sae = random_sae("hook_embed")
    model = tiny_gemma4("ple")
    model.model.embed_tokens.register_forward_hook(lambda _m, _args, out: sae(out))
    assert (bridge.run_with_saes(TOKENS, saes=sae) - eager_logits(model)).abs().max() == 0
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.1.hook_attn_out", "blocks.1.hook_resid_prescale"])
def test_an_sae_at_the_other_points_edits_as_a_hook_does(bridge: Gemma4Bridge, name: str) -> None:
    sae = random_sae(name)
    expected = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: sae(value))])
    assert (bridge.run_with_saes(TOKENS, saes=sae) - expected).abs().max() == 0
    assert (expected - bridge(TOKENS)).abs().max() > 1e-2
