"""Send one token to another expert and watch which SAE latents change: a script, or a notebook by its `# %%` cells.

The model is a tiny Gemma 4 with experts (8, of which 3 a token) and random weights, and the SAE is fitted to it in a
few seconds. So the numbers mean nothing; the steps are those for a real model: load it with
`g4.Gemma4Bridge.boot("google/gemma-4-26B-A4B-it")`, its SAE with `SAE.from_pretrained`, and leave out `fit_sae`.

    python docs/route_a_token.py
"""

# %% The model, and tokens to run it on
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_gemma4 as g4

EDITED_LAYER, SAE_LAYER, POSITION = 2, 3, 18
LOGITS = f"blocks.{EDITED_LAYER}.moe.hook_router_logits"
EXPERTS = f"blocks.{EDITED_LAYER}.moe.hook_expert_indices"
RESID = f"blocks.{SAE_LAYER}.hook_resid_post"
LATENTS = f"{RESID}.hook_sae_acts_post"


def random_tokens(n_texts: int, seed: int) -> torch.Tensor:
    """To a random model, random tokens are as good as text. `[batch, pos]`."""
    return torch.randint(22, 2048, (n_texts, 32), generator=torch.Generator().manual_seed(seed))


# %% An SAE above the layer that will be edited, by sae_lens's own trainer
def fit_sae(model: g4.Gemma4Bridge, steps: int = 300, batch: int = 512) -> SAE:
    """A small TopK SAE on the model's own activations."""
    with torch.no_grad():  # the layers above are not run
        x = model.run_with_cache(random_tokens(512, seed=1), names_filter=RESID, stop_at_layer=SAE_LAYER + 1)[1][RESID]
    x = x.flatten(0, 1)
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[-1], d_sae=256, k=8))
    sae.cfg.metadata.hook_name = RESID
    cfg = SAETrainerConfig(steps * batch, batch, lr=3e-3, lr_end=3e-4, logger=LoggingConfig(log_to_wandb=False))
    SAETrainer(cfg, sae, (x[torch.randint(len(x), (batch,))] for _ in range(steps))).fit()
    return sae


# %% The edit: the router's logits of one token, with two experts' exchanged
@dataclass(frozen=True)
class Run:
    """What one forward pass shows; `p` positions."""

    experts: list[int]
    """Those of the edited token."""
    latents_pl: torch.Tensor
    logits_pv: torch.Tensor


def exchange(one: int, other: int) -> Callable[..., torch.Tensor]:
    """A hook: the token at `POSITION` goes to `other` where it would have gone to `one`, with its probability."""

    def hook_fn(logits_bpe: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        logits_bpe[:, POSITION, [one, other]] = logits_bpe[:, POSITION, [other, one]]
        return logits_bpe

    return hook_fn


def run(model: g4.Gemma4Bridge, sae: SAE, tokens: torch.Tensor, hooks: list[tuple[str, Callable[..., Any]]]) -> Run:
    """One pass. The SAE only watches: with its error term the stream goes on as it was, and the edit acts alone."""
    with torch.no_grad(), model.saes(sae, use_error_term=True), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens, names_filter=[EXPERTS, LATENTS])
    return Run(cache[EXPERTS][0, POSITION].tolist(), cache[LATENTS][0], logits[0])


# %% Before and after
def main() -> tuple[Run, Run, tuple[int, int]]:
    """Print what changed; return the run before, the run after, and the two experts that changed places."""
    model = g4.Gemma4Bridge.boot(g4.testing.tiny_gemma4("moe"), g4.testing.tiny_tokenizer())
    sae = fit_sae(model)
    tokens = random_tokens(1, seed=2)
    before = run(model, sae, tokens, [])
    chosen, idle = before.experts[0], min(set(range(8)) - set(before.experts))
    after = run(model, sae, tokens, [(LOGITS, exchange(chosen, idle))])

    print(f"The token at position {POSITION}, experts of layer {EDITED_LAYER}: {before.experts} -> {after.experts}")
    was, now = before.latents_pl[POSITION], after.latents_pl[POSITION]
    print(f"Latents of layer {SAE_LAYER} there that changed most:\n\n  latent   before    after")
    for latent in (now - was).abs().topk(6).indices.tolist():
        print(f"  {latent:6d} {was[latent]:8.3f} {now[latent]:8.3f}")
    top = before.logits_pv[POSITION].argmax(), after.logits_pv[POSITION].argmax()
    print("\nIts top token: " + " -> ".join(f"{token.item()}" for token in top), end="; that token's logit: ")
    print(" -> ".join(f"{r.logits_pv[POSITION, top[0]]:.3f}" for r in (before, after)))
    moved_p = (after.latents_pl - before.latents_pl).abs().amax(dim=-1) > 1e-3
    print(f"Positions where a latent changed: {moved_p.nonzero().flatten().tolist()}")
    return before, after, (chosen, idle)


if __name__ == "__main__":
    main()
