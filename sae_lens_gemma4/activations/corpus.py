"""A corpus is packed blocks of tokens, plus what every later figure needs to know about each token.

sae_lens streams tokens and forgets where they came from; evaluation needs to know which tokens count and
which document each belongs to, training needs blocks that start with BOS exactly once (stock leaves a second
BOS in mid-context on Gemma 4: `load_model.py:236` looks for an attribute transformers no longer sets). So
both read one `Corpus`: tokens, a mask, document numbers, and a hash that says which text it was.

Shapes: `b` blocks, `p` positions, `t` tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.chat import as_messages
from sae_lens_gemma4.embedded import text as embedded_text
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError

_TEXT_COLUMNS = ("text",)
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}

Document = str | Sequence[Mapping[str, str]]
CorpusLike = Any  # Corpus | Dataset | str | Path | Sequence[Document] | torch.Tensor


@dataclass(frozen=True, eq=False)
class Corpus:
    """Blocks of tokens for one model.

    Attributes:
        tokens_bp: int64 `[block, pos]`.
        keep_bp: bool `[block, pos]`, the tokens that count: not special, not padding.
        document_bp: int64 `[block, pos]`, number of the token's document; -1 for padding.
        name: what the text is, for reports; a dataset's name and split unless given.
    """

    tokens_bp: torch.Tensor
    keep_bp: torch.Tensor
    document_bp: torch.Tensor
    name: str

    def __post_init__(self) -> None:
        if self.tokens_bp.ndim != 2 or self.tokens_bp.numel() == 0:
            raise DataError(
                f"Corpus {self.name!r} has tokens of shape {tuple(self.tokens_bp.shape)}, not [block, pos]."
            )
        if not self.tokens_bp.shape == self.keep_bp.shape == self.document_bp.shape:
            raise DataError(f"Tokens, mask and document numbers of corpus {self.name!r} differ in shape.")
        if not self.keep_bp.any():
            raise DataError(f"Every token of corpus {self.name!r} is masked: nothing is left to read.")

    @property
    def n_blocks(self) -> int:
        return self.tokens_bp.shape[0]

    @property
    def context_size(self) -> int:
        return self.tokens_bp.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.keep_bp.sum())

    @property
    def n_documents(self) -> int:
        return int(torch.unique(self.document_bp[self.keep_bp]).numel())

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of tokens and mask: the same text, the same hash."""
        digest = hashlib.sha256(str(tuple(self.tokens_bp.shape)).encode())
        digest.update(self.tokens_bp.contiguous().numpy().tobytes())
        digest.update(self.keep_bp.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """What a report says of this corpus."""
        return {
            "name": self.name,
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "blocks": self.n_blocks,
            "context_size": self.context_size,
            "hash": self.hash,
        }

    def batches(self, n_blocks: int, *, shuffle: torch.Generator | None = None) -> Iterator[Corpus]:
        """The same corpus `n_blocks` blocks at a time, in order or shuffled by `shuffle`."""
        order = torch.arange(self.n_blocks) if shuffle is None else torch.randperm(self.n_blocks, generator=shuffle)
        for chosen in order.split(n_blocks):
            if self.keep_bp[chosen].any():
                yield self.take(chosen)

    def take(self, blocks: torch.Tensor) -> Corpus:
        return Corpus(self.tokens_bp[blocks], self.keep_bp[blocks], self.document_bp[blocks], self.name)

    @staticmethod
    def concat(corpora: Sequence[Corpus]) -> Corpus:
        """One corpus of all blocks; documents keep numbers of their own."""
        if not corpora:
            raise DataError("A mixture needs at least one corpus.")
        sizes = {c.context_size for c in corpora}
        if len(sizes) > 1:
            raise DataError(f"Corpora of different context sizes cannot be joined: {sorted(sizes)}.")
        documents, offset = [], 0
        for c in corpora:
            documents.append(torch.where(c.document_bp >= 0, c.document_bp + offset, -1))
            offset += int(c.document_bp.max()) + 1
        return Corpus(
            torch.cat([c.tokens_bp for c in corpora]),
            torch.cat([c.keep_bp for c in corpora]),
            torch.cat(documents),
            " + ".join(c.name for c in corpora),
        )


def build_corpus(
    source: CorpusLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_size: int,
    name: str | None = None,
    split: str = "train",
    max_tokens: int | None = None,
    exclude_special_tokens: bool = True,
) -> Corpus:
    """Make a `Corpus` of whatever holds text.

    Args:
        source: a `Corpus` (returned as it is), a `datasets.Dataset`, the name of a dataset on the hub or of a
            local file or folder, `embedded:text` or `embedded:chat`, a list of texts, a list of `messages`
            chats, or a `[block, pos]` tensor of tokens.
        tokenizer: the model's. Chats go through its chat template.
        context_size: tokens in a block, the BOS that opens it included.
        split: for datasets, in their own words (`"train[:1%]"`); for the embedded text `train` or `heldout`.
        max_tokens: stop at the first whole block with so many tokens that count.
        exclude_special_tokens: mask every token that the tokenizer calls special, turn markers included.

    Raises:
        DataError: no text, or not in a form that can be read.
    """
    if isinstance(source, Corpus):
        return source
    if context_size < 2:
        raise ConfigError(f"context_size must be at least 2 (BOS and one token), not {context_size}.")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}.")
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    if isinstance(source, torch.Tensor):
        tokens = source.long().cpu()
        if tokens.ndim != 2:
            raise DataError(f"A tensor corpus must be [block, pos]; this one is {tuple(tokens.shape)}.")
        documents = torch.arange(len(tokens))[:, None].expand_as(tokens).clone()
        return Corpus(tokens, _keep(tokens, special, exclude_special_tokens), documents, name or "tokens")

    label = name or (f"{source} [{split}]" if isinstance(source, str | Path) else "texts")
    blocks: list[list[int]] = []
    numbers: list[list[int]] = []
    kept = 0
    special_ids = frozenset(special.tolist()) if exclude_special_tokens else frozenset()
    packed = _pack(_token_documents(_documents(source, split), tokenizer), tokenizer.bos_token_id, context_size)
    for block, number in packed:
        blocks.append(block)
        numbers.append(number)
        kept += sum(t not in special_ids for t in block)
        if max_tokens is not None and kept >= max_tokens:
            break
    if not blocks:
        raise DataError(f"Corpus {label!r} holds no text.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.tensor([b + [pad] * (context_size - len(b)) for b in blocks], dtype=torch.long)
    documents = torch.tensor([d + [-1] * (context_size - len(d)) for d in numbers], dtype=torch.long)
    keep = _keep(tokens, special, exclude_special_tokens) & (documents >= 0)
    return Corpus(tokens, keep, documents, label)


def _keep(tokens_bp: torch.Tensor, special: torch.Tensor, exclude: bool) -> torch.Tensor:
    return ~torch.isin(tokens_bp, special) if exclude else torch.ones_like(tokens_bp, dtype=torch.bool)


def _pack(documents: Iterable[list[int]], bos: int | None, context_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Fill blocks of `context_size` with documents end to end; BOS opens every block and every document."""
    block: list[int] = []
    numbers: list[int] = []
    for number, tokens in enumerate(documents):
        start = 0
        while start < len(tokens):
            if bos is not None and (start == 0 or not block):
                block.append(bos)
                numbers.append(number)
            taken = tokens[start : start + context_size - len(block)]
            start += len(taken)
            block += taken
            numbers += [number] * len(taken)
            if len(block) >= context_size - 1:  # a BOS with nothing after it would say nothing
                yield block, numbers
                block, numbers = [], []
    if block:
        yield block, numbers


def _token_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token lists without BOS: packing puts it where it belongs."""
    for i, document in enumerate(documents):
        if isinstance(document, str):
            tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            tokens = _render(document, i, tokenizer)
        if tokens and tokens[0] == tokenizer.bos_token_id:
            tokens = tokens[1:]
        if tokens:
            yield list(tokens)


def _render(messages: Sequence[Mapping[str, str]], index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    rows = as_messages(messages, index)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template, so chats cannot be rendered; use the tuned model's.")
    tokens: Any = tokenizer.apply_chat_template(rows, tokenize=True, return_dict=False)
    return list(tokens)


def _documents(source: CorpusLike, split: str) -> Iterable[Document]:
    if isinstance(source, str) and source.startswith("embedded:"):
        return embedded_text.load_embedded(source, split)
    if isinstance(source, str | Path):
        source = _load_dataset(str(source), split)
    if isinstance(source, DatasetDict):
        if split not in source:
            raise UnknownNameError("split", split, source)
        source = source[split]
    if hasattr(source, "column_names") or isinstance(source, Dataset):
        columns = list(source.column_names or next(iter(source)))
        column = next((c for c in (*_CHAT_COLUMNS, *_TEXT_COLUMNS) if c in columns), None)
        if column is None:
            raise DataError(f"The dataset has the columns {columns}; a corpus needs 'text' or 'messages'.")
        return (row[column] for row in source)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise DataError(f"Cannot read a corpus from {type(source).__name__}.")
    return source


def _load_dataset(name: str, split: str) -> Any:
    path = Path(name)
    try:
        if path.is_file():
            kind = _FILE_KINDS.get(path.suffix)
            if kind is None:
                raise DataError(f"Cannot tell what {name} holds; known endings: {', '.join(_FILE_KINDS)}.")
            return load_dataset(kind, data_files=name, split=split)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(name)
        if path.suffix in _FILE_KINDS or name.startswith((".", "/", "~")):
            raise DataError(f"There is no file {name}.")
        return load_dataset(name, split=split)
    except DataError:
        raise
    except Exception as e:  # datasets raises a dozen unrelated types for a wrong name, split or network
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(f"Dataset {name!r} (split {split!r}) cannot be read: {reason}") from e
