import json

import numpy as np
import pytest
import scipy.stats

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.excerpts import LatentExamples, Part
from sae_lens_gemma4.interp.judges.baseline import BaselineJudge
from sae_lens_gemma4.interp.labels.labelling import SILENT, label_latents, label_questions
from sae_lens_gemma4.interp.means import Mean, mean_of, plain
from sae_lens_gemma4.interp.statistics import share
from tests.interp.labels.planted import Guesser, Reader, Words, planted

NOTHING = Part([], [])


def test_each_judge_labels_each_latent_from_the_labelling_part_alone():
    latents = planted(5)
    judges = Reader("one"), Reader("other", prefix="it is ")
    labelled = label_latents(judges, latents, Words(), {2: ("cat", "dog")})
    assert labelled.judges == ("one", "other")
    assert labelled.by("one") == {i: f"the word w{2 * i + 1}" for i in range(5)}
    assert labelled.by("other") == {i: f"it is w{2 * i + 1}" for i in range(5)}
    assert labelled.unanswered == {"one": 0, "other": 0}
    for judge in judges:
        assert [q.promoted for q in judge.labelled] == [(), (), ("cat", "dog"), (), ()]
        for latent, question in zip(latents, judge.labelled, strict=True):
            shown = {e.text for e in question.positives + question.negatives}
            mine = [*latent.labelling.positives, *latent.labelling.negatives]
            assert shown == {Words().decode(e.tokens_w) for e in mine}
            peaks = [e.activation for e in question.positives]
            assert peaks == sorted(peaks, reverse=True) and min(peaks) > 0
            assert {e.activation for e in question.negatives} == {0.0}
            assert labelled.shown[latent.index] == question.positives


def test_a_label_that_did_not_come_is_counted_and_not_made_up():
    labelled = label_latents((Reader("one", silent=[1, 2]), Reader("other")), planted(4), Words())
    assert labelled.unanswered == {"one": 2, "other": 0}
    assert [*labelled.by("one")] == [0, 3] and [*labelled.by("other")] == [0, 1, 2, 3]
    document = labelled.to_dict()
    assert document["labels"]["1"] == {"one": None, "other": {"label": "the word w3", "category": "word"}}
    assert document["schema"] == 1 and document["kind"] == "labels" and document["asked"] == 4
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_latents_that_do_not_fire_are_skipped_by_name():
    silent = LatentExamples(9, NOTHING, planted(1)[0].held_out, NOTHING)
    labelled = label_latents([Reader()], [*planted(2), silent], Words())
    assert labelled.skipped == {9: SILENT} and [*labelled.answers] == [0, 1]
    with pytest.raises(DataError, match="None of 1 latents fires in the documents for labelling: read more text"):
        label_latents([Reader()], [silent], Words())


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="Labels need a judge"):
        label_latents([], planted(1), Words())
    with pytest.raises(ConfigError, match="Two judges are called 'reader'"):
        label_latents([Reader(), Reader()], planted(1), Words())
    one, same = Reader("one"), Reader("other")
    one.identity = same.identity = "openai gpt at https://x"
    with pytest.raises(ConfigError, match="Two judges are the same model: 'one' and 'other' are both openai gpt at"):
        label_latents([one, same], planted(1), Words())
    same.identity = "openai gpt-mini at https://x"
    assert label_latents([one, same], planted(1), Words()).judges == ("one", "other")
    with pytest.raises(ConfigError, match="are both token statistics"):
        label_latents([BaselineJudge(1, "a"), BaselineJudge(1, "b")], planted(1), Words())
    with pytest.raises(DataError, match="Latent 0 was given twice"):
        label_questions(planted(1) * 2, Words())

    class Short(Guesser):
        def label(self, questions):
            return super().label(questions)[1:]

    with pytest.raises(DataError, match="'guesser' gave 2 answers for 3 questions"):
        label_latents([Short()], planted(3), Words())


def test_a_mean_has_the_interval_of_scipy_s_bootstrap():
    values = np.random.default_rng(1).gamma(2, size=60)
    found = mean_of(values, Sampling(resamples=20_000))
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=2).confidence_interval
    assert found.value == pytest.approx(values.mean()) and found.n == 60
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_means_of_many_and_of_few():
    many = np.random.default_rng(0).normal(100, size=5000)  # in groups of four and of five, which must not show
    found = mean_of(many, Sampling(resamples=200))
    assert found.value == pytest.approx(many.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 / 5000**0.5, rel=0.25)
    assert mean_of([1.0, 2.0], Sampling()) == Mean(1.5, None, None, 2)
    assert mean_of([], Sampling()) == Mean(None, None, None, 0)
    assert mean_of([0.5] * 20, Sampling())[:3] == pytest.approx((0.5, 0.5, 0.5))


def test_plain_is_what_json_takes():
    given = {3: share(1, 2), "x": (np.float32(0.5), np.int64(2), np.bool_(True), float("nan"), [None, "a"])}
    assert plain(given) == {
        "3": {
            "k": 1,
            "n": 2,
            "value": 0.5,
            "low": pytest.approx(0.0945, abs=1e-4),
            "high": pytest.approx(0.9055, abs=1e-4),
        },
        "x": [0.5, 2, True, None, [None, "a"]],
    }
