import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sae_lens_gemma4 as g4
from sae_lens_gemma4.embedded.text import load_embedded
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.labels import probes
from sae_lens_gemma4.interp.labels.probe_rows import ProbeRows, activations_at, probe_rows
from sae_lens_gemma4.interp.labels.probes import ProbeSettings, out_of_fold, probe_latents, readout, splits_of, too_few
from tests.interp.conftest import HOOK
from tests.interp.plain import dense

FEW = ProbeSettings(shuffles=2)
QUICK = Sampling(resamples=200)


def rows(fires_n, document_n=None, near_miss_n=None, length_nf=None, index=0, seed=0):
    n, rng = len(fires_n), np.random.default_rng(seed)
    return ProbeRows(
        index,
        np.arange(n),
        np.asarray(fires_n, dtype=bool),
        np.zeros(n, dtype=bool) if near_miss_n is None else np.asarray(near_miss_n),
        np.arange(n) if document_n is None else np.asarray(document_n),
        rng.normal(size=(n, 3)) if length_nf is None else length_nf,
    )


def half(n, seed):
    return np.random.default_rng(seed).permutation(n) < n // 2


def linear(n_latents, n=80, d=24, seed=0):
    """Latents that are thresholds on directions. Near-misses are the silent contexts that come close."""
    rng = np.random.default_rng(seed)
    latents, acts = [], []
    for index in range(n_latents):
        x_nd = rng.normal(size=(n, d)).astype(np.float32)
        read_n = x_nd @ rng.normal(size=d)
        x_nd += np.float32(0.2) * np.sign(read_n - np.median(read_n))[:, None]
        fires_n = read_n > np.median(read_n)
        near_n = ~fires_n & (read_n > np.median(read_n[~fires_n]))
        latents.append(rows(fires_n, near_miss_n=near_n, index=index, seed=index))
        acts.append(x_nd)
    return latents, acts


def test_a_threshold_on_a_direction_is_read_by_any_probe_and_by_no_control():
    latents, acts = linear(8)
    found = probe_latents(latents, (x_nd for x_nd in acts), FEW, QUICK)
    assert found.means["probe"]["accuracy"].value > 0.85 and found.means["probe"]["auroc"].value > 0.93
    for control in ("shuffled", "length", "majority"):
        assert found.means[control]["balanced_accuracy"].value == pytest.approx(0.5, abs=0.07)
        assert found.differences[control]["accuracy"].low > 0.25
    assert all(probe.majority.accuracy == 0.5 and probe.majority.auroc == 0.5 for probe in found.probes.values())
    hard = [p.hard for p in found.probes.values()]
    assert all(hard) and found.differences["hard"]["auroc"].value < 0
    for name in ("length", "hard"):
        sign = -1 if name == "hard" else 1
        by_latent = [sign * (p.probe.accuracy - getattr(p, name).accuracy) for p in found.probes.values()]
        assert found.differences[name]["accuracy"].value == pytest.approx(np.mean(by_latent))
    document = found.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["kind"] == "probes" and document["probes"]["3"]["n_positive"] == 40


def test_out_of_fold_is_scikit_learn_s_cross_validation_with_classes_weighed_alike():
    [latent], [acts_nd] = linear(1)
    fires_n = latent.fires_n & (np.arange(80) % 3 == 0)
    splits = splits_of(fires_n, latent.document_n, FEW)
    odds_n, not_converged = out_of_fold(acts_nd, fires_n, splits, FEW)
    theirs = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)),
        acts_nd,
        fires_n,
        cv=splits,
        method="decision_function",
    )
    np.testing.assert_allclose(odds_n, theirs, rtol=1e-5)
    assert not_converged == 0


def test_shuffled_labels_are_what_the_control_is_trained_and_tested_on(monkeypatch):
    [latent], acts = linear(1)
    trained, tested, fit, read = [], [], probes.out_of_fold, probes.readout
    monkeypatch.setattr(
        probes, "out_of_fold", lambda x, fires_n, *rest: (trained.append(fires_n), fit(x, fires_n, *rest))[1]
    )
    monkeypatch.setattr(probes, "readout", lambda fires_n, odds_n: (tested.append(fires_n), read(fires_n, odds_n))[1])
    probe_latents([latent], acts, ProbeSettings(shuffles=3), QUICK)
    others = [[f for f in seen if len(f) == 80 and (f != latent.fires_n).any()] for seen in (trained, tested)]
    assert len(others[0]) == len(others[1]) == 3
    for one, same in zip(*others, strict=True):
        assert (one == same).all() and one.sum() == 40
    assert len({f.tobytes() for f in others[0]}) == 3


def test_noise_is_read_by_no_probe():
    rng = np.random.default_rng(0)
    latents = [rows(half(100, i), index=i, seed=i) for i in range(16)]
    settings = ProbeSettings(folds=3, shuffles=1)
    found = probe_latents(latents, rng.normal(size=(16, 100, 30)).astype(np.float32), settings, QUICK)
    error = (101 / (12 * 50 * 50) / 16) ** 0.5  # of an AUROC of 50 and 50, over 16
    assert found.means["probe"]["auroc"].value == pytest.approx(0.5, abs=3 * error)
    assert abs(found.differences["shuffled"]["auroc"].value) < 3 * error * 2**0.5


def test_documents_must_not_be_in_training_and_test():
    """Activations that tell the document and nothing of the latent, which fires throughout some documents."""
    settings = ProbeSettings(folds=3, shuffles=1)
    leaking, by_document = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        document_n = np.repeat(np.arange(20), 5)
        fires_n = half(20, seed)[document_n]
        x_nd = rng.normal(size=(20, 40))[document_n] + 0.3 * rng.normal(size=(100, 40))
        mixed = list(StratifiedKFold(3, shuffle=True, random_state=seed).split(x_nd, fires_n))
        leaking.append(readout(fires_n, out_of_fold(x_nd, fires_n, mixed, settings)[0]).auroc)
        by_document.append(probe_latents([rows(fires_n, document_n)], [x_nd], settings, QUICK).probes[0].probe.auroc)
    assert np.mean(leaking) > 0.98
    assert np.mean(by_document) == pytest.approx(0.5, abs=0.12)


def test_the_length_baseline_tells_what_is_told_by_length():
    rng, latents = np.random.default_rng(0), []
    for index in range(8):
        fires_n = half(60, index)
        length_nf = rng.normal(size=(60, 3))
        length_nf[:, 1] += 8.0 * fires_n
        latents.append(rows(fires_n, length_nf=length_nf, index=index))
    found = probe_latents(latents, rng.normal(size=(8, 60, 16)), FEW, QUICK)
    assert found.means["length"]["accuracy"].value > 0.98
    assert found.differences["length"]["accuracy"].high < -0.3


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_no_document_is_on_both_sides_and_each_context_is_tested_once(seed, folds):
    rng = np.random.default_rng(seed)
    document_n = rng.integers(0, 15, size=60)
    fires_n = rng.random(60) < 0.4
    if too_few(fires_n, document_n, folds):
        return
    splits = splits_of(fires_n, document_n, ProbeSettings(folds=folds, seed=seed))
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(60))
    for train, test in splits:
        assert not set(document_n[train]) & set(document_n[test])
        assert len(set(train) | set(test)) == 60


@given(st.integers(0, 10_000))
def test_figures_are_scikit_learn_s_and_the_area_is_by_pairs(seed):
    rng = np.random.default_rng(seed)
    fires_n = np.array([True, False, *(rng.random(20) < 0.5)])
    odds_n = np.round(rng.normal(rng.normal(), size=22), 1)
    found, said_n = readout(fires_n, odds_n), odds_n > 0
    pairs = [(p > n) + 0.5 * (p == n) for p in odds_n[fires_n] for n in odds_n[~fires_n]]
    assert found.auroc == pytest.approx(np.mean(pairs))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(fires_n, said_n))
    assert found.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(fires_n, said_n))
    assert found.recall == pytest.approx(metrics.recall_score(fires_n, said_n))
    assert found.f1 == pytest.approx(metrics.f1_score(fires_n, said_n, zero_division=0))
    if said_n.any():
        assert found.precision == pytest.approx(metrics.precision_score(fires_n, said_n))
    else:
        assert found.precision is None


def test_what_cannot_be_probed_is_skipped_by_name():
    latents, given = linear(1)
    few = rows([True] * 3 + [False] * 20, index=1)
    together = rows([True] * 10 + [False] * 10, document_n=[0] * 10 + [*range(10)], index=2)
    alone, empty = rows([True] * 8, index=3), rows([], index=4)
    acts = [*given, *(np.zeros((n, 24)) for n in (23, 20, 8, 0))]
    found = probe_latents([*latents, few, together, alone, empty], acts, FEW, QUICK)
    assert [*found.probes] == [0]
    assert found.skipped == {
        1: "fewer positives than folds: they are from 3 documents, for 5 folds",
        2: "fewer positives than folds: they are from 1 documents, for 5 folds",
        3: "one class only: there are no negatives",
        4: "one class only: there are no positives",
    }
    with pytest.raises(DataError, match=r"No latent can be probed: fewer positives.*\(1 latents\).*ask fewer folds"):
        probe_latents([few], acts[1:2], FEW)
    with pytest.raises(DataError, match="none was given"):
        probe_latents([], [])
    with pytest.raises(DataError, match="22 rows of activations for 23 contexts of latent 1"):
        probe_latents([few], [acts[1][:22]])
    with pytest.raises(DataError, match="fewer arrays than latents"):
        probe_latents([*latents, few], acts[:1], FEW)
    with pytest.raises(DataError, match="fewer latents than arrays of activations"):
        probe_latents(latents, acts[:2], FEW)
    for wrong in ({"folds": 1}, {"shuffles": 0}, {"c": 0.0}, {"seed": -1}, {"max_iter": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ProbeSettings(**wrong)


def test_near_misses_too_few_for_a_hard_probe_are_said():
    found = probe_latents([rows(half(40, 0))], np.random.default_rng(0).normal(size=(1, 40, 8)), FEW, QUICK)
    assert found.probes[0].hard is None and found.probes[0].no_hard == "one class only: there are no negatives"
    assert found.means["hard"]["accuracy"].n == 0 and found.means["hard"]["accuracy"].value is None


def test_fits_that_do_not_converge_are_counted_and_not_warned_of():
    latents, acts = linear(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = probe_latents(latents, acts, ProbeSettings(shuffles=2, max_iter=1), QUICK)
    assert found.probes[0].not_converged >= 15
    assert probe_latents(latents, acts, FEW, QUICK).probes[0].not_converged == 0


def test_activations_are_asked_for_one_latent_at_a_time(monkeypatch):
    latents, acts = linear(3)
    fitted, held, fit = [], [], probes._probe
    monkeypatch.setattr(probes, "_probe", lambda *given: (fitted.append(given), fit(*given))[1])

    def one_by_one():
        for x_nd in acts:
            held.append(len(fitted))
            yield x_nd

    found = probe_latents(latents, one_by_one(), FEW, QUICK)
    assert held == [0, 1, 2] and found.to_dict() == probe_latents(latents, acts, FEW, QUICK).to_dict()


def test_one_seed_one_result():
    latents, acts = linear(2)
    one, same = (probe_latents(latents, acts, FEW, QUICK).to_dict() for _ in range(2))
    other = probe_latents(latents, acts, ProbeSettings(shuffles=2, seed=1), QUICK).to_dict()
    assert one == same and one["probes"] != other["probes"]
    assert other["settings"]["seed"] == 1


@pytest.fixture(scope="module")
def corpus(model):
    """Some short documents, of which the third counts nowhere."""
    texts = [text[:300] for text in load_embedded("embedded:text", "heldout")]
    corpus = g4.build_corpus(texts[:24], model.tokenizer, context_size=32)
    corpus.keep_bp[2] = False
    return corpus


@pytest.fixture(scope="module")
def plain(sae, model, corpus):
    return dense(sae, model, HOOK, corpus)


@pytest.fixture(scope="module")
def found(sae, model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("firings")
    firings = gather_firings(sae, model, HOOK, corpus, folder, {}, batch_blocks=4, progress=False)
    settings = ExampleSettings(n_top=3, n_quantile=3, n_positive=4, n_negative=4, window=5)
    examples = Examples(firings, corpus, settings)
    return [latent for latent in examples.of(range(60)) if latent.labelling.positives and latent.held_out.positives]


def test_rows_are_the_contexts_of_all_parts_but_calibration(found, corpus, plain):
    assert found
    z_bpf = plain[1]
    for latent, row in zip(found, probe_rows(found, corpus), strict=True):
        chosen = {(e.block, e.position) for p in (latent.labelling, latent.held_out) for es in p for e in es}
        block_n, position_n = np.divmod(row.place_n, corpus.context_size)
        assert {*zip(block_n.tolist(), position_n.tolist(), strict=True)} == chosen
        np.testing.assert_array_equal(z_bpf[block_n, position_n, latent.index].numpy() > 0, row.fires_n)
        np.testing.assert_array_equal(corpus.document_bp[block_n, position_n], row.document_n)
        held_back = {e.document for es in latent.calibration for e in es}
        assert not held_back & set(row.document_n.tolist())
        assert not (row.near_miss_n & row.fires_n).any()
        for n, (block, position) in enumerate(zip(block_n, position_n, strict=True)):
            before = (corpus.document_bp.flatten() == row.document_n[n]).nonzero()[0, 0]
            assert row.length_nf[n, 1] == position
            assert row.length_nf[n, 2] == block * corpus.context_size + position - before
            assert 1 <= row.length_nf[n, 0] <= 11


def test_activations_are_those_of_a_plain_pass(found, corpus, model, plain):
    place_m = np.concatenate([r.place_n for r in probe_rows(found, corpus)])
    x_td = plain[0].flatten(0, 1)
    for batch_blocks in (1, 5):
        acts_md = activations_at(model, HOOK, corpus, place_m, batch_blocks)
        np.testing.assert_allclose(acts_md, x_td[place_m], rtol=1e-4, atol=1e-4)
    again = np.concatenate([place_m[::-1], place_m[:3]])
    np.testing.assert_allclose(activations_at(model, HOOK, corpus, again), x_td[again], rtol=1e-4, atol=1e-4)


def test_only_the_blocks_needed_go_through_the_model(corpus, model, monkeypatch):
    seen, run = [], model.run_with_cache
    monkeypatch.setattr(model, "run_with_cache", lambda tokens, **kw: (seen.append(len(tokens)), run(tokens, **kw))[1])
    size = corpus.context_size
    activations_at(model, HOOK, corpus, np.array([5 * size + 3, 9 * size + 4, 5 * size + 7]))
    assert seen == [2]


def test_places_elsewhere_are_refused(corpus, model):
    with pytest.raises(DataError, match="There is no place to read"):
        activations_at(model, HOOK, corpus, np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="are not all in a corpus of"):
        activations_at(model, HOOK, corpus, np.array([3, corpus.tokens_bp.numel()]))
    with pytest.raises(DataError, match="a token that does not count"):
        activations_at(model, HOOK, corpus, np.array([2 * corpus.context_size + 3]))
    with pytest.raises(UnknownNameError):
        activations_at(model, "blocks.3.hook_nowhere", corpus, np.array([3]))
