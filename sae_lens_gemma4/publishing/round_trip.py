"""Whether what lies in a repository is what was measured: loaded again by stock sae_lens, on the same tokens.

An upload can be of another folder, in another dtype, or of a file that was written over meanwhile. All of these load,
and all of them have figures; only measuring them again tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.errors import DataError, Gemma4SAEError, ModelError, SAEError
from sae_lens_gemma4.evaluation.evaluate import evaluate_saes
from sae_lens_gemma4.evaluation.identity import model_fingerprint
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import load_for_sae_lens
from sae_lens_gemma4.publishing.record import Record
from sae_lens_gemma4.report import numbers as n

_FIGURES = ("ve", "l0")


@dataclass(frozen=True)
class Remeasured:
    """One figure of one SAE on one held-out text, as recorded and as measured again."""

    name: str
    corpus: str
    figure: str
    recorded: float | None
    measured: float | None
    tolerance: float

    @property
    def difference(self) -> float | None:
        if self.recorded is None or self.measured is None:
            return None
        return abs(self.measured - self.recorded)

    @property
    def same(self) -> bool:
        """Within the tolerance, which counts relative to figures above 1; undefined is the same as undefined only."""
        if self.difference is None:
            return self.recorded is None and self.measured is None
        return self.difference <= self.tolerance * max(1.0, abs(self.recorded or 0.0))

    def __str__(self) -> str:
        return f"{self.figure} of {self.name} on {self.corpus} is {self.measured} and was {self.recorded}"


@dataclass(frozen=True)
class RoundTrip:
    """What was found when an upload was downloaded again.

    Attributes:
        commit: that was downloaded.
        same_weights: whether every SAE has the hash that its result recorded.
        figures: VE and L0 of every SAE on every held-out text.
    """

    repo_id: str
    commit: str
    tolerance: float
    same_weights: bool
    figures: list[Remeasured]

    @property
    def passed(self) -> bool:
        return all(figure.same for figure in self.figures)

    @property
    def sentence(self) -> str:
        how = (
            f"Commit {self.commit} was downloaded into an empty folder, loaded with SAE.load_from_disk, and measured "
            "again on the same held-out tokens: "
        )
        if not self.passed:
            wrong = "; ".join(str(figure) for figure in self.figures if not figure.same)
            return f"{how}it is NOT what was measured before the upload. {wrong}. Do not use it."
        worst = max((figure.difference or 0.0 for figure in self.figures), default=0.0)
        weights = "the weights are the same bits" if self.same_weights else "the weights are not the same bits"
        return (
            f"{how}every VE and L0 is the one recorded here (largest difference {n.scientific(worst)}, allowed "
            f"{n.scientific(self.tolerance)}), and {weights}."
        )

    def to_dict(self) -> dict[str, Any]:
        facts = {"repo_id": self.repo_id, "commit": self.commit, "tolerance": self.tolerance}
        figures = [{k: v for k, v in asdict(f).items() if k != "tolerance"} | {"same": f.same} for f in self.figures]
        return {**facts, "passed": self.passed, "same_weights": self.same_weights, "figures": figures}


def load_recorded_model(records: Sequence[Record], device: str | None = None) -> HookedModel:
    """The model that the SAEs were measured on, as recorded, there or on `device`. Errors as `load_for_sae_lens`."""
    model = records[0].result["model"]
    kwargs = {**(model.get("kwargs") or {}), **({"dtype": model["dtype"]} if model.get("dtype") else {})}
    return load_for_sae_lens(model["class_name"], model["name"], device or model.get("device") or "cpu", kwargs)


def check_model(records: Sequence[Record], model: HookedModel) -> None:
    """Raise `ModelError` if `model` is not the one that the SAEs were measured on."""
    fingerprint = model_fingerprint(model)
    for record in records:
        for _, after in record.measured:
            if (recorded := after["model"]["fingerprint"]) != fingerprint:
                raise ModelError(
                    f"{record.name} was measured on {after['model']['name']} with fingerprint {recorded}; this model "
                    f"has {fingerprint}. Its weights or dtype are others, and so would be the figures."
                )


def recorded_corpora(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Corpus] | None = None
) -> dict[str, Corpus]:
    """The held-out texts by hash: those `given` by name, else made again from what was recorded of them.

    Raises:
        DataError: one that was in memory and is not given, or whose tokens are not those that were measured.
    """
    corpora: dict[str, Corpus] = {}
    for record in records:
        for name, after in record.measured:
            facts = after["corpus"]
            if facts["hash"] in corpora:
                continue
            corpus = given[name] if given and name in given else _made_again(name, facts, tokenizer)
            if corpus.hash != facts["hash"]:
                raise DataError(
                    f"Held-out text {name!r} of {record.name} has hash {corpus.hash} and was measured with "
                    f"{facts['hash']}: the dataset or the tokenizer has changed. Pass the text itself (corpora=)."
                )
            corpora[corpus.hash] = corpus
    return corpora


def _made_again(name: str, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    if facts["source"] is None:
        raise DataError(f"Held-out text {name!r} was in memory, and nothing says how to make it again (corpora=).")
    return build_corpus(
        facts["source"],
        tokenizer,
        context_size=facts["context_size"],
        name=facts["name"],
        split=facts["split"] or "train",
        max_tokens=facts["tokens"],
        exact_tokens=True,  # of a text that was not cut so, the last block has no more to mask
        exclude_special_tokens=facts["exclude_special_tokens"],
        skip_documents=facts["first_document"],
        revision=facts["revision"],
        bos=facts["bos"],
        packed=facts["packed"],
        roles=facts["roles"],
        exclude_turn_markers=facts["exclude_turn_markers"],
    )


def measure_again(
    records: Sequence[Record],
    folders: Mapping[str, Path],
    model: HookedModel,
    corpora: Mapping[str, Corpus],
    *,
    repo_id: str,
    commit: str,
    tolerance: float,
    batch_blocks: int = 16,
    progress: bool = True,
) -> RoundTrip:
    """Load the SAEs from `folders`, by name, with stock sae_lens, and measure them where `records` say they were.

    Args:
        corpora: by hash, as `recorded_corpora` gives them.

    Raises:
        SAEError: what was downloaded cannot be loaded.
    """
    device = str(next(iter(model.parameters())).device)
    saes = {record.name: _load(folders[record.name], device) for record in records}
    figures, same_weights = [], True
    for (key, corpus), isolated in product(corpora.items(), (False, True)):
        wanted = {
            (record.name, name): after
            for record in records
            for name, after in record.measured
            if (after["corpus"]["hash"], after["corpus"]["isolate_documents"]) == (key, isolated)
        }
        if not wanted:
            continue
        results = evaluate_saes(
            {name: saes[name] for name, _ in wanted},
            model,
            corpus,
            hook_names={name: after["sae"]["hook_name"] for (name, _), after in wanted.items()},
            batch_blocks=batch_blocks,
            isolate_documents=isolated,
            sampling=Sampling(resamples=0),
            progress=progress,
        )
        for (name, corpus_name), after in wanted.items():
            now = results[name].to_dict()
            same_weights &= now["sae"]["hash"] == after["sae"]["hash"]
            figures += [
                Remeasured(name, corpus_name, figure, after["metrics"][figure], now["metrics"][figure], tolerance)
                for figure in _FIGURES
            ]
    return RoundTrip(repo_id, commit, tolerance, same_weights, figures)


def _load(folder: Path, device: str) -> SAE[Any]:
    try:
        return SAE.load_from_disk(folder, device=device)
    except Gemma4SAEError:
        raise
    except Exception as e:
        raise SAEError(f"What was uploaded cannot be loaded again from {folder.name}: {type(e).__name__}: {e}") from e
