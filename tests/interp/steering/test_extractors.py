import pytest

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.interp.steering import extractors
from sae_lens_gemma4.interp.steering.extractors import EXTRACTORS, extractor, number, register_extractor


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("gsm8k", "She has 9 * 2 = 18 dollars.\n#### 18", "18"),
        ("gsm8k", "#### $1,234.50\n", "1234.5"),
        ("gsm8k", "####-7", "-7"),
        ("gsm8k", "#### $-7.0.", "-7"),
        ("gsm8k", "#### −0", "0"),
        ("gsm8k", "#### 5\n\nQuestion: another\n#### 6", "5"),
        ("gsm8k", "the answer is 18", None),
        ("gsm8k", "#### none", None),
        ("last_number", "5 apples, then 10-3 = 7 apples.", "7"),
        ("last_number", "10-3", "3"),
        ("last_number", "x = -3", "-3"),
        ("last_number", "in all 1,250,000.", "1250000"),
        ("last_number", "between 1,2 and .50", "0.5"),
        ("last_number", "layer L27 and v2", None),
        ("last_number", "٣", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "Answer: A? No, the answer is C", "C"),
        ("choice", "A man walks. (D) it is", "D"),
        ("choice", "E) because", "E"),
        ("choice", "B", "B"),
        ("choice", "A man walks into a bar", None),
        ("choice", "answer: Apple", None),
        ("exact", "  The  Answer.\n", "the answer"),
        ("exact", " . ", None),
        ("contains", "It is Paris, in France.", "it is paris, in france"),
        (r"regex:result=(\w+)", "x result=Seven y", "seven"),
        (r"regex:\d+", "no digits", None),
        (r"regex:a(b)?", "a", None),
    ],
)
def test_what_each_finds(name, text, found):
    assert extractor(name).find(text) == found


@pytest.mark.parametrize(
    ("name", "output", "answer", "right"),
    [
        ("gsm8k", "#### 72.00", "48/2 = <<48/2=24>>24 and so on\n#### 72", True),
        ("gsm8k", "#### 1,000", "1000", True),
        ("gsm8k", "#### 73", "72", False),
        ("choice", "(b) no: (B)", " b ", True),
        ("contains", "It is Paris, in France.", "Paris", True),
        ("contains", "Parisians say so", "paris", False),
        ("exact", "PARIS.", "Paris", True),
        ("exact", "Paris, France", "Paris", False),
    ],
)
def test_right_answers_go_through_the_same_form(name, output, answer, right):
    read = extractor(name)
    assert read.same(read.find(output), read.gold(answer)) is right


def test_a_right_answer_that_is_none():
    assert extractor("gsm8k").gold("about seventy") is None
    assert extractor("choice").gold("F") is None
    assert number("12 apples") is None


def test_patterns_are_checked():
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        extractor("regex:(")
    with pytest.raises(ConfigError, match="501 characters"):
        extractor("regex:" + "a" * 501)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'gsm8k'.*regex:<pattern>"):
        extractor("gsm8")


def test_plugs(monkeypatch):
    monkeypatch.setattr(extractors, "EXTRACTORS", dict(EXTRACTORS))
    register_extractor("shout", lambda text: text.upper() or None, normal=str.upper)
    assert extractors.extractor("shout").gold("yes") == "YES"
    for name in ("shout", "", "regex:x"):
        with pytest.raises(ConfigError, match="empty or taken"):
            register_extractor(name, str.strip)
