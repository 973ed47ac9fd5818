"""Make the package's embedded data again from nothing: a tokenizer, two tiny Gemma 4 models and a base SAE.

    python recipes/make_embedded.py            # base, it and sae in turn; about 15 minutes on two cores
    python recipes/make_embedded.py it sae     # some of them, on what is there

The tuned model is the base model trained on chats. The SAE is trained on the base model by stock sae_lens.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.embedded import text
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.models.loading import load_model

DATA = Path(__file__).parents[1] / "sae_lens_gemma4" / "embedded" / "data"
CONTEXT, BATCH = 128, 16
STEPS = {"base": 2500, "it": 800}
LEARNING_RATE = {"base": 3e-3, "it": 8e-4}
SEED = 0
SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] | trim }}{{ '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE of 2,048 pieces with Gemma's conventions: `▁` for space, byte fallback, its special tokens."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁*[^▁\n]+|▁+"), "isolated")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL + bytes_, min_frequency=2)
    texts = text.documents("train") + [m["content"] for chat in text.chats("train") for m in chat]
    tok.train_from_iterator(texts, trainer)
    # The trainer needs the bytes reserved; they are ordinary pieces, not special tokens.
    state = json.loads(tok.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    tok = Tokenizer.from_str(json.dumps(state))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def model_config(vocab_size: int) -> Gemma4TextConfig:
    """E2B and E4B in small: per-layer embeddings, two KV-shared layers, sliding and full attention."""
    sliding, full = "sliding_attention", "full_attention"
    return Gemma4TextConfig(
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        layer_types=[sliding, full, sliding, sliding, sliding, full],
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        global_head_dim=48,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        sliding_window=64,
        max_position_embeddings=2048,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        eos_token_id=[SPECIAL.index("<eos>"), SPECIAL.index("<turn|>")],
    )


def train(model: Gemma4ForCausalLM, corpus: Corpus, steps: int, lr: float) -> float:
    """AdamW with warm-up and cosine decay; every token but padding counts. Returns the last 50 steps' mean loss."""
    labels = torch.where(corpus.document_bp >= 0, corpus.tokens_bp, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.long)
    losses, started = [], time.time()
    model.train()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(corpus.n_blocks, generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        loss = model(input_ids=corpus.tokens_bp[rows], labels=labels[rows], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}/{steps} loss {sum(losses[-50:]) / 50:.3f} {time.time() - started:.0f}s", flush=True)
    return sum(losses[-50:]) / 50


@torch.no_grad()
def heldout_loss(model: Gemma4ForCausalLM, corpus: Corpus) -> float:
    model.eval()
    total = weight = 0.0
    for part in corpus.batches(32):
        labels = torch.where(part.document_bp >= 0, part.tokens_bp, -100)
        n = int((labels[:, 1:] >= 0).sum())
        total += model(input_ids=part.tokens_bp, labels=labels, use_cache=False).loss.item() * n
        weight += n
    return total / weight


def make_model(name: str, dataset: str, model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train `model` on an embedded dataset, save it in bf16 and record its losses."""
    corpus, heldout = (build_corpus(dataset, tokenizer, context_size=CONTEXT, split=s) for s in ("train", "heldout"))
    print(f"{name}: {corpus.n_tokens:,} tokens, held out {heldout.n_tokens:,}")
    train_loss = train(model, corpus, STEPS[name], LEARNING_RATE[name])
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_portable_config(folder)
    saved = Gemma4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    record(name, train_loss=train_loss, heldout_loss=heldout_loss(saved, heldout))


def write_portable_config(folder: Path) -> None:
    """Full attention's head size as every transformers since 5.10 reads it; since 5.15 it is saved otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config["global_head_dim"],) = {layer["head_dim"] for layer in config.pop("per_layer_config").values()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def record(name: str, **figures: float) -> None:
    """Keep what was measured beside the data."""
    path = DATA / "facts.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts[name] = {key: round(value, 4) for key, value in figures.items()}
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(name, facts[name])


def make_base() -> None:
    shutil.rmtree(DATA / "tokenizer", ignore_errors=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(DATA / "tokenizer")
    torch.manual_seed(SEED)
    model = Gemma4ForCausalLM(model_config(len(tokenizer)))
    n_layers = model.config.num_hidden_layers
    scalars = torch.linspace(1.3, 0.7, n_layers)[torch.randperm(n_layers)]
    for layer, scalar in zip(model.model.layers, scalars, strict=True):
        layer.layer_scalar.fill_(scalar)
    make_model("base", "embedded:text", model, tokenizer)


def make_it() -> None:
    """The tuned model goes on from the base model as it was saved."""
    model = Gemma4ForCausalLM.from_pretrained(DATA / "base", dtype=torch.float32)
    make_model("it", "embedded:chat", model, PreTrainedTokenizerFast.from_pretrained(DATA / "tokenizer"))


def make_sae() -> None:
    """A Matryoshka BatchTopK SAE on the base model, trained and saved by stock sae_lens."""
    cfg = LanguageModelSAERunnerConfig(
        sae=MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=96, d_sae=2048, k=16, matryoshka_widths=[128, 512, 2048], normalize_activations="none"
        ),
        model_name="gemma-4-demo",
        model_class_name="Gemma4ProxyLM",
        hook_name="blocks.3.hook_resid_post",
        context_size=CONTEXT,
        prepend_bos=True,
        exclude_special_tokens=True,
        training_tokens=1_500_000,
        train_batch_size_tokens=1024,
        store_batch_size_prompts=16,
        n_batches_in_buffer=64,
        lr=2e-3,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=100,
        dead_feature_window=200,
        device="cpu",
        seed=SEED,
        n_checkpoints=0,
        output_path=None,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(SEED)
    dataset = Dataset.from_dict({"text": text.documents("train")}).shuffle(seed=SEED)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset).run()
    sae.cfg.metadata.dataset_path = "embedded:text"
    folder = DATA / "sae" / "layer_3_width_2k_l0_16"
    sae.save_inference_model(folder)
    model = load_model("gemma-4-demo", "Gemma4ProxyLM")
    heldout = build_corpus("embedded:text", model.tokenizer, context_size=CONTEXT, split="heldout")
    metrics = evaluate_sae(SAE.load_from_disk(folder), model, heldout).metrics
    record("sae", heldout_ve=metrics.ve, heldout_l0=metrics.l0)


STAGES = {"base": make_base, "it": make_it, "sae": make_sae}

if __name__ == "__main__":
    for stage in sys.argv[1:] or STAGES:
        STAGES[stage]()
