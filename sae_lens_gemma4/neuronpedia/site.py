"""Neuronpedia's API through its own client, so that every failure is one error which knows what may be tried again.

The client (`neuronpedia` on PyPI) makes the requests. How they are sent is replaced by a subclass (`_Sending`): its own
way waits forever for an answer, prints, keeps neither the status nor the reason of a refusal, and can read neither a
set that is not there (`null`) nor a latent that has explanations (they come without `modelId`).
"""

from __future__ import annotations

import importlib
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from sae_lens_gemma4.errors import ConfigError, DependencyError, HubError
from sae_lens_gemma4.neuronpedia.limits import Row, encoded
from sae_lens_gemma4.report.visible import visible_name

BASE_URL = "https://www.neuronpedia.org/api"
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
_WHERE_KEYS_ARE = "You find yours at neuronpedia.org/account"
_OBJECTS = ("np_feature", "np_activation", "np_explanation")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """How long to go on where the site does not take a request.

    Attributes:
        tries: of one request that is not answered, or answered with a fault of the site (5xx).
        limited_tries: of one that is refused because there were too many (429). The site counts them by the hour.
        first_s, longest_s, limited_longest_s: from one try to the next: doubled each time up to the longest, and up to
            the last after a 429; less up to a half of it, at random. What the site asks for is kept.
        settle_s: how long a request without an answer may still be at work there, from when it was sent.
        timeout_s: how long to wait for an answer.
        sleep: what waits.
    """

    tries: int = 6
    limited_tries: int = 20
    first_s: float = 2.0
    longest_s: float = 60.0
    limited_longest_s: float = 600.0
    settle_s: float = 300.0
    timeout_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def keep_trying(self, step: Callable[[], _T], waits: Callable[[float, SiteError], None]) -> _T:
        """The result of a step that may be tried again, and is until it works or `SiteError` says that it will not.

        Args:
            waits: told of each wait, in seconds, and what it is for.
        """
        failed = {True: 0, False: 0}
        while True:
            try:
                return step()
            except SiteError as e:
                failed[e.limited] += 1
                most, longest = (
                    (self.limited_tries, self.limited_longest_s) if e.limited else (self.tries, self.longest_s)
                )
                if not e.passing or failed[e.limited] >= most:
                    raise
                wait = min(self.first_s * 2 ** (failed[e.limited] - 1), longest) * random.uniform(0.5, 1)
                wait = max(wait, e.retry_after or 0)
                waits(wait, e)
                self.sleep(wait)


class SiteError(HubError):
    """Neuronpedia does not take a request, or cannot be reached.

    Attributes:
        status: of the answer; None where there was none.
        retry_after: seconds that the site asks to wait.
        by_its_code: the site's own code answered, so that nothing of the request is still at work.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: float | None = None, by_its_code: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.by_its_code = status, retry_after, by_its_code

    @property
    def limited(self) -> bool:
        return self.status == 429

    @property
    def refused(self) -> bool:
        """The request surely changed nothing."""
        return self.status is not None and 300 <= self.status < 500 and self.status != 408

    @property
    def passing(self) -> bool:
        """The same request may be taken another time."""
        return self.limited or not self.refused


class Site:
    """Neuronpedia, or another instance of it, for one user.

    Args:
        api_key: the user's; `NEURONPEDIA_API_KEY` if None. It is never shown.
        base_url: of the API.
        timeout_s: how long to wait for an answer.

    Raises:
        ConfigError: no key, or an address that none is sent to.
        DependencyError: the client is not installed.
    """

    def __init__(self, api_key: str | None = None, base_url: str | None = None, timeout_s: float = 120.0) -> None:
        check_texts(api_key=api_key, base_url=base_url)
        self.base_url = _checked_url(base_url or BASE_URL)
        key = _checked_key(api_key or os.environ.get(KEY_VARIABLE, ""))
        self._parts = {
            name: _client_module(name)
            for name in (*_OBJECTS, *(f"requests.{kind}_request" for kind in ("feature", "model", "source_set")))
        }

        def sending(module: str, name: str) -> Any:
            """The client's class of requests, sent our way to this address."""
            kind = getattr(self._parts[f"requests.{module}_request"], name)
            attributes = {"BASE_URL": self.base_url, "timeout": (min(15.0, timeout_s), timeout_s)}
            return type(name, (_Sending, kind), attributes)(api_key=key)

        self._features = sending("feature", "FeatureRequest")
        self._models = sending("model", "ModelRequest")
        self._sets = sending("source_set", "SourceSetRequest")

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).netloc

    def page(self, model_id: str, source_id: str) -> str:
        """Where a person sees a source."""
        return f"{self.base_url.removesuffix('/api')}/{model_id}/{source_id}"

    def model(self, model_id: str) -> dict[str, Any] | None:
        """A model, or None if the site has none of that name that this user may see."""
        return _object(self._models.send_request("get", json={"id": model_id}))

    def make_model(self, model_id: str, layers: int, display_name: str, url: str | None) -> None:
        """Make an unlisted model."""
        self._models.new(model_id, layers, display_name, url)

    def source_set(self, model_id: str, set_name: str) -> dict[str, Any] | None:
        """A set, with those of its `sources` that this user may use; None if there is none."""
        return _object(self._sets.send_request(f"{model_id}/{set_name}", method="GET"))

    def make_source_set(self, model_id: str, set_name: str, description: str | None, url: str | None) -> None:
        """Make an unlisted set with a source for each layer of the model."""
        self._sets.new(set_name, model_id, description, url)

    def has_latent(self, model_id: str, source_id: str, index: int) -> bool:
        """Whether the site has a latent."""
        try:
            return _object(self._features.send_request(f"{model_id}/{source_id}/{index}", method="GET")) is not None
        except SiteError as e:
            if e.status == 404:
                return False
            raise

    def upload(self, model_id: str, source_id: str, rows: Sequence[Row]) -> None:
        """Add latents, all of them or none."""
        place = (model_id, source_id)
        self._features.upload_batch(*place, [self._feature(place, row) for row in rows])

    def _feature(self, place: tuple[str, str], row: Row) -> Any:
        parts, where = self._parts, (*place, row["index"])
        logit = parts["np_feature"].Logit
        return parts["np_feature"].Feature(
            *where,
            density=row["density"],
            top_logits=[logit(**pair) for pair in row["topLogits"]],
            bottom_logits=[logit(**pair) for pair in row["bottomLogits"]],
            explanations=[
                parts["np_explanation"].Explanation(*where, e["text"], e["methodName"], e["modelName"])
                for e in row["explanations"]
            ],
            activations=[parts["np_activation"].Activation(*where, **example) for example in row["activations"]],
        )


class _Sending:
    """How the client's requests are sent; goes before one of its classes."""

    BASE_URL: str
    timeout: tuple[float, float]
    endpoint: str
    api_key: str

    def send_request(self, uri: str = "", method: str = "POST", json: Any = None) -> Any:
        """What the site answers, read as JSON.

        Raises:
            SiteError: anything else.
        """
        url = f"{self.BASE_URL}/{self.endpoint}/{uri}"
        headers = {"X-Api-Key": self.api_key, "Content-Type": "application/json", "Accept-Encoding": "gzip"}
        body = None if json is None else encoded(json)
        try:
            answer = requests.request(
                method, url, data=body, headers=headers, timeout=self.timeout, allow_redirects=False
            )
        except requests.RequestException as e:
            raise SiteError(f"No answer from {urlsplit(url).netloc}: {type(e).__name__}: {e}.") from e
        try:
            found, readable = answer.json(), True
        except ValueError:
            found, readable = None, False
        if 200 <= answer.status_code < 300 and readable:
            return found
        raise _error(answer, found if isinstance(found, dict) else None)


def check_texts(**arguments: object) -> None:
    """Raise `ConfigError` for an argument that is neither a text nor None, without showing it."""
    for name, value in arguments.items():
        if not isinstance(value, str | None):
            raise ConfigError(f"{name} must be a text, not of type {type(value).__name__}.")


def _error(answer: requests.Response, found: dict[str, Any] | None) -> SiteError:
    status, host = answer.status_code, urlsplit(answer.url).netloc
    if 300 <= status < 400:
        place = answer.headers.get("Location", "another place")
        return SiteError(f"{host} sends on to {place}; if you trust that, give its address (base_url).", status)
    if status == 401:
        return SiteError(f"{host} does not know this API key. {_WHERE_KEYS_ARE}.", status)
    said = "a page, and no JSON"
    if found is not None:
        said = _line(found.get("error") or found.get("message") or "no reason given")
        said += f" (at {_line(found['path'])})" if found.get("path") else ""
    wait = _seconds(answer.headers.get("Retry-After")) if status in (429, 503) else None
    return SiteError(f"{host} answered {status}: {said}.", status, wait, by_its_code=found is not None)


def _line(said: Any) -> str:
    """What the site says as one short line, in which nothing does anything to a terminal."""
    return visible_name(" ".join(str(said).split()).rstrip(".")[:500])


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for, at most an hour."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None


def _object(found: Any) -> dict[str, Any] | None:
    if found is None or isinstance(found, dict):
        return found
    raise SiteError(
        "The site answered in a form that is not understood; is this the address of Neuronpedia's API?", 400
    )


def _checked_url(url: str) -> str:
    parts = urlsplit(url.rstrip("/"))
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.username or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no address of an API, such as {BASE_URL}.")
    if parts.scheme == "http" and not local:
        raise ConfigError(f"{url} is not encrypted, and your API key would be sent to it. Use https.")
    return f"{parts.scheme}://{parts.netloc}{parts.path or '/api'}"


def _checked_key(key: str) -> str:
    key = key.strip()
    if not key:
        raise ConfigError(f"Neuronpedia takes uploads with an API key: set {KEY_VARIABLE}. {_WHERE_KEYS_ARE}.")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"The API key has characters that no key has. {_WHERE_KEYS_ARE}.")
    return key


def _client_module(name: str) -> Any:
    try:
        return importlib.import_module(f"neuronpedia.{name}")
    except Exception as e:  # as of a dependency that does not fit
        broken = "" if isinstance(e, ImportError) else f" The one here fails with {type(e).__name__}: {e}."
        raise DependencyError(
            f'Uploading needs Neuronpedia\'s client: pip install "sae-lens-gemma4[neuronpedia]".{broken}'
        ) from e
