"""A judge on this machine: any causal language model that transformers loads, decoded greedily."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from sae_lens_gemma4 import embedded
from sae_lens_gemma4.interp.judges.clients import Reply
from sae_lens_gemma4.interp.judges.failures import RequestError, said_of
from sae_lens_gemma4.interp.judges.questions import Prompt


class TransformersClient:
    """Loaded at the first question, and asked one question at a time.

    There are no batches: in 16 bits what stands beside a question can change its answer, which is kept for any other
    batch. Where that is too slow, serve the model (vLLM and others) and ask it as a judge of kind "openai".

    The cache knows it by its name: a model that was trained further needs another name, or another cache.

    Args:
        model: a name on the hub, a folder, or one of this package's embedded models.
        device: for instance "cuda"; None: wherever transformers puts it.
    """

    def __init__(self, *, model: str, device: str | None, most_output: int) -> None:
        self.identity: Mapping[str, Any] = {
            "kind": "transformers", "model": model, "base_url": None,
            "temperature": 0.0, "max_output_tokens": most_output,
        }  # fmt: skip
        self.left_out: set[str] = set()
        self._device, self._most = device, most_output
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def complete(self, prompt: Prompt) -> Reply:
        with self._lock:
            model, tokenizer = self._load()
            ids = self._encode(tokenizer, prompt)
            longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if longest is not None and ids.shape[1] + self._most > longest:
                why = f"a question has {ids.shape[1]} tokens, an answer up to {self._most}, and it reads {longest}"
                raise RequestError(said_of(self.identity, why), too_long=True)
            try:
                with torch.inference_mode():
                    out = model.generate(
                        ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device),
                        max_new_tokens=self._most, do_sample=False,
                        temperature=None, top_p=None, top_k=None,  # a model's own, which greedy decoding has no use for
                    )  # fmt: skip
            except (RuntimeError, ValueError) as e:  # out of memory among them
                raise RequestError(said_of(self.identity, e)) from e
        new = out[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return Reply(text, ids.shape[1], len(new), len(new) >= self._most)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            name = str(self.identity["model"])
            carried = embedded.MODELS.get(name)
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(embedded.TOKENIZER) if carried else name)
                path = str(carried.path) if carried else name
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
                if self._device is not None:
                    model = model.to(self._device)
            except (OSError, ValueError, RuntimeError, ImportError) as e:
                why = f"it cannot be loaded: {str(e).strip().splitlines()[0]}"
                raise RequestError(said_of(self.identity, why)) from e
            self._loaded = model.eval(), tokenizer
        return self._loaded

    def _encode(self, tokenizer: Any, prompt: Prompt) -> torch.Tensor:
        """By the model's chat template; without a system role where it has none; plainly where there is no template."""
        both = f"{prompt.system}\n\n{prompt.user}"
        if not tokenizer.chat_template:
            return torch.as_tensor(tokenizer(f"{both}\n\nAnswer:\n", return_tensors="pt")["input_ids"])
        chats = (
            [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            [{"role": "user", "content": both}],
        )
        try:
            text = _render(tokenizer, chats[0])
        except Exception:  # templates raise what they like where they know no such role
            text = _render(tokenizer, chats[1])
        return torch.as_tensor(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
