import pytest

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import ConfigError, UnknownNameError

ENTRY = {"id": "a", "path": "p", "hook": "h", "d_in": 1, "d_sae": 2}
RELEASE = {"repo_id": "x/y", "repo_type": "model", "model": "m", "loader": "sae_lens", "saes": [ENTRY]}


def test_every_release_file_reads_and_fits_its_name():
    for name, release in g4.releases().items():
        assert release.name == name
        assert name.startswith(release.model)
        assert len(set(release.sae_ids)) == len(release.saes) > 0


def test_a_row_carries_what_is_stated_and_nan_for_the_rest():
    stated = {**ENTRY, "id": "b", "variance_explained": 0.9, "l0": 12.0, "neuronpedia": "n/1"}
    row = parse_release("r", {**RELEASE, "saes": [ENTRY, stated]}).lookup()
    assert row.saes_map == {"a": "p", "b": "p"}
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
        ({**RELEASE, "saes": [{"id": "a"}]}, "missing .* 'path'"),
        ({"repo_id": "x"}, "saes"),
        ([], r"r\.yaml"),
        (None, r"r\.yaml"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_release("r", data)
