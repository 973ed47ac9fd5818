"""The figures of an evaluation as data: what each is called, where it stands, and how it is written.

Values, their intervals and the differences of two evaluations lie under the same keys, so one list of quantities
serves them all, and a figure has one name on every page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sae_lens_gemma4.report import numbers as n

UNSTATED = object()
"""What `Quantity.bounds` answers where a report gives no interval for a figure at all."""


class Quantity(NamedTuple):
    """A figure: its name, its keys from the outside in, and how it is written."""

    name: str
    path: tuple[str, ...]
    write: Callable[[Any], str]

    def value(self, figures: Any) -> Any:
        """The figure itself; KeyError names a key that is missing."""
        for key in self.path:
            figures = figures[key]
        return figures

    def beside(self, figures: Any) -> Any:
        """What a sparser table (intervals, differences) holds for this figure, or `UNSTATED`."""
        for key in self.path:
            if not isinstance(figures, Mapping) or key not in figures:
                return UNSTATED
            figures = figures[key]
        return figures


Groups = list[tuple[str, list[Quantity]]]
"""Quantities under headings; a heading may be empty."""

VE_WITHOUT_TOP = Quantity(f"VE without top {n.top_percent('0.001')}", ("ve_without_top_sse", "0.001"), n.ve)
SSE_OF_TOP = Quantity(f"SSE held by top {n.top_percent('0.001')}", ("sse_share", "0.001"), n.percent)
VE = Quantity("VE", ("ve",), n.ve)
L0 = Quantity("L0", ("l0",), n.per_token)
DEAD = Quantity("Dead latents", ("dead",), n.count)


def main_metrics(metrics: Mapping[str, Any]) -> Groups:
    """The figures of "metrics" that are read first."""
    small, large = (n.top(fraction, metrics["n_tokens"]) for fraction in ("0.001", "0.01"))
    return [
        (
            "",
            [
                Quantity("Tokens", ("n_tokens",), n.count),
                VE,
                VE_WITHOUT_TOP._replace(name=f"VE without top {small}"),
                Quantity(f"VE without top {large}", ("ve_without_top_sse", "0.01"), n.ve),
                SSE_OF_TOP._replace(name=f"SSE held by top {small}"),
                Quantity("NMSE", ("nmse",), n.real),
                Quantity("Cosine similarity", ("cosine",), n.fixed3),
                L0,
                DEAD,
            ],
        )
    ]


def all_metrics(metrics: Mapping[str, Any]) -> Groups:
    """Every figure of an evaluation's "metrics", in groups; what has a key for each fraction is listed by its keys."""

    def family(name: str, key: str, called: Callable[[str], str], write: Callable[[Any], str]) -> list[Quantity]:
        return [Quantity(name.format(called(k)), (key, k), write) for k in n.ascending(metrics[key])]

    def top(fraction: str) -> str:
        return n.top(fraction, metrics["n_tokens"])

    return [
        (
            "Variance explained",
            [
                VE,
                Quantity("VE of the centred error", ("ve_centred",), n.ve),
                Quantity("VE, mean over dimensions", ("ve_per_dimension",), n.ve),
            ],
        ),
        (
            "Variance explained, tokens left out",
            [
                *family("without top {} by SSE", "ve_without_top_sse", top, n.ve),
                *family("without top {} by norm", "ve_without_top_norm", top, n.ve),
                *family("without norms over {} the median", "ve_without_high_norm", n.times, n.ve),
                *(
                    Quantity(
                        f"without norms over {n.times(c)} the median and top {top(f)} by SSE",
                        ("ve_without_both", c, f),
                        n.ve,
                    )
                    for c in n.ascending(metrics["ve_without_both"])
                    for f in n.ascending(metrics["ve_without_both"][c])
                ),
            ],
        ),
        (
            "Where the squared error is",
            [
                *family("SSE held by top {}", "sse_share", top, n.percent),
                *family("Tokens with norms over {} the median", "high_norm_share", n.times, n.percent),
                *family("SSE held by norms over {} the median", "high_norm_sse_share", n.times, n.percent),
            ],
        ),
        (
            "Reconstruction",
            [
                Quantity("Squared error a token", ("mse",), n.real),
                Quantity("NMSE", ("nmse",), n.real),
                Quantity("Cosine similarity", ("cosine",), n.fixed3),
                Quantity("Relative bias", ("relative_bias",), n.real),
                Quantity("L2 norm of x", ("l2_norm_in",), n.real),
                Quantity("L2 norm of x̂", ("l2_norm_out",), n.real),
                Quantity("L2 ratio", ("l2_ratio",), n.real),
                Quantity("γ, the mean’s size", ("gamma",), n.real),
                *family("Error of a token, {} quantile", "error_quantiles", n.top_percent, n.real),
            ],
        ),
        (
            "Latents",
            [
                L0,
                Quantity("L1", ("l1",), n.real),
                DEAD,
                *(
                    Quantity(f"Never fired on the first {n.count(int(k))} tokens", ("never_fired", k), n.count)
                    for k in n.ascending(metrics["never_fired"])
                ),
            ],
        ),
    ]


_LOSSES = (("CE", "ce", n.real), ("KL to the model", "kl", n.real))
_RECOVERED = (("CE", "ce_recovered", n.ve), ("KL", "kl_recovered", n.ve))
_VARIANTS = {
    "model": "the model itself",
    "sae": "with the SAE spliced in",
    "zero": "with zeros",
    "mean": "with the mean activation",
}

DOWNSTREAM: Groups = [
    ("", [Quantity("Tokens", ("n_tokens",), n.count)]),
    *(
        (
            f"{name}, nats a token",
            [Quantity(said, (key, v), write) for v, said in _VARIANTS.items() if (key, v) != ("kl", "model")],
        )
        for name, key, write in _LOSSES
    ),
    (
        "Recovered by the SAE",
        [
            Quantity(f"{name}, against {against}", (key, v), write)
            for name, key, write in _RECOVERED
            for v, against in (("zero", "zeros"), ("mean", "the mean"))
        ],
    ),
]
