import json
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.excerpts import LatentExamples, Part
from sae_lens_gemma4.interp.judges.baseline import BaselineJudge
from sae_lens_gemma4.interp.labels.agreement import agreement, content_words, kappa, words
from sae_lens_gemma4.interp.labels.dealing import dealt
from sae_lens_gemma4.interp.labels.detection import label_test, untestable
from sae_lens_gemma4.interp.labels.labelling import Labelled, label_latents
from sae_lens_gemma4.interp.labels.verification import VerificationSettings, scorers_of, verify_labels
from sae_lens_gemma4.interp.statistics import mcnemar
from tests.interp.labels.planted import Guesser, Reader, Words, excerpt, planted

OWN = VerificationSettings(scorer="own")
QUICK = Sampling(resamples=200)


def contexts(n_fires, n_silent, n_near):
    rng = np.random.default_rng(0)
    negatives = [excerpt(rng, "near_miss" if n < n_near else "random", n) for n in range(n_silent)]
    return Part([excerpt(rng, "top", n) for n in range(n_fires)], negatives)


def at_least(tp, n_fires, n_silent, said):
    """P(so many of the contexts it is said of fire, or more), by counting."""
    ways = sum(math.comb(n_fires, k) * math.comb(n_silent, said - k) for k in range(tp, min(n_fires, said) + 1))
    return ways / math.comb(n_fires + n_silent, said)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_figures_are_scikit_learn_s_and_p_is_by_counting(n_fires, n_silent, data):
    n_near = data.draw(st.integers(0, n_silent))
    n = n_fires + n_silent
    applies = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    test = label_test(4, "x", applies, contexts(n_fires, n_silent, n_near), 0.05)
    fires = [True] * n_fires + [False] * n_silent
    tn, fp, fn, tp = metrics.confusion_matrix(fires, applies, labels=[False, True]).ravel()
    assert (test.tp, test.fp, test.tn, test.fn) == (tp, fp, tn, fn) and test.index == 4
    assert test.recall == pytest.approx(metrics.recall_score(fires, applies))
    assert test.f1 == pytest.approx(metrics.f1_score(fires, applies, zero_division=0))
    assert test.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(fires, applies))
    if any(applies):
        assert test.precision == pytest.approx(metrics.precision_score(fires, applies))
    else:
        assert test.precision is None and test.near_precision is None
    among = slice(0, n_fires + n_near)
    assert test.near_misses == n_near
    if n_near and any(applies[among]):
        assert test.near_precision == pytest.approx(metrics.precision_score(fires[among], applies[among]))
    else:
        assert test.near_precision is None
    assert test.p_value == pytest.approx(at_least(tp, n_fires, n_silent, sum(applies)))
    assert test.p_value == pytest.approx(scipy.stats.hypergeom.sf(tp - 1, n, n_fires, sum(applies)))
    assert test.confirmed == (test.p_value <= 0.05)


def test_true_labels_are_confirmed_and_the_floor_is_not():
    latents = planted(40)
    judges = Reader("one"), Reader("other", prefix="it is ")
    labelled = label_latents(judges, latents, Words())
    found = verify_labels(labelled, judges[::-1], latents, Words(), sampling=QUICK)
    for name in ("one", "other"):
        tested = found.by_judge[name]
        assert tested.scorer != name
        assert tested.confirmed[:3] == (40, 40, 1.0) and tested.f1.value == tested.near_precision.value == 1.0
        assert tested.floor.confirmed.k == 0 and tested.floor.f1.value == 0
        assert tested.floor.change == mcnemar(40, 0, 40)
        assert tested.floor.f1_difference.value == 1.0
        assert tested.floor.tests.keys() == tested.tests.keys()
        given, dealt = ({i: t.label for i, t in tests.items()} for tests in (tested.tests, tested.floor.tests))
        assert Counter(given.values()) == Counter(dealt.values()) and all(given[i] != dealt[i] for i in given)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_labels_that_say_nothing_are_confirmed_one_time_in_twenty_at_most(rate):
    latents = planted(500)
    judge = Guesser(share=rate, seed=3)
    labelled = label_latents([judge], latents, Words())
    settings = VerificationSettings(scorer="own", floor=False)
    found = verify_labels(labelled, [judge], latents, Words(), settings, sampling=QUICK).by_judge["guesser"]
    assert found.confirmed.n == 500
    assert found.confirmed.value <= 0.05 + 3 * (0.05 * 0.95 / 500) ** 0.5
    assert found.floor is None and found.no_floor == "not asked for"
    if rate == 0.9:  # what F1 makes of a label that applies nearly everywhere
        assert found.f1.value > 0.6


def test_near_misses_tell_of_a_label_that_is_taken_carelessly():
    latents = planted(12)

    class Careless(Reader):
        """Takes the word before it for the word."""

        def detect(self, questions):
            both = [{word := int(q.label.split("w")[-1]), word - 1} for q in questions]
            return [
                [any(f"w{w}" in e.text.split() for w in ws) for e in q.examples]
                for q, ws in zip(questions, both, strict=True)
            ]

    judge = Careless()
    found = verify_labels(label_latents([judge], latents, Words()), [judge], latents, Words(), OWN, sampling=QUICK)
    for test in found.by_judge["reader"].tests.values():
        assert (test.tp, test.fp, test.near_misses) == (10, 5, 5)
        assert test.precision == pytest.approx(2 / 3) and test.near_precision == pytest.approx(2 / 3)
        assert test.p_value == pytest.approx(at_least(10, 10, 10, 15)) and test.confirmed


def test_scorers_see_held_out_contexts_in_any_order_and_without_activations():
    latents, judges = planted(8), (Reader("one"), Reader("other"))
    labelled = label_latents(judges, latents, Words())
    verify_labels(labelled, judges[::-1], latents, Words(), sampling=QUICK)
    mixed = 0
    for judge in judges:
        assert len(judge.detected) == 16  # each label where it belongs, and elsewhere
        for question in judge.detected:
            part = latents[question.index].held_out
            texts = [Words().decode(e.tokens_w) for e in [*part.positives, *part.negatives]]
            shown = [e.text for e in question.examples]
            assert sorted(shown) == sorted(texts)
            mixed += shown != texts
            for example in question.examples:
                assert example.activation is example.activations is example.token is example.token_index is None
    assert mixed == 32
    again = Reader("one"), Reader("other")
    verify_labels(label_latents(again, latents, Words()), again[::-1], latents, Words(), sampling=QUICK)
    assert again[0].detected == judges[0].detected
    verify_labels(labelled, judges[::-1], latents, Words(), part="calibration", sampling=QUICK)
    assert {e.text for e in judges[0].detected[-1].examples} == {
        Words().decode(e.tokens_w)
        for e in [
            *latents[judges[0].detected[-1].index].calibration.positives,
            *latents[judges[0].detected[-1].index].calibration.negatives,
        ]
    }


def test_what_cannot_be_tested_is_not_refuted():
    latents, judge = planted(6), Reader(silent=[5])
    rest = latents[0].calibration
    few = Part(latents[0].held_out.positives[:4], latents[0].held_out.negatives)
    without = Part(latents[1].held_out.positives, [])
    latents[0] = LatentExamples(0, latents[0].labelling, few, rest)
    latents[1] = LatentExamples(1, latents[1].labelling, without, rest)

    class Forgetful(Reader):
        def detect(self, questions):
            found = super().detect(questions)
            return [None if q.index == 2 else said for q, said in zip(questions, found, strict=True)]

    scorer = Forgetful("scorer")
    judges = judge, scorer
    found = verify_labels(label_latents(judges, latents, Words()), judges[::-1], latents, Words(), sampling=QUICK)
    tested = found.by_judge["reader"]
    assert tested.untestable == {
        0: "fewer than 5 contexts that it fires in",
        1: "too few contexts that it is silent in for p ≤ 0.05",
    }
    assert tested.unanswered == (2,) and [*tested.tests] == [3, 4] and tested.confirmed[:2] == (2, 2)
    document = found.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["judges"]["reader"]["untestable"]["0"].startswith("fewer than 5")


@pytest.mark.parametrize(("n_fires", "n_silent", "can"), [(5, 1, False), (5, 2, True), (19, 1, True), (18, 1, False)])
def test_a_latent_is_testable_if_a_perfect_answer_is_confirmed(n_fires, n_silent, can):
    part = contexts(n_fires, n_silent, 0)
    best = label_test(0, "x", [True] * n_fires + [False] * n_silent, part, 0.05)
    assert best.confirmed == can == (untestable(part, 1, 0.05) is None)


def test_one_label_has_no_floor():
    judge, latents = Reader(), planted(1)
    found = verify_labels(label_latents([judge], latents, Words()), [judge], latents, Words(), OWN)
    assert found.by_judge["reader"].floor is None
    assert "among two latents or more, and 1 can be tested" in found.by_judge["reader"].no_floor


def test_bad_input_is_named():
    latents, judge = planted(2), Reader()
    labelled = label_latents([judge], latents, Words())
    with pytest.raises(ConfigError, match='scorer "other" needs two judges, and reader is alone'):
        scorers_of([judge], VerificationSettings())
    with pytest.raises(DataError, match="2 scorers were given for the labels of reader"):
        verify_labels(labelled, [judge, judge], latents, Words(), OWN)
    bare = [LatentExamples(i, latents[i].labelling, Part([], []), Part([], [])) for i in range(2)]
    with pytest.raises(DataError, match="No label can be tested on the held_out contexts: fewer than 5"):
        verify_labels(labelled, [judge], bare, Words(), OWN)
    nobody = Labelled(judges=("reader",), answers={0: (None,)}, skipped={}, shown={})
    with pytest.raises(DataError, match="there is no label"):
        verify_labels(nobody, [judge], latents, Words(), OWN)
    for wrong in ({"scorer": " "}, {"alpha": 1.0}, {"min_positives": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            VerificationSettings(**wrong)


@pytest.mark.parametrize(("n", "derangements"), [(2, 1), (3, 2), (4, 9), (5, 44)])
def test_all_derangements_are_equally_likely(n, derangements):
    rng = np.random.default_rng(0)
    counts = Counter(tuple(dealt("abcde"[:n], rng).items()) for _ in range(200 * derangements))
    assert len(counts) == derangements
    assert n == 2 or scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


@given(st.lists(st.sampled_from(["a", "A", " a", "b", "B b", "bb", "c", "d"]), max_size=12), st.integers(0, 9))
def test_nobody_is_dealt_its_own_text_and_as_few_as_can_be_are_left_out(texts, seed):
    keys = [text.lower().replace(" ", "") for text in texts]
    found = dealt(texts, np.random.default_rng(seed))
    assert all(keys[place] != keys[other] for place, other in found.items())
    assert sorted(found) == sorted(found.values())
    most = max(Counter(keys).values(), default=0)
    assert len(texts) - len(found) == max(0, 2 * most - len(texts))
    assert found == dealt(texts, np.random.default_rng(seed))


def test_a_latent_with_another_s_label_text_is_not_its_own_floor():
    """Sixty labels, of which twenty are one text, told by case and spaces alone; a label of one's own is confirmed."""
    latents = planted(60)

    class Alike(Reader):
        def label(self, questions):
            texts = ["punctuation", " Punctuation", "PUNCT uation"]
            return [
                a._replace(label=texts[q.index % 3]) if q.index < 20 else a
                for q, a in zip(questions, super().label(questions), strict=True)
            ]

        def detect(self, questions):
            """What is called punctuation is where the first twenty fire."""
            self.detected += questions
            words = [{f"w{2 * i + 1}" for i in range(20)} if "unct" in q.label.lower() else {q.label.split()[-1]}
                     for q in questions]  # fmt: skip
            return [
                [not w.isdisjoint(e.text.split()) for e in q.examples] for q, w in zip(questions, words, strict=True)
            ]

    judge = Alike()
    labelled = label_latents([judge], latents, Words())
    found = verify_labels(labelled, [judge], latents, Words(), OWN, sampling=QUICK).by_judge["reader"]
    assert found.confirmed.k == 60 and found.floor.confirmed[:2] == (0, 60) and found.floor.left_out == ()
    some = verify_labels(labelled, [judge], latents[:25], Words(), OWN, sampling=QUICK).by_judge["reader"]
    assert some.confirmed.n == 25 and some.floor.confirmed[:2] == (0, 10) and len(some.floor.left_out) == 15
    assert {*some.floor.left_out} < {*range(20)} and some.floor.left_out == tuple(sorted(some.floor.left_out))
    none = verify_labels(labelled, [judge], latents[:20], Words(), OWN, sampling=QUICK).by_judge["reader"]
    assert none.floor is None and none.no_floor == "all 20 labels that can be tested are the same text"


def test_the_floor_has_every_figure_of_the_labels():
    latents, judges = planted(30), (Guesser("one", seed=1), Guesser("other", seed=2))
    found = verify_labels(label_latents(judges, latents, Words()), judges[::-1], latents, Words(), sampling=QUICK)
    tested = found.by_judge["one"]
    pairs = [(tested.tests[i], test) for i, test in tested.floor.tests.items()]
    for name in ("f1", "balanced_accuracy", "near_precision"):
        both = [(getattr(own, name), getattr(other, name)) for own, other in pairs]
        known = [other for _, other in both if other is not None]
        assert getattr(tested.floor, name).value == pytest.approx(np.mean(known))
        assert getattr(tested.floor, name).n == len(known)
        differences = [own - other for own, other in both if None not in (own, other)]
        assert getattr(tested.floor, f"{name}_difference").value == pytest.approx(np.mean(differences))


def test_a_label_that_fits_the_strongest_contexts_alone_is_seen():
    latents = planted(12)
    strongest = {
        word for latent in latents for e in latent.held_out.positives if e.kind == "top" for word in e.tokens_w.tolist()
    }

    class TopAlone(Reader):
        def detect(self, questions):
            said = super().detect(questions)
            there = [[{int(w[1:]) for w in e.text.split()} <= strongest for e in q.examples] for q in questions]
            return [[a and b for a, b in zip(*both, strict=True)] for both in zip(said, there, strict=True)]

    judge = TopAlone()
    found = verify_labels(label_latents([judge], latents, Words()), [judge], latents, Words(), OWN, sampling=QUICK)
    recall = found.by_judge["reader"].recall
    assert (recall.top.value, recall.quantile.value, recall.difference.value) == (1.0, 0.0, 1.0)
    assert recall.difference.n == 12
    [test, *_] = found.by_judge["reader"].tests.values()
    assert (test.recall, test.recall_top, test.recall_quantile) == (0.5, 1.0, 0.0)
    assert test.documents == 20


def test_kinds_and_documents_are_counted_from_the_contexts():
    part = contexts(4, 4, 2)
    kinds = [e._replace(kind=kind, document=3) for e, kind in zip(part.positives, ["top", "top", "top", "quantile"],
                                                                  strict=True)]  # fmt: skip
    test = label_test(0, "x", [True, False, True, False] + [False] * 4, Part(kinds, part.negatives), 0.05)
    assert test.recall_top == pytest.approx(2 / 3) and test.recall_quantile == 0
    assert test.documents == len({3, *(e.document for e in part.negatives)})
    alone = label_test(0, "x", [True] * 8, Part(kinds[:3], [*part.negatives, kinds[3]]), 0.05)
    assert alone.recall_top == 1 and alone.recall_quantile is None


def test_kappa_by_hand():
    one = [True] * 5 + [False] * 5
    other = [True, True, True, True, False, True, False, False, False, False]
    assert kappa(one, other) == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    uneven = [True] * 8 + [False] * 2
    chance = 0.5 * 0.8 + 0.5 * 0.2
    assert kappa(one, uneven) == pytest.approx((0.7 - chance) / (1 - chance))
    assert kappa(one, [not v for v in one]) == pytest.approx(-1)
    assert kappa(one, [True] * 10) == kappa([True] * 10, [True] * 10) == 0


def test_words_by_hand():
    assert content_words("The past tense of the verb") == {"past", "tense", "verb"}
    assert content_words("of the") == {"of", "the"}
    assert words("the past tense", "a verb, in the Past") == pytest.approx(1 / 3)
    assert words("—", "…") == 0


def test_agreement_of_labels_and_of_labels_dealt_out_anew():
    latents, judges = planted(20), (Reader("one"), Reader("other", prefix="it says "))
    found = verify_labels(label_latents(judges, latents, Words()), judges[::-1], latents, Words(), sampling=QUICK)
    agreed = agreement(found, QUICK)
    assert agreed.kappa.value == agreed.kappa_difference.value == 1.0 and agreed.floor_kappa.value == 0
    one, other = content_words("the word w1"), content_words("it says w1")
    assert agreed.words.value == pytest.approx(len(one & other) / len(one | other)) and agreed.words.value > 0
    assert agreed.floor_words.value < agreed.words.value
    assert agreed.constant == 0 and agreed.judges == ("one", "other")
    document = agreed.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["pairs"]["3"]["kappa"] == 1.0 and document["kappa"]["n"] == 20


def test_agreement_of_two_that_guess_is_none():
    latents, judges = planted(100), (Guesser("one", seed=1), Guesser("other", seed=2))
    found = verify_labels(label_latents(judges, latents, Words()), judges[::-1], latents, Words(), sampling=QUICK)
    agreed = agreement(found, QUICK)
    error = 1 / (100 * 20) ** 0.5
    assert abs(agreed.kappa.value) < 4 * error and abs(agreed.floor_kappa.value) < 4 * error
    assert agreed.kappa_difference.low < 0 < agreed.kappa_difference.high
    one, other = (tested.tests for tested in found.by_judge.values())
    dealt = found.by_judge["other"].floor.tests
    by_latent = [
        metrics.cohen_kappa_score(one[i].applies, other[i].applies)
        - metrics.cohen_kappa_score(one[i].applies, dealt[i].applies)
        for i in one
    ]
    assert agreed.kappa_difference.value == pytest.approx(np.mean(by_latent))


def test_agreement_is_by_latent_and_needs_two():
    latents = planted(3)

    class Everywhere(Reader):
        def detect(self, questions):
            return [[True] * len(q.examples) for q in questions]

    judges = Everywhere("one"), Everywhere("other", silent=[1])
    found = verify_labels(label_latents(judges, latents, Words()), judges[::-1], latents, Words(), sampling=QUICK)
    agreed = agreement(found, QUICK)
    assert [*agreed.pairs] == [0, 2] and agreed.constant == 2 and agreed.kappa.value == 0
    mixed = judges[0], Reader("other")
    half = verify_labels(label_latents(mixed, latents, Words()), mixed[::-1], latents, Words(), sampling=QUICK)
    one_sided = agreement(half, QUICK)
    assert one_sided.constant == 3 and one_sided.kappa.value == 0 and one_sided.scorers == ("other", "one")
    alone = verify_labels(label_latents([judges[0]], latents, Words()), judges[:1], latents, Words(), OWN)
    with pytest.raises(ConfigError, match="Agreement is of two judges, and the labels are by one alone"):
        agreement(alone)


def test_the_other_judge_tests_unless_it_is_said():
    one, two = Reader("one"), Reader("two")
    assert scorers_of([one, two], VerificationSettings()) == (two, one)
    assert scorers_of([one, two], OWN) == (one, two)
    assert scorers_of([one, two], VerificationSettings(scorer="two")) == (two, two)
    assert scorers_of([one], VerificationSettings(scorer="one")) == (one,)
    with pytest.raises(ConfigError, match="scorer is 'three', and the judges are one, two: name one of these"):
        scorers_of([one, two], VerificationSettings(scorer="three"))


def test_baselines_test_alike_and_are_named_for_it():
    latents, judges = planted(8), (BaselineJudge(1), BaselineJudge(3))
    labelled = label_latents(judges, latents, Words())
    found = verify_labels(labelled, scorers_of(judges, VerificationSettings()), latents, Words(), sampling=QUICK)
    assert {tested.scorer for tested in found.by_judge.values()} == {"string match"}
    agreed = agreement(found, QUICK)
    assert agreed.scorers == ("string match",) * 2 and agreed.to_dict()["scorers"] == ["string match"] * 2
    in_words = label_latents([Reader()], latents, Words())
    unread = verify_labels(in_words, [BaselineJudge(1)], latents, Words(), sampling=QUICK).by_judge["reader"]
    assert unread.unanswered == tuple(range(8)) and not unread.tests and unread.confirmed.n == 0
