"""What a judge may cost, told before and kept to.

Before a call the most it can cost is set aside: a token for each byte of the prompt (no tokenizer in use makes more)
and all output tokens it may have. What the reply says it used is booked in its place. So a budget is never exceeded by
what replies report, whatever a tokenizer does, and it can end a run early only by as much as the calls in flight might
still have cost. A call that failed without a reply costs nothing here; whether its maker charges for it cannot be seen.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.judges.judge import Cost

BYTES_PER_TOKEN = 3.5
"""For estimates: English prose has about 4 bytes a token, JSON and other languages have fewer."""
FRAMING_TOKENS = 64
"""What a chat template puts around two messages, at most."""


class BudgetError(ConfigError):
    """The next call does not fit in the budget; what was answered is kept in the cache."""


class Prices(NamedTuple):
    """US dollars per million tokens; both None where they are not stated."""

    input: float | None = None
    output: float | None = None

    def usd(self, input_tokens: float, output_tokens: float) -> float | None:
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class Used(NamedTuple):
    """What calls used: `input_tokens` and `output_tokens` as replies state them."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Budget:
    """Counts calls and tokens, and refuses a call that might go beyond; any number of threads may share it.

    Args:
        most_calls, most_usd: None: no limit. A limit in dollars needs prices.
        most_output: output tokens that one call can have.
    """

    def __init__(
        self, prices: Prices, most_output: int, *, most_calls: int | None = None, most_usd: float | None = None
    ) -> None:
        self.prices, self.most_output, self.most_calls, self.most_usd = prices, most_output, most_calls, most_usd
        self.used = Used()
        self._open = 0
        self._set_aside = 0.0
        self._changed = threading.Condition()

    @property
    def usd(self) -> float | None:
        """Spent so far, without calls in flight."""
        return self.prices.usd(self.used.input_tokens, self.used.output_tokens)

    def most_of(self, n_bytes: int) -> float:
        """The most that a call with a prompt of so many bytes can cost, in US dollars; 0 without prices."""
        return self.prices.usd(n_bytes + FRAMING_TOKENS, self.most_output) or 0.0

    def reserve(self, n_bytes: int) -> float:
        """Set aside for a call; waits for others in flight where only they might leave too little.

        Returns:
            What was set aside, for `book` or `release`.

        Raises:
            BudgetError: it does not fit in what is left.
        """
        most = self.most_of(n_bytes)
        with self._changed:
            while (lacking := self._lacking(most)) is not None:
                if not self._open:
                    raise BudgetError(lacking)
                self._changed.wait()
            self._open += 1
            self._set_aside += most
        return most

    def book(self, set_aside: float, input_tokens: int, output_tokens: int) -> None:
        """Enter what a reply used in the place of what was set aside."""
        with self._changed:
            calls, tokens_in, tokens_out = self.used
            self.used = Used(calls + 1, tokens_in + input_tokens, tokens_out + output_tokens)
            self._close(set_aside)

    def release(self, set_aside: float) -> None:
        """A call that had no reply."""
        with self._changed:
            self._close(set_aside)

    def cost(self, prompt_bytes: list[int], cached: int, tries: int) -> Cost:
        """Of calls with prompts of so many bytes, each made up to `tries` times."""
        tokens = sum(math.ceil(n / BYTES_PER_TOKEN) + FRAMING_TOKENS for n in prompt_bytes)
        output = self.most_output * len(prompt_bytes)
        most = sum(map(self.most_of, prompt_bytes)) * tries
        return Cost(
            questions=len(prompt_bytes) + cached,
            cached=cached,
            calls=len(prompt_bytes),
            calls_at_most=len(prompt_bytes) * tries,
            input_tokens=tokens,
            output_tokens=output,
            usd=self.prices.usd(tokens, output),
            usd_at_most=None if self.usd is None else most,
        )

    def record(self) -> dict[str, Any]:
        return {**self.used._asdict(), "usd": self.usd, "max_calls": self.most_calls, "max_usd": self.most_usd}

    def _close(self, set_aside: float) -> None:
        self._open -= 1
        self._set_aside = self._set_aside - set_aside if self._open else 0.0
        self._changed.notify_all()

    def _lacking(self, most: float) -> str | None:
        if self.most_calls is not None and self.used.calls + self._open >= self.most_calls:
            return f"max_calls is {self.most_calls}, and so many calls were made. {self._kept('max_calls')}"
        usd = self.usd
        if self.most_usd is not None and usd is not None and usd + self._set_aside + most > self.most_usd:
            return (
                f"max_usd is {self.most_usd:g}; {usd:.6g} USD are spent in {self.used.calls} calls, and the next call "
                f"may cost {most:.4g}. {self._kept('max_usd')}"
            )
        return None

    def _kept(self, setting: str) -> str:
        return f"What was answered is kept in the cache and costs nothing again: raise {setting} and run it once more."
