"""A judge as a recipe states it, and the judge that this makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.interp.judges.asking import LLMJudge
from sae_lens_gemma4.interp.judges.baseline import BaselineJudge
from sae_lens_gemma4.interp.judges.budget import Budget, Prices
from sae_lens_gemma4.interp.judges.cache import AnswerCache
from sae_lens_gemma4.interp.judges.clients import AnthropicClient, Client, OpenAIClient, identity_of, key_from
from sae_lens_gemma4.interp.judges.judge import Judge
from sae_lens_gemma4.interp.judges.local import TransformersClient

Kind = Literal["openai", "anthropic", "transformers", "tokens", "ngrams"]
KINDS: tuple[Kind, ...] = ("openai", "anthropic", "transformers", "tokens", "ngrams")
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Who judges. `tokens` and `ngrams` are the baselines, which need no model; the rest is read by models only.

    Attributes:
        kind: "openai" is any server that speaks OpenAI's chat completions; "transformers" a model on this machine.
        model: as the server, the hub or the file system knows it.
        name: who labels are said to be by; None: the model.
        base_url: of the server; None: the maker's own.
        api_key_env: the variable that holds the key; None: OPENAI_API_KEY or ANTHROPIC_API_KEY.
        temperature: None: the server's own. Anthropic's interface takes none, and servers that refuse one are not
            sent it again.
        max_output_tokens: of one answer, with what a model thinks before it.
        concurrency: calls at once; a model on this machine has one.
        retries: how often a question is asked again whose answer cannot be used (over all runs on one folder of
            answers), and how often in a run one whose request failed in passing, by its pauses or the server's.
        timeout_s: seconds that a server may be silent.
        usd_per_million_input, usd_per_million_output: prices; None: cost is told in tokens alone.
        max_usd, max_calls: of all requests to this model at this base_url, under whatever name, that are booked in
            this folder of answers: a run that goes on has what is left, and a higher limit adds the difference.
            Dollars are by the prices stated here. Answers from the cache are free.
        device: for "transformers", for instance "cuda".

    Raises:
        ConfigError: a value that cannot be used.
        UnknownNameError: a kind that does not exist.
    """

    kind: Kind
    model: str | None = None
    name: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float | None = 0.0
    max_output_tokens: int = 1024
    concurrency: int = 4
    retries: int = 3
    timeout_s: float = 120.0
    usd_per_million_input: float | None = None
    usd_per_million_output: float | None = None
    max_usd: float | None = None
    max_calls: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_name("kind of judge", self.kind, KINDS)
        is_baseline = self.kind in ("tokens", "ngrams")
        if not is_baseline and not self.model:
            raise ConfigError(f"A judge of kind {self.kind!r} needs a model: name it.")
        if is_baseline and self.model:
            raise ConfigError(f"A judge of kind {self.kind!r} has no model: leave {self.model!r} out.")
        for field, least, most in (("max_output_tokens", 16, 10**6), ("concurrency", 1, 256), ("retries", 0, 20)):
            if not least <= getattr(self, field) <= most:
                raise ConfigError(f"{field} must be from {least} to {most}, not {getattr(self, field)}.")
        for field in ("timeout_s", "usd_per_million_input", "usd_per_million_output", "max_usd", "max_calls"):
            if (value := getattr(self, field)) is not None and not (0 <= value < math.inf):
                raise ConfigError(f"{field} must be a finite number, not below 0: it is {value}.")
        if self.timeout_s == 0:
            raise ConfigError("timeout_s must be above 0.")
        if (self.usd_per_million_input is None) != (self.usd_per_million_output is None):
            raise ConfigError("State usd_per_million_input and usd_per_million_output both, or neither.")
        if self.max_usd is not None and self.usd_per_million_input is None:
            raise ConfigError("max_usd can be kept to only where usd_per_million_input and …_output are stated.")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature must be from 0 to 2, not {self.temperature}.")
        if self.kind in ("anthropic", "transformers") and self.temperature:
            raise ConfigError(f"A judge of kind {self.kind!r} takes no temperature: leave {self.temperature} out.")
        if self.base_url is not None and self.kind not in _KEYS:
            raise ConfigError(f"A judge of kind {self.kind!r} has no base_url: leave it out.")
        if self.base_url is not None:
            _check_url(self.base_url)


def judge_of(settings: JudgeSettings, cache_folder: str | Path | None, *, progress: bool = False) -> Judge:
    """The judge. Nothing is asked yet, and no model is loaded.

    Args:
        cache_folder: where answers are kept, of any number of judges and runs; None: for this run only.

    Raises:
        ConfigError: there is no key, or the folder cannot be written.
        DependencyError: the client is not installed.
        DataError: the folder holds a file of answers that cannot be read.
    """
    if settings.kind in ("tokens", "ngrams"):
        return BaselineJudge(1 if settings.kind == "tokens" else 3, settings.name)
    client = _client_of(settings)
    prices = Prices(settings.usd_per_million_input, settings.usd_per_million_output)
    cache = AnswerCache(cache_folder)
    budget = Budget(
        prices, settings.max_output_tokens, most_calls=settings.max_calls, most_usd=settings.max_usd,
        ledger=cache, judge=identity_of(client.identity),
    )  # fmt: skip
    return LLMJudge(
        settings.name or str(settings.model),
        client,
        cache,
        budget,
        concurrency=1 if settings.kind == "transformers" else settings.concurrency,
        retries=settings.retries,
        progress=progress,
    )


def _client_of(s: JudgeSettings) -> Client:
    model, most = str(s.model), s.max_output_tokens
    if s.kind == "transformers":
        return TransformersClient(model=model, device=s.device, most_output=most)
    key = key_from(s.api_key_env or _KEYS[s.kind])
    if s.kind == "anthropic":
        return AnthropicClient(model=model, key=key, base_url=s.base_url, most_output=most, timeout_s=s.timeout_s)
    return OpenAIClient(
        model=model, key=key, base_url=s.base_url, temperature=s.temperature, most_output=most,
        timeout_s=s.timeout_s,
    )  # fmt: skip


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("base_url must be a URL like http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "base_url must have no user, password, query or fragment: recipes and results keep it. Put the key into a "
            "variable of the environment and name that by api_key_env."
        )
