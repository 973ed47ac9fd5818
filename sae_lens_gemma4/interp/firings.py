"""Every activation of an SAE on a text, on disk and sorted by latent.

What is wanted of a latent (its strongest contexts, its quantiles, its density) needs all of its activations, and what a
model gives are all latents' of a few tokens. sae-dashboard goes through the text again for each 128 latents; a running
top-k sees the text once but cannot draw from an interval of activations whose bounds are known only at the end. So the
text is read once, what fired is written down (some hundred numbers a token), and turned round a shard at a time:
afterwards a latent is one slice of each shard, and everything about it is exact.

A shard is complete or absent, so a pass that was killed goes on behind the last one.

Shapes: `e` activations, `f` latents, `d` the activations' width. A token is the number of its place in the corpus,
`block * context_size + position`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.reading import ActiveLatents
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.kernels.pattern import by_column

FACTS = "firings.json"
_SHARD = "shard-{:05d}.safetensors"
_SUMS = "sums-{:05d}.safetensors"


class Firing(NamedTuple):
    """All activations of one latent.

    Attributes:
        token_e: int64, ascending.
        value_e: float32, positive.
    """

    token_e: npt.NDArray[np.int64]
    value_e: npt.NDArray[np.float32]


class Firings:
    """The activations in a folder: written by `append`, read by `latents` when all of the text is there.

    Args:
        context_size: tokens in a block of the corpus.
        facts: what they are made of; a folder that was begun with others is refused.

    Attributes:
        n_blocks: how many of the corpus's blocks are written, from the first on.
        sums: what was accumulated on the way, as of the last shard.

    Raises:
        ConfigError: the folder holds activations of something else, naming what differs.
        DataError: a file in it cannot be read.
    """

    def __init__(self, folder: str | Path, d_sae: int, context_size: int, facts: Mapping[str, Any]) -> None:
        self.folder, self.d_sae, self.context_size, self.facts = Path(folder), d_sae, context_size, dict(facts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{self.folder} cannot be made: {e.strerror}.") from e
        there = self.folder / FACTS
        if there.is_file():
            differing(self.folder, read_facts(there), self.facts)
        else:
            write_text(json.dumps(self.facts, indent=1), there)
        self.shards: list[tuple[Path, int, int]] = []
        while (path := self.folder / _SHARD.format(len(self.shards))).is_file():
            with _opened(path) as shard:
                found = {k: int(v) for k, v in shard.metadata().items() if k in ("first_block", "end_block")}
            if found["first_block"] != self.n_blocks:
                raise DataError(
                    f"{path} does not begin where the one before it ends. Remove its folder and begin again."
                )
            self.shards.append((path, found["first_block"], found["end_block"]))
        self.sums: dict[str, torch.Tensor] = {}
        if self.shards:
            with _opened(self.folder / _SUMS.format(len(self.shards))) as file:
                self.sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @property
    def n_blocks(self) -> int:
        return self.shards[-1][2] if self.shards else 0

    @property
    def n_activations(self) -> int:
        total = 0
        for path, _, _ in self.shards:
            with _opened(path) as shard:
                total += int(shard.get_slice("offset_f")[self.d_sae :].item())
        return total

    def append(self, active: ActiveLatents, end_block: int, sums: Mapping[str, torch.Tensor]) -> None:
        """Write the activations of the blocks from `n_blocks` to `end_block`.

        Args:
            active: `token_a` as places in the corpus, ascending.
            sums: what is accumulated over all blocks so far.
        """
        latent_e = active.latent_a.cpu()
        order = by_column(latent_e)
        tensors = {
            "offset_f": torch.searchsorted(latent_e[order], torch.arange(self.d_sae + 1)),
            "token_e": (active.token_a.cpu()[order] - self.n_blocks * self.context_size).int(),
            "value_e": active.value_a.float().cpu()[order],
        }
        number, first = len(self.shards), self.n_blocks
        _save(self.folder / _SUMS.format(number + 1), dict(sums), {})
        path = self.folder / _SHARD.format(number)
        _save(path, tensors, {"first_block": str(first), "end_block": str(end_block)})
        (self.folder / _SUMS.format(number)).unlink(missing_ok=True)
        self.shards.append((path, first, end_block))
        self.sums = dict(sums)

    def latents(self, first: int, end: int) -> list[Firing]:
        """The activations of the latents from `first` to `end`; all of them fit in memory where a shard does."""
        parts: list[list[Firing]] = [[] for _ in range(first, end)]
        for path, first_block, _ in self.shards:
            with _opened(path) as shard:
                offsets = shard.get_slice("offset_f")[first : end + 1].tolist()
                token_e = shard.get_slice("token_e")[offsets[0] : offsets[-1]].long() + first_block * self.context_size
                value_e = shard.get_slice("value_e")[offsets[0] : offsets[-1]]
            sizes = [high - low for low, high in pairwise(offsets)]
            for part, token, value in zip(parts, token_e.split(sizes), value_e.split(sizes), strict=True):
                part.append(Firing(token.numpy(), value.numpy()))
        return [Firing(*(np.concatenate(arrays) for arrays in zip(*part, strict=True))) for part in parts]

    def by_token(self, blocks_b: npt.NDArray[np.int64]) -> ActiveLatents:
        """The activations in some blocks (ascending), tokens ascending and numbered by their place in these."""
        tokens, latents, values = [], [], []
        for path, low, high in self.shards:
            mine_b = blocks_b[np.searchsorted(blocks_b, low) : np.searchsorted(blocks_b, high)]
            if not len(mine_b):
                continue
            with _opened(path) as shard:
                offset_f, token_e = shard.get_tensor("offset_f"), shard.get_tensor("token_e")
                value_e = shard.get_tensor("value_e")
            place_b = np.full(high - low, -1, dtype=np.int64)
            place_b[mine_b - low] = np.searchsorted(blocks_b, mine_b)
            block_e, position_e = np.divmod(token_e.numpy(), self.context_size)
            at_e = place_b[block_e]
            chosen = torch.from_numpy(np.flatnonzero(at_e >= 0))
            latent_e = torch.arange(self.d_sae).repeat_interleave(offset_f.diff())
            token = torch.from_numpy(at_e * self.context_size + position_e)[chosen]
            order = torch.argsort(token, stable=True)
            tokens.append(token[order])
            latents.append(latent_e[chosen][order])
            values.append(value_e[chosen][order])
        if not tokens:
            nothing = torch.zeros(0, dtype=torch.int64)
            return ActiveLatents(nothing, nothing, nothing.float())
        return ActiveLatents(torch.cat(tokens), torch.cat(latents), torch.cat(values))


def blocks_done(folder: Path) -> int:
    """How many of a text's blocks are written there, from the first on."""
    shards = sorted(folder.glob(_SHARD.replace("{:05d}", "*")))
    if not shards:
        return 0
    with _opened(shards[-1]) as shard:
        return int(shard.metadata()["end_block"])


def remove_firings(folder: Path) -> None:
    """All of it, and the folder; a link to one elsewhere stays, empty."""
    for file in folder.iterdir() if folder.exists() else ():
        file.unlink()
    if folder.is_dir() and not folder.is_symlink():
        folder.rmdir()


def read_facts(file: Path) -> dict[str, Any]:
    """What a folder was made of.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file} cannot be read: {e}. Remove its folder and begin again.") from e
    if not isinstance(found, dict):
        raise DataError(f"{file} does not hold an object. Remove its folder and begin again.")
    return found


def differing(folder: Path, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if what a folder was made of is not what is asked for, naming the first difference."""
    for name in sorted({*there, *ours}):
        if there.get(name) != ours.get(name):
            raise ConfigError(
                f"{folder} was begun with {name} {there.get(name)!r}, not {ours.get(name)!r}. "
                "Go on with the same arguments, or take another folder."
            )


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {e}") from e


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise DataError(f"{path} cannot be read: {e}. Remove its folder and begin again.") from e
