"""Judges without a model: what they say, by hand, and that it reads back."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.interp.judges.baseline import BaselineJudge, applies, terms_of
from sae_lens_gemma4.interp.judges.judge import Answer, DetectionQuestion, LabelQuestion
from tests.interp.judges.conftest import example

POSITIVES = (
    example("I", " saw", " the", " cat", on=[" the"]),
    example(" the", " dog", " of", " the", on=[" the", " of"]),
    example("one", " of", " cat", on=[" of"]),
)
NEGATIVES = (example(" cat", " of", " dog"), example("I", "I"))


def test_a_label_by_hand():
    """At the five places where it fires: " the" 3, " of" 2; at the eleven others: " of" 1, " the" 0."""
    log_odds = {
        " the": math.log(3.5 / 2.5) - math.log(0.5 / 11.5),
        " of": math.log(2.5 / 3.5) - math.log(1.5 / 10.5),
    }
    assert log_odds[" the"] > log_odds[" of"] > 0
    (answer,) = BaselineJudge().label([LabelQuestion(0, POSITIVES, NEGATIVES)])
    assert answer == Answer('tokens: " the", " of"', "tokens")


def test_ngrams_find_what_tokens_cannot():
    """It fires on " york" after " new" alone."""
    positives = tuple(example(w, " new", " york", on=[" york"]) for w in ("in", "of", "to"))
    negatives = tuple(example(w, " old", " york") for w in ("in", "of", "to"))
    question = LabelQuestion(0, positives, negatives)
    tokens, ngrams = BaselineJudge(1).label([question])[0].label, BaselineJudge(3).label([question])[0].label
    assert terms_of(tokens) == ("tokens", (" york",))
    assert terms_of(ngrams)[1][0] == " new york"
    unseen = (example("at", " new", " york"), example("at", " old", " york"))
    assert BaselineJudge().detect([DetectionQuestion(0, 'n-grams: " new york"', unseen)]) == [[True, False]]
    assert BaselineJudge().detect([DetectionQuestion(0, tokens, unseen)]) == [[True, True]]


def test_nothing_to_say_is_none():
    same = (example("a", "b", on=["a", "b"]),)
    alike = LabelQuestion(0, (example("a", "a", on=["a"]),), (example("a", "a"),))
    judge = BaselineJudge()
    assert judge.label([LabelQuestion(0, ()), alike]) == [None, None]
    assert judge.record()["questions"] == judge.record()["unanswered"] == 2
    assert judge.label([LabelQuestion(0, same)]) == [None]


def test_at_most_five_terms_and_120_characters():
    many = tuple(example(f" w{i}", on=[f" w{i}"]) for i in range(9))
    others = (example(*["x"] * 20),)
    assert len(terms_of(BaselineJudge().label([LabelQuestion(0, many, others)])[0].label)[1]) == 5
    long = tuple(example(f" {c * 50}", on=[f" {c * 50}"]) for c in "abc")
    label = BaselineJudge().label([LabelQuestion(0, long, others)])[0].label
    assert len(label) <= 120 and len(terms_of(label)[1]) == 2
    assert BaselineJudge().label([LabelQuestion(0, (example("z" * 200, on=["z" * 200]),), others)]) == [None]


def test_texts_without_tokens():
    question = LabelQuestion(0, (Example(text="see the cat", token="cat"),), (Example(text="see the dog"),))
    assert BaselineJudge().label([question])[0].label == 'tokens: " cat"'
    assert applies(("tokens", [" cat"]), Example(text="a cat here"))
    assert not applies(("tokens", [" cat"]), Example(text="a cats"))


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.sampled_from([1, 3]))
def test_labels_read_back_and_apply_where_they_come_from(pieces, longest):
    shown = Example(text="".join(pieces), token=pieces[-1], tokens=tuple(pieces),
                    activations=(0.0,) * (len(pieces) - 1) + (1.0,))  # fmt: skip
    (answer,) = BaselineJudge(longest).label([LabelQuestion(0, (shown,), (example(*["\0never"] * 9),))])
    if answer is None:
        return
    kind, terms = terms_of(answer.label)
    assert kind == ("tokens" if longest == 1 else "n-grams")
    assert pieces[-1] in terms or longest == 3
    assert applies((kind, terms), shown) and len(answer.label.splitlines()) == 1
    assert json.loads(f"[{answer.label.partition(': ')[2]}]") == list(terms)


@pytest.mark.parametrize("label", ["Mentions of Cats", "dogs", "tokens: not json", "tokens: 3", "tokens: ", ""])
def test_labels_in_words_are_not_answered(label):
    judge, texts = BaselineJudge(), (Example(text="Two DOGS of it."), Example(text="cats, to a"))
    asked = [DetectionQuestion(0, label, texts), DetectionQuestion(1, 'tokens: "cats,"', texts)]
    assert judge.detect(asked) == [None, [False, True]]
    assert judge.record() == {
        "name": "token statistics",
        "kind": "tokens",
        "identity": "token statistics",
        "questions": 2,
        "unanswered": 1,
    }


@pytest.mark.parametrize("longest", [1, 3])
def test_planted_tokens_are_found(longest):
    """Of latents that fire on one token of 200, wherever it stands, every label is that token, first among n-grams."""
    rng = random.Random(0)
    words = [f" w{i}" for i in range(200)]
    for planted in words[:30]:
        others = [word for word in words if word != planted]
        texts = [rng.choices(others, k=15) for _ in range(20)]
        positives = tuple(example(*t[:7], planted, *t[7:], on=[planted]) for t in texts[:10])
        negatives = tuple(example(*t) for t in texts[10:])
        (answer,) = BaselineJudge(longest).label([LabelQuestion(0, positives, negatives)])
        terms = terms_of(answer.label)[1]
        assert terms == (planted,) if longest == 1 else terms[0] == planted


def test_it_costs_nothing():
    judge = BaselineJudge(3, name="mine")
    assert judge.name == "mine" and judge.record()["kind"] == "ngrams"
    assert judge.identity == "n-gram statistics" and judge.scorer_name == BaselineJudge(1).scorer_name == "string match"
    assert judge.cost(3, 4, n_examples=9)[:4] == (7, 0, 0, 0) and judge.cost(3, 4).usd == 0
