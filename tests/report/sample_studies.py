"""A result of each kind of study, made by the code that makes real ones, of data with a known answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from sae_lens_gemma4.evaluation.intervals import Estimate, Sampling
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.contrasts.contrast import contrast
from sae_lens_gemma4.interp.item_means import ItemMeans, Site
from sae_lens_gemma4.interp.labels.agreement import agreement
from sae_lens_gemma4.interp.labels.calibration import calibrate
from sae_lens_gemma4.interp.labels.confidence import Health, Weights, confidences, feature_labels, scores_dict
from sae_lens_gemma4.interp.labels.labelling import label_latents
from sae_lens_gemma4.interp.labels.probe_rows import ProbeRows
from sae_lens_gemma4.interp.labels.probes import ProbeSettings, probe_latents
from sae_lens_gemma4.interp.labels.verification import VerificationSettings, verify_labels
from sae_lens_gemma4.interp.layers.decoder_lens import DecoderLens, Pull
from sae_lens_gemma4.interp.layers.lens_result import Followed, Lens
from sae_lens_gemma4.interp.layers.phases import find_phases
from sae_lens_gemma4.interp.layers.profile import LayerFigures, LayerProfile
from sae_lens_gemma4.interp.pairs.probing import ProbeSettings as PairSettings
from sae_lens_gemma4.interp.pairs.probing import probe_pairs
from sae_lens_gemma4.interp.pairs.prompt_pairs import Category, Pair, PairMeans
from sae_lens_gemma4.interp.statistics import share
from sae_lens_gemma4.interp.steering.conditions import Condition, SteeringSettings, plan
from sae_lens_gemma4.interp.steering.effects import effects, opposite_sets
from sae_lens_gemma4.interp.steering.run import Answers, SteeringResult
from sae_lens_gemma4.interp.steering.vectors import Norm
from sae_lens_gemma4.interp.steering.verdict import verdict
from sae_lens_gemma4.studies.line import Findings
from tests.interp.labels.planted import Guesser, Reader, Words, planted

MODEL = {"name": "a-model", "class": "Gemma4ProxyLM", "dtype": "float32", "fingerprint": "0123456789abcdef"}
SAE = {"release": "a-release", "sae_id": "layer_3", "hook_name": "blocks.3.hook_resid_post", "hash": "fedcba9876543210"}
CORPUS = {"name": "some text [train]", "tokens": 12345, "documents": 67, "hash": "00112233"}
QUICK = Sampling(resamples=200)


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """As it is read back from a file."""
    read: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return read


def profile(n_layers: int = 24, change: int = 10, *, bare: bool = False) -> dict[str, Any]:
    """A curve that falls until `change` and then stays; `bare` is of too little text for intervals, nothing drawn."""
    rng = np.random.default_rng(0)
    level_l = np.where(np.arange(n_layers) < change, 0.8 - 0.06 * np.arange(n_layers), 0.1)
    curve_rl = level_l + rng.normal(0, 0.01, size=(100, n_layers))

    def estimate(value: float) -> Estimate:
        return Estimate(value, None if bare else (value - 0.01, value + 0.01))

    layers = []
    for layer in (None, *range(n_layers)):
        cosine = 1.0 if layer is None else float(curve_rl[0, layer])
        drawn = None if bare else estimate(cosine + 0.05)
        norm = 10.0 * 1.1 ** (layer or 0)
        layers.append(
            LayerFigures(
                "hook_embed" if layer is None else f"blocks.{layer}.hook_resid_post",
                layer,
                estimate(cosine),
                drawn,
                None if bare else estimate(max(cosine, 0.02)),
                None,
                None,
                None,
                norm,
                norm * 1.01,
                None if bare else norm * 0.99,
                norm / 3,
                None if bare else 0.3,
            )
        )
    phases = find_phases(curve_rl[0], None if bare else curve_rl, shuffles=0 if bare else 50)
    made = LayerProfile(
        model={"name": MODEL["name"], "fingerprint": MODEL["fingerprint"], "n_layers": n_layers},
        corpus=CORPUS,
        tied=None if bare else True,
        layers=tuple(layers),
        phases=phases,
        nearest_tokens=0 if bare else 4096,
        keep_layer=None,
        cosine_by_place=None,
        sampling=QUICK,
        seed=0,
    )
    return plain(made.to_dict() | {"model": MODEL | {"n_layers": n_layers}})


def labels(n: int = 14, *, bare: bool = False) -> dict[str, Any]:
    """Latents that fire on a word each, labelled by one who reads and one who guesses; `bare` is what is left where
    there is one judge, no floor and no probe."""
    judges = [Reader("reader")] if bare else [Reader("reader", silent={2}), Guesser("guesser")]
    latents = planted(n)
    labelled = label_latents(judges, latents, Words())
    settings = VerificationSettings(scorer="own", floor=not bare)
    verified = verify_labels(labelled, judges, latents, Words(), settings, sampling=QUICK)
    agreed = None if bare else agreement(verified, QUICK)
    probing = None if bare else probe_latents(*_probe_rows(n), ProbeSettings(folds=3, shuffles=1), QUICK)
    activity = {latent.index: latent.activity for latent in latents}
    scores = confidences(labelled, verified, agreed, probing, activity)
    calibration: Any = "it was not asked for"
    if not bare:
        further = verify_labels(labelled, judges, latents, Words(), settings, "calibration", QUICK)
        calibration = calibrate(scores, further, sampling=QUICK).to_dict()
    made = feature_labels(labelled, activity, verified, agreed, probing, scores)
    record = scores_dict(scores, Weights(), Health(), QUICK)
    findings = Findings(labelled, verified, agreed, probing, scores, record, calibration, made)
    indices = [latent.index for latent in latents]
    return plain(
        {
            "schema": 1,
            "kind": "latent_labels",
            "sae": SAE,
            "model": MODEL,
            "corpus": CORPUS,
            "origin": "made",
            "profile": None if bare else profile(),
            "selection": {"rule": "given", "indices": indices, "scores": [None] * n, "facts": {"left": {"latents": n}}},
            "examples": {
                "settings": {"seed": 0},
                "documents": {"labelling": 30, "held_out": 20, "calibration": 17},
                "tokens": {"labelling": 3000, "held_out": 2000, "calibration": 1700},
            },
            **findings.to_dict(),
            "judges": [{"name": judge.name, "kind": "made up", "questions": 7, "unanswered": 1} for judge in judges],
            "files": None if bare else {"jsonl": "labels/labels.jsonl"},
            "versions": versions(),
        }
    )


def _probe_rows(n: int, contexts: int = 30, d: int = 4) -> tuple[list[ProbeRows], Any]:
    rng = np.random.default_rng(1)
    rows, acts = [], []
    for index in range(n):
        fires_n = rng.permutation(contexts) < contexts // 2
        x_nd = rng.normal(size=(contexts, d)).astype(np.float32)
        x_nd[:, 0] += 3 * fires_n
        near_n = ~fires_n & (rng.random(contexts) < 0.5)
        rows.append(
            ProbeRows(index, np.arange(contexts), fires_n, near_n, np.arange(contexts), rng.normal(size=(contexts, 3)))
        )
        acts.append(x_nd)
    return rows, acts


def contrasted(*, bare: bool = False) -> dict[str, Any]:
    """Two groups that differ in one dimension of one layer, and by one latent altogether; `bare` is of three items a
    group, without latents."""
    rng, n = np.random.default_rng(0), 6 if bare else 60
    in_group_n = np.arange(n) < n // 2
    sites = []
    for layer in range(8):
        x_nf = rng.normal(size=(n, 40)).astype(np.float32)
        if layer == 5:
            x_nf[:, 7] += 2 * in_group_n
        sites.append(Site(f"blocks.{layer}.hook_resid_post", "activations", x_nf))
    sparse_nf = np.where(rng.random((n, 60)) < 0.4, rng.exponential(size=(n, 60)), 0).astype(np.float32)
    sparse_nf[:, 23] = ~in_group_n
    tokens_n = np.full(n, 5) if bare else rng.integers(5, 20, size=n)

    def found(*of: Site) -> dict[str, Any]:
        means = ItemMeans(tuple(of), tokens_n, "mean", {})
        made = contrast(means, in_group_n, names=("right", "wrong"), sampling=QUICK, permutations=199, splits=4)
        return made.to_dict()

    return plain(
        {
            "schema": 1,
            "kind": "contrast_by_layer",
            "activations": found(*sites),
            "latents": None if bare else found(Site("blocks.3.hook_resid_post", "latents", sparse_nf)),
            "model": MODEL,
            "items": {"n": n, "source": "questions.jsonl", "count": "response", "statistic": "mean"},
            "answers": None if bare else {"extractor": "gsm8k", "right": 30, "wrong": 30, "not_found": 4, "empty": 2},
            "versions": versions(),
        }
    )


def steered(*, bare: bool = False) -> dict[str, Any]:
    """Adding a direction helps, subtracting it hurts and random ones do nothing; `bare` is without random ones."""
    settings = SteeringSettings(scales=[0.05, 0.1], n_random=0 if bare else 3)
    rng, n = np.random.default_rng(0), 50
    right_n = np.arange(n) < 20
    outcomes: dict[Condition, Any] = {}
    for condition in plan(settings):
        now_n = right_n.copy()
        if condition.kind == "positive":
            now_n[20:35] = True
        if condition.kind == "negative":
            now_n[5:20] = False
        if condition.kind == "random":
            now_n[rng.integers(0, n, size=2)] ^= True
        outcomes[condition] = now_n
    found = effects(outcomes)
    result = SteeringResult(
        effects=tuple(found),
        answers={c: Answers(share(48, n), 31.4, share(2, n)) for c in outcomes},
        overlaps=tuple(opposite_sets(found)),
        verdict=verdict(outcomes, permutations=500),
        norm=Norm(41.5, 900),
        extractor="gsm8k",
        outcomes=outcomes,
        samples=(
            {
                "item": 3,
                "prompt": "How many?",
                "right": "4",
                "outputs": {c.name: {"text": "It is\n#### 4", "answer": None if bare else "4"} for c in outcomes},
            },
        ),
        facts={
            "model": MODEL["name"],
            "model_fingerprint": MODEL["fingerprint"],
            "vector": "89ab",
            "hook": "blocks.3.hook_resid_post",
            "origin": {"from": "contrast", "seed": None},
            "items": "cdef",
            "n_items": n,
            "settings": {"scales": settings.scales, "n_random": settings.n_random},
        },
    )
    more = {} if bare else {"model": MODEL, "source": "questions.jsonl"}
    return plain(result.to_dict() | more | {"versions": versions()})


def paired(*, bare: bool = False, two_sided: bool = False) -> dict[str, Any]:
    """Two categories: five latents go with the first, none with the second; `bare` has none and no swapped analyses.
    With `two_sided` one more goes against both, by the same in all pairs of the first, and one with both alike."""
    rng, n_pairs, n_latents = np.random.default_rng(0), 4 if bare else 20, 80

    def means(name: str, n_planted: int) -> PairMeans:
        pairs = tuple(Pair(f"with {name} {i}", f"without {name} {i}") for i in range(n_pairs))
        with_pf, without_pf = (rng.exponential(size=(n_pairs, n_latents)) for _ in range(2))
        with_pf[:, :n_planted] += 4
        if two_sided:
            with_pf[:, 70], without_pf[:, 70] = 1, 3 if n_planted else rng.uniform(2, 3, size=n_pairs)
            with_pf[:, 71], without_pf[:, 71] = 2, 1
        lengths = {} if bare else {"tokens_with_p": np.full(n_pairs, 11), "tokens_without_p": np.full(n_pairs, 10)}
        return PairMeans(Category(name=name, label=f"about {name}", pairs=pairs), with_pf, without_pf, **lengths)

    sides: Any = {"alternative": "two-sided"} if two_sided else {}
    settings = PairSettings(scrambles=0 if bare else 4, permutations=2000, sampling=QUICK, **sides)
    found = probe_pairs([means("files", 0 if bare else 5), means("questions", 0)], settings)
    facts = {
        "model": MODEL,
        "sae": SAE,
        "pairs": "pairs.yaml",
        "template": "{prompt}",
        "statistic": "mean",
        "files": {},
    }
    return plain(found.to_dict() | facts | {"versions": versions()})


def lensed(*, bare: bool = False) -> dict[str, Any]:
    """Positions that settle at layer 4 of 6; `bare` is one position without a target or a next token."""
    rng, n, n_places, k, vocabulary = np.random.default_rng(0), 1 if bare else 24, 7, 3, 50
    top_id_nlk = rng.integers(0, vocabulary, size=(n, n_places, k))
    final_n = rng.integers(0, vocabulary, size=n)
    top_id_nlk[:, 5:, 0] = final_n[:, None]
    top_id_nlk[:, 4, 0] = (final_n + 1) % vocabulary
    prob_nlk = np.sort(rng.dirichlet(np.ones(k + 1), size=(n, n_places)))[..., :0:-1].astype(np.float32)

    def followed(there: bool, settles: bool = False) -> Followed:
        rank_nl = rng.integers(2, vocabulary, size=(n, n_places))
        rank_nl[:, 5:] = 1 if settles else rank_nl[:, 5:]
        prob_nl = rng.random((n, n_places)).astype(np.float32)
        return Followed(final_n if there else np.full(n, -1), rank_nl, prob_nl)

    texts: Any = SimpleNamespace(text=lambda token: f" t{token}", script=lambda token: ("Latin", "Han")[token % 2])
    lens = Lens(
        layers=(None, *range(n_places - 1)),
        n_layers=n_places - 1,
        prompt_n=np.arange(n),
        position_n=np.full(n, 4),
        token_n=rng.integers(0, vocabulary, size=n),
        top_id_nlk=top_id_nlk,
        top_prob_nlk=prob_nlk,
        entropy_nl=rng.random((n, n_places)).astype(np.float32),
        kl_nl=rng.random((n, n_places)).astype(np.float32),
        final=followed(True, settles=True),
        target=None if bare else followed(True),
        following=followed(not bare),
        texts=texts,
        settings={"positions": "last", "top": k, "final_norm": True, "softcap": None if bare else 30.0},
        facts={"model": MODEL, "n_prompts": n, "vocabulary_scripts": {"Latin": 0.6, "Han": 0.3, "digits": 0.1}},
        sampling=QUICK,
    )
    pull: dict[str, Any] = {"token": " cat", "token_id": 3, "logit": 0.4, "z": 4.1}
    row = DecoderLens(9, (Pull(**pull),), (Pull(**pull | {"z": -3.9}),))
    decoder = {"sae": SAE, "latents": [row.to_dict()]}
    more = {} if bare else {"items": {"n": n, "source": "prompts.yaml", "hash": "1234abcd"}}
    return plain(lens.to_dict() | more | {"model": MODEL, "decoder": None if bare else decoder})


MADE = {
    "layer_profile": profile,
    "latent_labels": labels,
    "contrast_by_layer": contrasted,
    "steering": steered,
    "prompt_pairs": paired,
    "logit_lens": lensed,
}
"""Kind → what makes a result of it."""
