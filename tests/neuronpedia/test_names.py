"""Names on Neuronpedia, against ids that are in use there and rules that its forms check."""

import warnings

import pytest

from sae_lens_gemma4.catalogue.registry import parse_release, releases
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.neuronpedia.names import (
    SourceName,
    UnknownModelWarning,
    catalogue_name,
    model_id_of,
    set_name_of,
    site_of_hook,
    slug,
    warn_if_unknown,
)

IN_USE = [
    ("gemma-4-e4b/21-matryoshka-res-65k", "gemma-4-e4b", 21, "matryoshka-res-65k", None),
    ("gemma-4-31b/30-res-matryoshka-131k", "gemma-4-31b", 30, "res-matryoshka-131k", None),
    ("gemma-3-27b/13-gemmascope-2-res-16k", "gemma-3-27b", 13, "gemmascope-2-res-16k", None),
    ("gemma-2-2b/0-gemmascope-res-16k__l0-34", "gemma-2-2b", 0, "gemmascope-res-16k", "l0-34"),
    ("gemma-2-9b-it/9-gemmascope-res-16k", "gemma-2-9b-it", 9, "gemmascope-res-16k", None),
]


@pytest.mark.parametrize(("written", "model_id", "layer", "set_name", "suffix"), IN_USE)
def test_an_id_in_use_is_taken_apart_and_put_together(written, model_id, layer, set_name, suffix):
    name = SourceName.parse(written)
    assert (name.model_id, name.layer, name.set_name, name.suffix) == (model_id, layer, set_name, suffix)
    assert str(name) == written and name.source_id == written.split("/")[1]


@pytest.mark.parametrize(
    "written",
    ["", "gemma-4-e4b", "gemma-4-e4b/", "gemma-4-e4b/res-65k", "/21-res", "a/b/21-res-65k", "gemma-4-e4b/21-res__a__b"],
)
def test_what_is_no_id_is_said_to_be_none(written):
    with pytest.raises(ConfigError):
        SourceName.parse(written)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model_id": "Gemma-4"}, "model id 'Gemma-4'.*'gemma-4' would do"),
        ({"model_id": "4gemma"}, "model id"),
        ({"model_id": "a"}, "2–32"),
        ({"model_id": "a" * 33}, "2–32"),
        ({"model_id": "gemma_4"}, "'gemma-4' would do"),
        ({"set_name": "res 65k"}, "set name 'res 65k'.*'res-65k' would do"),
        ({"set_name": "res--65k"}, "'res-65k' would do"),
        ({"set_name": "res__65k"}, "'res-65k' would do"),
        ({"set_name": "-res"}, "'res' would do"),
        ({"set_name": ""}, "set name ''"),
        ({"set_name": "neurons"}, "keeps that name"),
        ({"layer": -1}, "counted from 0, so -1 is none"),
        ({"layer": True}, "Layers are integers, counted from 0, so True is none"),
        ({"layer": 3.0}, "so 3.0 is none"),
        ({"layer": "3"}, "so '3' is none"),
        ({"layer": None}, "so None is none"),
        ({"model_id": None}, "A model id is a text, and None is none"),
        ({"set_name": 5}, "A set name is a text, and 5 is none"),
        ({"suffix": 5}, "A suffix is a text, and 5 is none"),
        ({"suffix": "l0__34"}, "suffix 'l0__34'.*'l0-34' would do"),
        ({"suffix": "l0 34"}, "suffix 'l0 34'.*'l0-34' would do"),
        ({"suffix": ""}, "suffix ''"),
    ],
)
def test_a_part_that_is_refused_there_is_refused_here_with_the_nearest(parts, reason):
    with pytest.raises(ConfigError, match=reason):
        SourceName(**{"model_id": "gemma-4-e4b", "layer": 3, "set_name": "res-65k"} | parts)


@pytest.mark.parametrize(
    ("model", "model_id"),
    [
        ("google/gemma-4-E4B", "gemma-4-e4b"),
        ("google/gemma-4-E4B-it", "gemma-4-e4b-it"),
        ("google/gemma-3-27b-pt", "gemma-3-27b"),
        ("gemma-4-demo", "gemma-4-demo"),
        ("/data/models/Gemma-4-31B/", "gemma-4-31b"),
    ],
)
def test_a_model_s_id_is_its_name_in_lower_case_without_pt(model, model_id):
    assert model_id_of(model) == model_id


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.21.hook_resid_post", "res"),
        ("model.language_model.layers.21", "res"),
        ("blocks.0.hook_mlp_out", "mlp"),
        ("blocks.9.hook_attn_out", "att"),
        ("blocks.9.moe.hook_experts_out", "moe-experts"),
        ("ln_final.hook_out", "final"),
    ],
)
def test_a_hook_has_its_usual_word(hook, site):
    assert site_of_hook(hook) == site


def test_a_hook_without_a_word_asks_for_a_set_name():
    with pytest.raises(ConfigError, match=r"blocks\.1\.attn\.hook_q; state set_name"):
        site_of_hook("blocks.1.attn.hook_q")


def test_a_set_is_named_by_whose_which_where_and_how_wide():
    hook = "blocks.7.hook_resid_post"
    assert set_name_of("atawfeek", "matryoshka", hook, 65_536) == "atawfeek-matryoshka-res-65k"
    assert set_name_of("Some_One", "BatchTopK", hook, 512) == "some-one-batchtopk-res-512"


def test_a_slug_is_what_a_set_name_may_be():
    assert slug("Été  SAE__v2!") == "t-sae-v2"
    assert slug("42-res") == "res"
    assert slug("--") == ""


@pytest.mark.parametrize("release", releases().values(), ids=lambda r: r.name)
def test_every_sae_of_the_catalogue_has_a_name_of_its_own(release):
    names = [catalogue_name(release, sae, sae.d_sae or 4096, 60) for sae in release.saes]
    assert len(set(map(str, names))) == len(names)
    for sae, name in zip(release.saes, names, strict=True):
        assert SourceName.parse(str(name)) == name
        assert sae.neuronpedia in (None, str(name))
        assert "-pt" not in name.model_id and name.model_id.endswith("-it") == release.model.endswith("-it")


def entry(name, **facts):
    stated = {"repo_id": "lab/saes", "repo_type": "model", "model": "google/gemma-4-E4B", "architecture": "topk"}
    return parse_release(name, stated | {"sources": {"default": "card"}} | facts)


def test_a_layer_without_an_id_takes_that_of_its_set():
    hook = "blocks.{layer}.hook_resid_post"
    each = {"id": "l{layer}", "path": "{layer}", "hook": hook, "d_sae": 65_536}
    saes = [{"layer": 7}, {"layer": 21, "neuronpedia": "gemma-4-e4b/21-some-set"}, {"layer": 9, "d_sae": 16_384}]
    found = entry("gemma-4-e4b-res-topk-lab", each=each, saes=saes)
    names = [str(catalogue_name(found, sae, sae.d_sae, 42)) for sae in found.saes]
    assert names == ["gemma-4-e4b/7-some-set", "gemma-4-e4b/21-some-set", "gemma-4-e4b/9-lab-topk-res-16k"]


def test_saes_of_one_place_and_width_are_told_apart_by_their_suffixes():
    each = {"hook": "blocks.45.hook_resid_post", "d_sae": 16_384}
    saes = [{"id": f"layer_45_width_16k_l0_{k}", "path": f"k{k}", "k": k} for k in (80, 160)]
    found = entry("gemma-4-e4b-res-topk-lab", each=each, saes=saes)
    names = [catalogue_name(found, sae, sae.d_sae, 60).source_id for sae in found.saes]
    assert names == ["45-lab-topk-res-16k__l0-80", "45-lab-topk-res-16k__l0-160"]


def test_an_sae_after_the_final_norm_is_the_last_layer_s():
    saes = [{"id": "final", "path": "a", "hook": "ln_final.hook_out", "d_sae": 1_048_576}]
    found = entry("gemma-4-e4b-final-topk-lab", saes=saes)
    assert catalogue_name(found, found.saes[0], 1_048_576, 42).source_id == "41-lab-topk-final-1048k"


def test_a_model_that_is_not_there_is_a_warning_that_says_how_to_ask():
    with pytest.warns(UnknownModelWarning, match=r"model 'gemma-5'; .*gemma-4-e2b.*support@neuronpedia\.org"):
        warn_if_unknown("gemma-5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unknown("gemma-4-e4b")
