"""The random models that some of recipes/tiny train on: `python recipes/make_tiny.py [FOLDER]`.

Two shapes of Gemma 4 that the embedded pair does not have, and a Gemma 3 for stock's model class, each with the
embedded tokenizer, as folders that `from_pretrained` reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer


def gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).float().eval()


def main(folder: Path) -> None:
    models = {variant: tiny_gemma4(variant) for variant in ("dense_keqv", "moe")} | {"gemma3": gemma3()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["runs/tiny-models"]))
