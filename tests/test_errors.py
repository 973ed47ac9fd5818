import pytest

from sae_lens_gemma4.errors import Gemma4SAEError, UnknownNameError, check_name, nearest


def test_the_nearest_name_is_offered_whatever_its_case():
    with pytest.raises(UnknownNameError, match=r"Unknown model class 'gemma4proxylm'\. Did you mean 'Gemma4ProxyLM'\?"):
        check_name("model class", "gemma4proxylm", ["Gemma4ProxyLM", "HookedTransformer"])


def test_a_name_like_no_other_lists_what_there_is():
    with pytest.raises(UnknownNameError, match=r"Known: abc, xyz\."):
        check_name("thing", "q", ["xyz", "abc"])
    assert "None are known" in str(UnknownNameError("thing", "q", []))


def test_a_long_list_is_cut():
    message = str(UnknownNameError("thing", "?", [f"n{i:02d}" for i in range(30)]))
    assert "n11, …" in message
    assert "n12" not in message


def test_known_names_pass_through():
    assert check_name("thing", "a", iter(["b", "a"])) == "a"


def test_nearest_is_ordered_by_likeness():
    assert nearest("resid_pst", ["resid_pre", "resid_post", "mlp_out"]) == ["resid_post", "resid_pre"]


def test_every_error_is_ours_and_the_builtin_that_stock_raises():
    assert issubclass(UnknownNameError, Gemma4SAEError)
    assert issubclass(UnknownNameError, ValueError)
