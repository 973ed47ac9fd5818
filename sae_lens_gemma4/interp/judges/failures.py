"""A request that brought no reply: whether it may be billed, whether to send it again and when, and what to say.

The makers' clients would retry by themselves, but unseen: a request that timed out may have been answered and billed,
and a budget has to know of it. So they send each request once, and what failed is judged here. A request may be billed
unless the server said that it does no work for it (a 4xx, 503 or 529, a redirect), or it was never sent.
"""

from __future__ import annotations

import email.utils
import math
import random
import re
import time
from collections.abc import Mapping
from typing import Any

from sae_lens_gemma4.interp.judges.judge import JudgeError
from sae_lens_gemma4.interp.judges.quoting import cleaned

LONGEST_WAIT_S = 600.0
"""A server that asks for a longer pause ends the run instead."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_LONGEST_REASON = 300
_UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")
"""httpx's errors before the first byte."""
_TOO_LONG = re.compile(
    r"context[ _](length|window|limit|size)|prompt is too long|longer than the maximum model length|"
    r"string_above_max_length|maximum number of tokens allowed|max_tokens must be at least 1, got -",
    re.IGNORECASE,
)
"""As OpenAI, Anthropic, vLLM, SGLang, llama.cpp and Google's servers say it."""
_WHERE_LOOKED = 500
"""Characters: servers may quote the request after their reason, and a corpus may say anything."""


class RequestError(JudgeError):
    """One request without a usable reply.

    Attributes:
        billable: whether its maker may charge for it.
        passes: whether the same request may have a reply later.
        wait_s: seconds that the server asked to be left alone; None where it did not say.
        too_long: the model cannot read this question, but others.
        adapted: the client has left out what the server refused, so that the next request is another.
    """

    def __init__(
        self, message: str, *, billable: bool = False, passes: bool = False, wait_s: float | None = None,
        too_long: bool = False, adapted: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.billable, self.passes, self.wait_s, self.too_long = billable, passes, wait_s, too_long
        self.adapted = adapted


def failure_of(sdk: Any, identity: Mapping[str, Any], why: Exception, key: str) -> RequestError:
    """What an exception of a maker's client means."""
    if isinstance(why, sdk.APIConnectionError):
        cause = why.__cause__
        said = said_of(identity, f"{why} ({type(cause).__name__}: {cause})", key)
        return RequestError(said, billable=type(cause).__name__ not in _UNSENT, passes=True)
    if not isinstance(why, sdk.APIStatusError):
        return RequestError(said_of(identity, why, key), billable=True)
    status = why.status_code
    wait_s = asked_pause_s(why.response.headers)
    advice = {
        401: " Check the API key.", 403: " Check what the API key may do.", 404: " Check model and base_url.",
        429: " Lower concurrency, or wait: what was answered is kept.",
    }.get(status, "")  # fmt: skip
    if long := wait_s is not None and wait_s > LONGEST_WAIT_S:
        advice += f" It asks to be left alone for {wait_s:,.0f} seconds."
    return RequestError(
        said_of(identity, why, key) + advice,
        billable=status == 408 or (status >= 500 and status not in (503, 529)),
        passes=(status in (408, 409, 429) or status >= 500) and not long,
        wait_s=wait_s,
        too_long=status >= 400 and _TOO_LONG.search(str(why)[:_WHERE_LOOKED]) is not None,
    )


def said_of(identity: Mapping[str, Any], why: Any, key: str = "") -> str:
    """A sentence that names the judge and the reason, and never the key."""
    said = str(why).replace(key, "…") if key else str(why)
    at = identity.get("base_url")
    return f"Judge {identity['model']!r}{f' at {at}' if at else ''}: {cleaned(said, _LONGEST_REASON).rstrip('.')}."


def asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` in seconds, of a number or a date (RFC 9110, 10.2.3); `retry-after-ms`, which some send, first."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def pause_s(n_failed: int, asked_s: float | None) -> float:
    """Seconds to wait after the nth failure: ½, 1, 2, … up to 30, less up to a half by chance; not less than asked for.

    Chance parts threads that failed together; no result depends on it.
    """
    grown = min(_FIRST_PAUSE_S * 2.0 ** (n_failed - 1), _LONGEST_PAUSE_S)
    return max(grown * (1 - random.random() / 2), asked_s or 0.0)
