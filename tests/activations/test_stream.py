import gc
import itertools
import json
import threading
from contextlib import closing

import pytest
import torch

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.shards import CorpusStream
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.activations.stream import ActivationStream, Position
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer
from tests.activations.echo import HOOKS, WIDTH, Echo, numbered

N_BLOCKS, CHUNK, PER_BLOCK = 11, 4, 5  # an epoch is 55 tokens in chunks of 20, 20 and 15


class Parts:
    """A text in shards without end: number i has 3 + i % 2 blocks, its start is {"part": i}."""

    def shards(self, start):
        for i in itertools.count(start["part"] if start else 0):
            yield numbered(3 + i % 2, first=1000 * i, name=f"part {i}"), {"part": i + 1}


def stream(model=None, corpus=None, hooks=HOOKS, **settings):
    corpus = numbered(N_BLOCKS) if corpus is None else corpus
    settings = {"batch_size": 7, "seed": 0, "buffer_blocks": CHUNK, "batch_blocks": 3, **settings}
    return ActivationStream(model or Echo(), corpus, hooks, **settings)


def take(batches, n):
    return [batch[HOOKS[0]][:, 0].long().tolist() for batch in itertools.islice(batches, n)]


def rows(batches, n):
    """Token ids of the next `n` rows."""
    return list(itertools.chain.from_iterable(take(batches, -(-n // batches.batch_size))))[:n]


def test_each_epoch_has_every_token_that_counts_once_in_chunks_of_whole_blocks_in_another_order():
    corpus = numbered(N_BLOCKS)
    tokens, epoch = corpus.tokens_bp[corpus.keep_bp].tolist(), 55
    seen = rows(stream(corpus=corpus), 2 * epoch)
    first, second = seen[:epoch], seen[epoch:]
    assert sorted(first) == sorted(second) == tokens
    assert first != second and first != tokens
    for chunk in (first[:20], first[20:40], first[40:]):
        blocks = {token // 6 for token in chunk}
        assert sorted(chunk) == [t for t in tokens if t // 6 in blocks]
        assert chunk != sorted(chunk)


def test_blocks_and_the_tokens_of_a_chunk_are_each_put_in_another_order_in_each_epoch():
    seen = rows(stream(), 110)
    assert {token // 6 for token in seen[:20]} != {token // 6 for token in seen[55:75]}
    one_block = rows(stream(corpus=numbered(1, context_size=21)), 40)
    assert one_block[:20] != one_block[20:]


def test_batches_are_slices_of_one_sequence_of_rows_whatever_their_size_and_the_forward_s():
    assert rows(stream(batch_size=7), 150) == rows(stream(batch_size=64, batch_blocks=1), 150)


def test_the_order_depends_on_the_seed_and_on_no_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours = rows(stream(), 60)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert rows(stream(), 60) == ours
    assert rows(stream(seed=1), 60) != ours


def test_all_hooks_see_the_same_tokens_in_the_order_that_each_alone_would_see():
    together = list(itertools.islice(stream(), 12))
    for i, hook in enumerate(HOOKS):
        for batch, alone in zip(together, stream(hooks=[hook]), strict=False):
            assert batch[hook].shape == (7, WIDTH)
            assert torch.equal(batch[hook], batch[HOOKS[0]] * (i + 1))
            assert [*alone] == [hook] and torch.equal(alone[hook], batch[hook])


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("corpus", [numbered(N_BLOCKS), Parts()], ids=["fixed", "streamed"])
def test_a_stream_goes_on_from_any_position_with_the_same_batches(corpus, prefetch):
    whole = stream(corpus=corpus)
    positions = []
    batches = []
    for _ in range(20):
        positions.append(json.dumps(whole.position.to_dict()))
        batches += take(whole, 1)
    for i, position in enumerate(positions):
        resumed = stream(corpus=corpus, position=Position.from_dict(json.loads(position)), prefetch=prefetch)
        assert take(resumed, 3) == batches[i : i + 3] or i > 17
        assert json.dumps(resumed.position.to_dict()) == positions[i + 3] if i + 3 < 20 else True
        resumed.close()


def test_a_corpus_stream_is_gone_on_with_at_any_position():
    def text():
        sources = [Source(texts=[f"import m{i} " * (9 + i) for i in range(8)], name="a"), Source(texts=["x y " * 60])]
        return CorpusStream(sources, tiny_tokenizer(), context_size=16, shard_blocks=5)

    whole = stream(corpus=text(), buffer_blocks=2)
    positions, batches = zip(*[(whole.position, take(whole, 1)[0]) for _ in range(90)], strict=True)
    assert positions[-1].corpus["pass"] == 1
    for i in range(0, 88, 11):
        position = Position.from_dict(json.loads(json.dumps(positions[i].to_dict())))
        assert take(stream(corpus=text(), buffer_blocks=2, position=position), 2) == list(batches[i : i + 2])


def test_a_resume_reads_no_chunk_but_the_one_it_is_in():
    whole = stream()
    take(whole, 4)  # 28 rows: 8 into the second chunk
    model = Echo()
    resumed = stream(model, position=whole.position)
    assert (resumed.position.shard, resumed.position.chunk, resumed.position.row) == (0, 1, 8)
    take(resumed, 1)
    assert len(model.stops) == 2  # 4 blocks, 3 at a time


def test_a_text_in_shards_is_read_shard_by_shard():
    seen = rows(stream(corpus=Parts()), 15 + 20 + 15)
    for i, shard in enumerate((seen[:15], seen[15:35], seen[35:])):
        part = numbered(3 + i % 2, first=1000 * i)
        assert sorted(shard) == part.tokens_bp[part.keep_bp].tolist()


def test_a_text_that_ends_ends_the_stream_at_the_last_full_batch():
    class Once:
        def shards(self, start):
            yield numbered(4), None

    assert len(list(stream(corpus=Once(), batch_size=6))) == 3  # of 20 rows


def test_one_chunk_is_in_memory_gone_before_the_next_is_read_and_with_the_last_hook():
    def n_held():
        return sum(type(o) is torch.Tensor and o.shape == (CHUNK * 7, WIDTH) for o in gc.get_objects())

    held = []
    model = Echo()
    model.on_run = lambda: held.append(n_held())
    batches = stream(model, numbered(8, context_size=8), batch_blocks=2)
    take(batches, 5)  # 28 rows a chunk
    assert held == [0, 3, 0, 3]  # at the first forward of a chunk nothing, at its second all three hooks'
    for hook in HOOKS:
        batches.drop(hook)
    assert n_held() == 0


def test_a_dropped_hook_is_in_no_later_batch_and_later_forwards_stop_earlier():
    model = Echo()
    batches = stream(model)
    expected = take(stream(), 12)
    assert take(batches, 1) == expected[:1]
    batches.drop(HOOKS[2])
    assert [*next(batches)] == HOOKS[:2]
    assert take(batches, 10) == expected[2:]
    assert model.stops[:2] == [3, 3] and set(model.stops[2:]) == {2}
    with pytest.raises(UnknownNameError, match=r"blocks\.2"):
        batches.drop(HOOKS[2])
    batches.drop(HOOKS[1])
    batches.drop(HOOKS[0])
    assert list(batches) == []


def test_tokens_that_are_not_finite_at_one_hook_are_left_out_at_all_and_named():
    clean, bad = rows(stream(), 110), {13, 14, 40}
    batches = stream(Echo({HOOKS[0]: [40], HOOKS[1]: [13, 14, 40]}), batch_size=8, max_skipped=0.1)
    assert rows(batches, 104) == [t for t in clean if t not in bad]  # both epochs
    found = sorted(batches.skipped, key=lambda row: row["document"])
    assert [(row["hook"], row["corpus"], row["document"], row["tokens"]) for row in found] == [
        (HOOKS[1], "numbers", 1, 4),
        (HOOKS[0], "numbers", 3, 2),
    ]


def test_a_document_of_a_mixture_is_named_by_its_own_text_and_number():
    corpus = Corpus.concat([numbered(4, name="a"), numbered(6, first=100, name="b")])
    batches = stream(Echo({HOOKS[0]: [100 + 13]}), corpus, max_skipped=0.1)
    rows(batches, 40)
    assert [(row["corpus"], row["document"]) for row in batches.skipped] == [("b", 1)]


def test_what_was_skipped_is_counted_once_also_by_a_run_that_is_resumed():
    nan, n = {HOOKS[0]: [*range(13, 18), 40]}, 16
    whole = stream(Echo(nan), max_skipped=0.2)
    expected = take(whole, n)
    for stop in range(n):
        killed = stream(Echo(nan), max_skipped=0.2)
        take(killed, stop)
        resumed = stream(Echo(nan), max_skipped=0.2, position=Position.from_dict(killed.position.to_dict()))
        assert take(resumed, n - stop) == expected[stop:]
        assert resumed.skipped == whole.skipped
        assert resumed.position == whole.position


@pytest.mark.parametrize("corpus", [numbered(N_BLOCKS), Parts()], ids=["fixed", "streamed"])
def test_reading_ahead_changes_no_bit_and_no_position_also_when_hooks_are_dropped(corpus):
    nan = {HOOKS[0]: [40], HOOKS[1]: [13, 14], HOOKS[2]: [7, 26, 1004]}
    settings = {"max_skipped": 0.3, "batch_size": 4}
    for first, second in itertools.product(range(1, 18, 3), range(2, 20, 5)):
        streams = [stream(Echo(nan), corpus, prefetch=ahead, **settings) for ahead in (False, True)]
        for step in range(30):
            ours, theirs = map(next, streams)
            assert [*ours] == [*theirs] and streams[0].position == streams[1].position
            assert all(torch.equal(ours[hook], theirs[hook]) for hook in ours)
            for batches in streams:
                if step == first:
                    batches.drop(HOOKS[2])
                if step == first + second:
                    batches.drop(HOOKS[0])
        assert streams[0].skipped == streams[1].skipped != []
        streams[1].close()


def test_one_chunk_is_read_ahead_and_settled_before_somebody_else_runs_the_model():
    model = Echo()
    with closing(stream(model, numbered(8, context_size=8), batch_blocks=2, prefetch=True)) as batches:
        assert model.stops == []
        for n_read in (2, 3):  # of 2 forwards and 28 rows each
            take(batches, 4)
            batches.settle()
            assert len(model.stops) == 2 * n_read


def test_what_the_forward_raises_ahead_is_raised_where_its_batch_would_have_come():
    def fail():
        if len(model.stops) == 3:
            raise ZeroDivisionError("the fourth forward")

    model = Echo()
    model.on_run = fail
    batches = stream(model, prefetch=True)
    assert take(batches, 2) == take(stream(), 2)  # 14 of the 20 rows before it
    with pytest.raises(ZeroDivisionError, match="the fourth forward") as raised:
        next(batches)
    assert "run_with_cache" in [entry.name for entry in raised.traceback]
    assert list(batches) == []


@pytest.mark.parametrize("way", ["close", "drop", "lose"])
def test_a_stream_that_is_left_leaves_no_thread_and_no_chunk(way):
    def n_held():
        return sum(type(o) is torch.Tensor and o.shape == (CHUNK * 8, WIDTH) for o in gc.get_objects())

    def wait():
        if len(model.stops) == 2:  # the second chunk's first forward takes until the stream is left
            begun.set()
            assert stopped.wait(60)

    begun, model = threading.Event(), Echo()
    model.on_run = wait
    batches = stream(model, numbered(24, context_size=9), batch_blocks=2, prefetch=True)
    stopped = batches._chunks._stopped
    take(batches, 1)
    assert begun.wait(60) and n_held() > 0
    if way == "close":
        batches.close()
    elif way == "drop":
        for hook in HOOKS:
            batches.drop(hook)
    else:
        del batches
        gc.collect()
    assert not [t for t in threading.enumerate() if "prefetch" in t.name]
    assert len(model.stops) == 3 and n_held() == 0  # the forward that ran was the last
    assert way == "lose" or list(batches) == []


def test_more_of_them_than_a_share_of_the_text_stops_the_stream_and_names_the_first():
    nan = {HOOKS[1]: [13, 14, 15]}
    assert rows(stream(Echo(nan), max_skipped=3 / 55), 200)
    with pytest.raises(DataError, match=r"3 of 55 tokens .* blocks\.1\.hook_resid_post in document 1 of 'numbers'"):
        rows(stream(Echo(nan), max_skipped=2.9 / 55), 200)


def test_blocks_without_a_token_that_counts_are_passed_over():
    corpus = numbered(N_BLOCKS)
    corpus.keep_bp[1:] = False
    assert sorted(rows(stream(corpus=corpus, buffer_blocks=1), 5)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_skipped": 1.0}, "max_skipped is a share"),
        ({"hooks": []}, "at least one hook"),
        ({"position": Position(chunk=3)}, "Chunk 3 of 3: the position is of another text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        next(stream(**settings))


@pytest.fixture(scope="module")
def proxy():
    return Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer())


@pytest.fixture(scope="module")
def corpus(proxy):
    tokens_bp = torch.randint(30, 2048, (43, 16))
    tokens_bp[:, 0] = proxy.tokenizer.bos_token_id
    return build_corpus(tokens_bp, proxy.tokenizer, context_size=16)


def test_a_model_s_activations_come_row_for_row_at_one_hook_or_three(proxy, corpus):
    """Each row is found among the activations of one plain forward over all blocks."""
    seen = {}
    layers = proxy.model.model.layers
    handles = [
        layers[i].register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(HOOKS[i], out)) for i in range(3)
    ]
    with torch.no_grad():
        proxy.model(input_ids=corpus.tokens_bp, use_cache=False)
    for handle in handles:
        handle.remove()
    settings = {"batch_size": corpus.n_tokens, "buffer_blocks": 8}
    together = next(stream(proxy, corpus, **settings))
    nearest = torch.cdist(together[HOOKS[0]], seen[HOOKS[0]][corpus.keep_bp]).argmin(dim=1)
    assert len(set(nearest.tolist())) == corpus.n_tokens
    for hook in HOOKS:
        torch.testing.assert_close(together[hook], seen[hook][corpus.keep_bp][nearest], rtol=1e-5, atol=1e-5)
        alone = next(stream(proxy, corpus, [hook], **settings))[hook]
        torch.testing.assert_close(alone, together[hook], rtol=0, atol=1e-6)


def test_batches_have_the_dtype_asked_for_and_heads_are_flattened(proxy, corpus):
    batches = stream(proxy, corpus, ["blocks.0.attn.hook_z"], dtype=torch.bfloat16)
    batch = next(batches)["blocks.0.attn.hook_z"]
    assert batch.shape == (7, 4 * 16) and batch.dtype == torch.bfloat16


def test_an_unknown_hook_is_named(proxy, corpus):
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post"):
        next(stream(proxy, corpus, ["blocks.1.hook_resid_pots"]))
