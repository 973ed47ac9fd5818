import sys

import pytest

from sae_lens_gemma4.embedded import text
from sae_lens_gemma4.errors import DataError


def test_documents_are_english_and_split_once_and_for_all():
    train, heldout = text.documents("train"), text.documents("heldout")
    assert sum(map(len, train)) > 1_000_000
    assert 0.03 < sum(map(len, heldout)) / sum(map(len, train)) < 0.3
    paragraphs = {p.strip() for d in train for p in d.split("\n\n")}
    shared = [p for d in heldout for p in d.split("\n\n") if p.strip() in paragraphs]
    assert sum(map(len, shared)) < 0.005 * sum(map(len, heldout))  # names of methods alone, as "datetime.date"
    assert any("the" in d.split() for d in heldout)
    assert train == text.documents("train")


def test_no_chat_is_about_a_document_of_the_other_split():
    answers = {
        split: [p.strip() for chat in text.chats(split) for m in chat[1:] if m["role"] == "assistant"
                for p in m["content"].split("\n\n")]
        for split in ("train", "heldout")
    }  # fmt: skip
    assert not set(answers["heldout"]) & set(answers["train"])


def test_chats_alternate_and_end_with_an_answer():
    for chat in text.chats("heldout"):
        roles = [m["role"] for m in chat if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in chat)


def test_an_interpreter_without_its_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text._entries.cache_clear()
    try:
        with pytest.raises(DataError, match="documentation holds only"):
            text.documents("train")
    finally:
        text._entries.cache_clear()
