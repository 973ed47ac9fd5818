"""A small folder of dashboards in the form that `build_dashboards` writes, made of random numbers and nothing else."""

import json

import numpy as np

from sae_lens_gemma4.neuronpedia.folder import LATENTS, NEAREST, SCHEMA, SETTINGS, SKIPPED, summary

HEADER = {"model_id": "gemma-4-e4b", "layer": 21, "sae_set": "matryoshka-res-65k", "sae_id_suffix": None}
PIECES = ["▁the", "▁cat", "<0xE2>", "\n", "▁sat", "ing", "<|turn>", "▁été", "▁<b>x</b>", "'", '"', "▁"]


def feature(index, rng, n_tokens=31, n_top=4, n_bins=2, per_bin=2):
    """One latent's dashboard, as sae-dashboard names its parts; `docs/neuronpedia.md` says what each is."""
    groups = [(-1, None, -1, n_top)] + [(b, b + 1.0, 0.01 * (b + 1), per_bin) for b in reversed(range(n_bins))]
    activations = []
    for low, high, contains, n in groups:
        for _ in range(n):
            at = int(rng.integers(n_tokens))
            values = np.zeros(n_tokens)
            values[at] = rng.uniform(max(low, 0) + 0.01, high or n_bins)
            activations.append(
                {
                    "bin_min": low,
                    "bin_max": high if high is not None else float(n_bins),
                    "bin_contains": contains,
                    "tokens": [PIECES[i] for i in rng.integers(len(PIECES), size=n_tokens)],
                    "values": np.round(values, 3).tolist(),
                    "qualifying_token_index": at,
                }
            )

    def floats(n):
        return np.round(rng.normal(size=n), 3).tolist()

    def pieces(n):
        return [PIECES[i] for i in rng.integers(len(PIECES), size=n)]

    return {
        "feature_index": index,
        "neuron_alignment_indices": [3, 1, 2],
        "neuron_alignment_values": floats(3),
        "neuron_alignment_l1": [0.1, 0.05, 0.04],
        "correlated_neurons_indices": [5, 0, 7],
        "correlated_neurons_l1": floats(3),
        "correlated_neurons_pearson": floats(3),
        "correlated_features_indices": [1, 2, 3],
        "correlated_features_l1": floats(3),
        "correlated_features_pearson": floats(3),
        "neg_str": pieces(10),
        "neg_values": sorted(floats(10)),
        "pos_str": pieces(10),
        "pos_values": sorted(floats(10), reverse=True),
        "frac_nonzero": round(float(rng.uniform(0.001, 0.1)), 6),
        "freq_hist_data_bar_values": np.linspace(0.02, 1.98, 50).round(3).tolist(),
        "freq_hist_data_bar_heights": rng.integers(0, 40, size=50).tolist(),
        "logits_hist_data_bar_heights": rng.integers(0, 400, size=50).tolist(),
        "logits_hist_data_bar_values": np.linspace(-1.5, 1.5, 50).round(3).tolist(),
        "n_prompts_total": 64,
        "n_tokens_in_prompt": 32,
        "dataset": "embedded:text",
        "decoder_weights_dist": [],
        "activations": activations,
        "vector": [],
    }


def settings(d_sae, **changed):
    return {
        **HEADER,
        "schema": SCHEMA,
        "complete": True,
        "sae": {
            "release": "gemma-4-e4b-res-matryoshka-decoderesearch",
            "sae_id": "layer_21_width_65k_l0_100",
            "d_in": 8,
            "d_sae": d_sae,
            "architecture": "jumprelu",
            "hook_name": "blocks.21.hook_resid_post",
            "hf_hook_name": "model.language_model.layers.21",
            "hash": "0123456789abcdef",
            "config": {"architecture": "jumprelu", "d_in": 8, "d_sae": d_sae},
        },
        "model": {
            "name": "google/gemma-4-E4B",
            "class": "Gemma4ProxyLM",
            "dtype": "bfloat16",
            "fingerprint": "fedcba9876543210",
            "n_layers": 42,
            "d_model": 2560,
            "d_mlp": 10240,
        },
        "corpus": {"name": "embedded:text [train]", "source": "embedded:text", "tokens": 64 * 31, "hash": "00ff00ff"},
        "dataset": "embedded:text",
        "n_prompts_total": 64,
        "n_tokens_in_prompt": 32,
        "n_tokens": 64 * 31,
        "version": "0.1.0",
    } | changed


def write_dashboards(folder, d_sae=20, dead=(3, 11), per_file=8, seed=0, **changed):
    """The folder, with `d_sae` latents of which `dead` never fired; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    alive = [i for i in range(d_sae) if i not in dead]
    columns = {name: [] for name in ("index", "density", "max", "token", "logit", "file", "offset", "length")}
    facts = settings(d_sae, **changed)
    header = {name: facts[name] for name in HEADER}
    for number, first in enumerate(range(0, d_sae, per_file)):
        name, text = f"batch-{number}.json", json.dumps(header)[:-1] + ', "features": [\n'
        parts = [feature(i, rng) for i in alive if first <= i < first + per_file]
        for i, part in enumerate(parts):
            one = json.dumps(part, ensure_ascii=False)
            place = {"file": name, "offset": len(text.encode()), "length": len(one.encode())}
            for key, value in (summary(part) | place).items():
                columns[key].append(value)
            text += one + (",\n" if i < len(parts) - 1 else "\n")
        (folder / name).write_bytes((text + "]}\n").encode())
    skipped = {k: header[k] for k in ("model_id", "layer", "sae_set")}
    (folder / SKIPPED).write_text(json.dumps({**skipped, "skipped_indexes": list(dead)}))
    (folder / LATENTS).write_text(json.dumps(columns))
    nearest = [[(i + step) % d_sae for step in (1, 2, 3)] for i in range(d_sae)]
    (folder / NEAREST).write_text(json.dumps({"indices": nearest, "cosine": [[0.5, 0.25, 0.125]] * d_sae}))
    (folder / SETTINGS).write_text(json.dumps(facts))
    return folder
