"""Activations of a fixed text on disk, so that every epoch after the first costs a read and not a forward.

Caches of activations fill disks and outlive what they were made from. So the size is told before anything is written,
a cache is complete or absent, and one is opened only for the model, text and settings that it says it was made of.

Shapes: `b` blocks, `t` tokens that count, in the corpus's order, `d` the hook's width.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.models.interface import HookedModel

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FACTS = "cache.json"
_SCHEMA = 1


class ActivationCache:
    """The activations of one corpus at some hooks: a plain file `[t, d]` a hook, and `cache.json`.

    Made by `build` or `open`.

    Attributes:
        corpus: the text.
        widths: `d` of each hook.
        made_of: what the activations depend on besides the hooks: model, corpus, dtype, isolate_documents.
    """

    def __init__(self, folder: Path, corpus: Corpus, widths: Mapping[str, int], made_of: Mapping[str, Any]) -> None:
        self.folder, self.corpus, self.widths, self.made_of = folder, corpus, dict(widths), dict(made_of)
        kept_b = corpus.keep_bp.sum(dim=1)
        self._ends_b = kept_b.cumsum(0)
        self._starts_b = self._ends_b - kept_b

    @staticmethod
    def size(corpus: Corpus, widths: Mapping[str, int], dtype: torch.dtype) -> int:
        """Bytes on disk of the activations of `corpus` at hooks of these widths."""
        return corpus.n_tokens * sum(widths.values()) * dtype.itemsize

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: HookedModel,
        corpus: Corpus,
        hook_names: Sequence[str],
        *,
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
        batch_blocks: int = 16,
        isolate_documents: bool = False,
    ) -> ActivationCache:
        """Harvest `corpus` once and write it to `folder`, which must not exist yet.

        Activations that are not finite are written as they are: who reads them skips them. One process at a time may
        build a folder; what a killed one left behind is removed by the next.

        Args:
            fingerprint: of the model (`evaluation.identity.model_fingerprint`).
            dtype: bfloat16 or float32.

        Raises:
            ConfigError: another dtype, a folder that exists, or a disk that is too small or fails; no file is left.
            UnknownNameError, DataError: as `harvest` does.
        """
        folder = Path(folder)
        made_of = _made_of(fingerprint, corpus, dtype, isolate_documents)
        if folder.exists():
            raise ConfigError(f"{folder} exists. Open it as a cache, delete it, or build this one elsewhere.")
        settings: dict[str, Any] = {"isolate_documents": isolate_documents, "require_finite": False}
        first = corpus.take(corpus.keep_bp.any(dim=1).nonzero()[0])
        widths = {
            name: acts.flatten(1).shape[1]
            for name, acts in next(harvest(model, first, hook_names, **settings)).acts.items()
        }
        partial = folder.parent / f".{folder.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            needed, free = cls.size(corpus, widths, dtype), shutil.disk_usage(partial).free
            if needed > free:
                raise ConfigError(
                    f"The activations need {_gigabytes(needed)} in {folder.parent}, where {_gigabytes(free)} are free."
                )
            with ExitStack() as stack:
                files = {name: stack.enter_context((partial / _file(name)).open("wb")) for name in widths}
                for batch in harvest(model, corpus, hook_names, batch_blocks=batch_blocks, **settings):
                    for name, file in files.items():
                        _write(file, batch.acts[name].to("cpu", dtype))
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            _check_files(partial, corpus, widths, dtype)
            facts = {"schema": _SCHEMA, **made_of, "tokens": corpus.n_tokens, "widths": widths}
            (partial / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
            partial.rename(folder)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(e, OSError):
                raise ConfigError(f"The activation cache {folder} cannot be written: {e}") from e
            raise
        return cls(folder, corpus, widths, made_of)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        corpus: Corpus,
        hook_names: Sequence[str],
        *,
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
        isolate_documents: bool = False,
    ) -> ActivationCache:
        """The cache in `folder`, if it holds what `build` would write with the same arguments (or more hooks).

        Raises:
            ConfigError: no cache, an incomplete one, or one that was made of something else, naming what differs.
            UnknownNameError: a hook that it does not hold.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / _FACTS).read_text())
            found = {key: facts[key] for key in ("model", "corpus", "dtype", "isolate_documents")}
            widths = {str(name): int(width) for name, width in facts["widths"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{folder} holds no activation cache that can be read: {e!r}") from e
        asked = _made_of(fingerprint, corpus, dtype, isolate_documents)
        _refuse_others(folder, {"schema": facts.get("schema"), **found}, {"schema": _SCHEMA, **asked})
        _check_files(folder, corpus, widths, dtype)
        cache = cls(folder, corpus, widths, asked)
        cache.require(corpus, hook_names, isolate_documents=isolate_documents)
        return cache

    def require(self, corpus: Corpus, hook_names: Sequence[str], *, isolate_documents: bool) -> None:
        """Raise unless these activations are here: `ConfigError` naming what differs, `UnknownNameError` for a hook."""
        asked = {"corpus": self.made_of["corpus"] if corpus is self.corpus else corpus.hash}
        _refuse_others(self.folder, self.made_of, asked | {"isolate_documents": isolate_documents})
        for name in hook_names:
            check_name("hook", name, self.widths, f"The activation cache {self.folder} does not hold it.")

    def read(self, hook_name: str, blocks: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
        """Activations `[t, d]` of these blocks, in their order, as a copy on the CPU in the cache's dtype.

        The file is read in its own order, straight into the copy; the system is told first what will be read.

        Args:
            pinned: into memory from which a CUDA device copies by itself.

        Raises:
            ConfigError: the file ends early, or cannot be read.
        """
        width, dtype = self.widths[hook_name], _DTYPES[self.made_of["dtype"]]
        starts_b, sizes_b = self._starts_b[blocks], (self._ends_b - self._starts_b)[blocks]
        row = width * dtype.itemsize
        n_rows = int(sizes_b.sum())
        shape = max(n_rows, 1), row  # nothing at all could not be looked at in another dtype
        # numpy asks for huge pages, of which the first touch costs a quarter.
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pinned else np.empty(shape, np.uint8)
        bytes_tr = torch.as_tensor(memory)[:n_rows]
        acts_td, into = bytes_tr.view(dtype), bytes_tr.view(-1).numpy().data
        places = sorted(zip(starts_b.tolist(), (sizes_b.cumsum(0) - sizes_b).tolist(), sizes_b.tolist(), strict=True))
        path = self.folder / _file(hook_name)
        try:
            with path.open("rb", buffering=0) as file:
                if sys.platform == "linux":
                    for start, _, size in places:
                        os.posix_fadvise(file.fileno(), start * row, size * row, os.POSIX_FADV_WILLNEED)
                for start, place, size in places:
                    file.seek(start * row)
                    _fill(file, into[place * row : (place + size) * row])
        except OSError as e:
            raise ConfigError(f"The activation cache {self.folder} cannot be read: {e}") from e
        return acts_td


def _made_of(fingerprint: str, corpus: Corpus, dtype: torch.dtype, isolate_documents: bool) -> dict[str, Any]:
    names = [name for name, known in _DTYPES.items() if known == dtype]
    if not names:
        raise ConfigError(f"Activations are cached as {' or '.join(_DTYPES)}, not {dtype}.")
    return {"model": fingerprint, "corpus": corpus.hash, "dtype": names[0], "isolate_documents": isolate_documents}


def _refuse_others(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differs = [f"{key} is {found.get(key)}, not {value}" for key, value in asked.items() if found.get(key) != value]
    if differs:
        raise ConfigError(f"The activation cache {folder} was made of something else: {'; '.join(differs)}.")


def _check_files(folder: Path, corpus: Corpus, widths: Mapping[str, int], dtype: torch.dtype) -> None:
    for name, width in widths.items():
        path, size = folder / _file(name), ActivationCache.size(corpus, {name: width}, dtype)
        if not path.is_file() or path.stat().st_size != size:
            raise ConfigError(
                f"The activation cache {folder} is incomplete: {path.name} is not {size:,} bytes. Delete it."
            )


def _file(hook_name: str) -> str:
    return f"{hook_name}.bin"


def _write(file: BinaryIO, acts: torch.Tensor) -> None:
    file.write(acts.contiguous().view(-1).view(torch.uint8).numpy().data)


def _fill(file: FileIO, into: memoryview) -> None:
    """Read until `into` is full; `OSError` if the file ends before."""
    while into:
        n_bytes = file.readinto(into)
        if not n_bytes:
            raise OSError(f"{file.name} ends {len(into):,} bytes too early, delete the cache")
        into = into[n_bytes:]


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"
