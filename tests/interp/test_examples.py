import tempfile
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.embedded.text import load_embedded
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.reading import ActiveLatents
from sae_lens_gemma4.interp import examples as examples_module
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings, Excerpt, SplitWarning, example_of, read_latents
from sae_lens_gemma4.interp.excerpts import token_texts
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.segments import Segments, repeated, split_documents
from tests.interp.conftest import HOOK
from tests.interp.plain import dense

BOS, SIZE, PARTS = 0, 12, ("labelling", "held_out", "calibration")


def packed(seed, n_documents=14, longest=30, n_ids=6):
    """Documents of random lengths end to end, each and each block opened by a masked BOS; some other tokens masked.
    Many quote one before them, and some are the same."""
    rng = np.random.default_rng(seed)
    rows, row, earlier = [], [], []
    for document in range(n_documents):
        tokens = rng.integers(1, n_ids, size=rng.integers(1, longest)).tolist()
        if earlier and rng.random() < 0.5:
            source = earlier[rng.integers(len(earlier))]
            start, at = rng.integers(len(source)), rng.integers(len(tokens) + 1)
            tokens[at:at] = source[start : start + rng.integers(6, 15)]
        elif earlier and rng.random() < 0.1:
            tokens = list(earlier[rng.integers(len(earlier))])
        earlier.append(list(tokens))
        while tokens:
            row.append((BOS, False, document))
            room = SIZE - len(row)
            row += [(token, bool(rng.random() > 0.1), document) for token in tokens[:room]]
            tokens = tokens[room:]
            if len(row) >= SIZE - 1:
                rows.append(row + [(BOS, False, -1)] * (SIZE - len(row)))
                row = []
    rows.append(row + [(BOS, False, -1)] * (SIZE - len(row)))
    tokens_bp, keep_bp, document_bp = (torch.tensor([[t[i] for t in r] for r in rows]) for i in range(3))
    return Corpus(tokens_bp, keep_bp, document_bp, "packed")


def written(folder, corpus, z_bpf, n_shards=1):
    """What a pass would have left of dense activations."""
    firings = Firings(folder, z_bpf.shape[-1], corpus.context_size, {})
    for blocks in torch.arange(corpus.n_blocks).tensor_split(n_shards):
        z_tf = z_bpf[blocks].flatten(0, 1)
        token_a, latent_a = z_tf.nonzero().unbind(dim=1)
        firings.append(
            ActiveLatents(token_a + int(blocks[0]) * corpus.context_size, latent_a, z_tf[token_a, latent_a]),
            int(blocks[-1]) + 1,
            {},
        )
    return firings


def some(seed, corpus, n_latents=5):
    """Sparse activations where tokens count: one latent on everything, one never, others by chance and by token."""
    rng = np.random.default_rng(seed)
    z_bpf = rng.gamma(2, size=(*corpus.tokens_bp.shape, n_latents)) * (rng.random((*corpus.tokens_bp.shape, 1)) < 0.2)
    z_bpf[..., 0] = 1 + rng.random(corpus.tokens_bp.shape)
    z_bpf[..., 1] = 0
    z_bpf[..., 2] *= corpus.tokens_bp.numpy() == 3
    z_bpf[..., 3] = np.ceil(z_bpf[..., 3])  # equals
    return torch.from_numpy(z_bpf * corpus.keep_bp.numpy()[..., None]).float()


def excerpts(latent):
    for name in PARTS:
        part = getattr(latent, name)
        yield from ((name, True, e) for e in part.positives)
        yield from ((name, False, e) for e in part.negatives)


def shown(excerpt):
    return excerpt.block, slice(excerpt.start, excerpt.start + len(excerpt.tokens_w))


def runs(corpus):
    """Of each document in each block its first and last position, by a plain walk."""
    found = []
    for block in range(corpus.n_blocks):
        for position in range(corpus.context_size):
            document = int(corpus.document_bp[block, position])
            if position and document == int(corpus.document_bp[block, position - 1]):
                found[-1][2] = position
            else:
                found.append([block, position, position, document])
    return [run for run in found if run[3] >= 0]


def texts(corpus):
    """Each document's tokens in order, without what opens it in a block: places and ids."""
    found = {}
    for block, first, last, document in runs(corpus):
        places = range(first + (not corpus.keep_bp[block, first]), last + 1)
        found.setdefault(document, []).extend((block, p, int(corpus.tokens_bp[block, p])) for p in places)
    return found


def in_runs(tokens, run):
    """Each run of so many of a text, or all of one that is shorter: where it begins, and its ids."""
    n = min(run, len(tokens))
    return [(i, tuple(tokens[i : i + n])) for i in range(len(tokens) - n + 1)]


def repeats(corpus, part_of, run):
    """Places in a run that a document of an earlier part has, by plain loops."""
    text = {d: t for d, t in texts(corpus).items() if d in part_of}
    has = [
        {r for d, t in text.items() if part_of[d] == part for _, r in in_runs([i for *_, i in t], run)}
        for part in range(3)
    ]
    found = set()
    for document, t in text.items():
        known = set().union(*has[: part_of[document]])
        for start, r in in_runs([i for *_, i in t], run):
            if r in known:
                found |= {(block, p) for block, p, _ in t[start : start + len(r)]}
    return found


def quiet(*arguments):
    """Examples of a text that is too short for its parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SplitWarning)
        return Examples(*arguments)


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 3))
def test_parts_share_no_document_and_windows_no_text(seed, window, n_shards):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    asked = ExampleSettings(window=window, seed=seed, n_top=3, n_quantile=3, n_positive=4, n_negative=4)
    with tempfile.TemporaryDirectory() as folder:
        examples = quiet(written(folder, corpus, z_bpf, n_shards), corpus, asked)
        found = list(examples.of(range(5)))
    assert [latent.index for latent in found] == [0, 1, 2, 3, 4]
    part_of, parts_of = examples.segments.part_of, {}
    again = repeats(corpus, part_of, asked.run)
    for latent in found:
        z_bp = z_bpf[..., latent.index]
        for name, positive, e in excerpts(latent):
            block, span = shown(e)
            parts_of.setdefault(e.document, set()).add(name)
            assert set(corpus.document_bp[block, span].tolist()) == {e.document}
            assert corpus.tokens_bp[block, span].tolist() == e.tokens_w.tolist()
            np.testing.assert_array_equal(e.value_w, z_bp[block, span])
            assert corpus.keep_bp[block, e.position] and 0 <= e.peak < len(e.tokens_w)
            assert e.peak <= window and len(e.tokens_w) - e.peak - 1 <= window
            assert positive == bool(e.value_w.any()) == (e.kind in ("top", "quantile"))
            if positive:
                (run,) = (r for r in runs(corpus) if r[0] == block and r[1] <= e.position <= r[2])
                free = [p for p in range(run[1], run[2] + 1) if (block, p) not in again]
                assert float(e.value_w[e.peak]) == float(z_bp[block, free].max())
    assert all(parts == {PARTS[part_of[document]]} for document, parts in parts_of.items())


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 11))
def test_no_context_is_chosen_in_text_that_an_earlier_part_has(seed, window):
    """By definition, and by what it is for: no run of more tokens than a side of the window, the whole window over."""
    corpus = packed(seed, n_documents=20, n_ids=4)
    asked = ExampleSettings(window=window, seed=seed, n_positive=9, n_negative=9)
    assert asked.run == max(8, window + 1)
    with tempfile.TemporaryDirectory() as folder:
        examples = quiet(written(folder, corpus, some(seed, corpus)), corpus, asked)
        latents = list(examples.of(range(5)))
    part_of = examples.segments.part_of
    again = repeats(corpus, part_of, asked.run)
    text = {d: [i for *_, i in t] for d, t in texts(corpus).items() if d in part_of}
    for latent in latents:
        for name, _, e in excerpts(latent):
            assert (e.block, e.position) not in again
            if asked.run > window + 1 or len(e.tokens_w) < asked.run:
                continue
            earlier = [d for d, part in part_of.items() if part < PARTS.index(name)]
            seen = {run for d in earlier for _, run in in_runs(text[d], asked.run)}
            assert not seen & {run for _, run in in_runs(e.tokens_w.tolist(), asked.run)}
    keep_bp = corpus.keep_bp
    for part, name in enumerate(PARTS):
        n = sum(bool(keep_bp[at]) and part_of.get(int(corpus.document_bp[at])) == part for at in again)
        assert examples.facts()["repeated"][name] == n and (n == 0 or name != "labelling")
    places = {divmod(int(at), SIZE) for pool in examples.segments.pools for at in pool.place_n}
    assert places == {(b, p) for b, p in keep_bp.nonzero().tolist() if (b, p) not in again}


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=8), st.integers(1, 6), st.data())
def test_repeated_runs_by_plain_comparison(documents, run, data):
    """Texts of two ids repeat each other everywhere."""
    token_t = np.array(data.draw(st.lists(st.integers(0, 1), min_size=(n := sum(d[0] for d in documents)), max_size=n)))
    document_t = np.repeat(np.arange(len(documents)), [length for length, _ in documents])
    part_t = np.array([part for _, part in documents])[document_t]
    expected = np.zeros(n, dtype=bool)
    spans = [
        (int(part_t[i]), i, i + length, tuple(token_t[i : i + length].tolist()))
        for i in range(n)
        for length in [min(run, int((document_t == document_t[i]).sum()))]
        if i + length <= n and document_t[i + length - 1] == document_t[i]
    ]
    for part, start, end, tokens in spans:
        expected[start:end] |= any(other < part and tokens == theirs for other, _, _, theirs in spans)
    assert repeated(token_t, document_t, part_t, run).tolist() == expected.tolist()


def test_a_repeat_crosses_blocks_and_a_short_document_is_one_if_it_is_the_same():
    licence = list(range(1, 31))
    documents = [[*licence, *range(40, 60)], [*range(60, 75), *licence, *range(80, 88)], [90, 91, 92], [90, 91, 92]]
    documents += [[90, 91], [*range(100, 130)]]
    row = [(token, d) for d, tokens in enumerate(documents) for token in tokens]
    row += [(0, -1)] * (-len(row) % 25)
    tokens_bp, document_bp = (torch.tensor([t[i] for t in row]).view(-1, 25) for i in range(2))
    corpus = Corpus(tokens_bp, document_bp >= 0, document_bp, "licences")
    n = 0
    for seed in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SplitWarning)
            segments = Segments(corpus, (0.5, 0.25, 0.25), seed, 17)
        part_of, document_n = segments.part_of, document_bp.flatten().numpy()
        barred = {d: np.flatnonzero(~segments.open_n & (document_n == d)) for d in part_of}
        barred = {d: (at - np.flatnonzero(document_n == d)[0]).tolist() for d, at in barred.items()}
        assert barred[0] == (list(range(30)) if part_of[0] > part_of[1] else [])
        assert barred[1] == (list(range(15, 45)) if part_of[1] > part_of[0] else [])
        assert [len(barred[d]) for d in (2, 3)] == [3 * (part_of[2] > part_of[3]), 3 * (part_of[3] > part_of[2])]
        assert barred[4] == barred[5] == []
        n += part_of[0] != part_of[1]
    assert n > 10


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_windows_are_as_wide_as_their_document_lets_them(seed, window):
    corpus = packed(seed)
    with tempfile.TemporaryDirectory() as folder:
        found = quiet(written(folder, corpus, some(seed, corpus)), corpus, ExampleSettings(window=window))
        latents = list(found.of([0, 4]))
    for e in (e for latent in latents for _, _, e in excerpts(latent)):
        (run,) = (r for r in runs(corpus) if r[0] == e.block and r[1] <= e.position <= r[2])
        assert e.start == max(run[1] + 1, e.position - window)  # each run opens with a masked BOS
        assert e.start + len(e.tokens_w) == min(run[2] + 1, e.position + window + 1)


@settings(max_examples=12)
@given(st.integers(0, 10_000))
def test_top_contexts_are_documents_in_blocks_by_their_maximum(seed):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    asked = ExampleSettings(n_top=4, n_quantile=0, n_positive=6, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        examples = quiet(written(folder, corpus, z_bpf), corpus, asked)
        latents = list(examples.of(range(5)))
    for block, position in repeats(corpus, examples.segments.part_of, asked.run):
        z_bpf[block, position] = 0
    for latent in latents:
        for part, name in enumerate(PARTS):
            ranked = []
            for block, first, last, document in runs(corpus):
                z_p = z_bpf[block, first : last + 1, latent.index]
                if z_p.any() and examples.segments.part_of.get(document) == part:
                    ranked.append((-float(z_p.max()), block, first + int(z_p.argmax())))
            n_top = 4 if name == "labelling" else 3
            positives = getattr(latent, name).positives
            top = [(e.block, e.position) for e in positives if e.kind == "top"]
            assert top == [(block, position) for _, block, position in sorted(ranked)[:n_top]]
            if name != "labelling":
                assert len(positives) == min(len(ranked), 6)
            assert len({(e.block, e.document) for e in positives}) == len(positives)


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_negatives_are_apart_and_missing_only_where_there_is_no_room(seed, window):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    asked = ExampleSettings(window=window, n_negative=6, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        examples = quiet(written(folder, corpus, z_bpf), corpus, asked)
        latents = list(examples.of(range(5)))
    again = repeats(corpus, examples.segments.part_of, asked.run)
    for latent in latents:
        z_bp = z_bpf[..., latent.index]
        for part, name in enumerate(PARTS):
            positives, negatives = getattr(latent, name)
            if not positives:
                assert negatives == []
                continue
            tokens = [(e.block, e.start + i) for e in positives + negatives for i in range(len(e.tokens_w))]
            assert len(set(tokens)) == len(tokens)  # no window is in another
            near = [e for e in negatives if e.kind == "near_miss"]
            fires_on = {int(corpus.tokens_bp[block, p]) for block, p in (z_bp > 0).nonzero().tolist()}
            assert len(near) <= 3 and all(int(e.tokens_w[e.peak]) in fires_on for e in near)
            if len(negatives) == 6:
                continue
            for block, first, last, document in runs(corpus):  # no silent window is left that would fit in
                if examples.segments.part_of.get(document) != part:
                    continue
                for p in range(first, last + 1):
                    low, high = max(first, p - window), min(last, p + window) + 1
                    free = bool(corpus.keep_bp[block, p]) and (block, p) not in again
                    if free and not z_bp[block, low:high].any():
                        assert {(block, i) for i in range(low, high)} & set(tokens)


def test_near_misses_are_found_at_the_tokens_the_latent_fires_on(tmp_path):
    corpus = packed(1, n_documents=200)
    z_bpf = torch.zeros(*corpus.tokens_bp.shape, 2)
    fires = (corpus.tokens_bp == 3) & corpus.keep_bp & (torch.arange(corpus.n_blocks) % 2 == 0)[:, None]
    z_bpf[fires, 0] = 1.0
    z_bpf[(corpus.tokens_bp == 3) & corpus.keep_bp, 1] = 1.0  # on every one: there are no near-misses
    examples = Examples(written(tmp_path, corpus, z_bpf), corpus, ExampleSettings(window=2, n_negative=9))
    some_misses, none = examples.of([0, 1])
    for name in PARTS:
        kinds = Counter(e.kind for e in getattr(some_misses, name).negatives)
        assert kinds == {"near_miss": 4, "random": 5}
        assert all(e.tokens_w[e.peak] == 3 for e in getattr(some_misses, name).negatives if e.kind == "near_miss")
        assert Counter(e.kind for e in getattr(none, name).negatives) == {"random": 9}
        assert not any(3 in e.tokens_w[corpus.keep_bp[shown(e)].numpy()] for e in getattr(none, name).negatives)


def flat(n_documents, size, seed=0):
    """A document a block, all of which counts."""
    tokens_bp = torch.from_numpy(np.random.default_rng(seed).integers(1, 50, size=(n_documents, size)))
    document_bp = torch.arange(n_documents)[:, None].expand(-1, size).contiguous()
    return Corpus(tokens_bp, torch.ones_like(tokens_bp, dtype=torch.bool), document_bp, "flat")


def test_near_misses_are_at_the_most_frequent_of_those_tokens(tmp_path):
    """Ids 1 to 5 are fired on often, 6 and 7 once each; all occur where the latent is silent."""
    corpus = flat(300, 8)
    corpus.tokens_bp[:] = torch.randint(1, 8, corpus.tokens_bp.shape, generator=torch.Generator().manual_seed(0))
    z_bpf = torch.zeros(300, 8, 1)
    z_bpf[::2, 4, 0] = torch.arange(150) % 7 + 1.0
    corpus.tokens_bp[::2, 4] = torch.arange(150) % 5 + 1
    for block in (0, 2):
        corpus.tokens_bp[20 * block : 300 : 80, 4] = 6 + block // 2
        z_bpf[20 * block : 300 : 80, 4, 0] = 9.0
    firings = written(tmp_path, corpus, z_bpf)
    (latent,) = Examples(firings, corpus, ExampleSettings(window=1, n_negative=30, n_positive=40)).of([0])
    near = [e for e in latent.labelling.negatives if e.kind == "near_miss"]
    assert len(near) == 15
    counts = Counter(int(e.tokens_w[e.peak]) for e in near)
    assert sorted(counts) == [1, 2, 3, 4, 5] and min(counts.values()) >= 2  # one that has no room is passed over


def test_quantiles_come_from_the_whole_range(tmp_path):
    corpus = flat(400, 4)
    z_bpf = torch.zeros(400, 4, 1)
    z_bpf[:, 1, 0] = torch.arange(1, 401)
    asked = ExampleSettings(n_top=3, n_quantile=4, n_positive=5, seed=2)
    (latent,) = Examples(written(tmp_path, corpus, z_bpf), corpus, asked).of([0])
    for name, n_intervals in (("labelling", 4), ("held_out", 2), ("calibration", 2)):
        part = getattr(latent, name)
        peaks = [float(e.value_w[e.peak]) for e in part.positives]
        assert peaks[:3] == sorted(peaks[:3], reverse=True) and part.positives[2].kind == "top"
        assert len(peaks) == 3 + n_intervals
        intervals = [int(np.ceil(peak / peaks[0] * n_intervals)) for peak in peaks[3:]]
        assert intervals == list(range(n_intervals, 0, -1))  # one from each, the highest first


def test_an_empty_interval_gives_its_places_to_the_others(tmp_path):
    corpus = flat(120, 4)
    z_bpf = torch.zeros(120, 4, 1)
    z_bpf[:, 0, 0] = 1.0
    z_bpf[::10, 0, 0] = 100.0
    (latent,) = Examples(written(tmp_path, corpus, z_bpf), corpus, ExampleSettings(n_top=20, n_quantile=10)).of([0])
    assert len(latent.labelling.positives) == 30


def test_random_negatives_are_drawn_evenly_from_silent_places(tmp_path):
    corpus = flat(6, 10)
    z_bpf = torch.zeros(6, 10, 1)
    z_bpf[:, :3, 0] = 1.0
    firings = written(tmp_path, corpus, z_bpf)
    counts = Counter()
    for seed in range(450):
        asked = ExampleSettings(seed=seed, window=1, n_negative=1)
        (latent,) = Examples(firings, corpus, asked).of([0])
        counts.update(e.position for e in latent.held_out.negatives)
    assert sorted(counts) == [4, 5, 6, 7, 8, 9]  # at 3 the window would hold a firing
    assert min(counts.values()) > 43 and max(counts.values()) < 107  # 75 ± 4 σ


def same(one, other):
    return [(e[:4], e.kind) for _, _, e in excerpts(one)] == [(e[:4], e.kind) for _, _, e in excerpts(other)]


def test_the_seed_and_the_index_decide_alone(tmp_path):
    corpus = packed(5, n_documents=60)
    firings = written(tmp_path, corpus, some(5, corpus))
    asked = ExampleSettings(window=2, n_top=2, n_quantile=2, n_positive=3, n_negative=3, seed=4)
    alone = next(Examples(firings, corpus, asked).of([4]))
    assert same(alone, list(Examples(firings, corpus, asked).of([2, 3, 4]))[2])
    assert same(alone, next(Examples(firings, corpus, asked).of([4, 0])))
    assert not same(alone, next(Examples(firings, corpus, replace(asked, seed=5)).of([4])))


@given(st.lists(st.integers(1, 500), min_size=3, max_size=60), st.integers(0, 99), st.floats(0.1, 0.8), st.data())
def test_documents_are_dealt_out_by_tokens(sizes, seed, a, data):
    """No part is further ahead of another than by one document."""
    b = data.draw(st.floats(0.2, 0.8))
    shares = (a, (1 - a) * b, (1 - a) * (1 - b))
    part_of = split_documents(np.repeat(7 * np.arange(len(sizes)), sizes), shares, seed, "x")
    assert sorted(part_of) == [7 * k for k in range(len(sizes))]
    mine = [[sizes[k // 7] for k, p in part_of.items() if p == part] for part in range(3)]
    assert all(mine)
    filled = [sum(found) / share for found, share in zip(mine, shares, strict=True)]
    for found, share, full in zip(mine, shares, filled, strict=True):
        assert full - max(found) / share <= min(filled) + 1e-6


def test_tokens_are_dealt_out_by_their_shares_and_documents_by_chance():
    sizes = np.random.default_rng(0).lognormal(6, 1, size=400).astype(int) + 1
    document_n = np.repeat(np.arange(400), sizes)
    parts = [split_documents(document_n, (0.5, 0.3, 0.2), seed, "x") for seed in range(60)]
    for part_of in parts[:5]:
        for part, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(sum(sizes[k] for k, p in part_of.items() if p == part) / sizes.sum() - share) < 0.02
    first = np.mean([[part_of[k] == 0 for k in range(400)] for part_of in parts], axis=0)
    assert first.min() > 0.2 and first.max() < 0.8 and abs(np.corrcoef(first, sizes)[0, 1]) < 0.2


def test_a_part_that_gets_too_little_is_told(tmp_path):
    """As the embedded text is: a document that has half of it, and some few others."""
    tokens_bp = torch.arange(1, 601).view(6, 100)
    document_bp = torch.tensor([0, 0, 0, 1, 2, 2])[:, None].expand(-1, 100).clone()
    document_bp[3, :10] = 3
    corpus = Corpus(tokens_bp, torch.ones(6, 100, dtype=torch.bool), document_bp, "uneven")
    firings = written(tmp_path, corpus, torch.ones(6, 100, 1))
    told = 0
    for seed in range(20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens = Examples(firings, corpus, ExampleSettings(seed=seed)).facts()["tokens"]
        small = [name for name, share in zip(PARTS, (0.5, 0.25, 0.25), strict=True) if tokens[name] < 300 * share]
        messages = [str(w.message) for w in caught if w.category is SplitWarning]
        assert len(messages) == bool(small)
        for name, share in zip(PARTS, (300, 150, 150), strict=True):
            said = f"{name} {tokens[name]} tokens, not {share}"
            assert all((said in message) == (name in small) for message in messages)
        assert all("Read more text, or shorter documents." in message for message in messages)
        told += len(messages)
    assert 0 < told < 20


def test_a_part_that_is_all_repeats_is_told(tmp_path):
    corpus = flat(40, 12)
    corpus.tokens_bp[:] = corpus.tokens_bp[:1]
    firings = written(tmp_path, corpus, torch.ones(40, 12, 1))
    with pytest.warns(SplitWarning, match=r"held_out 0 tokens, not 120 \(120 are repeats\); calibration 0 tokens"):
        examples = Examples(firings, corpus, ExampleSettings(window=2))
    (latent,) = examples.of([0])
    assert len(latent.labelling.positives) == 20 and latent.held_out == latent.calibration == ([], [])
    assert examples.facts()["repeated"] == {"labelling": 0, "held_out": 120, "calibration": 120}


def test_facts_tell_how_the_text_was_dealt_out(tmp_path):
    corpus = packed(3, n_documents=40)
    examples = Examples(written(tmp_path, corpus, some(3, corpus)), corpus, ExampleSettings(seed=9))
    facts = examples.facts()
    assert facts["settings"]["seed"] == 9 and facts["corpus"] == corpus.hash
    assert sum(facts["documents"].values()) == corpus.n_documents
    assert sum(facts["tokens"].values()) == corpus.n_tokens
    assert abs(facts["tokens"]["labelling"] / corpus.n_tokens - 0.5) < 0.1
    assert facts["run"] == 17 and min(facts["documents"].values()) > 0


@settings(max_examples=12)
@given(st.integers(0, 10_000))
def test_activity_leaves_out_what_is_for_calibration(seed):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    with tempfile.TemporaryDirectory() as folder:
        examples = quiet(written(folder, corpus, z_bpf), corpus, ExampleSettings(seed=seed))
        latents = list(examples.of(range(5)))
    part_of = examples.segments.part_of
    scored_bp = corpus.keep_bp & torch.tensor(
        [[part_of.get(d, 2) < 2 for d in row] for row in corpus.document_bp.tolist()]
    )
    for latent in latents:
        z_m = z_bpf[scored_bp][:, latent.index].double()
        fires = z_m[z_m > 0]
        expected = (
            (len(fires), len(fires) / len(z_m), float(fires.mean()), float(fires.max())) if len(fires) else (0, 0, 0, 0)
        )
        assert latent.activity == pytest.approx(expected)


def test_latents_are_read_in_any_order(tmp_path, monkeypatch):
    """Neighbours, near ones and far ones, over more than one chunk."""
    corpus = packed(2)
    rng = np.random.default_rng(0)
    z_bpf = torch.from_numpy(rng.random((*corpus.tokens_bp.shape, 60)) * (rng.random(60) < 0.9)).float()
    z_bpf *= rng.random(z_bpf.shape) < 0.3
    firings = written(tmp_path, corpus, z_bpf, n_shards=2)
    monkeypatch.setattr(examples_module, "_CHUNK", 7)
    asked = rng.permutation(60)[:33].tolist()
    read = list(read_latents(firings, corpus, asked))
    assert [index for index, _ in read] == asked
    for index, firing in read:
        z_n = (z_bpf[..., index] * corpus.keep_bp).flatten().numpy()
        assert firing.token_e.tolist() == np.flatnonzero(z_n).tolist()
        np.testing.assert_array_equal(firing.value_e, z_n[z_n > 0])


@pytest.fixture(scope="module")
def documents(model):
    """The first characters of 40 documents, packed so that blocks hold parts of several."""
    texts = [text[:300] for text in load_embedded("embedded:text", "heldout")]
    return g4.build_corpus(texts, model.tokenizer, context_size=48)


def test_on_the_embedded_model(sae, model, documents, tmp_path):
    firings = gather_firings(sae, model, HOOK, documents, tmp_path, {}, batch_blocks=8, progress=False)
    _, z_bpf = dense(sae, model, HOOK, documents)
    latents = (z_bpf > 0).sum(dim=(0, 1)).topk(12).indices.tolist()
    n = 0
    for latent in Examples(firings, documents, ExampleSettings(window=6)).of(latents):
        for _, positive, e in excerpts(latent):
            block, span = shown(e)
            n += 1
            np.testing.assert_allclose(e.value_w, z_bpf[block, span, latent.index], rtol=1e-4, atol=1e-4)
            assert documents.document_bp[block, span].unique().tolist() == [e.document]
            example = example_of(e, model.tokenizer)
            assert example.text == model.tokenizer.decode(e.tokens_w.tolist()) == "".join(example.tokens)
            assert example.tokens[example.token_index] == example.token and "<bos>" not in example.text
            assert (example.activation > 0) == positive
            assert len(example.tokens) == len(example.activations)
    assert n > 12 * 60


def test_tokens_read_as_the_text_even_where_a_character_has_several(model):
    tokenizer = model.tokenizer
    text = "naïve é€ 日本 😀 x\ufffdy"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)
    assert "日" in pieces and "😀" in pieces and "é" not in tokenizer.convert_ids_to_tokens(ids)
    assert pieces[pieces.index("日") - 2 : pieces.index("日")] == ["", ""]
    for start in range(len(ids)):  # windows that begin or end inside of a character
        for end in range(start + 1, len(ids) + 1):
            cut = token_texts(tokenizer, ids[start:end])
            assert len(cut) == end - start
            kept = "".join(cut).strip("\ufffd")
            assert kept in text and len(kept) >= len(tokenizer.decode(ids[start:end]).strip("\ufffd"))


def test_what_cannot_be_used_is_named(tmp_path):
    corpus = packed(1)
    firings = written(tmp_path / "a", corpus, some(1, corpus))
    examples = Examples(firings, corpus, ExampleSettings())
    assert examples.require([0, 1, 4]) == [0, 4]
    with pytest.raises(DataError, match=rf"None of the 1 latents asked for fires on the {corpus.n_tokens} tokens"):
        examples.require([1])
    with pytest.raises(ConfigError, match="no latent 5: the SAE has 5"):
        list(examples.of([5]))
    with pytest.raises(ConfigError, match="Latent 2 is asked for twice"):
        list(examples.of([2, 2]))
    (silent,) = examples.of([1])
    assert [*excerpts(silent)] == [] and silent.activity.n_active == 0
    with pytest.raises(DataError, match="Finish the pass"):
        Examples(firings, corpus.take(torch.arange(2)), ExampleSettings())
    with pytest.raises(DataError, match="Finish the pass"):
        Examples(Firings(tmp_path / "b", 5, SIZE, {}), corpus, ExampleSettings())
    firings.sums = {"n": torch.tensor(corpus.n_tokens + 1)}
    with pytest.raises(DataError, match="Take the corpus"):
        Examples(firings, corpus, ExampleSettings())
    two = packed(1, n_documents=2)
    with pytest.raises(DataError, match="has 2 documents that count;"):
        Examples(written(tmp_path / "c", two, some(1, two)), two, ExampleSettings())


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"n_top": 0}, "n_top must be an integer of at least 1"),
        ({"window": -1}, "window must be an integer of at least 0"),
        ({"n_negative": True}, "n_negative"),
        ({"seed": 0.5}, "seed"),
        ({"labelling": 0.6}, "sum to 1"),
        ({"labelling": 0.75, "held_out": 0.0}, "positive"),
        ({"calibration": float("nan")}, "positive"),
    ],
)
def test_settings_that_make_no_examples_are_refused(setting, match):
    with pytest.raises(ConfigError, match=match):
        ExampleSettings(**setting)


def test_activations_where_nothing_counts_are_no_contexts(tmp_path):
    corpus = flat(9, 4)
    z_bpf = torch.zeros(9, 4, 1)
    z_bpf[:, 1, 0] = 1.0
    z_bpf[:, 3, 0] = 5.0
    firings = written(tmp_path, corpus, z_bpf)
    corpus.keep_bp[:, 3] = False
    (latent,) = Examples(firings, corpus, ExampleSettings()).of([0])
    assert latent.activity.max == 1.0
    assert {e.position for _, positive, e in excerpts(latent) if positive} == {1}


def test_an_excerpt_knows_its_peak():
    e = Excerpt(3, 7, 5, 0, np.array([4, 5, 6]), np.array([0, 0, 2], np.float32), "top")
    assert e.peak == 2
