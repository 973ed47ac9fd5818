"""One label on one latent's contexts: what a judge is asked, and what its answer comes to.

Detection scoring (Paulo et al. 2024, arXiv 2410.13928): the label and the contexts, shuffled and without activations,
are shown to a judge that says in which the label applies. Where a latent has too few contexts for any answer to confirm
a label, nobody is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.stats import fisher_exact
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.interp.excerpts import Part as Contexts
from sae_lens_gemma4.interp.excerpts import example_of
from sae_lens_gemma4.interp.judges.judge import DetectionQuestion, Judge
from sae_lens_gemma4.interp.labels.labelling import answered


class LabelTest(NamedTuple):
    """One label on one latent's contexts.

    Attributes:
        applies: what the scorer said, in the order of the part's positives and then its negatives.
        tp, fp, tn, fn: positive is "the label applies"; true, "and the latent fires".
        precision: None where the label applied nowhere.
        recall_top, recall_quantile: of the contexts in which the latent is strongest, and of those from all over its
            range; None where there are none. A label that fits the strongest alone shows in their difference.
        f1: 2·tp / (2·tp + fp + fn).
        near_misses: how many of the negatives are near-misses.
        near_precision: precision with these as the only negatives; None without any, or where it applied nowhere.
        p_value: one-sided, Fisher's exact.
        documents: from how many the contexts are; those of one document are not independent.
    """

    index: int  # type: ignore[assignment]
    label: str
    applies: tuple[bool, ...]
    tp: int
    fp: int
    tn: int
    fn: int
    precision: float | None
    recall: float
    recall_top: float | None
    recall_quantile: float | None
    f1: float
    balanced_accuracy: float
    near_misses: int
    near_precision: float | None
    p_value: float
    confirmed: bool
    documents: int


def ask(
    scorer: Judge,
    asked: Sequence[tuple[int, str]],
    contexts: Mapping[int, Contexts],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> list[list[bool] | None]:
    """What the scorer says of some labels, each on the contexts of a latent (index, label), shuffled by `seed`.

    Returns:
        One answer a label: whether it applies to each of the part's positives, then its negatives; None for none.

    Raises:
        DataError: the scorer's answers are not one a question, or not one a context.
    """
    questions, orders = [], []
    for index, label in asked:
        excerpts = [*contexts[index].positives, *contexts[index].negatives]
        order = np.random.default_rng((seed, index)).permutation(len(excerpts))
        shown = tuple(_bare(example_of(excerpts[i], tokenizer)) for i in order)
        questions.append(DetectionQuestion(index, label, shown))
        orders.append(order)
    said: list[list[bool] | None] = []
    name = scorer_name(scorer)
    for order, answer in zip(orders, answered(name, scorer.detect(questions), len(questions)), strict=True):
        if answer is not None:
            answered(name, answer, len(order), "contexts")
            answer = [bool(answer[place]) for place in np.argsort(order)]
        said.append(answer)
    return said


def label_test(index: int, label: str, applies: Sequence[bool], contexts: Contexts, alpha: float) -> LabelTest:
    """The figures of one label from what the scorer said: positives first, then negatives."""
    n_fires, n_silent = len(contexts.positives), len(contexts.negatives)
    says_fires, says_silent = applies[:n_fires], applies[n_fires:]
    near = [said for said, e in zip(says_silent, contexts.negatives, strict=True) if e.kind == "near_miss"]
    tp, fp = sum(says_fires), sum(says_silent)
    fn, tn = n_fires - tp, n_silent - fp
    by_kind = {
        kind: [said for said, e in zip(says_fires, contexts.positives, strict=True) if e.kind == kind]
        for kind in ("top", "quantile")
    }
    p_value = float(fisher_exact([[tp, fn], [fp, tn]], alternative="greater").pvalue)
    return LabelTest(
        index=index,
        label=label,
        applies=tuple(applies),
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        precision=_ratio(tp, tp + fp),
        recall=tp / n_fires,
        recall_top=_ratio(sum(by_kind["top"]), len(by_kind["top"])),
        recall_quantile=_ratio(sum(by_kind["quantile"]), len(by_kind["quantile"])),
        f1=2 * tp / (2 * tp + fp + fn),
        balanced_accuracy=(tp / n_fires + tn / n_silent) / 2,
        near_misses=len(near),
        near_precision=_ratio(tp, tp + sum(near)) if near else None,
        p_value=p_value,
        confirmed=p_value <= alpha,
        documents=len({e.document for e in [*contexts.positives, *contexts.negatives]}),
    )


def scorer_name(scorer: Judge) -> str:
    """Who tests: judges that label each in their way may test all in the same one (`scorer_name`)."""
    return str(getattr(scorer, "scorer_name", scorer.name))


def untestable(contexts: Contexts | None, min_positives: int, alpha: float) -> str | None:
    """Why nothing that a judge says of these contexts could confirm a label; None where it could."""
    if contexts is None:
        return "it has no contexts"
    n_fires, n_silent = len(contexts.positives), len(contexts.negatives)
    if n_fires < min_positives:
        return f"fewer than {min_positives} contexts that it fires in"
    if 1 / math.comb(n_fires + n_silent, n_fires) > alpha:
        return f"too few contexts that it is silent in for p ≤ {alpha:g}"
    return None


def _bare(example: Example) -> Example:
    """Without what would tell whether the latent fires, and where."""
    return replace(example, token=None, activation=None, token_index=None, activations=None)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
