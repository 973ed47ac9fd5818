"""Chats as tokens and roles, against the template's own rendering and turns written out by hand."""

import pytest
import torch

from sae_lens_gemma4.activations.chat import tokenize_chat
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.embedded.text import chats
from sae_lens_gemma4.errors import ConfigError, DataError
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
        ids, roles, _ = tokenize_chat(chat, tokenizer)
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
    ids, roles, _ = tokenize_chat([{"role": r, "content": r} for r in "abc"], tokenizer)
    found = dict(zip(tokenizer.convert_ids_to_tokens(ids), roles, strict=True))
    assert {token: found[token] for token in "abc"} == expected


def test_a_token_across_two_turns_has_no_role(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    whole = tokenizer("import", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1
    chat = [{"role": "user", "content": "im"}, {"role": "assistant", "content": "port os"}]
    ids, roles, _ = tokenize_chat(chat, tokenizer)
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
    assert tokenize_chat([], tokenizer) == ([], [], [])
    tokenizer.chat_template = "{{ raise_exception('only two roles') }}"
    with pytest.raises(DataError, match="cannot render document 3: only two roles"):
        build_corpus([CHAT] * 4, tokenizer, context_size=8, skip_documents=3)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        build_corpus([CHAT], tokenizer, context_size=8)


def decoded(tokenizer, corpus):
    return tokenizer.decode(corpus.tokens_bp[corpus.keep_bp])


def test_only_the_turns_of_the_roles_asked_for_count(tokenizer):
    for special in (True, False):
        corpus = build_corpus([CHAT], tokenizer, context_size=128, roles=["user"], exclude_special_tokens=special)
        whole = build_corpus([CHAT], tokenizer, context_size=128, exclude_special_tokens=special)
        turns = (corpus.role_bp == corpus.roles.index("user")) & whole.keep_bp
        assert torch.equal(corpus.keep_bp, turns)
        assert torch.equal(corpus.tokens_bp, whole.tokens_bp)
    assert decoded(tokenizer, corpus) == TURNS[1] + TURNS[4]


def test_turn_markers_are_what_is_not_a_message_s_own_content(tokenizer):
    """Contents that also stand in the markers, repeat, are empty or are trimmed by the template."""
    chat = [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "model\nmodel"},
        {"role": "user", "content": "  "},
        {"role": "assistant", "content": "  turn <turn|> \n"},
    ]
    corpus = build_corpus([chat], tokenizer, context_size=128, exclude_turn_markers=True, exclude_special_tokens=False)
    assert decoded(tokenizer, corpus) == "<bos>usermodel\nmodelturn <turn|>"
    asked = {"exclude_turn_markers": True, "roles": ["assistant"]}
    assert decoded(tokenizer, build_corpus([chat], tokenizer, context_size=128, **asked)) == "model\nmodelturn "
    text = build_corpus(["user\nimport os"], tokenizer, context_size=32, exclude_turn_markers=True)
    assert text.hash == build_corpus(["user\nimport os"], tokenizer, context_size=32).hash


def test_content_that_a_template_rewrites_is_still_found(tokenizer):
    """As Gemma 4's own template does: what a model thought is left out of its turn."""
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim }}]{% endfor %}"
    chat = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "import os</think>\nreturn x"}]
    ids, _, own = tokenize_chat(chat, tokenizer, find_own=True)
    assert tokenizer.decode(ids) == "[so][return x]"
    assert tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine]) == "soreturn x"


def test_content_that_the_template_does_not_show_counts_for_nothing(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }};{% endfor %}"
    assert not any(tokenize_chat(CHAT, tokenizer, find_own=True).own)
    with pytest.raises(DataError, match="Every token of corpus 'texts' is masked"):
        build_corpus([CHAT], tokenizer, context_size=128, exclude_turn_markers=True)


def test_roles_that_are_not_there(tokenizer):
    with pytest.raises(DataError, match=r"role of \['asistant'\]; its roles are system, .* Did you mean 'assistant'"):
        build_corpus([CHAT], tokenizer, context_size=128, roles=["asistant"])
    with pytest.raises(DataError, match=r"role of \['user'\]; none of its tokens has a role"):
        build_corpus(["import os"], tokenizer, context_size=128, roles=["user"])
    for roles in ("user", [], ["user", ""]):
        with pytest.raises(ConfigError, match="roles must be a list of names"):
            build_corpus([CHAT], tokenizer, context_size=128, roles=roles)


def test_the_time_of_a_long_chat_grows_with_its_length(tokenizer, monkeypatch):
    """Renderings are counted, by the messages in them: 3,000 turns cost 200 renderings more than 200 do, not 3,000."""
    rendered = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **k: rendered.append(len(m)) or render(m, **k))
    chat = [{"role": "user", "content": f"import {n}"} for n in range(3000)]
    ids, roles, own = tokenize_chat(chat, tokenizer, find_own=True)
    assert sum(rendered) == 3000 + 2 * sum(range(1, 201))
    known = [i for i, role in zip(ids, roles, strict=True) if role]
    first = tokenize_chat(chat[:200], tokenizer, find_own=True)
    assert known == first.ids and set(first.roles) == {"user"}
    assert own == first.own + [False] * (len(ids) - len(known))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [1, 2]}, "document 0 has the part 1; a part is"),
        ({"role": "user", "content": [None]}, "document 0 has the part None"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "the part {'type': 'text', 'text': None}"),
        ({"role": "user", "content": [{"text": "a"}]}, "the part {'text': 'a'}"),
        ({"role": "", "content": "a"}, "document 0 has an empty role"),
        ({"role": "user", "content": "a \ud83d"}, r"Document 0 holds half a character \(U\+D83D, at 19\)"),
    ],
)
def test_odd_messages_are_refused(tokenizer, message, error):
    with pytest.raises(DataError, match=error):
        build_corpus([[message]], tokenizer, context_size=16)


def test_parts_that_the_template_knows_are_its_own_matter(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<|image|>' }}{% endfor %}{% endif %}]{% endfor %}"
    )
    chat = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "import os"}]}]
    ids, _, own = tokenize_chat(chat, tokenizer, find_own=True)
    assert tokenizer.decode(ids) == "[<|image|>import os]"
    assert tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine]) == "<|image|>import os"


def test_there_are_fewer_roles_than_an_int8_holds(tokenizer):
    crowd = [[{"role": f"guest{i}", "content": "hi"} for i in range(n)] for n in (127, 128)]
    assert len(build_corpus(crowd[:1], tokenizer, context_size=64).roles) == 127
    with pytest.raises(DataError, match="more than 127 roles, as guest0"):
        build_corpus(crowd[1:], tokenizer, context_size=64)
