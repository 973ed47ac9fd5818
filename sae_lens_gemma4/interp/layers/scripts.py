"""Which writing a token is in: a measurable stand-in for the language that a model is said to think in.

A script is not a language: Latin letters are English, French and most code, and a token of punctuation is in none. What
can be counted without a judge is the script, so that is what is counted, under its own name.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.interp.pieces import safe_piece

SPECIAL, BYTES, DIGITS, SYMBOLS, BLANK, OTHER = "special", "bytes", "digits", "symbols", "blank", "other letters"
"""What a token without letters is: a token of the tokenizer's own, a part of a character, numerals, punctuation and
other signs, blanks; and letters of scripts not listed here."""
_LISTED = (
    "Latin Greek Cyrillic Armenian Hebrew Arabic Syriac Thaana Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu "
    "Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar Georgian Hangul Ethiopic Cherokee Mongolian Khmer Hiragana "
    "Katakana Bopomofo"
)
_SCRIPTS = {word.upper(): word for word in _LISTED.split()} | {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HENTAIGANA": "Hiragana",
}
"""By a word of a character's Unicode name, which superscript and modifier letters often lack."""


def script_of(text: str) -> str:
    """The script of most letters of a text, of the first among equals; without letters, what else it is made of."""
    if "\ufffd" in text:
        return BYTES
    scripts = Counter(script for c in text if (script := _of_character(c)))
    if scripts:
        return scripts.most_common(1)[0][0]
    if not text.strip():
        return BLANK
    return DIGITS if any(unicodedata.category(c).startswith("N") for c in text) else SYMBOLS


def _of_character(character: str) -> str | None:
    """None for what is no letter, and for marks of no script (accents on their own)."""
    kind = unicodedata.category(character)[0]
    if kind not in "LM":
        return None
    words = unicodedata.name(character, "").split()
    script = next((_SCRIPTS[word] for word in words if word in _SCRIPTS), None)
    return script or (OTHER if kind == "L" else None)


class TokenTexts:
    """Tokens as texts and their scripts, each looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}
        self._scripts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """Decoded; the vocabulary's piece where that is nothing, or a part of a character."""
        if token not in self._texts:
            text = self._decoded(token)
            piece = self._tokenizer.convert_ids_to_tokens(token) if not text or "\ufffd" in text else None
            self._texts[token] = safe_piece(piece if isinstance(piece, str) else text)
        return self._texts[token]

    def script(self, token: int) -> str:
        if token not in self._scripts:
            self._scripts[token] = SPECIAL if token in self._special else script_of(self._decoded(token))
        return self._scripts[token]

    def shares(self, tokens: Iterable[int]) -> dict[str, float]:
        """The share of each script among some tokens, the greatest first."""
        counts = Counter(map(self.script, tokens))
        return {script: n / counts.total() for script, n in counts.most_common()}

    def _decoded(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
