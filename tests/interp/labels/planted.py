"""Latents with a known meaning, and judges that say known things of them: each latent fires on one word."""

import numpy as np

from sae_lens_gemma4.interp.excerpts import Activity, Excerpt, LatentExamples, Part
from sae_lens_gemma4.interp.judges.judge import Answer

WIDTH, PEAK = 9, 4


class Words:
    """A tokenizer whose token 7 reads " w7"."""

    def decode(self, ids, **_):
        return "".join(f" w{i}" for i in ids)


def excerpt(rng, kind, document, word=None, at=PEAK, vocabulary=(1000, 2000)):
    """A window of other words, with `word` at `at`, where the latent fires if the kind is a positive one."""
    tokens_w = rng.integers(*vocabulary, size=WIDTH)
    value_w = np.zeros(WIDTH, dtype=np.float32)
    if word is not None:
        tokens_w[at] = word
    if kind in ("top", "quantile"):
        value_w[PEAK] = 1 + rng.random()
    return Excerpt(int(document), PEAK, 0, int(document), tokens_w, value_w, kind)


def part(rng, word, n_positive, n_negative, first_document, near=0.5):
    """Positives hold the word; near-misses hold the word before it, which latents that read carelessly fire on."""
    documents = iter(range(first_document, first_document + n_positive + n_negative))
    positives = [
        excerpt(rng, "top" if n < n_positive / 2 else "quantile", next(documents), word) for n in range(n_positive)
    ]
    n_near = int(near * n_negative)
    negatives = [excerpt(rng, "near_miss", next(documents), word - 1) for _ in range(n_near)]
    negatives += [excerpt(rng, "random", next(documents)) for _ in range(n_negative - n_near)]
    return Part(positives, negatives)


def planted(n, seed=0, n_positive=10, n_negative=10):
    """`n` latents; number i fires on the word 2i + 1."""
    rng = np.random.default_rng(seed)
    sizes = n_positive, n_negative
    return [
        LatentExamples(
            i,
            *(part(rng, 2 * i + 1, *sizes, 100 * p) for p in range(3)),
            activity=Activity(1000, 1e-3, 1.5, 2.0),
        )
        for i in range(n)
    ]


class Reader:
    """Labels a latent by the word at its strongest place, and applies a label where the text has the word."""

    def __init__(self, name="reader", prefix="the word ", silent=()):
        self.name, self.prefix, self.silent = name, prefix, set(silent)
        self.labelled, self.detected = [], []

    def label(self, questions):
        self.labelled += questions
        return [
            None if q.index in self.silent else Answer(self.prefix + q.positives[0].token.strip(), "word")
            for q in questions
        ]

    def detect(self, questions):
        self.detected += questions
        return [[q.label.split()[-1] in e.text.split() for e in q.examples] for q in questions]


class Guesser(Reader):
    """Says of a latent what comes to mind, and applies any label to a share of texts, whatever they are."""

    def __init__(self, name="guesser", share=0.5, seed=0):
        super().__init__(name)
        self.share, self.rng = share, np.random.default_rng(seed)

    def label(self, questions):
        return [Answer(f"the word w{self.rng.integers(5000, 9000)}", None) for _ in questions]

    def detect(self, questions):
        return [(self.rng.random(len(q.examples)) < self.share).tolist() for q in questions]
