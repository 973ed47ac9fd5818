"""What a machine could do at best: the rate of the encoder's product and of a large copy, and a step at these rates.

A step's time says little about another machine. Its ratio to what cannot be saved there does, so the two rates that
bound a sparse step are measured beside it. What cannot be saved ("the roofline sum") is, for n tokens, d_in d and f
latents with P = 2·d·f + f + d parameters in float32:

    encoder product       2·n·d·f operations, at the rate of the fastest dtype measured
    one selection pass    4·n·f bytes: every pre-activation looked at once
    gradients             4·P bytes: each written once
    fused Adam            28·P bytes: parameter, gradient and two moments read; parameter and moments written

the bytes at the rate of a copy (bytes read and bytes written both count). The parts are added up, as if none of them
could hide behind another; what is done on the selected entries alone is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae_lens_gemma4.bench.racing import race

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Of the array that is copied: larger than any cache."""
_DTYPES = {
    "cpu": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "cuda": {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16},
}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one machine, medians of rounds.

    Attributes:
        product_seconds: of the encoder's product, by dtype.
        product_tflops: the same as 10¹² operations a second.
        copy_gbs: 10⁹ bytes a second, read and written ones counted.
    """

    product_seconds: dict[str, float]
    product_tflops: dict[str, float]
    copy_gbs: float

    @property
    def fastest(self) -> str:
        """The dtype whose product takes least time."""
        return min(self.product_seconds, key=lambda name: self.product_seconds[name])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ceilings(n: int, d_in: int, d_sae: int, device: str, rounds: int, seed: int = 0) -> Ceilings:
    """Measure them, in rounds."""
    names = list(_DTYPES[torch.device(device).type])
    contestants = {name: product(n, d_in, d_sae, device, name) for name in names}
    times = race(contestants | {"copy": copy(device)}, rounds + 1, device, seed)
    seconds = {name: statistics.median(spent[1:]) for name, spent in times.items()}  # the first round warms up
    copied = 2 * COPY_BYTES[torch.device(device).type] / seconds.pop("copy")
    return Ceilings(seconds, {name: 2e-12 * n * d_in * d_sae / s for name, s in seconds.items()}, copied / 1e9)


def product(n: int, d_in: int, d_sae: int, device: str, name: str) -> Callable[[], None]:
    """The encoder's product alone, into memory that is there already."""
    dtype = _DTYPES[torch.device(device).type][name]
    x_nd = torch.ones(n, d_in, dtype=dtype, device=device)
    W_df = torch.ones(d_in, d_sae, dtype=dtype, device=device)
    hidden_nf = torch.empty(n, d_sae, dtype=dtype, device=device)

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.mm(x_nd, W_df, out=hidden_nf)
        torch.set_float32_matmul_precision(before)

    return run


def copy(device: str) -> Callable[[], Any]:
    """A copy of one large array onto another."""
    source = torch.ones(COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def step_bytes(n: int, d_in: int, d_sae: int) -> int:
    """Bytes that a step cannot do without, as the module's docstring counts them."""
    parameters = 2 * d_in * d_sae + d_sae + d_in
    return 4 * n * d_sae + (4 + 28) * parameters


def roofline(n: int, d_in: int, d_sae: int, device: str, product_s: list[float], copy_s: list[float]) -> list[float]:
    """The roofline sum of each round in seconds, of that round's product and copy."""
    copies = step_bytes(n, d_in, d_sae) / (2 * COPY_BYTES[torch.device(device).type])
    return [spent + copies * copied for spent, copied in zip(product_s, copy_s, strict=True)]
