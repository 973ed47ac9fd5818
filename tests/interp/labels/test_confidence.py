import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from statsmodels.stats.multitest import multipletests

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.embedded.text import load_embedded
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings
from sae_lens_gemma4.interp.excerpts import Activity
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.judges.baseline import BaselineJudge
from sae_lens_gemma4.interp.labels import calibration
from sae_lens_gemma4.interp.labels.agreement import agreement
from sae_lens_gemma4.interp.labels.calibration import calibrate, table
from sae_lens_gemma4.interp.labels.confidence import (
    COMPONENTS,
    Components,
    Confidence,
    Health,
    Weights,
    confidence_of,
    confidences,
    feature_labels,
    scores_dict,
)
from sae_lens_gemma4.interp.labels.detection import label_test
from sae_lens_gemma4.interp.labels.labelling import label_latents
from sae_lens_gemma4.interp.labels.probe_rows import activations_at, probe_rows
from sae_lens_gemma4.interp.labels.probes import ProbeSettings, probe_latents
from sae_lens_gemma4.interp.labels.verification import VerificationSettings, verify_labels
from sae_lens_gemma4.interp.statistics import share
from tests.interp.conftest import HOOK
from tests.interp.labels.planted import Reader, Words, planted
from tests.interp.labels.test_verification import contexts

QUICK = Sampling(resamples=200)


def test_a_score_is_the_card_s_sum():
    components = Components(agreement=0.5, held_out=0.8, probe=0.99, health=1.0)
    found = confidence_of(components)
    assert found.score == pytest.approx(0.2 * 0.5 + 0.35 * 0.8 + 0.35 * 0.99 + 0.1)
    assert found.tier == "high" and found.reason is None and found.components == components
    only = Weights(agreement=0, held_out=1, probe=0, health=0)
    assert confidence_of(components, only).score == 0.8
    assert confidence_of(Components(1.0, 1.0, 1.0, 1.0)).score == 1.0


@pytest.mark.parametrize(
    ("value", "tier"), [(1.0, "high"), (0.8, "high"), (0.79, "medium"), (0.5, "medium"), (0.499, "low"), (0.0, "low")]
)
def test_tiers(value, tier):
    assert confidence_of(Components(value, value, value, value)).tier == tier


def test_a_missing_signal_is_no_score():
    found = confidence_of(Components(None, 0.9, None, 1.0))
    assert found.score is None and found.tier is None and found.reason == "no agreement, probe"
    without = Weights(agreement=0, held_out=0.5, probe=0, health=0.5)  # of weight 0, and so not missed
    assert confidence_of(found.components, without).score == pytest.approx(0.95)
    assert confidence_of(Components(None, None, None, 1.0), without).reason == "no held_out"


@pytest.mark.parametrize(
    "weights", [{"agreement": 0.3}, {"agreement": -0.2, "held_out": 0.75}, {"probe": float("nan")}]
)
def test_weights_sum_to_one(weights):
    with pytest.raises(ConfigError, match="Weights must be 0 or more and sum to 1"):
        Weights(**weights)


@pytest.mark.parametrize(
    ("n_active", "density", "health"),
    [
        (1000, 1e-3, 1.0),
        (50, 1e-5, 1.0),
        (1000, 1e-1, 1.0),
        (1000, 1e-6, 0.5),  # one order of magnitude of two
        (1000, 1e-7, 0.0),
        (5, 1e-3, 0.5),
        (1000, 10**-0.5, 0.75),
        (5, 1e-8, 0.0),
        (0, 0.0, 0.0),
    ],
)
def test_health_falls_by_orders_of_magnitude(n_active, density, health):
    assert Health().of(Activity(n_active, density, 1.0, 2.0)) == pytest.approx(health)


def test_health_needs_a_band():
    for wrong in ({"density_low": 0.0}, {"density_low": 0.5}, {"min_firings": 0}, {"decades": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Health(**wrong)


def outcome(confirmed, hits):
    """A label's test on 10 and 10 contexts: a good one, or one with so many hits and as many false alarms."""
    k = 10 if confirmed else hits
    applies = (
        [True] * k + [False] * (10 - k) + [True] * (0 if confirmed else k) + [False] * (10 if confirmed else 10 - k)
    )
    test = label_test(0, "x", applies, contexts(10, 10, 5), 0.05)
    assert test.confirmed == confirmed
    return test


def test_a_calibration_table_by_hand():
    good, bad = outcome(True, 5), outcome(False, 5)
    scores = [0.1, 0.2, 0.35, 0.6, 0.7, 0.79, 0.8, 0.9, 1.0]
    confirmed = [0, 0, 1, 1, 0, 1, 1, 1, 1]
    found = table([(s, good if c else bad) for s, c in zip(scores, confirmed, strict=True)], 5)
    assert [(b.low, b.high) for b in found.bins] == [
        (pytest.approx(n / 5), pytest.approx((n + 1) / 5)) for n in range(5)
    ]
    assert [b.confirmed for b in found.bins] == [share(0, 1), share(1, 2), share(0, 0), share(2, 3), share(3, 3)]
    means = [0.1, 0.275, None, pytest.approx((0.6 + 0.7 + 0.79) / 3), pytest.approx(0.9)]
    assert [b.mean_score for b in found.bins] == [pytest.approx(m) if isinstance(m, float) else m for m in means]
    expected = (1 * 0.1 + 2 * abs(0.275 - 1 / 2) + 3 * abs(2.09 / 3 - 2 / 3) + 3 * abs(0.9 - 1)) / 9
    assert found.error == pytest.approx(expected)
    assert found.n == 9 and found.confirmed == share(6, 9) and found.mean_score == pytest.approx(sum(scores) / 9)
    assert found.brier == pytest.approx(metrics.brier_score_loss(confirmed, scores))
    assert found.brier_constant == pytest.approx(metrics.brier_score_loss(confirmed, [6 / 9] * 9))
    above = [(s > t) + 0.5 * (s == t) for s, c in zip(scores, confirmed, strict=True) if c
             for t, d in zip(scores, confirmed, strict=True) if not d]  # fmt: skip
    assert found.auroc == pytest.approx(np.mean(above))


def drawn_pairs(n, seed=0):
    """Scores in tenths, so that there are ties, and labels that hold the more often the larger it is."""
    rng = np.random.default_rng(seed)
    score_n = np.round(rng.random(n), 1)
    return [(s, outcome(rng.random() < s, int(rng.integers(11)))) for s in score_n.tolist()]


def test_intervals_are_those_of_scipy_s_bootstrap():
    pairs = drawn_pairs(60)
    found = table(pairs, 5, Sampling(resamples=4000))
    score_n, confirmed_n, f1_n = (
        np.array(column) for column in zip(*((s, t.confirmed, t.f1) for s, t in pairs), strict=True)
    )

    def error(score_n, confirmed_n):
        bin_n = np.minimum((score_n * 5 + 1e-9).astype(int), 4)
        parts = [score_n[bin_n == b].sum() - confirmed_n[bin_n == b].sum() for b in range(5)]
        return np.abs(parts).sum() / len(score_n)

    def rho(score_n, f1_n):
        return scipy.stats.spearmanr(score_n, f1_n).statistic

    options = {"paired": True, "vectorized": False, "n_resamples": 4000, "method": "BCa", "rng": 3}
    for statistic, other_n, value, low, high in (
        (error, confirmed_n, found.error, found.error_low, found.error_high),
        (rho, f1_n, found.rank.rho, found.rank.low, found.rank.high),
    ):
        assert value == pytest.approx(statistic(score_n, other_n))
        theirs = scipy.stats.bootstrap((score_n, other_n), statistic, **options).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    few = table(pairs[:7], 5)
    assert few.error_low is few.error_high is None and (few.rank is None or few.rank.low is few.rank.high is None)


def test_weighted_ranks_are_ranks_of_what_was_drawn():
    rng = np.random.default_rng(0)
    one_n, other_n = np.round(rng.random((2, 30)), 1)
    w_rn = rng.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)
    found_r = calibration._rank_correlations(one_n, other_n, w_rn)
    for w_n, found in zip(w_rn.astype(int), found_r, strict=True):
        theirs = scipy.stats.spearmanr(np.repeat(one_n, w_n), np.repeat(other_n, w_n)).statistic
        assert found == pytest.approx(theirs)
    assert np.isnan(calibration._rank_correlations(np.ones(30), other_n, w_rn)).all()


def test_many_labels_are_drawn_in_groups():
    found = table(drawn_pairs(3000), 5, Sampling(resamples=200))
    spread = found.rank.high - found.rank.low  # of a correlation of independent pairs, about
    assert spread == pytest.approx(2 * 1.96 * (1 - found.rank.rho**2) / 3000**0.5, rel=0.4)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10), st.booleans()), min_size=1, max_size=40))
def test_tables_hold_every_label_once_and_ranks_are_pearson_s_of_ranks(drawn):
    pairs = [(score, outcome(confirmed, hits)) for score, hits, confirmed in drawn]
    found = table(pairs, 4)
    assert sum(b.confirmed.n for b in found.bins) == found.n == len(pairs)
    assert sum(b.confirmed.k for b in found.bins) == found.confirmed.k == sum(c for *_, c in drawn)
    for b in found.bins:
        assert b.mean_score is None or b.low - 1e-9 <= b.mean_score <= b.high + 1e-9
    scores, f1 = [s for s, _ in pairs], [t.f1 for _, t in pairs]
    if found.rank:
        ranks = [scipy.stats.rankdata(v) for v in (scores, f1)]
        assert found.rank.rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    else:
        assert len(pairs) < 3 or len(set(scores)) == 1 or len(set(f1)) == 1


def test_what_does_not_vary_is_said_to():
    good, bad = outcome(True, 5), outcome(False, 5)
    assert table([(1.0, good), (1.0, bad), (1.0, bad)], 5).no_rank == "it is 1 for every label"
    assert table([(0.1, good), (1.0, good), (0.5, good)], 5).no_rank.startswith("F1 on the calibration contexts is 1")
    assert table([(0.1, good), (1.0, bad)], 5).no_rank == "2 labels are too few"
    assert table([(0.1, bad), (0.9, good), (0.5, bad)], 5).no_rank is None
    assert table([(0.1, good), (1.0, good), (0.5, good)], 5).auroc is None


@pytest.fixture(scope="module")
def planted_run():
    """Half of the latents have true labels: the reader reads them right, and calls the others what comes to mind."""
    latents = planted(20)

    class Half(Reader):
        def label(self, questions):
            found = super().label(questions)
            return [
                a if q.index < 10 else a._replace(label="the word w7777") for q, a in zip(questions, found, strict=True)
            ]

    judges = Half("one"), Half("other")
    labelled = label_latents(judges, latents, Words())
    found, further = (
        verify_labels(labelled, judges[::-1], latents, Words(), part=part, sampling=QUICK)
        for part in ("held_out", "calibration")
    )
    rng = np.random.default_rng(0)
    tokens_bp = torch.arange(400 * 9).view(400, 9)  # a block a document, so that every excerpt is in it
    document_bp = torch.arange(400)[:, None].expand(400, 9).clone()
    rows = probe_rows(latents, Corpus(tokens_bp, torch.ones_like(tokens_bp, dtype=torch.bool), document_bp, "planted"))
    acts = [rng.normal(size=(len(r.fires_n), 6)) + 6 * np.eye(6)[0] * r.fires_n[:, None] for r in rows]
    probing = probe_latents(rows, acts, ProbeSettings(folds=2, shuffles=1), QUICK)
    activity = {latent.index: latent.activity for latent in latents}
    return labelled, found, agreement(found, QUICK), probing, activity, further


def test_the_calibration_tells_which_part_of_a_score_is_worth_something(planted_run):
    *parts, further = planted_run
    scores = confidences(*parts)
    assert all(scores[i].tier == "high" for i in range(10)) and all(scores[i].tier == "low" for i in range(10, 20))
    found = calibrate(scores, further)
    assert [b.confirmed[:2] for b in found.score.bins] == [(0, 0), (0, 0), (0, 10), (0, 0), (10, 10)]
    assert found.score.rank.rho == pytest.approx(1, abs=0.3) and found.score.rank.p_value < 1e-4
    assert found.components["held_out"].error == 0 and found.components["held_out"].rank.rho == pytest.approx(1)
    probe = found.components["probe"]
    assert probe.mean_score > 0.95 and probe.confirmed[:2] == (10, 20) and probe.error > 0.45
    assert found.components["health"].no_rank == "it is 1 for every label" and found.left_out == 0
    assert found.score.auroc == found.components["held_out"].auroc == 1
    assert found.components["held_out"].brier == 0 and found.score.brier_constant == 0.25
    document = found.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_p_values_of_components_are_corrected_for_their_number_and_the_score_s_is_not():
    rng = np.random.default_rng(5)
    tests = {i: outcome(confirmed, int(rng.integers(11))) for i, confirmed in enumerate(rng.random(30) < 0.5)}
    scores = {i: confidence_of(Components(*np.round(rng.random(4), 2).tolist())) for i in tests}
    further = SimpleNamespace(part="calibration", by_judge={"one": SimpleNamespace(tests=tests)})
    found = calibrate(scores, further, sampling=QUICK)
    f1 = [t.f1 for t in tests.values()]
    p_values = [
        scipy.stats.spearmanr([s.components[at] for s in scores.values()], f1).pvalue for at in range(len(COMPONENTS))
    ]
    adjusted = multipletests(p_values, method="holm")[1]
    assert [found.components[name].rank.p_value for name in COMPONENTS] == pytest.approx(adjusted)
    assert not np.allclose(adjusted, p_values)
    own = scipy.stats.spearmanr([s.score for s in scores.values()], f1).pvalue
    assert found.score.rank.p_value == pytest.approx(own)


def test_records_have_the_card_s_names(planted_run):
    labelled, found, agreed, probing, activity, _ = planted_run
    scores = confidences(labelled, found, agreed, probing, activity)
    labels = feature_labels(labelled, activity, found, agreed, probing, scores, n_examples=3)
    assert [label.index for label in labels] == [*range(20)]
    first, last = labels[0], labels[-1]
    assert first.label == "the word w1" and first.source == "one" and first.category == "word"
    assert first.alternatives == {"other": "the word w1"} and first.confidence == scores[0].score
    assert len(first.examples) == 3 and first.examples == labelled.shown[0][:3]
    facts = first.facts
    assert (facts["freq"], facts["n_active"], facts["mean_activation"], facts["max_activation"]) == (1e-3, 1000, 1.5, 2)
    assert facts["cv_validated"] is True and (facts["cv_matches"], facts["cv_mismatches"]) == (10, 0)
    assert facts["cv_precision"] == facts["cv_f1"] == 1.0 and facts["cv_floor_validated"] is False
    assert facts["probe_accuracy"] == facts["probe_metrics"]["accuracy"] == probing.probes[0].probe.accuracy
    assert facts["agreement"] == 1.0 and facts["confidence_tier"] == "high"
    assert facts["confidence_scores"].keys() == {"agreement", "cv", "probe", "activation"}
    assert last.facts["cv_validated"] is False and last.facts["confidence_tier"] == "low"
    assert json.loads(json.dumps(dict(facts), allow_nan=False)) == facts
    assert facts["cv_documents"] == 20 and facts["confidence_floor"] == scores[0].dealt
    document = scores_dict(scores)
    assert document["tiers"] == {"high": 10, "medium": 0, "low": 10, "none": 0}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_scores_stand_beside_those_of_dealt_labels(planted_run):
    labelled, found, agreed, probing, activity, _ = planted_run
    weights = Weights(agreement=0.2, held_out=0.3, probe=0.4, health=0.1)
    scores = confidences(labelled, found, agreed, probing, activity, weights)
    floor = found.by_judge["one"].floor
    for index, one in scores.items():
        kappa = agreed.pairs[index].floor_kappa
        expected = (
            0.2 * max(0, kappa) + 0.3 * floor.tests[index].f1 + 0.4 * probing.probes[index].probe.accuracy + 0.1 * 1.0
        ) if index in floor.tests else None  # fmt: skip
        assert one.dealt == (None if expected is None else pytest.approx(expected))
    document = scores_dict(scores, weights, sampling=QUICK)
    both = [(s.score, s.dealt) for s in scores.values() if s.dealt is not None]
    assert document["mean"]["value"] == pytest.approx(np.mean([s.score for s in scores.values()]))
    mean = document["floor"]
    assert mean["mean"]["value"] == pytest.approx(np.mean([dealt for _, dealt in both])) and mean["mean"]["n"] > 10
    assert mean["difference"]["value"] == pytest.approx(np.mean([own - dealt for own, dealt in both]))
    assert mean["own"]["value"] > mean["mean"]["value"] and document["mean"]["low"] < document["mean"]["value"]
    tiers = ["high" if d >= 0.8 else "medium" if d >= 0.5 else "low" for _, d in both]
    assert mean["tiers"] == {tier: tiers.count(tier) for tier in ("high", "medium", "low")}
    without = verify_labels(labelled, [Reader("other")] * 2, planted(20), Words(),
                            VerificationSettings(floor=False), sampling=QUICK)  # fmt: skip
    bare = confidences(labelled, without, agreement(without, QUICK), probing, activity)
    assert bare[0].score is not None and bare[0].dealt is None and scores_dict(bare)["floor"] is None


def test_labels_that_contradict_each_other_agree_in_nothing_and_matches_are_of_firing_contexts():
    latents = planted(8)

    class Contrary(Reader):
        """Says that a label applies where it does not."""

        def detect(self, questions):
            return [[not said for said in answer] for answer in super().detect(questions)]

    judges = Reader("one"), Contrary("other")
    labelled = label_latents(judges, latents, Words())
    found = verify_labels(labelled, judges[::-1], latents, Words(), sampling=QUICK)
    agreed = agreement(found, QUICK)
    assert agreed.kappa.value == pytest.approx(-1)
    scores = confidences(labelled, found, agreed, None, {})
    assert scores[3].components == Components(agreement=0.0, held_out=0.0, probe=None, health=None)
    [first, *_] = feature_labels(labelled, {}, found, agreed)
    assert (first.facts["cv_matches"], first.facts["cv_mismatches"]) == (0, 10) and first.facts["agreement"] < 0
    uneven = planted(8, n_negative=6)
    [first, *_] = feature_labels(labelled, {}, verify_labels(labelled, judges[::-1], uneven, Words(), sampling=QUICK))
    assert first.facts["cv_mismatches"] == 6 and first.facts["cv_recall"] == 0


def test_what_is_not_known_is_not_among_the_facts():
    latents, judges = planted(8), (Reader("one", silent=[1]), Reader("other", silent=[2, 1]))
    judges[0].silent = {0, 1}
    labelled = label_latents(judges, latents, Words())
    bare = feature_labels(labelled, {})
    assert [label.index for label in bare] == [0, 2, 3, 4, 5, 6, 7]
    assert bare[0].source == "other" and bare[0].alternatives == {} and bare[0].confidence is None
    assert bare[1].facts == {"categories": {"one": "word"}}
    found = verify_labels(
        labelled, judges[::-1], latents, Words(), VerificationSettings(min_positives=10), sampling=QUICK
    )
    scores = confidences(labelled, found, None, None, {3: Activity(100, 1e-3, 1.0, 1.0)})
    assert 0 not in scores and scores[3] == Confidence(
        None, None, "no agreement, probe", Components(None, 1.0, None, 1.0)
    )
    labels = feature_labels(labelled, {}, found, None, None, scores)
    assert labels[2].facts["confidence_reason"] == "no agreement, probe" and "confidence_tier" not in labels[2].facts
    assert labels[2].facts["confidence_scores"] == {"cv": 1.0, "activation": 1.0}
    strict = VerificationSettings(scorer="own", floor=False)
    few = [latents[0], *planted(8, n_positive=4)[1:]]
    judge = Reader("one")
    alone = label_latents([judge], few, Words())
    some = verify_labels(alone, [judge], few, Words(), strict, sampling=QUICK)
    assert feature_labels(alone, {}, some)[3].facts["cv_status"] == "fewer than 5 contexts that it fires in"


def test_calibration_refuses_what_made_the_score():
    latents, judge = planted(3), Reader()
    labelled = label_latents([judge], latents, Words())
    own = VerificationSettings(scorer="own", floor=False)
    held_out, further = (
        verify_labels(labelled, [judge], latents, Words(), own, part, QUICK) for part in ("held_out", "calibration")
    )
    scores = {i: confidence_of(Components(0.5, 0.5, 0.5, 0.5)) for i in range(3)}
    with pytest.raises(ConfigError, match="The tests are on the held_out contexts, which made the score"):
        calibrate(scores, held_out)
    with pytest.raises(ConfigError, match="n_bins must be 1 or more, not 0"):
        calibrate(scores, further, 0)
    none = {i: confidence_of(Components(None, 0.5, 0.5, 0.5)) for i in range(3)}
    with pytest.raises(DataError, match="3 labels, of which 0 have a score and 3 a test"):
        calibrate(none, further)
    some = calibrate({0: scores[0], 1: none[1], 9: scores[1]}, further)
    assert some.left_out == 2 and some.score.n == 1 and some.components["agreement"].n == 1
    assert some.components["held_out"].n == 2


def test_the_whole_line_on_the_embedded_pair(sae, model, tmp_path):
    """Offline, with the two baseline judges; every figure is checked elsewhere, here that the parts fit."""
    whole = load_embedded("embedded:text", "heldout")
    texts = [text[i : i + 400] for text in whole for i in range(0, len(text), 400)]
    corpus = g4.build_corpus(texts, model.tokenizer, context_size=48, max_tokens=6_000)
    firings = gather_firings(sae, model, HOOK, corpus, tmp_path, {}, batch_blocks=16, progress=False)
    settings = ExampleSettings(n_top=8, n_quantile=4, n_positive=8, n_negative=8, window=8)
    busy = [i for i, f in enumerate(firings.latents(0, 400)) if len(f.token_e) >= 40][:12]
    examples = list(Examples(firings, corpus, settings).of(busy))
    judges = BaselineJudge(1), BaselineJudge(3)
    labelled = label_latents(judges, examples, model.tokenizer)
    found = verify_labels(labelled, judges[::-1], examples, model.tokenizer, sampling=QUICK)
    further = verify_labels(labelled, judges[::-1], examples, model.tokenizer, part="calibration", sampling=QUICK)
    rows = probe_rows(examples, corpus)
    acts_md = activations_at(model, HOOK, corpus, np.concatenate([r.place_n for r in rows]))
    acts = np.split(acts_md, np.cumsum([len(r.place_n) for r in rows])[:-1])
    probing = probe_latents(rows, acts, ProbeSettings(folds=2, shuffles=1), QUICK)
    activity = {latent.index: latent.activity for latent in examples}
    agreed = agreement(found, QUICK)
    scores = confidences(labelled, found, agreed, probing, activity)
    calibrated = calibrate(scores, further, sampling=QUICK)
    labels = feature_labels(labelled, activity, found, agreed, probing, scores)
    tested = found.by_judge[labelled.judges[0]]
    assert len(labels) >= 10 and calibrated.score.n >= 8
    assert tested.f1.value > tested.floor.f1.value and tested.floor.change.change > 0
    assert probing.means["probe"]["accuracy"].value > probing.means["shuffled"]["accuracy"].value + 0.2
    everything = [*(r.to_dict() for r in (labelled, found, further, agreed, probing, calibrated)), scores_dict(scores)]
    assert all(json.loads(json.dumps(d, allow_nan=False)) == d for d in everything)
    assert all(math.isfinite(s.score) for s in scores.values() if s.score is not None)
