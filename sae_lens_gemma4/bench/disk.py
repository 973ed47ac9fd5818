"""What a cache of activations gives: its rate beside that of the disk, and what reading ahead gives to a step.

The cache is a file of random numbers in the form of an `ActivationCache`, read in a stream's order: chunks of blocks
from all over the file. Where the system lets a file's pages go (`posix_fadvise`), each reading begins without them; on
other systems, and in a folder that is memory, it is read from memory on either side.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_lens_gemma4.activations.cache import ActivationCache
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError

_HOOK = "blocks.0.hook_resid_post"
_PIECE = 8 * 2**20  # bytes of a plain read
_WIDER = 16  # what a step multiplies by, in hidden sizes
_CHUNKS = 4  # at least


@dataclass(frozen=True)
class Paired:
    """A ratio of two times: the median over rounds and its quartiles, and what is to be reached, if anything is."""

    what: str
    ratio: float
    quartiles: tuple[float, float]
    target: str | None = None


@dataclass(frozen=True)
class CacheBench:
    """What was read and what came out.

    Attributes:
        gigabytes: of the file.
        block_kb: of a block, which is read in one piece.
        cold: whether its pages could be let go.
        gb_per_second: of the cache; the median.
        read: the plain read's time by the cache's.
        prefetch: reading, and steps of about the same length: in turn by ahead.
    """

    gigabytes: float
    block_kb: float
    cold: bool
    gb_per_second: float
    read: Paired
    prefetch: Paired


def bench_cache(
    hidden: int, context: int, chunk_blocks: int, gigabytes: float, folder: str | Path | None, rounds: int, device: str
) -> CacheBench:
    """Write a cache of about `gigabytes`, four chunks at least, into a temporary folder in `folder`, and read it.

    Raises:
        ConfigError: it cannot be written.
    """
    block_bytes = context * hidden * 4
    n_blocks = max(_CHUNKS * chunk_blocks, int(gigabytes * 1e9) // block_bytes)
    text = random_text(n_blocks, context)
    cold = hasattr(os, "posix_fadvise")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="bench-harvest-") as made:
            path = _written(Path(made) / f"{_HOOK}.bin", n_blocks, context * hidden)
            made_of = {"corpus": text.hash, "dtype": "float32", "isolate_documents": False}
            cache = ActivationCache(Path(made), text, {_HOOK: hidden}, made_of)
            settings: dict[str, Any] = {"model": None, "batch_size": context, "seed": 0, "device": device}
            settings |= {"corpus": text, "hook_names": [_HOOK], "buffer_blocks": chunk_blocks, "cache": cache}

            def permuted() -> None:
                for chosen in torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0)).split(chunk_blocks):
                    cache.read(_HOOK, chosen)

            read = _race_cold({"plain": lambda: _plain(path), "cache": permuted}, path, rounds, device)
            seconds = statistics.median(read["cache"])
            step = step_like(hidden, context, seconds / n_blocks, device)
            ways = {
                ahead: partial(steps, partial(ActivationStream, **settings, prefetch=ahead), step, n_blocks)
                for ahead in (False, True)
            }
            stepped = _race_cold(ways, path, rounds, device)
    except OSError as e:
        raise ConfigError(
            f"A cache of {gigabytes:g} GB cannot be written to {folder or 'a temporary folder'}: {e}"
        ) from e
    size = n_blocks * block_bytes
    return CacheBench(
        size / 1e9,
        block_bytes / 1e3,
        cold,
        size / 1e9 / seconds,
        Paired("cache's rate by a plain read's", *ratio(read["plain"], read["cache"]), "≥ 0.8"),
        Paired("cache and steps, in turn by ahead", *ratio(stepped[False], stepped[True])),
    )


def random_text(n_blocks: int, context: int, seed: int = 0) -> Corpus:
    drawn_bp = torch.randint(30, 2000, (n_blocks, context), generator=torch.Generator().manual_seed(seed))
    document_bp = torch.arange(n_blocks)[:, None].expand_as(drawn_bp).clone()
    return Corpus(drawn_bp, torch.ones_like(drawn_bp, dtype=torch.bool), document_bp, "random tokens")


def step_like(hidden: int, tokens: int, seconds: float, device: str) -> Callable[[torch.Tensor], None]:
    """Something to do with a batch `[tokens, hidden]` that takes about so long: products, or some rows of one."""
    weight_df = torch.randn(hidden, _WIDER * hidden, device=device)

    def step(x_nd: torch.Tensor, rows: int = tokens, repeats: int = 1) -> None:
        for _ in range(repeats):
            x_nd[:rows] @ weight_df

    x_nd = torch.randn(tokens, hidden, device=device)
    one = statistics.median(race({None: partial(step, x_nd)}, 5, device, 0)[None])
    products = seconds / one
    return partial(step, rows=max(1, min(tokens, round(tokens * products))), repeats=max(1, round(products)))


def steps(stream: Callable[[], ActivationStream], step: Callable[[torch.Tensor], Any], n: int) -> None:
    """Take `n` batches of a new stream, and a step on each at its last hook."""
    with closing(stream()) as batches:
        for _ in range(n):
            step([*next(batches).values()][-1])


def _race_cold(
    contestants: Mapping[Any, Callable[[], None]], path: Path, rounds: int, device: str
) -> dict[Any, list[float]]:
    """As `race`, but each begins without the file's pages, and the time that it takes to let them go is not counted."""
    seconds: dict[Any, list[float]] = {key: [] for key in contestants}

    def run(key: Any) -> None:
        _forget(path)
        start = time.perf_counter()
        contestants[key]()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds[key].append(time.perf_counter() - start)

    race({key: partial(run, key) for key in contestants}, rounds, device, 0)
    return seconds


def _written(path: Path, n_blocks: int, block_numbers: int) -> Path:
    block = torch.randn(block_numbers, generator=torch.Generator().manual_seed(0)).numpy().data
    with path.open("wb") as file:
        for _ in range(n_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path


def _plain(path: Path) -> None:
    piece = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def _forget(path: Path) -> None:
    if sys.platform != "win32" and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
