"""The kernels on CUDA, by Triton. Signatures and meanings are those of `cpu.py`.

Selections have a fixed number of entries: where fewer are positive, the rest have an activation of 0 and stand for
nothing. Besides, a batch's selection can be begun and asked for later (`begin`).
"""

from sae_lens_gemma4.kernels.gpu_select import Pending, batch_topk, begin, row_topk
from sae_lens_gemma4.kernels.gpu_sparse import dots, sums

__all__ = ["Pending", "batch_topk", "begin", "dots", "row_topk", "sums"]
