"""What this package carries with it so that everything works without a network: two tiny trained Gemma 4
models, their tokenizer, an SAE on the base one, and the names under which each is found.

`recipes/make_embedded.py` makes the data again from nothing; `facts.json` beside it says how well it went.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
TOKENIZER = DATA / "tokenizer"


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model's weights are, and by what its residual stream is scaled after loading."""

    path: Path
    residual_scale: float = 1.0


MODELS = {
    "gemma-4-demo": EmbeddedModel(DATA / "base"),
    "gemma-4-demo-it": EmbeddedModel(DATA / "it"),
    "gemma-4-demo-it-rescaled": EmbeddedModel(DATA / "it", residual_scale=6.0),
}
