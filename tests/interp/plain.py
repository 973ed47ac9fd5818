"""What dashboards say of a latent, computed the plain way: the SAE's dense activations of the whole text, one latent
at a time, with nothing of this package but its corpus. The reference for `interp` and for the dashboards."""

import torch


@torch.no_grad()
def dense(sae, model, hook_name, corpus):
    """Activations of model `[b, p, d]` and SAE `[b, p, f]`, these 0 on tokens that do not count."""
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=[hook_name], prepend_bos=False)
    x_bpd = cache[hook_name].float()
    z_bpf = sae.encode(x_bpd)
    return x_bpd, torch.where(corpus.keep_bp[..., None], z_bpf, 0.0)


def correlation(a, b):
    """Pearson's r and the cosine of two series, in float64 by their definitions."""
    a, b = a.double(), b.double()
    x, y = a - a.mean(), b - b.mean()
    spread, lengths = x.norm() * y.norm(), a.norm() * b.norm()
    return (float(x @ y / spread) if spread > 0 else 0.0), (float(a @ b / lengths) if lengths > 0 else 0.0)
