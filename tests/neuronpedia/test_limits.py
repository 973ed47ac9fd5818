"""Whatever a dashboard holds, what is sent is what the API's schema takes, or the latent is named.

The schema here is the server's of `api_server`, written from Neuronpedia's routes.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.pieces import safe_text
from sae_lens_gemma4.neuronpedia.explanations import Explanation
from sae_lens_gemma4.neuronpedia.limits import URL, Changes, cut, encoded, fit
from tests.neuronpedia.api_server import _storable, check_batch
from tests.neuronpedia.sample import feature

ANY_TEXT = st.text(st.characters(codec=None), max_size=8)  # with NUL and halves of surrogate pairs
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def dashboard(index=7, **changed):
    return {**feature(index, np.random.default_rng(0)), **changed}


def example(tokens=("a", "b"), values=(0.0, 1.5), **changed):
    return {"tokens": list(tokens), "values": list(values), "bin_min": 1.0, "bin_max": 2.0, "bin_contains": 0.5,
            "qualifying_token_index": 1, **changed}  # fmt: skip


def sent(one, labels=()):
    """What the server reads of a row, and what was changed."""
    changes = Changes()
    row = fit(one, labels, changes)
    return json.loads(encoded(row)), changes


def assert_taken(row):
    body = {"modelId": "m", "source": "0-s", "features": [row]}
    check_batch(body)
    assert _storable(json.dumps(body))
    assert all(len(a["tokens"]) == len(a["values"]) for a in row["activations"])


@st.composite
def examples(draw):
    values = draw(st.lists(FINITE, min_size=1, max_size=6))
    times = draw(st.sampled_from([1, 1, 1, 400]))
    tokens = draw(st.lists(ANY_TEXT, min_size=len(values), max_size=len(values)))
    return {
        "tokens": tokens * times,
        "values": values * times,
        "bin_min": draw(st.none() | st.just(-1) | FINITE),
        "bin_max": draw(st.none() | FINITE),
        "bin_contains": draw(st.none() | st.just(-1) | st.floats(-2, 2)),
        "qualifying_token_index": 0,
    }


@settings(max_examples=50)
@given(
    activations=st.lists(examples(), min_size=1, max_size=4),
    density=st.floats(0, 1),
    logits=st.lists(st.tuples(ANY_TEXT, FINITE), max_size=30),
    labels=st.lists(st.builds(str.__mul__, ANY_TEXT, st.integers(1, 200)), max_size=3),
)
def test_whatever_is_in_a_dashboard_the_schema_takes_what_is_sent(activations, density, logits, labels):
    given = dashboard(
        activations=activations,
        frac_nonzero=density,
        pos_str=[token for token, _ in logits],
        pos_values=[value for _, value in logits],
    )
    explanations = [Explanation(text) for text in labels if safe_text(text).strip()]
    row, changes = sent(given, explanations)
    assert_taken(row)
    assert row["density"] == density
    for before, after in zip(activations, row["activations"], strict=True):
        assert max(after["values"]) == max(before["values"])
    assert changes.cut_examples == sum(len(a["tokens"]) > 1024 for a in activations)
    assert changes.dropped_logits == max(len(logits) - 20, 0)


def test_a_dashboard_within_the_limits_is_sent_as_it_is():
    given = dashboard()
    row, changes = sent(given)
    assert changes == Changes()
    assert row["index"] == 7 and row["density"] == given["frac_nonzero"]
    for before, after in zip(given["activations"], row["activations"], strict=True):
        assert (after["tokens"], after["values"]) == (before["tokens"], before["values"])


def test_tokens_that_nothing_holds_get_stand_ins_and_are_counted():
    row, changes = sent(dashboard(activations=[example(["", "a\0b", "\ud83d"], [1, 2, 3])]))
    assert row["activations"][0]["tokens"] == ["<empty>", "a<0x00>b", "\\ud83d"]
    assert changes.replaced_tokens == 3


def test_halves_of_a_pair_in_two_tokens_are_not_made_one():
    row, _ = sent(dashboard(activations=[example(["\ud83d", "\ude00"])]))
    assert row["activations"][0]["tokens"] == ["\\ud83d", "\\ude00"]


@pytest.mark.parametrize("at", [0, 3, 700, 1500, 1999])
def test_of_two_thousand_tokens_those_about_the_largest_value_are_sent(at):
    tokens, values = [f"t{i}" for i in range(2000)], [0.25] * 2000
    values[at] = 9.5
    row, changes = sent(dashboard(activations=[example(tokens, values)]))
    only = row["activations"][0]
    assert len(only["tokens"]) == len(only["values"]) == 1024
    assert only["tokens"][only["values"].index(9.5)] == f"t{at}"
    first = int(only["tokens"][0][1:])
    assert only["tokens"] == tokens[first : first + 1024]
    assert changes.cut_examples == 1


@pytest.mark.parametrize("most", [2, 3, 10, 512])
def test_a_long_label_ends_in_an_ellipsis_and_counts_as_javascript_counts(most):
    for text in ("x" * 600, "😀" * 600, "x" + "😀" * 600, "word " * 200):
        short = cut(text, most)
        assert len(short.encode("utf-16-le")) / 2 <= most
        assert short.endswith("…") and text.startswith(short[:-1])
        assert len(short.encode("utf-16-le")) / 2 >= most - 2  # a blank or half a character less
    assert cut("x" * most, most) == "x" * most


def test_labels_that_are_cut_and_kinds_that_the_site_does_not_have_are_counted():
    labels = [Explanation("x" * 600), Explanation("short", "NP_max-act", "gpt-5"), Explanation("own", "my-way")]
    row, changes = sent(dashboard(), labels)
    assert [e["text"] for e in row["explanations"]] == ["x" * 511 + "…", "short", "own"]
    assert [e["methodName"] for e in row["explanations"]] == [None, "np_max-act", None]
    assert {e["modelName"] for e in row["explanations"]} == {None}  # with one, the site stores nothing
    assert (changes.cut_labels, changes.dropped_methods) == (1, {"my-way"})


def test_who_or_what_stated_a_label_is_not_sent_and_each_such_label_is_counted():
    labels = [Explanation("a", notes="a person"), Explanation("b", model_name="gpt-5", notes="x"), Explanation("c")]
    row, changes = sent(dashboard(), labels)
    assert row["explanations"] == [{"text": text, "methodName": None, "modelName": None} for text in "abc"]
    assert changes == Changes(dropped_sources=2)


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("https://huggingface.co/me/my-saes", True),
        ("http://me.example:8080/a%20b?c=d&e=/#f", True),
        ("https://müller.example/saes", True),
        ("https://me.example?c=d", True),
        ("https://localhost/saes", False),
        ("me.example", False),
        ("https://me..example", False),
        ("https://me.example/a b", False),
        ("https://me.example/a\n", False),
        ("https://me.example/100%", False),
        ("javascript:alert(1)//https://me.example", False),
    ],
)
def test_an_address_passes_where_the_site_lets_it_pass(url, taken):
    """The answers are those of yup 1.7.1, by which the site checks."""
    assert (URL.fullmatch(url) is not None) == taken


def test_the_top_group_keeps_its_mark_and_has_no_fraction():
    row, changes = sent(dashboard(activations=[example(bin_min=-1, bin_max=12.5, bin_contains=-1)]))
    only = row["activations"][0]
    assert (only["quantileMin"], only["quantileMax"], only["quantileFraction"]) == (-1, 12.5, None)
    assert changes == Changes()


def test_bounds_that_the_site_does_not_take_are_left_out_and_counted():
    row, changes = sent(dashboard(activations=[example(values=[0, 2e8], bin_max=2e8, bin_contains=1.5)]))
    only = row["activations"][0]
    assert (only["quantileMin"], only["quantileMax"], only["quantileFraction"]) == (1.0, None, None)
    assert only["values"] == [0, 2e8]
    row, _ = sent(dashboard(activations=[example(bin_min=-2e8, bin_max=-1e8)]))
    assert (row["activations"][0]["quantileMin"], row["activations"][0]["quantileMax"]) == (-2e8, -1e8)
    assert changes.dropped_bounds == 2


def test_a_latent_without_examples_is_not_sent():
    assert fit(dashboard(activations=[]), [], Changes()) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, None, "1.0", True, [1.0]])
def test_what_is_no_number_is_named(value):
    for changed in (
        {"frac_nonzero": value},
        {"pos_values": [*dashboard()["pos_values"][:9], value]},
        {"activations": [example(values=[0.0, value])]},
    ):
        with pytest.raises(DataError, match=r"dashboard of latent 7 cannot be uploaded: .* and no finite number\."):
            fit(dashboard(**changed), [], Changes())
    if value is not None:
        with pytest.raises(DataError, match=r"a quantile of it is .*, and no finite number"):
            fit(dashboard(activations=[example(bin_max=value)]), [], Changes())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frac_nonzero": 1.5}, "its density is 1.5, and no fraction"),
        ({"activations": [example(["a"])]}, "an example of it has 1 tokens and 2 values"),
        ({"activations": [example([], [])]}, "an example of it has 0 tokens and 0 values"),
        ({"activations": [example("ab")]}, None),
        ({"activations": [{**example(), "tokens": "ab"}]}, "what should be a list of tokens is none"),
        ({"activations": [example([1, 2])]}, "is not as sae-dashboard writes them"),
        ({"activations": [{"tokens": ["a"]}]}, "is not as sae-dashboard writes them: KeyError.'values'"),
        ({"activations": ["a"]}, "is not as sae-dashboard writes them"),
        ({"neg_str": ["a"]}, "1 promoted or suppressed tokens and 10 values"),
        ({"pos_str": None}, "what should be a list of tokens is none"),
        ({"feature_index": 10_000_001}, "Neuronpedia counts from 0 to 10,000,000"),
        ({"feature_index": "7"}, "of latent '7'"),
        ({"feature_index": True}, "of latent True"),
    ],
)
def test_what_nobody_could_guess_is_named(changed, message):
    if message is None:
        assert_taken(sent(dashboard(**changed))[0])
        return
    with pytest.raises(DataError, match=message):
        fit(dashboard(**changed), [], Changes())


def test_what_is_no_dashboard_is_named():
    for one in (None, [], "x", {}):
        with pytest.raises(DataError, match="A dashboard is of latent None"):
            fit(one, [], Changes())


def test_the_highest_index_is_taken():
    assert_taken(sent(dashboard(feature_index=10_000_000))[0])


def test_clean_text_stays_as_it_is():
    for text in ("▁été", "😀", "<0xE2>", "\n\t", "\u200d", ""):
        assert safe_text(text) == text
    assert safe_text("a\0\ud800b") == "a \ufffdb"
