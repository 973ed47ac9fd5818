"""Chats as tokens and roles, against the template's own rendering and turns written out by hand."""

import pytest
import torch

from sae_lens_gemma4.activations.chat import tokenize_chat
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.embedded.text import chats
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.testing import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "import os"},
    {"role": "assistant", "content": "Größe 🙂 <turn|> x"},
    {"role": "tool", "content": "return x"},
    {"role": "user", "content": "so"},
]
TURNS = [
    "<|turn>system\nBe brief.<turn|>\n",
    "<|turn>user\nimport os<turn|>\n",
    "<|turn>model\nGröße 🙂 <turn|> x<turn|>\n",
    "<|turn>tool\nreturn x<turn|>\n",
    "<|turn>user\nso<turn|>\n",
]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_every_token_has_the_role_of_its_turn(tokenizer):
    corpus = build_corpus([CHAT], tokenizer, context_size=128)
    assert corpus.roles == ("system", "user", "assistant", "tool")
    real = corpus.document_bp >= 0
    assert tokenizer.decode(corpus.tokens_bp[real]) == "<bos>" + "".join(TURNS)
    for index, role in enumerate(corpus.roles):
        turns = [turn for turn, message in zip(TURNS, CHAT, strict=True) if message["role"] == role]
        assert tokenizer.decode(corpus.tokens_bp[corpus.role_bp == index]) == "".join(turns)
    assert corpus.tokens_bp[real & (corpus.role_bp < 0)].tolist() == [tokenizer.bos_token_id]


def test_token_ids_are_those_of_apply_chat_template(tokenizer):
    for chat in [CHAT, *chats("heldout")[:60]]:
        ids, roles = tokenize_chat(chat, tokenizer)
        assert ids == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert len(roles) == len(ids) and set(roles) == {m["role"] for m in chat}


def test_a_slow_tokenizer_gives_the_same_tokens_without_roles(tokenizer, monkeypatch):
    fast = build_corpus([CHAT], tokenizer, context_size=128)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = build_corpus([CHAT], tokenizer, context_size=128)
    assert slow.hash == fast.hash
    assert slow.role_bp is None and slow.roles == ()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }};{% endfor %}", {"a": "a", "b": "b", "c": "c"}),
        # marks the last turn: no shorter chat is what the longer one begins with
        (
            "{% for m in messages %}{{ m.content }}{{ '!' if loop.last else ';' }}{% endfor %}",
            {"a": None, "b": None, "c": None},
        ),
        # refuses a chat of one message, so nobody knows where the first turn ends
        (
            "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
            "{% for m in messages %}{{ m.content }};{% endfor %}",
            {"a": None, "b": None, "c": "c"},
        ),
    ],
)
def test_where_a_turn_ends_is_told_only_if_the_template_tells(tokenizer, template, expected):
    tokenizer.chat_template = template
    ids, roles = tokenize_chat([{"role": r, "content": r} for r in "abc"], tokenizer)
    found = dict(zip(tokenizer.convert_ids_to_tokens(ids), roles, strict=True))
    assert {token: found[token] for token in "abc"} == expected


def test_a_token_across_two_turns_has_no_role(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    whole = tokenizer("import", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1
    chat = [{"role": "user", "content": "im"}, {"role": "assistant", "content": "port os"}]
    ids, roles = tokenize_chat(chat, tokenizer)
    assert ids[0] == whole[0]
    assert roles == [None, *["assistant"] * (len(ids) - 1)]


def test_share_gpt_s_rows_are_the_same_chats(tokenizer):
    turns = [("human", "user", "hi"), ("gpt", "assistant", "yes"), ("human", "user", "so")]
    theirs = [[{"from": who, "value": text} for who, _, text in turns]]
    ours = [[{"role": role, "content": text} for _, role, text in turns]]
    a, b = (build_corpus(rows, tokenizer, context_size=24) for rows in (theirs, ours))
    assert torch.equal(a.tokens_bp, b.tokens_bp)
    assert a.roles == b.roles == ("user", "assistant") and torch.equal(a.role_bp, b.role_bp)
    assert "yes" in tokenizer.decode(a.tokens_bp.flatten())


def test_chats_that_cannot_be_rendered_are_refused(tokenizer):
    assert tokenize_chat([], tokenizer) == ([], [])
    tokenizer.chat_template = "{{ raise_exception('only two roles') }}"
    with pytest.raises(DataError, match="cannot render document 3: only two roles"):
        build_corpus([CHAT] * 4, tokenizer, context_size=8, skip_documents=3)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        build_corpus([CHAT], tokenizer, context_size=8)


def test_there_are_fewer_roles_than_an_int8_holds(tokenizer):
    crowd = [[{"role": f"guest{i}", "content": "hi"} for i in range(n)] for n in (127, 128)]
    assert len(build_corpus(crowd[:1], tokenizer, context_size=64).roles) == 127
    with pytest.raises(DataError, match="more than 127 roles, as guest0"):
        build_corpus(crowd[1:], tokenizer, context_size=64)
