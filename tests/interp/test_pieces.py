import json

import pytest

from sae_lens_gemma4.interp.pieces import pieces_of, safe_piece


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "<empty>"), ("a\0b", "a<0x00>b"), ("\ud83d", "\\ud83d"), ("▁the", "▁the"), ("<0xE2>", "<0xE2>"), (" ", " ")],
)
def test_what_nothing_can_read_gets_a_stand_in(text, shown):
    assert safe_piece(text) == shown
    assert json.loads(json.dumps(safe_piece(text)).encode("utf-8")) == shown


def test_pieces_are_the_tokenizers_and_ids_beyond_it_are_marked(model):
    pieces = pieces_of(model.tokenizer, len(model.tokenizer) + 3)
    assert pieces[-3:] == ["<|outofrange|>"] * 3
    assert pieces[model.tokenizer.bos_token_id] == "<bos>"
    ids = model.tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    assert [pieces[i] for i in ids] == model.tokenizer.convert_ids_to_tokens(ids)
