"""Who is asked, through well-kept clients: OpenAI's and Anthropic's own.

Each call here is one request: what fails is a `RequestError`, and is sent again by who counts requests. Both makers'
clients are optional: they come with `sae-lens-gemma4[judges]`. A base URL is always given to them, so that no variable
of the environment sends a corpus elsewhere; redirects are not followed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit, urlunsplit

from sae_lens_gemma4.errors import ConfigError, DependencyError
from sae_lens_gemma4.interp.judges.failures import RequestError, failure_of, said_of
from sae_lens_gemma4.interp.judges.questions import Prompt

OPENAI_URL = "https://api.openai.com/v1"
ANTHROPIC_URL = "https://api.anthropic.com"
_PORTS = {"http": 80, "https": 443}


class Reply(NamedTuple):
    """What a model said; tokens are None where the server does not say how many it used."""

    text: str
    input_tokens: int | None
    output_tokens: int | None
    cut_off: bool = False


class Client(Protocol):
    """Something that answers a prompt.

    Attributes:
        identity: all that its answers depend on, besides the prompt.
        left_out: of these settings, those that the server refuses, so that they are not sent.
    """

    identity: Mapping[str, Any]
    left_out: set[str]

    def complete(self, prompt: Prompt) -> Reply:
        """One request; raises `RequestError` where it has no reply."""


def identity_of(identity: Mapping[str, Any]) -> str:
    """Which model of which server this is, whatever it is called and by whichever settings it is asked."""
    at = identity["base_url"]
    return f"{identity['kind']} {identity['model']}{f' at {at}' if at else ''}"


def key_from(variable: str) -> str:
    """An API key from the environment.

    Raises:
        ConfigError: the variable is not set, or holds what no key can be.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"This judge needs an API key: set {variable} (to any text for a server of your own that wants none), or "
            "name another variable by api_key_env."
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{variable} holds characters that no key has.")
    return key


def plain_url(url: str) -> str:
    """A URL as it is known by: without user, password, query, default port, and capitals in the host's name."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower().removesuffix(f":{_PORTS.get(parts.scheme)}")
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


class OpenAIClient:
    """Any server that speaks OpenAI's chat completions: OpenAI, vLLM, Ollama, OpenRouter, …

    Only what all of them take is sent: two messages, a limit of tokens, a temperature. A server that refuses one of the
    last two with a 400 that names it (reasoning models know no temperature, and call the limit otherwise) is sent it no
    more, or by its other name: that request fails as `adapted`, and the next is another.
    """

    def __init__(
        self, *, model: str, key: str, base_url: str | None, temperature: float | None, most_output: int,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self._sdk = sdk("openai")
        url = base_url or OPENAI_URL
        self._key = key
        self._client = self._sdk.OpenAI(
            api_key=key, base_url=url, max_retries=0, timeout=timeout_s,
            http_client=self._sdk.DefaultHttpxClient(follow_redirects=False, timeout=timeout_s),
        )  # fmt: skip
        self.left_out: set[str] = set()
        self._limit = {"max_completion_tokens" if base_url is None else "max_tokens": most_output}
        self._temperature = {} if temperature is None else {"temperature": temperature}
        self.identity: Mapping[str, Any] = {
            "kind": "openai", "model": model, "base_url": plain_url(url),
            "temperature": temperature, "max_output_tokens": most_output,
        }  # fmt: skip

    def complete(self, prompt: Prompt) -> Reply:
        sent = (self._limit, self._temperature)
        try:
            completion = self._create(prompt, *sent)
        except self._sdk.OpenAIError as e:
            failure = failure_of(self._sdk, self.identity, e, self._key)
            if isinstance(e, self._sdk.BadRequestError) and not failure.too_long:
                failure.adapted = self._adapt(str(e), *sent)
            raise failure from e
        except ValueError as e:  # a body that is no JSON
            raise self._no_completion() from e
        return self._reply(completion)

    def _create(self, prompt: Prompt, limit: Mapping[str, int], temperature: Mapping[str, float]) -> Any:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        return self._client.chat.completions.create(
            model=self.identity["model"], messages=messages, **limit, **temperature
        )

    def _adapt(self, message: str, limit: Mapping[str, int], temperature: Mapping[str, float]) -> bool:
        """Change what the server refused, and say whether there was anything; another thread may have done so."""
        if temperature and "temperature" in message:
            self._temperature = {}
            self.left_out.add("temperature")
            return True
        if "max_tokens" in limit and "max_completion_tokens" in message:
            self._limit = {"max_completion_tokens": limit["max_tokens"]}
            return True
        return False

    def _reply(self, completion: Any) -> Reply:
        try:
            choice, usage = completion.choices[0], completion.usage
            text = choice.message.content
        except (AttributeError, TypeError, IndexError) as e:
            raise self._no_completion() from e
        used_in, used_out = (count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text if isinstance(text, str) else "", used_in, used_out, choice.finish_reason == "length")

    def _no_completion(self) -> RequestError:
        return RequestError(said_of(self.identity, "its reply is no chat completion"), billable=True)


class AnthropicClient:
    """Anthropic's messages. Its clients from 1.0 on send no temperature, and its current models refuse one."""

    def __init__(self, *, model: str, key: str, base_url: str | None, most_output: int, timeout_s: float) -> None:
        self._sdk = sdk("anthropic")
        self.left_out: set[str] = set()
        url = base_url or ANTHROPIC_URL
        self._key = key
        self._client = self._sdk.Anthropic(
            api_key=key, base_url=url, max_retries=0, timeout=timeout_s,
            http_client=self._sdk.DefaultHttpxClient(follow_redirects=False, timeout=timeout_s),
        )  # fmt: skip
        self.identity: Mapping[str, Any] = {
            "kind": "anthropic", "model": model, "base_url": plain_url(url),
            "temperature": None, "max_output_tokens": most_output,
        }  # fmt: skip

    def complete(self, prompt: Prompt) -> Reply:
        try:
            message = self._client.messages.create(
                model=self.identity["model"],
                max_tokens=self.identity["max_output_tokens"],
                system=prompt.system,
                messages=[{"role": "user", "content": prompt.user}],
            )
            text = "".join(part.text for part in message.content if part.type == "text")
            usage, reason = message.usage, message.stop_reason
        except self._sdk.AnthropicError as e:
            raise failure_of(self._sdk, self.identity, e, self._key) from e
        except (AttributeError, TypeError, ValueError) as e:
            raise RequestError(said_of(self.identity, "its reply is no message"), billable=True) from e
        parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        tokens_in = [count(getattr(usage, part, None)) for part in parts]
        known_in = None if tokens_in[0] is None else sum(n or 0 for n in tokens_in)
        return Reply(text, known_in, count(getattr(usage, "output_tokens", None)), reason == "max_tokens")


def sdk(name: str) -> Any:
    """A maker's client; `DependencyError` where it is not installed or does not work."""
    try:
        return importlib.import_module(name)
    except Exception as e:  # as of a dependency that does not fit
        broken = "" if isinstance(e, ImportError) else f" The one here fails with {type(e).__name__}: {e}."
        raise DependencyError(
            f'This judge needs the package {name}: pip install "sae-lens-gemma4[judges]".{broken}'
        ) from e


def count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
