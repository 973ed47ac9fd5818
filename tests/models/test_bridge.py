"""The bridge against Hugging Face's own forward, against stock where stock goes wrong, and against wrong input."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    Gemma4TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from sae_lens_gemma4.errors import ModelError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer
from tests.models.forms import BOTH_NAMES, FORMS, TOKENS, eager_logits, layer_2_output, random_sae


@pytest.fixture
def bridge() -> Gemma4Bridge:
    return Gemma4Bridge.boot(tiny_gemma4("ple"))


# --- building one


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_exactly_eager_transformers(form: str) -> None:
    model = FORMS[form]()
    bridge = Gemma4Bridge.boot(model)
    assert type(bridge) is Gemma4Bridge
    assert isinstance(bridge, SAETransformerBridge)
    with torch.no_grad():
        assert (bridge(TOKENS) - eager_logits(FORMS[form]())).abs().max() == 0
        assert (bridge(TOKENS) - FORMS[form]()(TOKENS).logits).abs().max() < 1e-4  # sdpa
    assert bridge.original_model is not model
    assert not any(m.training for m in bridge.modules())
    assert (bridge.cfg.n_layers, bridge.cfg.d_model, bridge.cfg.device) == (6, 64, "cpu")


def test_the_passed_model_is_not_changed() -> None:
    """Stock wraps its modules, switches it to eager attention and gives its head a bias."""
    model = tiny_gemma4("ple_multimodal")
    config, logits = copy.deepcopy(model.config), model(TOKENS).logits
    modules, state = dict(model.named_modules()), {k: t.data_ptr() for k, t in model.state_dict().items()}
    bridge = Gemma4Bridge.boot(model)
    bridge.run_with_cache(TOKENS)
    bridge.run_with_saes(TOKENS, saes=random_sae("blocks.2.hook_resid_post"))
    assert dict(model.named_modules()) == modules
    assert {k: t.data_ptr() for k, t in model.state_dict().items()} == state
    assert model.config.to_dict() == config.to_dict()
    for c in (model.config, model.config.text_config, model.config.vision_config):
        assert c._attn_implementation == "sdpa"
    assert (model(TOKENS).logits - logits).abs().max() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {p.data_ptr() for p in model.parameters()} < {p.data_ptr() for p in bridge.original_model.parameters()}


def test_two_bridges_of_one_model_do_not_meet() -> None:
    model = tiny_gemma4("ple")
    first, second = Gemma4Bridge.boot(model), Gemma4Bridge.boot(model)
    first.add_hook("blocks.2.hook_resid_post", lambda value, hook: value * 0)
    assert (second(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0
    assert (first(TOKENS) - second(TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_vision_hooks_exist_where_there_is_vision(form: str) -> None:
    bridge = Gemma4Bridge.boot(FORMS[form]())
    parts = {name.split(".")[0] for name in bridge.hook_dict if name.startswith("vision")}
    expected = {"ple_multimodal": {"vision_encoder", "vision_projector"}, "unified": {"vision_projector"}}
    assert parts == expected.get(form, set())
    assert bridge.cfg.is_multimodal == bool(parts)


def test_images_go_through_the_bridge() -> None:
    ids = tiny_tokenizer()("<|image><|image|><|image|><|image|><|image|><image|>so", return_tensors="pt")["input_ids"]
    image = {
        "pixel_values": torch.rand(1, 16, 48),
        "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
        "mm_token_type_ids": (ids == 18).long(),
    }
    model = tiny_gemma4("ple_multimodal")
    model.set_attn_implementation("eager")
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple_multimodal"))
    soft_tokens: list[torch.Tensor] = []
    model.model.embed_vision.register_forward_hook(lambda _m, _args, out: soft_tokens.append(out))
    with torch.no_grad():
        expected = model(input_ids=ids, **image).logits
        _, cache = bridge.run_with_cache(ids, names_filter="vision_projector.hook_out", **image)
        assert (cache["vision_projector.hook_out"] - soft_tokens[0]).abs().max() == 0
        assert (bridge(ids, **image) - expected).abs().max() == 0


def test_boot_by_name_and_by_stocks_name(tmp_path: Path) -> None:
    tiny_gemma4("ple_multimodal", seed=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    expected = eager_logits(tiny_gemma4("ple_multimodal", seed=3))
    for bridge in (
        Gemma4Bridge.boot(tmp_path),
        Gemma4Bridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32),
        Gemma4Bridge.boot_transformers("x", hf_model=tiny_gemma4("ple_multimodal", seed=3), tokenizer=tiny_tokenizer()),
    ):
        assert type(bridge) is Gemma4Bridge
        assert bridge.tokenizer.decode(bridge.to_tokens("A list.")[0]) == "<bos>A list."
        with torch.no_grad():
            assert (bridge(TOKENS) - expected).abs().max() == 0
    assert bridge.cfg.model_name == "x"
    assert Gemma4Bridge.boot(tmp_path).cfg.model_name == str(tmp_path)


def test_what_is_not_a_gemma4_language_model() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(ModelError, match="This is not Gemma 4: model_type 'gpt2'"):
        Gemma4Bridge.boot(gpt2)
    with pytest.raises(ModelError, match="cannot be built on a Gemma4TextModel: it needs a model with a language-mod"):
        Gemma4Bridge.boot(Gemma4TextModel(tiny_gemma4("ple").config))
    with pytest.raises(ModelError, match="not Gemma 4"):
        Gemma4Bridge.boot(None)  # type: ignore[arg-type]


def test_subclasses_are_wrapped_as_what_they_extend() -> None:
    model = tiny_gemma4("ple")
    model.__class__ = type("MyGemma", (type(model),), {})
    assert (Gemma4Bridge.boot(model)(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


def test_a_model_in_memory_in_another_dtype_is_a_copy() -> None:
    model = tiny_gemma4("ple")
    assert Gemma4Bridge.boot(model, device="cpu", dtype="float32").cfg.dtype == torch.float32
    bridge = Gemma4Bridge.boot(model, dtype="bfloat16")
    assert {p.dtype for p in bridge.original_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert bridge.cfg.dtype == torch.bfloat16
    with pytest.raises(UnknownNameError, match=r"Unknown dtype 'bfloat61'\. Did you mean 'bfloat16'"):
        Gemma4Bridge.boot(model, dtype="bfloat61")
    with pytest.raises(ModelError, match="revision: these apply to a model loaded by name"):
        Gemma4Bridge.boot(model, revision="main")


@pytest.mark.parametrize("form", FORMS)
def test_another_attention_than_eager(form: str) -> None:
    model = FORMS[form]()
    bridge = Gemma4Bridge.boot(model, attn_implementation="sdpa")
    with torch.no_grad():
        assert (bridge(TOKENS) - model(TOKENS).logits).abs().max() == 0
    with pytest.raises(ModelError, match="attn_implementation='flesh' cannot be used"):
        Gemma4Bridge.boot(model, attn_implementation="flesh")


# --- the tokenizer


def in_memory_tokenizer() -> PreTrainedTokenizerFast:
    backend = copy.deepcopy(tiny_tokenizer().backend_tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"loaded {args}")

    for name in ("AutoTokenizer", "AutoProcessor", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)


@pytest.mark.parametrize("named", [False, True])
def test_a_tokenizer_is_used_as_it_is(no_loading: None, named: bool) -> None:
    """Stock loads the one with a name anew and fails at the one without."""
    tokenizer = tiny_tokenizer() if named else in_memory_tokenizer()
    assert ("name_or_path" in tokenizer.init_kwargs) == named
    before = (copy.deepcopy(tokenizer.init_kwargs), tokenizer.pad_token, tokenizer.backend_tokenizer.to_str())
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple"), tokenizer)
    expected = tiny_tokenizer()("A list is a sequence.")["input_ids"]
    assert bridge.to_tokens("A list is a sequence.").tolist() == [expected]
    assert bridge.to_tokens("A list is a sequence.", prepend_bos=False).tolist() == [expected[1:]]
    assert bridge.to_tokens(["A list is a sequence.", "A list"]).shape == (2, len(expected))
    assert bridge.tokenizer is not tokenizer
    assert (tokenizer.init_kwargs, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str()) == before


def test_stock_refuses_a_tokenizer_in_memory() -> None:
    model = tiny_gemma4("ple")
    with pytest.raises(KeyError, match="name_or_path"):
        build_bridge_from_module(model, "Gemma4ForCausalLM", hf_config=model.config, tokenizer=in_memory_tokenizer())


def test_a_tokenizer_that_adds_no_bos_gets_one_from_to_tokens(no_loading: None) -> None:
    tokenizer = in_memory_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("A list")["input_ids"][0] != 2
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple"), tokenizer)
    assert bridge.to_tokens("A list").tolist() == [tiny_tokenizer()("A list")["input_ids"]]


def test_no_tokenizer_loads_none(no_loading: None) -> None:
    bridge = Gemma4Bridge.boot(tiny_gemma4("ple"))
    assert bridge.tokenizer is None
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


def test_a_processor_is_no_tokenizer() -> None:
    with pytest.raises(ModelError, match=r"of a processor, pass its \.tokenizer"):
        Gemma4Bridge.boot(tiny_gemma4("ple"), object())  # type: ignore[arg-type]


# --- nothing is installed


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every way to start a program raises and is recorded; there is no torchvision and no processor."""
    started: list[Any] = []

    def refuse(command: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(command)
        raise AssertionError(f"tried to run {command}")

    for name in ("check_call", "check_output", "call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setitem(sys.modules, "torchvision", None)

    def no_processor(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no such processor")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", no_processor)
    return started


def test_boot_runs_no_installer(installs: list[Any]) -> None:
    for variant in ("ple_multimodal", "unified"):
        bridge = Gemma4Bridge.boot(tiny_gemma4(variant), tiny_tokenizer())
        assert (bridge(TOKENS) - eager_logits(tiny_gemma4(variant))).abs().max() == 0
        Gemma4Bridge.boot_transformers("any-name", hf_model=tiny_gemma4(variant), tokenizer=tiny_tokenizer())
    assert installs == []


def test_stock_would_run_one(installs: list[Any]) -> None:
    """If this fails, transformer_lens has stopped installing torchvision, and the test above guards nothing."""
    for stock in (TransformerBridge, SAETransformerBridge):
        installs.clear()
        stock.boot_transformers("any-name", hf_model=tiny_gemma4("ple_multimodal"), tokenizer=tiny_tokenizer())
        assert [command[-4:] for command in installs] == [["pip", "install", "torchvision", "-q"]]


# --- hooks fire, by either name


@BOTH_NAMES
@pytest.mark.parametrize("as_list", [False, True])
def test_run_with_cache(bridge: Gemma4Bridge, name: str, as_list: bool) -> None:
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(TOKENS, names_filter=[name] if as_list else name)
    assert (cache[name] - layer_2_output()).abs().max() == 0
    assert (logits - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


DEAD_IN_STOCK = (
    *(f"attn.hook_{name}" for name in ("attn_in", "q_input", "k_input", "v_input", "hidden_states", "result")),
    *("attn.hook_rot_k", "attn.hook_rot_q", "hook_mlp_in", "rotary_emb.hook_out", "hook_pos_embed"),
)
INERT_IN_STOCK = ("router.hook_out", "rotary_emb.hook_in")
AMBIGUOUS_IN_STOCK = ("rotary_emb.hook_cos", "rotary_emb.hook_sin")


@pytest.mark.parametrize("form", FORMS)
def test_hook_dict_has_those_of_transformer_lenss_names_that_fire(form: str) -> None:
    bridge, model = Gemma4Bridge.boot(FORMS[form]()), FORMS[form]()
    key = {"Gemma4UnifiedForCausalLM": "Gemma4ForCausalLM"}.get(type(model).__name__, type(model).__name__)

    def drop_towers(adapter: Any) -> None:
        for name in ("vision_encoder", "vision_projector"):
            adapter.components.pop(name, None)

    stock = build_bridge_from_module(model, key, hf_config=model.config, post_adapter_hook=drop_towers)
    missing = set(TransformerBridge.hook_dict.fget(stock)) - set(bridge.hook_dict)  # type: ignore[attr-defined]
    assert [name for name in missing if not name.endswith((*DEAD_IN_STOCK, *INERT_IN_STOCK, *AMBIGUOUS_IN_STOCK))] == []
    assert all(bridge.hook_point(name) is point for name, point in bridge.hook_dict.items())


def test_run_with_cache_by_function_or_without_a_filter(bridge: Gemma4Bridge) -> None:
    names = [f"blocks.{n}.hook_resid_post" for n in range(6)]
    with torch.no_grad():
        _, some = bridge.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_resid_post"))
        _, every = bridge.run_with_cache(TOKENS, return_cache_object=False)
    assert sorted(some) == names
    assert (every[names[2]] - layer_2_output()).abs().max() == 0
    assert every["blocks.2.hook_out"].data_ptr() == every[names[2]].data_ptr()


@BOTH_NAMES
def test_edits_in_run_with_hooks_and_hooks_and_add_hook(bridge: Gemma4Bridge, name: str) -> None:
    def halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value / 2

    expected = eager_logits(tiny_gemma4("ple"), replace_layer_2=lambda out: out / 2)
    plain = eager_logits(tiny_gemma4("ple"))
    with torch.no_grad():
        assert (bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, halve)]) - expected).abs().max() == 0
        with bridge.hooks(fwd_hooks=[(name, halve)]):
            assert (bridge(TOKENS) - expected).abs().max() == 0
        assert (bridge(TOKENS) - plain).abs().max() == 0
        bridge.add_hook(name, halve)
        assert (bridge(TOKENS) - expected).abs().max() == 0
        bridge.reset_hooks()
        assert (bridge(TOKENS) - plain).abs().max() == 0


@BOTH_NAMES
def test_backward_hooks_fire(bridge: Gemma4Bridge, name: str) -> None:
    """The gradient that arrives is that of the layer's output in transformers."""
    model, kept = tiny_gemma4("ple"), []
    model.set_attn_implementation("eager")
    model.model.layers[2].register_forward_hook(lambda _m, _args, out: (out.retain_grad(), kept.append(out))[1])
    model(TOKENS).logits.logsumexp(-1).sum().backward()
    seen: list[torch.Tensor] = []
    with bridge.hooks(bwd_hooks=[(name, lambda gradient, hook: seen.append(gradient.clone()))]):
        bridge(TOKENS).logsumexp(-1).sum().backward()
    assert len(seen) == 1
    assert (seen[0] - kept[0].grad).abs().max() < 1e-5 * kept[0].grad.abs().max()


# --- wrong names


@pytest.mark.parametrize("form", ["ple", "moe"])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [("blocks.2.hook_resid_pst", "blocks.2.hook_resid_post"), ("blocks.2.mlp.hook_ot", "blocks.2.mlp.hook_out")],
)
def test_unknown_hooks_raise_everywhere(form: str, wrong: str, right: str) -> None:
    bridge = Gemma4Bridge.boot(FORMS[form]())
    sound = [("blocks.0.hook_resid_post", lambda value, hook: value)]
    spoilt = [*sound, (wrong, lambda value, hook: value)]
    for attempt in (
        lambda: bridge.run_with_cache(TOKENS, names_filter=wrong),
        lambda: bridge.run_with_cache(TOKENS, True, False, [sound[0][0], wrong]),
        lambda: bridge.run_with_hooks(TOKENS, fwd_hooks=spoilt),
        lambda: bridge.run_with_hooks(TOKENS, sound, spoilt),
        lambda: bridge.hooks(fwd_hooks=spoilt),
        lambda: bridge.hooks(bwd_hooks=spoilt),
        lambda: bridge.add_hook(wrong, sound[0][1]),
        lambda: bridge.add_perma_hook(wrong, sound[0][1]),
        lambda: bridge.add_sae(random_sae(wrong)),
        lambda: bridge.add_sae(random_sae(sound[0][0], wrong)),
        lambda: bridge.run_with_saes(TOKENS, saes=random_sae(wrong)),
        lambda: bridge.hook_point(wrong),
    ):
        with pytest.raises(UnknownNameError, match=f"Unknown hook '{wrong}'. Did you mean '{right}'"):
            attempt()
    assert bridge.acts_to_saes == {}
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())


def test_hooks_that_a_layer_lacks(bridge: Gemma4Bridge) -> None:
    """Layers 3–5 of "ple" read other layers' keys and values."""
    assert bridge.hook_point("blocks.2.attn.hook_k").name == "blocks.2.attn.k.hook_out"
    with pytest.raises(UnknownNameError, match=r"Unknown hook 'blocks.3.attn.hook_k'"):
        bridge.run_with_cache(TOKENS, names_filter="blocks.3.attn.hook_k")


# --- weights by head


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_split_into_each_layers_own_heads(form: str) -> None:
    """Stock splits a full layer's into the sliding layers' heads, or raises."""
    bridge = Gemma4Bridge.boot(FORMS[form]())
    for block, layer in zip(bridge.blocks, bridge.geometry.layers, strict=True):
        attention = block.attn.original_component
        for name, heads in (("q", layer.n_heads), ("k", layer.n_kv_heads), ("v", layer.n_kv_heads)):
            projection = getattr(attention, f"{name}_proj", None)
            if projection is None or not hasattr(attention, f"{name}_proj"):
                continue
            split = getattr(block.attn, f"W_{name.upper()}")
            assert split.shape == (heads, 64, layer.head_dim)
            assert torch.equal(split.transpose(1, 2).flatten(0, 1), projection.weight)
        assert block.attn.W_O.shape == (layer.n_heads, layer.head_dim, 64)
        assert torch.equal(block.attn.W_O.flatten(0, 1).T, attention.o_proj.weight)
    with pytest.raises(ModelError, match=r"attn\.W_Q differs from layer to layer: read it of one, bridge\.blocks\[N\]"):
        _ = bridge.W_Q


def test_a_bridge_says_what_it_is(bridge: Gemma4Bridge) -> None:
    assert str(bridge).startswith("Gemma4Bridge")
    with pytest.raises(
        UnknownNameError, match=r"Layer 3 attends with keys and values of layer 1: see blocks\.3\.attn\.ho"
    ):
        bridge.hook_point("blocks.3.attn.hook_k")


def test_what_stock_does_wrong_in_silence_is_refused() -> None:
    shared = Gemma4Bridge.boot(tiny_gemma4("ple"))
    assert shared.to("cpu") is shared
    for refused in (
        lambda: shared.to(torch.bfloat16),
        lambda: shared.to("meta"),
        lambda: shared.enable_compatibility_mode(),
        lambda: shared.set_use_hook_mlp_in(True),
        lambda: shared.set_use_attn_result(True),
    ):
        with pytest.raises(ModelError):
            refused()
    with pytest.raises(ModelError, match="those of the model that was passed in"):
        Gemma4Bridge.boot(tiny_gemma4("ple"), device="cpu", dtype="float32").to("meta")
    assert {p.dtype for p in shared.original_model.parameters()} == {torch.float32}


def test_hooks_of_the_owner_stay_with_the_owner() -> None:
    model = tiny_gemma4("ple")
    model.model.layers[2].register_forward_hook(lambda _m, _args, out: out * 0)
    bridge = Gemma4Bridge.boot(model)
    with torch.no_grad():
        assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0
        hidden = bridge.original_model(TOKENS, output_hidden_states=True).hidden_states
    assert len(hidden) == 7
