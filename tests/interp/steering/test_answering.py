from dataclasses import replace

import pytest

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.items import Item, item_corpus
from sae_lens_gemma4.interp.steering.answering import (
    RIGHT,
    WRONG,
    Answering,
    AnsweringWarning,
    answer,
    check_apart,
    gold_answers,
    graded,
)
from sae_lens_gemma4.interp.steering.generating import Output
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

LAST = Answering(extractor="last_number")
ITEMS = [Item(prompt=f"question {i}", answer=str(i)) for i in range(6)]


def outputs(*texts):
    return [Output(text, max(1, len(text.split())), cut=text.endswith("…")) for text in texts]


def test_answers_that_are_empty_are_left_out_and_counted():
    with pytest.warns(AnsweringWarning, match="2 of 6 answers are empty and left out"):
        items, facts = graded(ITEMS, outputs("it is 0", "", "it is 2", "it is 4", "no idea …", ""), LAST)
    assert [(i.prompt, i.group) for i in items] == [
        ("question 0", RIGHT),
        ("question 2", RIGHT),
        ("question 3", WRONG),
        ("question 4", WRONG),
    ]
    counts = {"right": 2, "wrong": 2, "not_found": 1, "cut": 1, "empty": 2}
    assert facts == {"extractor": "last_number", **counts}
    assert item_corpus(items, tiny_tokenizer(), count="response").n_blocks == 4


@pytest.mark.filterwarnings("error")
def test_answers_of_one_kind_are_nothing_to_contrast():
    items, facts = graded(ITEMS[:2], outputs("0", "7"), LAST)
    assert len(items) == 2 and facts["empty"] == 0
    with pytest.raises(DataError, match=r"All 2 answers are right \(0 without an answer, beside 1 that are empty\)"):
        graded(ITEMS[:3], outputs("0", "1", ""), LAST)
    with pytest.raises(DataError, match="All 2 answers are empty"):
        graded(ITEMS[:2], outputs("", ""), LAST)


def test_right_answers_are_read_before_anything_is_asked():
    assert gold_answers([Item(prompt="x", answer="so 4\n#### 1,250.0")], "gsm8k") == ["1250"]
    with pytest.raises(DataError, match="Item 1 has the right answer 'many'"):
        gold_answers([Item(prompt="x", answer="3"), Item(prompt="y", answer="many")], "gsm8k")


def test_a_direction_is_made_of_other_items_than_are_steered():
    check_apart(ITEMS[:3], ITEMS[3:])
    made_of = [replace(ITEMS[1], response="1", group=RIGHT), Item(prompt=" question  2\n"), Item(prompt="question 9")]
    with pytest.raises(DataError, match=r"^2 of the 6 steered items are among those .* `skip`.*`split`"):
        check_apart(ITEMS, made_of)


def test_answers_in_16_bits_are_gone_on_with_by_the_same_batches(tmp_path):
    read = Answering(extractor="regex:(.)", max_new_tokens=2, batch_items=3)
    for model, free in (
        (Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer()), True),
        (Gemma4ProxyLM(tiny_gemma4("ple").bfloat16(), tiny_tokenizer()), False),
    ):
        folder = tmp_path / str(free)
        found = answer(model, ITEMS, folder, read, progress=False)
        if free:
            assert answer(model, ITEMS, folder, replace(read, batch_items=2), progress=False) == found
            continue
        with pytest.raises(ConfigError, match="begun with batch_items 3, not 2"):
            answer(model, ITEMS, folder, replace(read, batch_items=2), progress=False)
        assert answer(model, ITEMS, folder, read, progress=False) == found
