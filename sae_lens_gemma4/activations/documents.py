"""Documents wherever they are: lists, files, saved datasets, the hub, the embedded text; and which of them were read.

sae_lens streams a dataset and forgets which rows it took, so nobody can say afterwards that two texts were apart. Here
the reader keeps count, and knows the commit of the repository. From the hub no more is fetched than is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi

from sae_lens_gemma4.embedded import text as embedded_text
from sae_lens_gemma4.errors import ConfigError, DataError, check_name

Document = str | Sequence[Mapping[str, str]]

_COLUMNS = ("messages", "conversations", "conversation", "text")
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_HUB_TIMEOUT = 10.0  # seconds


@dataclass
class Documents:
    """Texts and chats in the source's order, to be read once. A row that holds nothing is an empty text.

    Attributes:
        rows: the documents; None for one that holds nothing.
        source: name or path; None for what was in memory.
        split: of the source; None where it has none.
        revision: commit of the hub's repository; None elsewhere, and where it cannot be known.
        first: number, in the source, of the first document here.
        n_read: how many have been read so far.
    """

    rows: Iterable[Document | None]
    source: str | None
    split: str | None
    revision: str | None
    first: int
    n_read: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            self.n_read += 1
            yield "" if row is None else row


def read_documents(
    source: Any,
    *,
    split: str = "train",
    skip: int = 0,
    revision: str | None = None,
    streaming: bool | None = None,
    in_part: bool = False,
) -> Documents:
    """Open whatever holds documents.

    Args:
        source: as `build_corpus` takes it, except for tokens.
        skip: documents to leave out at the start.
        streaming: for the hub, to fetch rows as they are read. By default where only a part is wanted, the split is
            a whole one and there is a network.
        in_part: that only a part is wanted.

    Raises:
        DataError: it cannot be read, now or while it is iterated over.
        ConfigError: a revision of something that is not on the hub.
        UnknownNameError: it has no such split.
    """
    name = str(source) if isinstance(source, str | Path) else None
    on_hub = name is not None and is_on_hub(name)
    if revision is not None and not on_hub:
        raise ConfigError(f"Only datasets on the hub have revisions; {name or type(source).__name__} is none.")
    if name is not None and name.startswith("embedded:"):
        source = embedded_text.load_embedded(name, split)
    elif name is not None and on_hub:
        revision = commit_of(name, revision) or revision
        if streaming is None:  # parts of a split, and what was fetched before, are read without streaming only
            streaming = in_part and re.fullmatch(r"[\w.]+", split) is not None and not datasets.config.HF_HUB_OFFLINE
        source = _load(name, split, revision=revision, streaming=streaming)
    elif name is not None:
        source = _load_local(name, split)
    has_splits = isinstance(source, DatasetDict | IterableDatasetDict)
    if has_splits:
        check_name("split", split, source)
        source = source[split]
    if isinstance(source, Dataset | IterableDataset):
        rows: Iterable[Document | None] = _column(source.skip(skip) if skip else source, name or "the dataset")
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        rows = islice(source, skip, None)
    else:
        raise DataError(f"Cannot read a corpus from {type(source).__name__}.")
    return Documents(rows, name, split if has_splits or name is not None else None, revision, skip)


def _column(dataset: Dataset | IterableDataset, name: str) -> Iterator[Document | None]:
    """Of each row the first of the known columns that holds something."""
    try:
        for row in dataset:
            known = [row[column] for column in _COLUMNS if column in row]
            if not known:
                raise DataError(
                    f"{name[0].upper()}{name[1:]} has the columns {list(row)}; a corpus needs 'text' or 'messages'."
                )
            yield next((value for value in known if value), None)
    except DataError:
        raise
    except Exception as e:  # as in `_load`, when a stream breaks off
        raise DataError(f"Dataset {name!r} could not be read to the end: {_reason(e)}") from e


def is_on_hub(name: str) -> bool:
    """Whether a dataset of that name is looked for on the hub: it is no local file or folder, nor embedded."""
    local = name.startswith((".", "/", "~", "embedded:")) or Path(name).suffix in _FILE_KINDS
    return not local and not os.path.exists(name)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a dataset on the hub that a branch or tag now is; None if it cannot be known."""
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=_HUB_TIMEOUT).sha
    except Exception:  # no network, no such name: reading it says which
        return None


def _load_local(name: str, split: str) -> Any:
    path = Path(name)
    if path.is_file():
        kind = _FILE_KINDS.get(path.suffix)
        if kind is None:
            raise DataError(f"Cannot tell what {name} holds; known endings: {', '.join(_FILE_KINDS)}.")
        return _load(kind, split, data_files=name)
    if not path.is_dir():
        raise DataError(f"There is no file {name}.")
    if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
        return _load(name, split)
    try:
        return datasets.load_from_disk(name)
    except Exception as e:
        raise DataError(f"Dataset {name!r} cannot be read: {_reason(e)}") from e


def _load(name: str, split: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as e:  # datasets raises a dozen unrelated types for a wrong name, split or network
        what = options.get("data_files", name)
        raise DataError(f"Dataset {what!r} (split {split!r}) cannot be read: {_reason(e)}") from e


def _reason(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "it has no rows"
    if isinstance(error, DatasetGenerationError) and error.__cause__:  # says no more than that there was an error
        return _reason(error.__cause__)
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
