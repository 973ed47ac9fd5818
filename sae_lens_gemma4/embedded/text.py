"""Real English text that every machine with Python already has: the interpreter's own documentation.

The embedded models are trained, and the demo is run, on `pydoc_data.topics` (the language reference as
`help()` prints it) and on the docstrings of the standard library, read from its source files without
importing any of them. Nothing is downloaded and nothing is shipped. The text follows the Python version,
so figures are comparable within one version; results carry the corpus's hash.

Documents are split once and for all by a hash of their name, and a held-out document loses every paragraph that
also stands in a training document (help topics repeat each other). The embedded models and their SAE were trained on
Python 3.11's text; on another version a few documents go by other names, and may be on the other side.
"""

from __future__ import annotations

import ast
import importlib
import sysconfig
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

from sae_lens_gemma4.errors import DataError, check_name

Split = Literal["train", "heldout"]
Message = dict[str, str]

HELDOUT_SHARE = 10  # one document in ten
_SKIPPED_FOLDERS = {
    "__pycache__", "config", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_MIN_DOCUMENT = 200
_MIN_ANSWER, _MAX_ANSWER = 60, 1200
_MIN_CORPUS = 500_000
_QUESTIONS = (
    "What does `{name}` do?",
    "How do I use `{name}` in Python?",
    "Explain `{name}` to me, please.",
    "I found `{name}` in some code. What is it for?",
    "Can you describe `{name}`?",
)
_FOLLOW_UPS = ("And `{name}`?", "Thanks. What about `{name}`?", "What is `{name}`, then?")
_SYSTEM = "You answer questions about Python's standard library."


@dataclass(frozen=True)
class Entry:
    """One documented thing: its dotted name, the document it belongs to, and its text."""

    name: str
    document: str
    text: str


def _variant(name: str, n: int) -> int:
    return zlib.crc32(name.encode()) % n


def _split_of(document: str) -> Split:
    return "heldout" if _variant(document, HELDOUT_SHARE) == 0 else "train"


def _docstrings(path: Path, module: str) -> list[Entry]:
    """Docstrings of one source file, module first, then classes and functions in source order."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a few shipped files are deliberately broken
        return []
    entries: list[Entry] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                entries.append(Entry(name, module, doc.strip()))
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return entries


@cache
def _entries() -> tuple[Entry, ...]:
    topics: dict[str, str] = {}
    with suppress(ImportError):
        topics = importlib.import_module("pydoc_data.topics").topics
    entries = [Entry(name, f"topic:{name}", text.strip()) for name, text in sorted(topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(p.startswith("config-") for p in parts):
            continue
        module = ".".join(p for p in parts if p != "__init__")
        if module:
            entries.extend(_docstrings(path, module))
    total = sum(len(e.text) for e in entries)
    if total < _MIN_CORPUS:
        raise DataError(
            f"The interpreter's documentation holds only {total} characters of text under {root}; the embedded "
            f"corpus needs {_MIN_CORPUS}. Its source files or pydoc_data are not installed."
        )
    return tuple(entries)


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


@cache
def _train_paragraphs() -> frozenset[str]:
    train = (entry for entry in _entries() if _split_of(entry.document) == "train")
    return frozenset(p.strip() for entry in train for p in _paragraphs(entry.text))


def _text_of(entry: Entry) -> str:
    """The entry's text; of a held-out one only the paragraphs that no training document has."""
    if _split_of(entry.document) == "train":
        return entry.text
    return "\n\n".join(p for p in _paragraphs(entry.text) if p.strip() not in _train_paragraphs())


def documents(split: Split) -> list[str]:
    """Plain documents: one per help topic and one per documented module, in a fixed order."""
    grouped: dict[str, list[str]] = {}
    for entry in _entries():
        if _split_of(entry.document) == split and (own := _text_of(entry)):
            body = own if entry.document.startswith("topic:") else f"{entry.name}\n\n{own}"
            grouped.setdefault(entry.document, []).append(body)
    texts = ("\n\n\n".join(parts) for parts in grouped.values())
    return [text for text in texts if len(text) >= _MIN_DOCUMENT]


def _answer(text: str) -> str:
    """The opening paragraphs of `text`, at most `_MAX_ANSWER` characters and never half a paragraph more."""
    kept = ""
    for paragraph in _paragraphs(text):
        if kept and len(kept) + len(paragraph) > _MAX_ANSWER:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[:_MAX_ANSWER].strip()


def chats(split: Split) -> list[list[Message]]:
    """Question-and-answer chats about the same documents, as `messages` lists.

    One or two questions each, always about one document, so that the split by document holds for chats too.
    """
    asked = [
        (entry, answer)
        for entry in _entries()
        if _split_of(entry.document) == split and len(answer := _answer(_text_of(entry))) >= _MIN_ANSWER
    ]
    result: list[list[Message]] = []
    i = 0
    while i < len(asked):
        entry, answer = asked[i]
        i += 1
        question = _QUESTIONS[_variant(entry.name, len(_QUESTIONS))].format(name=entry.name.removeprefix("topic:"))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if _variant(entry.name, 4) == 0:
            turns.insert(0, {"role": "system", "content": _SYSTEM})
        if i < len(asked) and asked[i][0].document == entry.document and _variant(entry.name, 3) == 0:
            follow, follow_answer = asked[i]
            i += 1
            text = _FOLLOW_UPS[_variant(follow.name, len(_FOLLOW_UPS))].format(name=follow.name)
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": follow_answer}]
        result.append(turns)
    return result


DATASETS = {"embedded:text": documents, "embedded:chat": chats}


def load_embedded(name: str, split: str) -> list[str] | list[list[Message]]:
    """`embedded:text` or `embedded:chat`, as `documents` or `chats` return them; `UnknownNameError` for others."""
    check_name("embedded dataset", name, DATASETS)
    check_name("split of the embedded text", split, get_args(Split))
    return cast("list[str] | list[list[Message]]", DATASETS[name](cast(Split, split)))
