"""What a logit lens found, summed up by stated rules: where the model settles on its answer, and in which writing.

Where a model "commits" is easily read into a table of top tokens. Here it is the first layer from which on the top
token is the final one at every later layer; the last layer's is by construction, so what tells is how long before it.

Shapes: `n` positions, `l` places in the stream (the embeddings, then layers), `k` top tokens, `p` prompts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.layers.scripts import TokenTexts
from sae_lens_gemma4.interp.means import means_of, summed

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_DEFINITIONS = {
    "rank": "1 + the number of tokens with a greater logit",
    "entropy": "of the distribution over the vocabulary, in nats",
    "kl": "from the model's own final distribution to the layer's, KL(final ‖ layer), in nats",
    "commitment": "the first place in the stream from which on no token is above the model's final one at any later "
    "place; at the last layer none is, by construction, unless the norm is left out",
    "script_commitment": "the first from which on the top token's script is the final token's; a script is not a "
    "language, and punctuation, digits and special tokens count as scripts of their own",
    "intervals": "bootstrap over prompts",
}


class Followed(NamedTuple):
    """One token at each position, through the layers: `id_n` (-1 where there is none), `rank_nl`, `prob_nl`."""

    id_n: Ints
    rank_nl: Ints
    prob_nl: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens:
    """What each layer would say. Made by `logit_lens`.

    Attributes:
        layers: for each place in the stream the layer whose output it is, None for the embeddings.
        n_layers: of the model.
        prompt_n, position_n, token_n: which prompt, which position in it, and the token there.
        top_id_nlk, top_prob_nlk: the likeliest tokens, the first first.
        entropy_nl, kl_nl: in nats.
        final: the model's own top token.
        target: the token asked for; None without.
        following: the text's next token, where there is one.
        settings: how it was read, as plain data.
        facts: of the model and the text, as plain data.
    """

    layers: tuple[int | None, ...]
    n_layers: int
    prompt_n: Ints
    position_n: Ints
    token_n: Ints
    top_id_nlk: Ints
    top_prob_nlk: Floats
    entropy_nl: Floats
    kl_nl: Floats
    final: Followed
    target: Followed | None
    following: Followed
    texts: TokenTexts
    settings: dict[str, Any]
    facts: dict[str, Any]
    sampling: Sampling

    @property
    def commitment_n(self) -> Ints:
        """For each position the place in the stream of its commitment (an index into `layers`), `l` for never."""
        return first_kept(self.final.rank_nl == 1)

    @property
    def script_nlk(self) -> npt.NDArray[np.object_]:
        """The script of every top token."""
        return _scripts(self.top_id_nlk, self.texts)

    @property
    def script_commitment_n(self) -> Ints:
        """As `commitment_n`, for the script of the top token."""
        final_n = _scripts(self.final.id_n, self.texts)
        return first_kept(self.script_nlk[:, :, 0] == final_n[:, None])

    def to_dict(self, *, shown: int = 16) -> dict[str, Any]:
        """Plain data for JSON and a report: curves by layer with intervals, commitments, and the first positions."""
        return {
            "schema": 1,
            "kind": "logit_lens",
            **self.facts,
            "settings": self.settings,
            "sampling": asdict(self.sampling),
            "definitions": _DEFINITIONS,
            "n_layers": self.n_layers,
            "layers": list(self.layers),
            "n_positions": len(self.token_n),
            "curves": self._curves(),
            "commitment": self._commitment(self.commitment_n),
            "script_commitment": self._commitment(self.script_commitment_n),
            "scripts": self._script_shares(),
            "shown": [self._position(n) for n in range(min(shown, len(self.token_n)))],
            "versions": versions(),
        }

    def _curves(self) -> dict[str, Any]:
        everywhere = np.ones(len(self.token_n), dtype=bool)
        curves = {
            "entropy": self._means(self.entropy_nl, everywhere),
            "kl": self._means(self.kl_nl, everywhere),
            **self._followed("final", self.final),
            **self._followed("following", self.following),
        }
        return curves | ({} if self.target is None else self._followed("target", self.target))

    def _followed(self, name: str, token: Followed) -> dict[str, Any]:
        there_n = token.id_n >= 0
        if not there_n.any():
            return {}
        return {
            f"{name}_probability": self._means(token.prob_nl, there_n),
            f"{name}_is_top": self._means((token.rank_nl == 1).astype(np.float32), there_n),
            f"{name}_median_rank": {"values": np.median(token.rank_nl[there_n], axis=0).tolist()},
        }

    def _means(self, values_nl: npt.NDArray[Any], there_n: Bools) -> dict[str, Any]:
        """Means by layer over some positions, with intervals over prompts."""
        values, intervals = means_over_prompts(values_nl[there_n], self.prompt_n[there_n], self.sampling)
        return {"values": values, "intervals": intervals}

    def _commitment(self, place_n: Ints) -> dict[str, Any]:
        n_places = len(self.layers)
        by_nl = (place_n[:, None] <= np.arange(n_places)).astype(np.float32)
        counts = np.bincount(place_n, minlength=n_places + 1)
        kept = np.sort(place_n)
        median = int(kept[(len(kept) - 1) // 2])
        depth_n = np.array([0.0 if layer is None else layer + 1.0 for layer in self.layers] + [np.nan])[place_n]
        held_n = np.isfinite(depth_n)
        mean, interval = means_over_prompts(depth_n[held_n, None], self.prompt_n[held_n], self.sampling)
        return {
            "counts": counts[:n_places].tolist(),
            "never": int(counts[n_places]),
            "committed_by": self._means(by_nl, np.ones(len(place_n), dtype=bool)),
            "median_layer": None if median == n_places else self.layers[median],
            "median_is_embeddings": median < n_places and self.layers[median] is None,
            "mean_layers_run": mean[0] if held_n.any() else None,
            "mean_layers_run_interval": interval[0] if held_n.any() and interval is not None else None,
        }

    def _script_shares(self) -> dict[str, Any]:
        scripts_nlk = self.script_nlk
        by_layer = []
        for at in range(len(self.layers)):
            counts = Counter(scripts_nlk[:, at].ravel().tolist())
            by_layer.append({script: n / counts.total() for script, n in counts.most_common()})
        top = {script: float((scripts_nlk[:, -1, 0] == script).mean()) for script in by_layer[-1]}
        return {"top_k_by_layer": by_layer, "last_layer_top": top, "vocabulary": self.facts["vocabulary_scripts"]}

    def _position(self, n: int) -> dict[str, Any]:
        text = self.texts.text

        def followed(token: Followed | None) -> dict[str, Any] | None:
            if token is None or token.id_n[n] < 0:
                return None
            return {
                "token": text(int(token.id_n[n])),
                "rank": token.rank_nl[n].tolist(),
                "probability": token.prob_nl[n].tolist(),
            }

        place = int(self.commitment_n[n])
        return {
            "prompt": int(self.prompt_n[n]),
            "position": int(self.position_n[n]),
            "token": text(int(self.token_n[n])),
            "top": [
                [{"token": text(int(i)), "probability": float(p)} for i, p in zip(ids, probs, strict=True)]
                for ids, probs in zip(self.top_id_nlk[n].tolist(), self.top_prob_nlk[n].tolist(), strict=True)
            ],
            "entropy": self.entropy_nl[n].tolist(),
            "kl": self.kl_nl[n].tolist(),
            "final": followed(self.final),
            "target": followed(self.target),
            "following": followed(self.following),
            "commitment": None if place == len(self.layers) else place,
        }


def first_kept(holds_nl: Bools) -> Ints:
    """The first place from which on something holds to the end, `l` where it does not hold at the end: int64 `[n]`."""
    kept_nl = np.flip(np.logical_and.accumulate(np.flip(holds_nl, axis=1), axis=1), axis=1)
    place_n: Ints = holds_nl.shape[1] - kept_nl.sum(axis=1)
    return place_n


def means_over_prompts(
    values_nl: npt.NDArray[np.floating], prompt_n: Ints, sampling: Sampling
) -> tuple[list[float], list[tuple[float, float] | None] | None]:
    """Means over positions, `[l]`, and their intervals by a bootstrap over prompts (`Sampling`), None where there are
    too few of them."""
    if not len(values_nl):
        return [], None
    number_n = torch.from_numpy(np.unique(prompt_n, return_inverse=True)[1])
    found, drawn_rl = means_of(*summed(torch.from_numpy(values_nl.astype(np.float64)), number_n), sampling)
    return [float(mean) for mean in found], None if drawn_rl is None else [mean.interval for mean in found]


def _scripts(ids: Ints, texts: TokenTexts) -> npt.NDArray[np.object_]:
    unique, place = np.unique(ids, return_inverse=True)
    scripts = np.array([texts.script(int(token)) for token in unique], dtype=object)
    found: npt.NDArray[np.object_] = scripts[place].reshape(ids.shape)
    return found
