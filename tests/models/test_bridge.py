"""The bridge against Hugging Face's own forward, against stock where stock goes wrong, and against wrong input."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    Gemma4TextModel,
    Gemma4UnifiedForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sae_lens_gemma4.errors import ModelError, SAEError, UnknownNameError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

TOKENS = torch.arange(100, 124).view(2, 12)
BOTH_NAMES = pytest.mark.parametrize("name", ["blocks.2.hook_resid_post", "blocks.2.hook_out"])


def unified_text_only() -> PreTrainedModel:
    composite = tiny_gemma4("unified")
    model = Gemma4UnifiedForCausalLM(composite.config.text_config).eval()
    model.model.load_state_dict(composite.model.language_model.state_dict())
    return model


FORMS: dict[str, Callable[[], PreTrainedModel]] = {v: (lambda v=v: tiny_gemma4(v)) for v in VARIANTS}
FORMS["unified_text_only"] = unified_text_only


@pytest.fixture
def bridge() -> Gemma4Bridge:
    return Gemma4Bridge.boot(tiny_gemma4("ple"))


@torch.no_grad()
def eager_logits(model: PreTrainedModel, *, replace_layer_2: Callable[[Any], Any] | None = None) -> torch.Tensor:
    """Transformers' own logits, with eager attention; optionally with the output of layer 2 replaced."""
    model.set_attn_implementation("eager")
    decoder = getattr(model.model, "language_model", model.model)
    if replace_layer_2 is None:
        return model(TOKENS).logits
    handle = decoder.layers[2].register_forward_hook(lambda _m, _args, out: replace_layer_2(out))
    try:
        return model(TOKENS).logits
    finally:
        handle.remove()


def random_sae(hook_name: str | None, hook_name_out: str | None = None) -> StandardSAE:
    metadata = SAEMetadata(hook_name=hook_name, hook_name_out=hook_name_out)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128, metadata=metadata))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.1)
    return sae


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
    assert bridge.original_model is model
    assert not any(m.training for m in bridge.modules())
    assert (bridge.cfg.n_layers, bridge.cfg.d_model, bridge.cfg.device) == (6, 64, "cpu")


def test_what_boot_changes_in_the_model() -> None:
    model = tiny_gemma4("ple_multimodal")
    before = copy.deepcopy(model.config)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert before._attn_implementation == "sdpa"
    Gemma4Bridge.boot(model)
    after = {p.data_ptr(): p for p in model.parameters()}
    assert pointers < set(after)
    assert [p.data_ptr() for ptr, p in after.items() if ptr not in pointers] == [model.lm_head.bias.data_ptr()]
    assert model.lm_head.bias.count_nonzero() == 0
    assert model.config.to_dict() == before.to_dict()
    for config in (model.config, model.config.text_config, model.config.vision_config):
        assert config._attn_implementation == "eager"


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


def test_a_model_in_memory_is_not_moved_or_cast() -> None:
    model = tiny_gemma4("ple")
    Gemma4Bridge.boot(model, device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=r"is torch.float32, not torch.bfloat16: cast it"):
        Gemma4Bridge.boot(model, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="is on cpu, not cuda: move it"):
        Gemma4Bridge.boot(model, device="cuda")
    with pytest.raises(ModelError, match="revision: these apply to a model loaded by name"):
        Gemma4Bridge.boot(model, revision="main")


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


def layer_2_output() -> torch.Tensor:
    seen: list[torch.Tensor] = []
    eager_logits(tiny_gemma4("ple"), replace_layer_2=lambda out: seen.append(out.clone()))
    return seen[0]


@BOTH_NAMES
@pytest.mark.parametrize("as_list", [False, True])
def test_run_with_cache(bridge: Gemma4Bridge, name: str, as_list: bool) -> None:
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(TOKENS, names_filter=[name] if as_list else name)
    assert (cache[name] - layer_2_output()).abs().max() == 0
    assert (logits - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_hook_dict_has_all_of_transformer_lenss_names(form: str) -> None:
    """sae_lens drops the aliases; TransformerLens has them."""
    bridge = Gemma4Bridge.boot(FORMS[form]())
    expected = TransformerBridge.hook_dict.fget(bridge)  # type: ignore[attr-defined]
    assert bridge.hook_dict.keys() == expected.keys()
    assert all(point is expected[name] for name, point in bridge.hook_dict.items())
    assert set(expected) - set(SAETransformerBridge.hook_dict.fget(bridge)) >= {"blocks.2.hook_resid_post"}


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


# --- SAEs


@BOTH_NAMES
@pytest.mark.parametrize("form", FORMS)
def test_an_sae_is_spliced_in(form: str, name: str) -> None:
    sae = random_sae(name)
    bridge = Gemma4Bridge.boot(FORMS[form]())
    expected = eager_logits(FORMS[form](), replace_layer_2=sae)
    with torch.no_grad():
        assert (bridge.run_with_saes(TOKENS, saes=sae) - expected).abs().max() == 0
        assert (bridge(TOKENS) - eager_logits(FORMS[form]())).abs().max() == 0
        bridge.add_sae(sae)
        assert (bridge(TOKENS) - expected).abs().max() == 0
    assert bridge.acts_to_saes == {name: sae}


@BOTH_NAMES
def test_hooks_fire_beside_an_attached_sae(bridge: Gemma4Bridge, name: str) -> None:
    """At the layers below and above; at the SAE's own point its hooks stand in, and the point's own name raises."""
    sae = random_sae(name)
    bridge.add_sae(sae)
    below, above, output = "blocks.1.hook_resid_post", "blocks.3.hook_out", "blocks.2.hook_out.hook_sae_output"
    seen: dict[str, torch.Tensor] = {}
    keep = [(key, lambda value, hook, key=key: seen.__setitem__(key, value)) for key in (below, above, output)]
    with torch.no_grad():
        bridge.run_with_hooks(TOKENS, fwd_hooks=keep)
        _, cache = bridge.run_with_cache(TOKENS, names_filter=[below, above, output])
        assert (seen[output] - sae(layer_2_output())).abs().max() == 0
    assert all((cache[key] - seen[key]).abs().max() == 0 for key in (below, above, output))
    for stands_in_for in ("blocks.2.hook_resid_post", "blocks.2.hook_out"):
        with pytest.raises(UnknownNameError, match=r"An SAE is attached there: hook blocks\.2\.hook_out\.hook_sae_"):
            bridge.run_with_hooks(TOKENS, fwd_hooks=[(stands_in_for, lambda value, hook: value)])


@BOTH_NAMES
def test_after_an_sae_everything_is_as_before(bridge: Gemma4Bridge, name: str) -> None:
    point = bridge.blocks[2].hook_out
    bridge.run_with_saes(TOKENS, saes=random_sae(name))
    assert bridge.blocks[2].hook_out is bridge.blocks[2].hook_resid_post is point
    fired: list[str] = []

    def note(value: torch.Tensor, hook: Any) -> None:
        fired.append(hook.name)

    for other in ("blocks.2.hook_resid_post", "blocks.2.hook_out"):
        fired.clear()
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(other, note)])
        bridge.add_hook(other, note)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(TOKENS, names_filter=other)
        bridge.reset_hooks()
        assert fired == ["blocks.2.hook_out"] * 2
        assert (cache[other] - layer_2_output()).abs().max() == 0


def test_reshaping_hook_points_survive_an_sae(bridge: Gemma4Bridge) -> None:
    """attn.hook_z is split into heads by its hook point; stock puts a plain one in its place."""
    name = "blocks.1.attn.hook_z"
    shape = bridge.run_with_cache(TOKENS, names_filter=name)[1][name].shape
    assert shape == (2, 12, 4, 16)
    bridge.run_with_saes(TOKENS, saes=random_sae(name))
    assert bridge.run_with_cache(TOKENS, names_filter=name)[1][name].shape == shape


def test_an_sae_replaces_one_of_the_same_name_for_a_while(bridge: Gemma4Bridge) -> None:
    first, second = random_sae("blocks.2.hook_resid_post"), random_sae("blocks.2.hook_resid_post")
    bridge.add_sae(first)
    with torch.no_grad():
        during, after = bridge.run_with_saes(TOKENS, saes=second), bridge(TOKENS)
    assert (during - eager_logits(tiny_gemma4("ple"), replace_layer_2=second)).abs().max() == 0
    assert (after - eager_logits(tiny_gemma4("ple"), replace_layer_2=first)).abs().max() == 0
    other_name = random_sae("blocks.2.hook_out")
    elsewhere = random_sae("blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
    reading_it = random_sae("blocks.2.hook_out", "blocks.3.hook_resid_post")
    for conflicting in (other_name, elsewhere, reading_it):
        with pytest.raises(SAEError, match=r"SAE attached as blocks\.2\.hook_resid_post is in the way of one at block"):
            bridge.add_sae(conflicting)
    with pytest.raises(SAEError):
        bridge.run_with_saes(TOKENS, saes=other_name)
    assert (bridge(TOKENS) - after).abs().max() == 0
    bridge.reset_saes()
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


def test_a_transcoder_reads_one_point_and_stands_in_for_another(bridge: Gemma4Bridge) -> None:
    transcoder = random_sae("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    inputs: list[torch.Tensor] = []
    model = tiny_gemma4("ple")
    model.model.layers[1].register_forward_hook(lambda _m, _args, out: inputs.append(out.clone()))
    expected = eager_logits(model, replace_layer_2=lambda out: transcoder(inputs[-1]))
    assert (bridge.run_with_saes(TOKENS, saes=transcoder) - expected).abs().max() == 0
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())
    assert bridge.hook_point("blocks.2.hook_resid_post") is bridge.blocks[2].hook_out


def test_an_sae_on_the_embeddings(bridge: Gemma4Bridge) -> None:
    """`hook_embed` has a list of possible targets; stock does not resolve it and attaches nothing."""
    sae = random_sae("hook_embed")
    model = tiny_gemma4("ple")
    model.model.embed_tokens.register_forward_hook(lambda _m, _args, out: sae(out))
    assert (bridge.run_with_saes(TOKENS, saes=sae) - eager_logits(model)).abs().max() == 0
    assert (bridge(TOKENS) - eager_logits(tiny_gemma4("ple"))).abs().max() == 0


def test_waiting_hooks_are_not_dropped_silently(bridge: Gemma4Bridge) -> None:
    bridge.add_hook("blocks.2.hook_resid_post", lambda value, hook: value)
    with pytest.raises(SAEError, match=r"Hooks wait at blocks\.2\.hook_out"):
        bridge.run_with_saes(TOKENS, saes=random_sae("blocks.2.hook_resid_post"))
    assert bridge.hook_dict["blocks.2.hook_out"].has_hooks()


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


def test_stock_skips_an_sae_without_a_hook() -> None:
    """Why `add_sae` is overridden: stock runs the bare model."""
    model = tiny_gemma4("ple")
    stock = build_bridge_from_module(model, "Gemma4ForCausalLM", hf_config=model.config)
    stock.__class__ = SAETransformerBridge
    stock._acts_to_saes, stock._transcoder_output_hooks = {}, {}
    logits = stock.run_with_saes(TOKENS, saes=random_sae("blocks.2.hook_resid_pst"))
    assert (logits - eager_logits(tiny_gemma4("ple"))).abs().max() == 0
    assert stock.run_with_cache(TOKENS, names_filter="blocks.2.hook_resid_post")[1].cache_dict == {}


def test_hooks_that_a_layer_lacks(bridge: Gemma4Bridge) -> None:
    """Layers 3–5 of "ple" read other layers' keys and values."""
    assert bridge.hook_point("blocks.2.attn.hook_k").name == "blocks.2.attn.k.hook_out"
    with pytest.raises(UnknownNameError, match=r"Unknown hook 'blocks.3.attn.hook_k'"):
        bridge.run_with_cache(TOKENS, names_filter="blocks.3.attn.hook_k")


def test_an_sae_that_names_no_hook(bridge: Gemma4Bridge) -> None:
    with pytest.raises(SAEError, match="no hook_name"):
        bridge.add_sae(random_sae(None))
