"""Answers on disk: whole, shared, and known by all that they depend on."""

import multiprocessing
import sqlite3
import threading

import pytest

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.judges.cache import FILE, NOTHING, AnswerCache, Known, Spent, key_of
from tests.interp.judges.conftest import labels


def test_answers_and_refusals(tmp_path):
    cache = AnswerCache(tmp_path / "a" / "b")
    assert cache.get("k") is NOTHING
    cache.refuse("k", "j", "it was empty")
    cache.refuse("k", "j", "it was long")
    assert cache.get("k") == Known(None, 2, "it was long")
    cache.put("k", "j", "text")
    cache.put("k", "j", "again")
    assert AnswerCache(tmp_path / "a" / "b").get("k") == Known("again", 2, "it was long")


def test_in_memory_only():
    cache = AnswerCache(None)
    cache.put("k", "j", "x")
    assert cache.get("k").text == "x" and AnswerCache(None).get("k") is NOTHING


def _write(folder, name):
    cache = AnswerCache(folder)
    for i in range(25):
        cache.put(f"{name}-{i}", name, f"text {i}")
        cache.refuse("shared", name, "r")


def test_processes_at_once(tmp_path):
    """Processes that fork with nothing open, each with a cache of its own."""
    AnswerCache(tmp_path).close()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, f"p{i}")) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = AnswerCache(tmp_path)
    assert all(cache.get(f"p{p}-{i}").text == f"text {i}" for p in range(3) for i in range(25))
    assert cache.get("shared").refused == 75


def test_threads_at_once(tmp_path):
    cache = AnswerCache(tmp_path)
    threads = [threading.Thread(target=lambda: [cache.refuse("shared", "j", "r") for _ in range(15)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get("shared").refused == 60


def test_a_key_is_all_that_an_answer_depends_on():
    identity = {"kind": "openai", "model": "m", "base_url": "u", "temperature": 0.0, "max_output_tokens": 5}
    keys = {
        key_of(identity, "s", "u"),
        key_of(identity, "s", "v"),
        key_of(identity, "t", "u"),
        key_of(identity, "su", ""),
    }
    keys |= {key_of({**identity, name: "other"}, "s", "u") for name in identity}
    assert len(keys) == 4 + len(identity)
    assert key_of(dict(reversed(identity.items())), "s", "u") in keys
    assert all(len(key) == 64 for key in keys)


def test_what_is_no_cache(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to be looked at\n" * 40)
    with pytest.raises(DataError, match="no file of answers"):
        AnswerCache(tmp_path)
    (tmp_path / FILE).unlink()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(DataError, match="version 9"):
        AnswerCache(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Name a folder"):
        AnswerCache(tmp_path / "file")


def test_what_is_spent_is_beside_the_answers(tmp_path):
    cache = AnswerCache(tmp_path)
    assert cache.spend("j", Spent(1, 10, 5, 1)) is None
    assert cache.spend("j", Spent(0, -4, -2, -1), lambda spent: None if spent.calls == 1 else "no") is None
    assert cache.spend("j", Spent(1, 1, 1, 1), lambda spent: f"{spent.calls} is enough") == "1 is enough"
    with pytest.raises(ZeroDivisionError):
        cache.spend("j", Spent(1, 1, 1, 1), lambda spent: 1 // 0)
    cache.put("k", "j", "x")  # no transaction is left open
    assert AnswerCache(tmp_path).spent("j") == (1, 6, 3, 0)


def test_nobody_spends_between_the_look_and_the_entry(tmp_path):
    cache, other = AnswerCache(tmp_path), sqlite3.connect(tmp_path / FILE, timeout=0, isolation_level=None)

    def lacking(spent):
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")

    assert cache.spend("j", Spent(1), lacking) is None
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_file_from_before_anything_was_booked(tmp_path):
    AnswerCache(tmp_path).put("k", "j", "text")
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DROP TABLE spent")
    cache = AnswerCache(tmp_path)
    assert cache.get("k").text == "text" and cache.spent("j") == Spent()


def test_a_kept_answer_is_checked_again(judge, server, tmp_path):
    judge().label(labels("cat"))
    with sqlite3.connect(tmp_path / "cache" / FILE) as db:
        db.execute("UPDATE answers SET text = '{\"label\": 3}'")
    assert judge().label(labels("cat"))[0].label == "token cat"
    assert len(server.requests) == 2
    assert judge().record()["calls"] == 0 and judge().cost_of(labels("cat")).cached == 1
