import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer
from tests.activations.echo import HOOKS, WIDTH, Echo, numbered

PRINT = {"fingerprint": "0123"}


@pytest.fixture(scope="module")
def proxy():
    return Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer())


@pytest.fixture(scope="module")
def corpus(proxy):
    return build_corpus(["import os and sys " * 60, "def f(x): return x"] * 3, proxy.tokenizer, context_size=16)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_stream_from_a_cache_serves_the_same_bits_and_runs_no_forward(proxy, corpus, tmp_path, prefetch):
    ActivationCache.build(tmp_path / "acts", proxy, corpus, HOOKS, **PRINT)
    cache = ActivationCache.open(tmp_path / "acts", corpus, HOOKS, **PRINT)
    settings = {"batch_size": 50, "seed": 3, "buffer_blocks": 8}
    live = ActivationStream(proxy, corpus, HOOKS[:2], **settings)
    model = Echo()
    cached = ActivationStream(model, corpus, HOOKS[:2], cache=cache, prefetch=prefetch, **settings)
    for _ in range(2 * corpus.n_tokens // 50):
        ours, theirs = next(cached), next(live)
        assert cached.position == live.position
        for hook in HOOKS[:2]:
            assert torch.equal(ours[hook], theirs[hook])
    assert model.stops == []


def test_the_size_that_is_told_is_the_size_on_disk(proxy, corpus, tmp_path):
    cache = ActivationCache.build(tmp_path / "acts", proxy, corpus, HOOKS[:2], **PRINT)
    assert cache.widths == dict.fromkeys(HOOKS[:2], 64)
    written = sum(path.stat().st_size for path in (tmp_path / "acts").glob("*.bin"))
    assert written == ActivationCache.size(corpus, cache.widths, torch.float32) == corpus.n_tokens * 2 * 64 * 4


def test_bfloat16_halves_the_files_and_rounds_the_activations(proxy, corpus, tmp_path):
    cache = ActivationCache.build(tmp_path / "acts", proxy, corpus, HOOKS[:1], dtype=torch.bfloat16, **PRINT)
    assert (tmp_path / "acts" / f"{HOOKS[0]}.bin").stat().st_size == corpus.n_tokens * 64 * 2
    acts_td = torch.cat([batch.acts[HOOKS[0]] for batch in harvest(proxy, corpus, HOOKS[:1])])
    assert torch.equal(cache.read(HOOKS[0], torch.arange(corpus.n_blocks)), acts_td.bfloat16())


def test_what_is_not_finite_is_kept_for_the_stream_to_skip(tmp_path):
    corpus, nan = numbered(8), {HOOKS[0]: [8, 9]}
    cache = ActivationCache.build(tmp_path / "acts", Echo(nan), corpus, HOOKS, **PRINT)
    settings = {"batch_size": 9, "seed": 0, "buffer_blocks": 4, "max_skipped": 0.1}
    live = ActivationStream(Echo(nan), corpus, HOOKS, **settings)
    cached = ActivationStream(Echo(), corpus, HOOKS, cache=cache, **settings)
    for _ in range(9):
        assert torch.equal(next(cached)[HOOKS[2]], next(live)[HOOKS[2]])
    assert cached.skipped == live.skipped != []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "4567"}, "model is 0123, not 4567"),
        ({"corpus": numbered(8, first=1)}, "corpus is "),
        ({"dtype": torch.bfloat16}, "dtype is float32, not bfloat16"),
        ({"isolate_documents": True}, "isolate_documents is False, not True"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_what_differs(tmp_path, change, message):
    ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    asked = {"folder": tmp_path / "acts", "corpus": numbered(8), "hook_names": HOOKS, **PRINT}
    ActivationCache.open(**asked)
    with pytest.raises(ConfigError, match=message):
        ActivationCache.open(**{**asked, **change})


def test_a_hook_that_is_not_there_is_named_with_the_nearest(tmp_path):
    cache = ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS[:2], **PRINT)
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post.*acts does not hold it"):
        ActivationCache.open(tmp_path / "acts", numbered(8), HOOKS, **PRINT)
    with pytest.raises(UnknownNameError):
        ActivationStream(Echo(), numbered(8), HOOKS, batch_size=4, seed=0, cache=cache)


def test_a_stream_refuses_the_cache_of_another_text(tmp_path):
    cache = ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    for corpus, message in ((numbered(9), "corpus is"), (SimpleNamespace(shards=iter), "this text is streamed")):
        with pytest.raises(ConfigError, match=message):
            ActivationStream(Echo(), corpus, HOOKS, batch_size=4, seed=0, cache=cache)


def test_a_disk_that_is_too_small_is_told_before_anything_is_harvested(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6239))
    model = Echo()
    with pytest.raises(ConfigError, match=r"need 6\.24e-06 GB in .*, where 6\.24e-06 GB are free"):
        ActivationCache.build(tmp_path / "acts", model, numbered(8), HOOKS, **PRINT)
    assert 8 * 5 * 3 * WIDTH * 4 == 6240
    assert len(model.stops) == 1  # one block, for the widths
    assert not [*tmp_path.iterdir()]


def test_a_write_that_fails_is_one_error_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"acts cannot be written: .*File too large"):
            ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_build_leaves_nothing_and_a_killed_one_s_files_go_with_the_next(tmp_path):
    def interrupt():
        if len(model.stops) == 2:
            assert [*tmp_path.glob(".acts.partial/*.bin")]
            raise KeyboardInterrupt

    model = Echo()
    model.on_run = interrupt
    with pytest.raises(KeyboardInterrupt):
        ActivationCache.build(tmp_path / "acts", model, numbered(8), HOOKS, batch_blocks=2, **PRINT)
    assert not [*tmp_path.iterdir()]
    (tmp_path / ".acts.partial").mkdir()
    (tmp_path / ".acts.partial" / "blocks.9.hook_resid_post.bin").write_bytes(b"half")
    with pytest.raises(ConfigError, match="no activation cache"):
        ActivationCache.open(tmp_path / "acts", numbered(8), HOOKS, **PRINT)
    ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    names = {path.name for path in (tmp_path / "acts").iterdir()}
    assert names == {"cache.json", *(f"{hook}.bin" for hook in HOOKS)}
    assert [path.name for path in tmp_path.iterdir()] == ["acts"]


def test_an_incomplete_cache_is_refused_and_a_folder_is_not_written_over(tmp_path):
    ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    with pytest.raises(ConfigError, match="acts exists"):
        ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    path = tmp_path / "acts" / f"{HOOKS[1]}.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"incomplete: blocks\.1\.hook_resid_post\.bin is not 2,080 bytes"):
        ActivationCache.open(tmp_path / "acts", numbered(8), HOOKS, **PRINT)
    (tmp_path / "acts" / "cache.json").write_text("{}")
    with pytest.raises(ConfigError, match="no activation cache that can be read"):
        ActivationCache.open(tmp_path / "acts", numbered(8), HOOKS, **PRINT)


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cached as bfloat16 or float32, not torch\.float16"):
        ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, dtype=torch.float16, **PRINT)


def test_nothing_written_to_what_was_read_reaches_the_file(tmp_path):
    corpus = numbered(8)
    cache = ActivationCache.build(tmp_path / "acts", Echo(), corpus, HOOKS, **PRINT)
    cache.read(HOOKS[0], torch.tensor([5])).fill_(0)
    for reader in (cache, ActivationCache.open(tmp_path / "acts", corpus, HOOKS, **PRINT)):
        assert reader.read(HOOKS[0], torch.tensor([5, 2]))[:, 0].tolist() == [31, 32, 33, 34, 35, 13, 14, 15, 16, 17]
    assert json.loads((tmp_path / "acts" / "cache.json").read_text())["tokens"] == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_read_in_any_order_and_number_also_those_without_a_token(tmp_path, dtype):
    corpus = numbered(9)
    corpus.keep_bp[[0, 4, 8]] = False
    corpus.keep_bp[2, 2:] = False  # one token
    cache = ActivationCache.build(tmp_path / "acts", Echo(), corpus, HOOKS, dtype=dtype, **PRINT)
    generator = torch.Generator().manual_seed(0)
    for n_blocks in [0, 1, 2, 5, 9, 30]:
        blocks = torch.randint(9, (n_blocks,), generator=generator)
        tokens_t = [t for b in blocks.tolist() for t in corpus.tokens_bp[b][corpus.keep_bp[b]].tolist()]
        by_hand = torch.tensor(tokens_t, dtype=dtype)[:, None].expand(-1, WIDTH) * 3  # of the third hook
        assert torch.equal(cache.read(HOOKS[2], blocks), by_hand)


def test_a_read_that_gets_less_than_it_asked_for_goes_on(tmp_path, monkeypatch):
    """As the operating system may do, above 2 GB or where a signal comes."""

    class Short(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    cache = ActivationCache.build(tmp_path / "acts", Echo(), numbered(8), HOOKS, **PRINT)
    expected = cache.read(HOOKS[1], torch.arange(8).flip(0))
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Short(path))
    assert torch.equal(cache.read(HOOKS[1], torch.arange(8).flip(0)), expected)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_file_that_loses_its_end_or_is_gone_while_it_is_read_is_named(tmp_path, prefetch):
    corpus = numbered(8)
    cache = ActivationCache.build(tmp_path / "acts", Echo(), corpus, HOOKS, **PRINT)
    path = tmp_path / "acts" / f"{HOOKS[1]}.bin"
    settings = {"batch_size": 5, "seed": 0, "buffer_blocks": 2, "cache": cache, "prefetch": prefetch}
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ConfigError, match=r"cannot be read: .*blocks\.1\.hook_resid_post\.bin ends 4 bytes too early"):
        list(ActivationStream(Echo(), corpus, HOOKS, **settings))
    path.unlink()
    with pytest.raises(ConfigError, match=r"acts cannot be read: .*No such file"):
        next(ActivationStream(Echo(), corpus, HOOKS, **settings))
