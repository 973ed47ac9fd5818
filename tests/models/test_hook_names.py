import pytest

from sae_lens_gemma4.models.hook_names import (
    BLOCK_HOOKS,
    MODEL_HOOKS,
    Site,
    bridge_path,
    canonical_name,
    hf_name,
    lies_beyond,
    site_of,
)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("model.language_model.layers.21", "blocks.21.hook_resid_post"),
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_pre"),
        ("model.language_model.layers.0.mlp", "blocks.0.mlp.hook_out"),
        ("model.layers.7.post_feedforward_layernorm", "blocks.7.hook_mlp_out"),
        ("model.layers.7.self_attn.o_proj", "blocks.7.attn.o.hook_out"),
        ("model.layers.7.self_attn.q_proj", "blocks.7.attn.hook_q"),
        ("model.layers.7.mlp.act_fn", "model.language_model.layers.7.mlp.act_fn"),
        ("blocks.7.hook_out", "blocks.7.hook_resid_post"),
        ("blocks.7.hook_in", "blocks.7.hook_resid_pre"),
        ("blocks.7.ln2_post.hook_out", "blocks.7.hook_mlp_out"),
        ("blocks.7.attn.o.hook_in", "blocks.7.attn.hook_z"),
        ("blocks.7.router.hook_out", "blocks.7.moe.hook_router_probs"),
        ("model.layers.7.router.proj", "blocks.7.moe.hook_router_logits"),
        ("model.layers.7.hook_sae_acts_post", "blocks.7.hook_resid_post.hook_sae_acts_post"),
        ("embed.hook_out", "hook_embed"),
        ("model.norm", "ln_final.hook_out"),
        ("lm_head", "hook_unembed"),
        ("model.vision_tower", "model.vision_tower"),
        ("nonsense", "nonsense"),
    ],
)
def test_canonical_name(given, canonical):
    assert canonical_name(given) == canonical
    assert canonical_name(canonical) == canonical


def test_sites_say_which_side():
    assert site_of("blocks.2.hook_resid_pre") == Site("layers.2", "in")
    assert site_of("blocks.2.hook_resid_post") == Site("layers.2", "out")
    assert site_of("model.layers.2.mlp.gate_proj") == Site("layers.2.mlp.gate_proj", "out")
    assert site_of("blocks.2.hook_nothing") is None
    assert site_of("hook_nothing") is None


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "ln_final.hook_out", "hook_embed", "hook_unembed"),
        *("blocks.2.moe.hook_router_probs", "blocks.2.moe.hook_router_logits", "blocks.2.attn.hook_k"),
    ],
)
def test_the_hf_name_of_an_output_leads_back(name):
    path = hf_name(name)
    assert path is not None
    assert path.startswith("model.language_model.") or path == "lm_head"
    assert canonical_name(path) == name
    assert canonical_name(bridge_path(name)) == name


def test_an_input_has_no_hf_name():
    assert hf_name("blocks.2.hook_resid_pre") is None
    assert hf_name("blocks.2.nothing") is None
    assert hf_name("blocks.2.hook_resid_mid") is None


@pytest.mark.parametrize("kinds", [BLOCK_HOOKS, MODEL_HOOKS])
def test_every_kind_of_hook_has_one_canonical_name_and_one_path(kinds):
    names = [name if kinds is MODEL_HOOKS else f"blocks.3.{name}" for name in kinds]
    assert [canonical_name(name) for name in names] == names
    assert len({bridge_path(name) for name in names}) == len(names)
    for name, hook in zip(names, kinds.values(), strict=True):
        assert (site_of(name) is None) == (hook.module is None)


@pytest.mark.parametrize(
    ("name", "stop", "beyond"),
    [
        ("blocks.2.hook_resid_post", 3, False),
        ("blocks.3.hook_resid_pre", 3, False),
        ("blocks.3.hook_resid_mid", 3, True),
        ("blocks.4.hook_resid_pre", 3, True),
        ("model.layers.3.mlp.act_fn", 3, True),
        ("blocks.3.hook_resid_post.hook_sae_acts_post", 3, True),
        ("hook_embed", 0, False),
        ("hook_ple_inputs", 0, False),
        ("ln_final.hook_out", 6, True),
        ("hook_unembed", 6, True),
    ],
)
def test_what_lies_beyond_a_stop(name, stop, beyond):
    assert lies_beyond(name, stop) == beyond
