import tempfile
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
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings, Excerpt, example_of
from sae_lens_gemma4.interp.excerpts import token_texts
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.segments import split_documents
from tests.interp.conftest import HOOK
from tests.interp.plain import dense

BOS, SIZE, PARTS = 0, 12, ("labelling", "held_out", "calibration")


def packed(seed, n_documents=14, longest=30, n_ids=6):
    """Documents of random lengths end to end, each and each block opened by a masked BOS; some other tokens masked."""
    rng = np.random.default_rng(seed)
    rows, row = [], []
    for document in range(n_documents):
        tokens = rng.integers(1, n_ids, size=rng.integers(1, longest)).tolist()
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


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 3))
def test_parts_share_no_document_and_windows_no_text(seed, window, n_shards):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    asked = ExampleSettings(window=window, seed=seed, n_top=3, n_quantile=3, n_positive=4, n_negative=4)
    with tempfile.TemporaryDirectory() as folder:
        found = list(Examples(written(folder, corpus, z_bpf, n_shards), corpus, asked).of(range(5)))
    assert [latent.index for latent in found] == [0, 1, 2, 3, 4]
    parts_of = {}
    for latent in found:
        z_bp = z_bpf[..., latent.index]
        assert latent.activity.n_active == int((z_bp > 0).sum())
        assert latent.activity.max == float(z_bp.max())
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
                assert float(e.value_w[e.peak]) == float(z_bp[block, run[1] : run[2] + 1].max())
    assert all(len(parts) == 1 for parts in parts_of.values())


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_windows_are_as_wide_as_their_document_lets_them(seed, window):
    corpus = packed(seed)
    with tempfile.TemporaryDirectory() as folder:
        found = Examples(written(folder, corpus, some(seed, corpus)), corpus, ExampleSettings(window=window))
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
        examples = Examples(written(folder, corpus, z_bpf), corpus, asked)
        latents = list(examples.of(range(5)))
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
def test_negatives_are_apart_and_missing_only_where_there_are_none(seed, window):
    corpus = packed(seed)
    z_bpf = some(seed, corpus)
    with tempfile.TemporaryDirectory() as folder:
        examples = Examples(
            written(folder, corpus, z_bpf), corpus, ExampleSettings(window=window, n_negative=6, seed=seed)
        )
        latents = list(examples.of(range(5)))
    for latent in latents:
        z_bp = z_bpf[..., latent.index]
        for part, name in enumerate(PARTS):
            positives, negatives = getattr(latent, name)
            if not positives:
                assert negatives == []
                continue
            centres = [e.block * SIZE + e.position for e in negatives]
            assert all(abs(a - b) > window for i, a in enumerate(centres) for b in centres[:i])
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
                    if corpus.keep_bp[block, p] and not z_bp[block, low:high].any():
                        assert any(abs(block * SIZE + p - centre) <= window for centre in centres)


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
    assert Counter(int(e.tokens_w[e.peak]) for e in near) == dict.fromkeys(range(1, 6), 3)


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


@given(st.integers(3, 60), st.integers(0, 1000), st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_documents_are_dealt_out_by_their_shares(n, seed, a, b):
    shares = (a, (1 - a) * b, (1 - a) * (1 - b))
    part_of = split_documents(np.repeat(np.arange(n) * 7, 2), shares, seed, "x")
    assert sorted(part_of) == [7 * k for k in range(n)]
    for part, share in enumerate(shares):
        count = sum(p == part for p in part_of.values())
        assert count >= 1
        if n * min(shares) >= 2:
            assert abs(count - n * share) <= 1


def test_facts_tell_how_the_text_was_dealt_out(tmp_path):
    corpus = packed(3, n_documents=40)
    examples = Examples(written(tmp_path, corpus, some(3, corpus)), corpus, ExampleSettings(seed=9))
    facts = examples.facts()
    assert facts["settings"]["seed"] == 9 and facts["corpus"] == corpus.hash
    assert sum(facts["documents"].values()) == corpus.n_documents
    assert sum(facts["tokens"].values()) == corpus.n_tokens
    assert facts["documents"]["labelling"] == round(corpus.n_documents / 2)


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
    assert latent.activity.n_active == 9 and latent.activity.max == 1.0
    assert {e.position for _, positive, e in excerpts(latent) if positive} == {1}


def test_an_excerpt_knows_its_peak():
    e = Excerpt(3, 7, 5, 0, np.array([4, 5, 6]), np.array([0, 0, 2], np.float32), "top")
    assert e.peak == 2
