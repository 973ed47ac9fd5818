"""A tiny Gemma 4 that answers "A" or "B", and a direction that moves its answers."""

import torch

from sae_lens_gemma4.interp.items import Item
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

HOOK = "blocks.4.hook_resid_post"


def planted_model():
    """The model, and the direction at `HOOK` along which it says "A" rather than "B".

    The unembedding has two rows that are not zero, one the other's negative: a random direction, by which the baseline
    is mixed, and the planted one, both behind the final norm's weight.
    """
    hf, tokenizer = tiny_gemma4("dense_keqv", seed=1), tiny_tokenizer()
    generator = torch.Generator().manual_seed(3)
    own_d, planted_d = torch.nn.functional.normalize(torch.randn(2, 64, generator=generator), dim=1)
    gain_d = hf.model.language_model.norm.weight.detach()
    weight_vd = torch.zeros(2048, 64)
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB")
    weight_vd[a] = 8 * (own_d + 2 * planted_d) / gain_d
    weight_vd[b] = -weight_vd[a]
    hf.lm_head.weight = torch.nn.Parameter(weight_vd)
    return Gemma4ProxyLM(hf, tokenizer, name="planted"), planted_d


def planted_items(tokenizer, n=60):
    """Prompts of random words, of several lengths; the right answer is always A."""
    generator = torch.Generator().manual_seed(4)
    items = []
    for i in range(n):
        ids = torch.randint(100, 2000, (3 + i % 5,), generator=generator).tolist()
        items.append(Item(prompt="x " + tokenizer.decode(ids).replace("\ufffd", "?"), answer="A"))
    return items
