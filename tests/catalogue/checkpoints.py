"""Small checkpoints in exactly the layouts of public SAEs, each with its author's arithmetic written out by hand.

A `Sample` shares no code with the package: its files are what the author's training code would write, and `encode` and
`decode` are the author's snippet or library, line by line, in the author's own orientation.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors.torch import load, save

D_IN, D_SAE, K = 12, 32, 5


@dataclass
class Sample:
    files: dict[str, bytes]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    facts: dict = field(default_factory=dict)
    """What a caller must state by hand of such a file."""


def pt(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_json(content) -> bytes:
    return json.dumps(content).encode()


def inputs(n=64, d_in=D_IN, seed=7):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def _random(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def keep_largest(values, k):
    """torch.topk's k largest of each row, the rest zero."""
    top, index = torch.topk(values, k, dim=-1)
    return torch.zeros_like(values).scatter_(-1, index, top)


def sae_lens(seed=0, d_in=D_IN, d_sae=D_SAE, **metadata):
    """A JumpReLU folder as SAELens 6 writes it, with the hook under Hugging Face's name."""
    W_enc, W_dec, b_enc, b_dec = _random(seed, (d_in, d_sae), (d_sae, d_in), (d_sae,), (d_in,))
    threshold = torch.full((d_sae,), 2.5)
    cfg = {
        "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cuda:0", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": "jumprelu",
        "metadata": {"sae_lens_version": "6.20.0", "sae_lens_training_version": "6.20.0", "prepend_bos": True,
                     "training_architecture": "matryoshka_batchtopk"} | metadata,
    }  # fmt: skip
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}

    def encode(x):
        pre = (x - b_dec) @ W_enc + b_enc
        return torch.relu(pre) * (pre > threshold)

    files = {
        "cfg.json": as_json(cfg),
        "sae_weights.safetensors": save(state),
        "sparsity.safetensors": save({"sparsity": torch.linspace(-10, 0, d_sae)}),
        "runner_cfg.json": as_json({"model_name": "google/gemma-4-E4B", "hook_name": "model.language_model.layers.0"}),
    }
    return Sample(files, encode, lambda f: f @ W_dec + b_dec)


def plain(seed=0, d_in=D_IN, d_sae=D_SAE, k=K, subtract=True, name="sae_final", suffix=".pt", extra=None):
    """caiovicentino1's dict: the card's `sae_encode` and `sae_decode`."""
    W_enc, W_dec, b_enc, b_dec = _random(seed, (d_in, d_sae), (d_sae, d_in), (d_sae,), (d_in,))
    content = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    config = {"d_model": d_in, "d_sae": d_sae, "k": k, "model": "google/gemma-4-e4b", "layer": 21, "algorithm": "topk"}
    if suffix == ".pt":
        weights = pt(content | {"d_model": d_in, "d_sae": d_sae, "k": k, "step": 1000} | (extra or {}))
    else:
        weights = save(content | (extra or {}))

    def encode(x):
        pre = ((x - b_dec) if subtract else x) @ W_enc + b_enc
        return torch.relu(keep_largest(pre, k))

    files = {f"{name}{suffix}": weights, f"{name}.json": as_json(config)}
    return Sample(files, encode, lambda f: f @ W_dec + b_dec, {"apply_b_dec_to_input": subtract})


def solshine_scope(seed=0, d_in=D_IN, d_sae=D_SAE, k=K):
    """sae_lens's keys in a `.pt`, no k inside; the card keeps the k largest latents of each token."""
    sample = plain(seed, d_in, d_sae, k)
    weights = torch.load(io.BytesIO(sample.files["sae_final.pt"]), weights_only=True)
    state = {key: weights[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    sample.files = {"sae_weights.pt": pt(state), "cfg.json": as_json({"d_in": d_in, "d_sae": d_sae, "k": k})}
    return sample


def dictionary_learning(seed=0, d_in=D_IN, d_sae=D_SAE, k=K, layer=45, submodule="resid_post_layer_45", topk=False):
    """`BatchTopKSAE.state_dict()` and the config that its trainer writes; or those of `AutoEncoderTopK`."""
    encoder, decoder, b_enc, b_dec = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,))
    threshold = torch.tensor(3.0)
    state = {
        "b_dec": b_dec, "k": torch.tensor(k, dtype=torch.int), "threshold": threshold,
        "decoder.weight": decoder, "encoder.weight": encoder, "encoder.bias": b_enc,
    }  # fmt: skip
    config = {
        "trainer": {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE", "activation_dim": d_in,
                    "dict_size": d_sae, "k": k, "layer": layer, "lm_name": "google/gemma-3-27b-it",
                    "submodule_name": submodule},
        "buffer": {"d_submodule": d_in, "io": "out", "ctx_len": 2048},
    }  # fmt: skip

    def encode(x):
        acts = F.relu(F.linear(x - b_dec, encoder, b_enc))
        return keep_largest(acts, k) if topk else acts * (acts > threshold)

    if topk:
        config["trainer"]["dict_class"] = "AutoEncoderTopK"
    return Sample({"ae.pt": pt(state), "config.json": as_json(config)}, encode, lambda f: F.linear(f, decoder) + b_dec)


def dictionary_learning_matryoshka(seed=0, d_in=D_IN, d_sae=D_SAE, k=K):
    W_enc, W_dec, b_enc, b_dec = _random(seed, (d_in, d_sae), (d_sae, d_in), (d_sae,), (d_in,))
    threshold = torch.tensor(3.0)
    state = {
        "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "k": torch.tensor(k, dtype=torch.int),
        "threshold": threshold, "group_sizes": torch.tensor([8, d_sae - 8]),
    }  # fmt: skip
    config = {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": d_in, "dict_size": d_sae, "k": k}}

    def encode(x):
        acts = F.relu((x - b_dec) @ W_enc + b_enc)
        return acts * (acts > threshold)

    return Sample({"ae.pt": pt(state), "config.json": as_json(config)}, encode, lambda f: f @ W_dec + b_dec)


def sparsify(seed=0, d_in=D_IN, d_sae=D_SAE, k=K):
    """sparsify's `save_to_disk`: both matrices [d_sae, d_in]; relu before top-k, as `fused_encoder` has it."""
    encoder, W_dec, b_enc, b_dec = _random(seed, (d_sae, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    state = {"encoder.weight": encoder, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    cfg = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae, "k": k,
        "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": d_in,
    }  # fmt: skip

    def encode(x):
        return keep_largest(F.relu(F.linear(x - b_dec, encoder, b_enc)), k)

    return Sample({"sae.safetensors": save(state), "cfg.json": as_json(cfg)}, encode, lambda f: f @ W_dec + b_dec)


def log_threshold(seed=0, d_in=D_IN, d_sae=D_SAE, layer=0):
    """event-aware-SAE-trainer: z = pre · 1[pre > exp(log_threshold)]."""
    encoder, decoder, b_enc, b_dec, log_theta = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae,))
    state = {
        "b_dec": b_dec, "log_threshold": log_theta,
        "W_enc.weight": encoder, "W_enc.bias": b_enc, "W_dec.weight": decoder,
    }  # fmt: skip
    meta = {
        "layer": layer, "seed": 0, "model_id": "google/gemma-4-E2B-it", "d_in": d_in, "n_features": d_sae, "k": 50,
        "final_metrics": {"ev": 0.9768, "mean_l0": 46.39, "dead_pct": 0.27},
    }  # fmt: skip

    def encode(x):
        pre = F.linear(x - b_dec, encoder, b_enc)
        return pre * (pre > log_theta.exp())

    files = {"sae.pt": pt(state), "meta.json": as_json(meta), "checkpoint_full.pt": b"optimizer state, never read"}
    return Sample(files, encode, lambda f: F.linear(f, decoder) + b_dec)


def linear(seed=0, d_in=D_IN, d_sae=D_SAE, k=K, name="sae_weights_final.pt"):
    """Solshine's bio SAE: two nn.Linears, nothing subtracted."""
    encoder, decoder, b_enc, bias = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,))
    state = {"W_enc.weight": encoder, "W_enc.bias": b_enc, "W_dec.weight": decoder, "W_dec.bias": bias}

    def encode(x):
        top, index = torch.topk(F.linear(x, encoder, b_enc), k, dim=-1)
        return torch.zeros(x.shape[0], d_sae).scatter_(-1, index, F.relu(top))

    return Sample({name: pt(state)}, encode, lambda f: F.linear(f, decoder, bias), {"k": k})


def linear_b_dec(seed=0, d_in=D_IN, d_sae=D_SAE, k=K, name="sae.pt"):
    """Two nn.Linears with a decoder bias of its own, subtracted from the input."""
    encoder, decoder, b_enc, b_dec = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,))
    state = {"W_enc.weight": encoder, "W_enc.bias": b_enc, "W_dec.weight": decoder, "b_dec": b_dec}

    def encode(x):
        return torch.relu(keep_largest(F.linear(x - b_dec, encoder, b_enc), k))

    return Sample({name: pt(state)}, encode, lambda f: F.linear(f, decoder) + b_dec, {"k": k})


class SAEConfig:
    """What SKwra's `TopKSAE.save` pickles beside the state dict, under the module name of its repository."""

    def __init__(self, d_in, d_sae, k):
        self.input_dim, self.dict_size, self.k, self.dtype = d_in, d_sae, k, "bfloat16"


SAEConfig.__module__, SAEConfig.__qualname__ = "sae.sae_model", "SAEConfig"


def skwra(seed=0, d_in=D_IN, d_sae=D_SAE, k=K, name="sae-stage2.pt", dtype=torch.bfloat16):
    """`TopKSAE.save` of agent-sae: a config object and a state dict of two nn.Linears, in bfloat16."""
    import sys
    import types

    encoder, decoder, b_enc, bias = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,), dtype=dtype)
    modules = {"sae": types.ModuleType("sae"), "sae.sae_model": types.ModuleType("sae.sae_model")}
    modules["sae.sae_model"].SAEConfig = SAEConfig
    state = {"encoder.weight": encoder, "encoder.bias": b_enc, "decoder.weight": decoder, "decoder.bias": bias}
    sys.modules.update(modules)  # pickle looks the class up while it writes
    try:
        content = pt({"config": SAEConfig(d_in, d_sae, k), "state_dict": state})
    finally:
        for module in modules:
            del sys.modules[module]
    encoder, decoder, b_enc, bias = encoder.float(), decoder.float(), b_enc.float(), bias.float()

    def encode(x):
        top, index = torch.topk(F.linear(x, encoder, b_enc), k, dim=-1)
        return torch.zeros(x.shape[0], d_sae).scatter_(-1, index, F.relu(top))

    return Sample({name: content}, encode, lambda f: F.linear(f, decoder, bias))


def normalised(seed=0, d_in=D_IN, d_sae=D_SAE):
    """lamm-mit: (x − mean) / scale, minus the decoder's bias; the output is scaled back."""
    encoder, decoder, b_enc, bias, mean = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_in,))
    mean, scale, theta = mean * 4, torch.tensor([2.75]), torch.tensor(0.8)
    state = {
        "sae.encoder.weight": encoder, "sae.encoder.bias": b_enc,
        "sae.decoder.weight": decoder, "sae.decoder_bias": bias, "sae.inference_threshold": theta,
        "normalization.activation_mean": mean, "normalization.activation_scale": scale,
    }  # fmt: skip

    def encode(x):
        acts = F.relu(F.linear((x - mean) / scale - bias, encoder, b_enc))
        return acts * (acts > theta)

    files = {"sae_weights.safetensors": save(state), "sae_config.json": as_json({"d_model": d_in, "k": K})}
    return Sample(files, encode, lambda f: (F.linear(f, decoder) + bias) * scale + mean)


def ernos_code(seed=0, d_in=D_IN, d_sae=D_SAE, name="gemma4_sae_1m.safetensors"):
    """ErnOSAgent's trainer: x W_encᵀ + b_enc, kept where at least 0.001; W_enc [d_sae, d_in], W_dec [d_in, d_sae]."""
    W_enc, W_dec, b_enc, b_dec = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,))

    def encode(x):
        pre = x @ W_enc.t() + b_enc
        return pre.relu() * pre.ge(0.001)

    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    return Sample({name: save(state)}, encode, lambda h: h @ W_dec.t() + b_dec)


def ernos_card(seed=0, d_in=D_IN, d_sae=D_SAE, name="gemma4_sae_1m.safetensors", decoder_bias=False):
    """The card's snippet: maximum(0, encoder @ activations + bias)."""
    encoder, decoder, bias, b_dec = _random(seed, (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,))
    state = {"encoder.weight": encoder, "decoder.weight": decoder, "encoder.bias": bias}
    if decoder_bias:
        state["decoder.bias"] = b_dec

    def encode(x):
        return torch.stack([torch.clamp(encoder @ row + bias, min=0) for row in x])

    return Sample({name: save(state)}, encode, lambda h: h @ decoder.t() + (b_dec if decoder_bias else 0))


def weights_name(sample):
    """The file of a sample that holds its weights."""
    others = ("checkpoint_full.pt", "sparsity.safetensors")
    return next(n for n in sample.files if n.endswith((".pt", ".safetensors")) and n not in others)


def tensors_of(sample):
    """The tensors of a sample's weights file."""
    name = weights_name(sample)
    if name.endswith(".safetensors"):
        return load(sample.files[name])
    with torch.serialization.safe_globals([(SAEConfig, "sae.sae_model.SAEConfig")]):
        content = torch.load(io.BytesIO(sample.files[name]), weights_only=True)
    return content.get("state_dict", content)


def packed(tensors, name):
    """Tensors as the bytes of a file of that name."""
    if not name.endswith(".safetensors"):
        return pt(tensors)
    return save({k: t.contiguous() for k, t in tensors.items() if isinstance(t, torch.Tensor)})


ALL = {
    "sae_lens": sae_lens,
    "plain": plain,
    "plain_safetensors": lambda **kw: plain(suffix=".safetensors", **kw),
    "solshine_scope": solshine_scope,
    "dictionary_learning": dictionary_learning,
    "dictionary_learning_matryoshka": dictionary_learning_matryoshka,
    "sparsify": sparsify,
    "log_threshold": log_threshold,
    "linear": linear,
    "linear_b_dec": linear_b_dec,
    "linear_encoder": skwra,
    "normalised": normalised,
    "ernos_code": ernos_code,
    "ernos_card": ernos_card,
}
FORM_OF = {"plain_safetensors": "plain", "solshine_scope": "plain", "ernos_code": "ernos", "ernos_card": "ernos"}
