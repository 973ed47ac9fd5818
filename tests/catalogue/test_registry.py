import pytest

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import ConfigError, UnknownNameError

ENTRY = {"id": "a", "path": "p", "hook": "h", "d_in": 1, "d_sae": 2}
RELEASE = {
    "repo_id": "x/y", "repo_type": "model", "model": "m", "architecture": "topk", "sources": {"default": "card"},
    "saes": [ENTRY],
}  # fmt: skip


def test_every_release_file_reads_and_fits_its_name():
    for name, release in g4.releases().items():
        assert release.name == name
        assert name.startswith(release.model.rsplit("/", 1)[-1].lower().removesuffix("-fp8-block"))
        assert len(set(release.sae_ids)) == len(release.saes) > 0


def test_a_row_carries_what_is_stated_and_nan_for_the_rest():
    stated = {**ENTRY, "id": "b", "path": "q", "variance_explained": 0.9, "l0": 12.0, "neuronpedia": "n/1"}
    row = parse_release("r", {**RELEASE, "saes": [ENTRY, stated]}).lookup()
    assert row.saes_map == {"a": "p", "b": "q"}
    assert row.expected_var_explained["b"] == 0.9
    assert row.expected_l0["b"] == 12.0
    assert row.neuronpedia_id == {"b": "n/1"}
    assert row.expected_l0["a"] != row.expected_l0["a"]


def test_an_id_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="'a'"):
        parse_release("r", RELEASE).sae("A")
    assert parse_release("r", RELEASE).sae("a").d_sae == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**RELEASE, "licens": "MIT"}, r"r\.yaml: Unknown key 'licens'. Did you mean 'licence'"),
        ({**RELEASE, "saes": [{**ENTRY, "d_sea": 3}]}, "Did you mean 'd_sae'"),
        ({**RELEASE, "saes": [{"id": "a"}]}, "missing .* 'hook'"),
        ({**RELEASE, "saes": [{"id": "a", "hook": "h"}]}, "a needs either a path or a search"),
        ({**RELEASE, "saes": [{**ENTRY, "search": "x"}]}, "a needs either a path or a search"),
        ({**RELEASE, "saes": [{**ENTRY, "path": None, "search": "(x"}]}, "unterminated subpattern"),
        ({**RELEASE, "saes": [ENTRY, ENTRY]}, "two SAEs have the id 'a'"),
        ({**RELEASE, "saes": [ENTRY, {**ENTRY, "id": "b"}]}, "two SAEs have the path 'p'"),
        ({**RELEASE, "saes": [{**ENTRY, "encoder": "d_in"}]}, "layout of W_enc 'd_in'"),
        ({**RELEASE, "repo_type": "space"}, "repo_type 'space'"),
        ({**RELEASE, "sources": {}}, "sources has no default"),
        ({**RELEASE, "sources": {"default": "x", "wdith": "y"}}, "fact with a source 'wdith'"),
        ({**RELEASE, "caveats": [{"licens": "x"}]}, "kind of caveat 'licens'. Did you mean 'licence'"),
        ({"repo_id": "x"}, "saes"),
        ([], r"r\.yaml"),
        (None, r"r\.yaml"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_release("r", data)


def test_an_entry_of_layers_stands_for_one_of_each():
    each = {
        "id": "layer_{layer}_width_{width}_l0_{k}",
        "path": "L{layer:02d}",
        "hook": "blocks.{layer}.hook_resid_post",
    }
    data = {**RELEASE, "each": {**each, "d_sae": 49152, "k": 50}, "saes": [{"layers": "0-2"}, {"layer": 9, "k": 7}]}
    release = parse_release("r", data)
    assert release.sae_ids[::3] == ("layer_0_width_49k_l0_50", "layer_9_width_49k_l0_7")
    assert [s.path for s in release.saes] == ["L00", "L01", "L02", "L09"]
    assert release.saes[2].hook == "blocks.2.hook_resid_post"


def test_forms_schemas_and_sources_exist():
    for release in g4.releases().values():
        assert release.form is None or release.form in FORMS
        assert (release.label_schema in SCHEMAS) == any(sae.labels for sae in release.saes)
        assert release.sources["default"]
        assert not [text for text in release.sources.values() if not text.strip()]
