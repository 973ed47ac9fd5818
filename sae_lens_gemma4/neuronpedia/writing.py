"""Dashboards from what a pass has left, in the form of sae-dashboard 0.8.

What sae-dashboard computes otherwise, and for Gemma 4 wrongly, is in the modules that compute it: logits in
`interp.unembedding`, contexts and intervals in `interp.contexts`. Densities here are over the tokens that the corpus's
mask leaves; sae-dashboard masks the tokens that fire and counts all (sae_vis_runner.py, `frac_nonzero`).

A file is complete or absent, so that a call with the same arguments goes on where one was stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.result import write_json, write_text
from sae_lens_gemma4.interp import neighbours
from sae_lens_gemma4.interp.contexts import Group, histogram, intervals, strongest
from sae_lens_gemma4.interp.firings import Firing, Firings
from sae_lens_gemma4.interp.gathering import neuron_correlations
from sae_lens_gemma4.interp.unembedding import Unembedding
from sae_lens_gemma4.neuronpedia.folder import COLUMNS, LATENTS, NEAREST, SKIPPED, Feature, summary
from sae_lens_gemma4.neuronpedia.row_files import MAX_FILES

_CLOSING = "\n]}\n"


@dataclass(frozen=True)
class DashboardSettings:
    """What a dashboard shows.

    Attributes:
        n_strongest: contexts of the strongest activations.
        n_intervals, n_each: equal intervals of activation, and contexts drawn from each.
        n_logits: tokens that are promoted most, and as many that are suppressed most.
        n_nearest: latents whose decoder rows are nearest.
        n_rows: of the tables of neurons and of correlated latents.
        cofiring_tokens: tokens of the sample on which latents are correlated.
        seed: of what is drawn.

    Raises:
        ConfigError: a number that makes no dashboard.
    """

    n_strongest: int = 20
    n_intervals: int = 5
    n_each: int = 5
    n_logits: int = 10
    n_nearest: int = 10
    n_rows: int = 3
    cofiring_tokens: int = 131_072
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"n_strongest": 1, "cofiring_tokens": 1}
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not int or value < least.get(f.name, 0):
                raise ConfigError(f"{f.name} must be an integer of at least {least.get(f.name, 0)}, not {value!r}.")

    @property
    def most_contexts(self) -> int:
        """In a dashboard."""
        return self.n_strongest + self.n_intervals * self.n_each


class Writer:
    """Dashboards from what a pass has left.

    Args:
        header: of each file: `model_id`, `layer`, `sae_set`, `sae_id_suffix`.
        pieces: the text of each token id.
        unembedding: None where there are no logits to speak of.
        bos: the id that is not shown where it opens every block and counts in none; None for none.
        dataset: what the text is called in each dashboard.
    """

    def __init__(
        self,
        firings: Firings,
        corpus: Corpus,
        sae: SAE[Any],
        header: Mapping[str, Any],
        pieces: list[str],
        unembedding: Unembedding | None,
        bos: int | None,
        dataset: str,
        settings: DashboardSettings,
    ) -> None:
        self.firings, self.corpus, self.sae, self.header = firings, corpus, sae, dict(header)
        self.pieces, self.unembedding, self.dataset, self.settings = pieces, unembedding, dataset, settings
        opened = bos is not None and bool((corpus.tokens_bp[:, 0] == bos).all())
        self.first = int(opened and not corpus.keep_bp[:, 0].any())
        self.n_tokens = corpus.n_tokens
        self.cofiring = neighbours.Cofiring(firings, corpus, settings.cofiring_tokens)
        self.unit_gd = neighbours.unit_rows(sae.W_dec)
        ends_b = corpus.context_size - (corpus.document_bp.flip(1) >= 0).int().argmax(dim=1)
        self._end_b: list[int] = ends_b.tolist()
        self._texts: dict[int, list[str]] = {}

    @property
    def per_file(self) -> int:
        d_sae: int = self.sae.cfg.d_sae
        return max(128, math.ceil(d_sae / MAX_FILES))

    def write(self, folder: Path, *, progress: bool) -> None:
        """All that a folder of dashboards holds but its settings; files that are there already stay."""
        d_sae = self.sae.cfg.d_sae
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        dead: list[int] = []
        rows: list[neighbours.Nearest] = []
        with tqdm(total=d_sae, desc="Writing dashboards", unit="latent", disable=not progress) as bar:
            for number, first in enumerate(range(0, d_sae, self.per_file)):
                end, file = min(first + self.per_file, d_sae), folder / f"batch-{number}.json"
                rows.append(neighbours.nearest_decoders(self.unit_gd, first, end, self.settings.n_nearest))
                entries = self._entries(file) if file.is_file() else None
                if entries is None:
                    entries = self._write_file(file, first, end)
                for entry in entries:
                    for key, value in entry.items():
                        columns[key].append(value)
                dead += sorted(set(range(first, end)) - {entry["index"] for entry in entries})
                bar.update(end - first)
        write_json({**self.header, "skipped_indexes": dead}, folder / SKIPPED)
        write_json(
            {
                "indices": [row for found in rows for row in found.index_fk.tolist()],
                "cosine": [row for found in rows for row in found.value_fk.double().round(decimals=4).tolist()],
            },
            folder / NEAREST,
        )
        write_json(columns, folder / LATENTS)

    def features(self, first: int, end: int) -> Iterator[Feature]:
        """The dashboards of those latents from `first` to `end` that ever fired."""
        n, W_fd = self.settings.n_rows, self.sae.W_dec[first:end]
        aligned = neighbours.aligned_neurons(W_fd, n)
        pearson_fd, cosine_fd = neuron_correlations(self.firings.sums, first, end)
        neuron_fk = pearson_fd.topk(min(n, pearson_fd.shape[1]), dim=1).indices
        logits_fv = None if self.unembedding is None else self.unembedding.logits(W_fd)
        for i, firing in enumerate(self.firings.latents(first, end)):
            if not len(firing.token_e):
                continue
            correlated = self.cofiring.correlated(first + i, n)
            yield {
                "feature_index": first + i,
                "neuron_alignment_indices": aligned.index_fk[i].tolist(),
                "neuron_alignment_values": _rounded(aligned.value_fk[i]),
                "neuron_alignment_l1": _rounded(aligned.share_fk[i]),
                "correlated_neurons_indices": neuron_fk[i].tolist(),
                "correlated_neurons_l1": _rounded(cosine_fd[i, neuron_fk[i]]),
                "correlated_neurons_pearson": _rounded(pearson_fd[i, neuron_fk[i]]),
                "correlated_features_indices": correlated.index_k,
                "correlated_features_l1": _rounded(correlated.cosine_k),
                "correlated_features_pearson": _rounded(correlated.pearson_k),
                **self._logits(first + i, None if logits_fv is None else logits_fv[i]),
                **self._activity(first + i, firing),
                "n_prompts_total": self.corpus.n_blocks,
                "n_tokens_in_prompt": self.corpus.context_size,
                "dataset": self.dataset,
                "decoder_weights_dist": [],
                "vector": [],
            }

    def _logits(self, latent: int, logits_v: torch.Tensor | None) -> dict[str, Any]:
        n = self.settings.n_logits
        if logits_v is None:
            empty: list[Any] = []
            words = {f"{sign}_{what}": empty for sign in ("neg", "pos") for what in ("str", "values")}
            return {**words, "logits_hist_data_bar_heights": empty, "logits_hist_data_bar_values": empty}
        if not logits_v.isfinite().all():
            raise DataError(f"Latent {latent} has logits that are not finite: its decoder row has, or the unembedding.")
        high, low = (logits_v.topk(min(n, len(logits_v)), largest=best) for best in (True, False))
        bars = histogram(logits_v.numpy())
        return {
            "neg_str": [self.pieces[token] for token in low.indices.tolist()],
            "neg_values": _rounded(low.values),
            "pos_str": [self.pieces[token] for token in high.indices.tolist()],
            "pos_values": _rounded(high.values),
            "logits_hist_data_bar_heights": bars.counts.tolist(),
            "logits_hist_data_bar_values": _rounded(bars.centres),
        }

    def _activity(self, latent: int, firing: Firing) -> dict[str, Any]:
        s, size = self.settings, self.corpus.context_size
        bars, rng = histogram(firing.value_e), np.random.default_rng((s.seed, latent))
        top = strongest(firing, size, s.n_strongest)
        groups = [Group(None, float(firing.value_e.max()), None, top)]
        groups += intervals(firing, size, self.n_tokens, s.n_intervals, s.n_each, rng)
        return {
            "frac_nonzero": len(firing.token_e) / self.n_tokens,
            "freq_hist_data_bar_values": _rounded(bars.centres),
            "freq_hist_data_bar_heights": bars.counts.tolist(),
            "activations": [activation for group in groups for activation in self._contexts(group)],
        }

    def _contexts(self, group: Group) -> Iterator[dict[str, Any]]:
        low, high = (-1 if group.low is None else _rounded([group.low])[0]), _rounded([group.high])[0]
        value_cp = _rounded(np.array([context.value_p for context in group.contexts]))
        for context, value_p in zip(group.contexts, value_cp, strict=True):
            shown = slice(self.first, self._end_b[context.block])
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": -1 if group.share is None else group.share,
                "tokens": self._tokens(context.block),
                "values": value_p[shown],
                "qualifying_token_index": context.position - self.first,
            }

    def _tokens(self, block: int) -> list[str]:
        """A block's tokens without the BOS that opens it and without padding."""
        if block not in self._texts:
            token_p = self.corpus.tokens_bp[block, self.first : self._end_b[block]].tolist()
            self._texts[block] = [self.pieces[token] for token in token_p]
        return self._texts[block]

    def _write_file(self, file: Path, first: int, end: int) -> list[dict[str, Any]]:
        """A batch, a line a latent, as `_entries` finds them again; the line of `latents.json` for each."""
        lines, entries = [self._opening()], []
        offset = len(lines[0].encode())
        for feature in self.features(first, end):
            line = json.dumps(feature, ensure_ascii=False, allow_nan=False)
            length = len(line.encode())
            entries.append(summary(feature) | {"file": file.name, "offset": offset, "length": length})
            lines.append(line + ",\n")
            offset += length + 2
        lines[-1] = lines[-1].removesuffix(",\n")
        write_text("".join([*lines, _CLOSING]), file)
        return entries

    def _opening(self) -> str:
        return json.dumps(self.header)[:-1] + ', "features": [\n'

    def _entries(self, file: Path) -> list[dict[str, Any]] | None:
        """The lines of `latents.json` for a batch that an earlier call wrote; None if it is not all there."""
        text, opening, closing = file.read_bytes(), self._opening().encode(), _CLOSING.encode()
        if not (text.startswith(opening) and text.endswith(closing)):
            return None
        entries, offset = [], len(opening)
        try:
            for line in filter(None, text[offset : -len(closing)].split(b",\n")):
                entries.append(summary(json.loads(line)) | {"file": file.name, "offset": offset, "length": len(line)})
                offset += len(line) + 2
        except (ValueError, KeyError, TypeError):
            return None
        return entries


def _rounded(values: Any) -> list[Any]:
    """To three places, as sae-dashboard rounds, and more where the greatest has fewer than three digits then."""
    array = np.asarray(values, dtype=np.float64)
    greatest = float(np.abs(array).max(initial=0.0))
    places = 2 - math.floor(math.log10(greatest)) if 0 < greatest < 0.1 else 3
    rounded: list[Any] = array.round(places).tolist()
    return rounded
