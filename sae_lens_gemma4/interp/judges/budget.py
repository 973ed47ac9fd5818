"""What a judge may cost, told before and kept to, over all runs on one folder of answers.

Before a request is sent the most it can cost is entered into the folder's ledger: a token for each byte of the prompt
(no tokenizer in use makes more) and all output tokens it may have. What the reply says it used takes its place, and
nothing does for a request that was refused or never sent. One that has no reply, because it timed out or the run was
killed, may have been billed, and stays as it was entered. So no limit is exceeded by what replies report, whatever a
tokenizer does, and it can end a run early only by as much as the requests without a reply might have cost.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.judges.cache import AnswerCache, Spent
from sae_lens_gemma4.interp.judges.judge import Cost

BYTES_PER_TOKEN = 3.5
"""For estimates: English prose has about 4 bytes a token, JSON and other languages have fewer."""
FRAMING_TOKENS = 64
"""What a chat template puts around two messages, at most."""


class BudgetError(ConfigError):
    """The next request does not fit in what this folder's limit leaves; what was answered is kept in the cache."""


class Prices(NamedTuple):
    """US dollars per million tokens; both None where they are not stated."""

    input: float | None = None
    output: float | None = None

    def usd(self, input_tokens: float, output_tokens: float) -> float | None:
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class Budget:
    """Counts requests and tokens, and refuses a request that might go beyond; any number of threads may share it.

    Args:
        most_calls, most_usd: in the ledger's folder, of all runs; None: no limit. A limit in dollars needs prices, and
            tokens of earlier runs count by these prices.
        most_output: output tokens that one request can have.
        ledger: where what is spent is kept; None: in memory, for this run.
        judge: by which identity it is kept.
    """

    def __init__(
        self, prices: Prices, most_output: int, *, most_calls: int | None = None, most_usd: float | None = None,
        ledger: AnswerCache | None = None, judge: str = "",
    ) -> None:  # fmt: skip
        self.prices, self.most_output, self.most_calls, self.most_usd = prices, most_output, most_calls, most_usd
        self.judge, self._ledger = judge, ledger or AnswerCache(None)
        self.used = Spent()
        """By this run, with requests under way at the most they can use."""
        self._open = 0
        self._changed = threading.Condition()

    def reserve(self, n_bytes: int) -> Spent:
        """Enter the most that a request can use, before it is sent; one reservation is one request.

        Waits for others under way in this run where only they might leave too little.

        Returns:
            What was entered, for `book` or `release`.

        Raises:
            BudgetError: it does not fit in what is left.
        """
        most = Spent(1, n_bytes + FRAMING_TOKENS, self.most_output, 1)
        with self._changed:
            while (lacking := self._enter(most, lambda spent: self._lacking(spent, most))) is not None:
                if not self._open:
                    raise BudgetError(lacking)
                self._changed.wait()
            self._open += 1
        return most

    def book(self, reserved: Spent, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """A request that was, or may be, billed: what it used, where a reply says so, takes the place of the most."""
        tokens_in = reserved.input_tokens if input_tokens is None else input_tokens
        tokens_out = reserved.output_tokens if output_tokens is None else output_tokens
        assumed = input_tokens is None or output_tokens is None
        self._close(Spent(1, tokens_in, tokens_out, int(assumed)).plus(reserved, -1))

    def release(self, reserved: Spent) -> None:
        """A request that was refused or never sent."""
        self._close(Spent().plus(reserved, -1))

    def cost(self, prompt_bytes: list[int], cached: int, tries: int, again_bytes: int = 0) -> Cost:
        """Of prompts of so many bytes, each sent up to `tries` times, with `again_bytes` more after the first."""
        tokens = sum(math.ceil(n / BYTES_PER_TOKEN) + FRAMING_TOKENS for n in prompt_bytes)
        n, output = len(prompt_bytes), self.most_output * len(prompt_bytes)
        most_in = tries * (sum(prompt_bytes) + n * FRAMING_TOKENS) + (tries - 1) * n * again_bytes
        return Cost(
            questions=n + cached,
            cached=cached,
            calls=n,
            calls_at_most=n * tries,
            input_tokens=tokens,
            output_tokens=output,
            usd=self.prices.usd(tokens, output),
            usd_at_most=self.prices.usd(most_in, output * tries),
        )

    def record(self) -> dict[str, Any]:
        """What this run spent, and what was spent `in_folder` by all runs of whatever name."""
        spent = self._ledger.spent(self.judge)
        return {
            **self._told(self.used),
            "in_folder": self._told(spent),
            "max_calls": self.most_calls,
            "max_usd": self.most_usd,
        }

    def _told(self, spent: Spent) -> dict[str, Any]:
        return {**spent._asdict(), "usd": self.prices.usd(spent.input_tokens, spent.output_tokens)}

    def _enter(self, change: Spent, lacking: Any = None) -> str | None:
        reason = self._ledger.spend(self.judge, change, lacking)
        if reason is None:
            self.used = self.used.plus(change)
        return reason

    def _close(self, change: Spent) -> None:
        with self._changed:
            try:
                if any(change):
                    self._enter(change)
            finally:
                self._open -= 1
                self._changed.notify_all()

    def _lacking(self, spent: Spent, most: Spent) -> str | None:
        where = "in this run" if self._ledger.path is None else "in this folder of answers"
        if self.most_calls is not None and spent.calls >= self.most_calls:
            return f"max_calls is {self.most_calls}, and {spent.calls} were made {where}. {self._kept('max_calls')}"
        usd = self.prices.usd(spent.input_tokens, spent.output_tokens)
        next_usd = self.prices.usd(most.input_tokens, most.output_tokens)
        if self.most_usd is None or usd is None or next_usd is None or usd + next_usd <= self.most_usd:
            return None
        without = f" ({spent.assumed} of them without a reply that tells its tokens, at their most)"
        return (
            f"max_usd is {self.most_usd:g}; {usd:.6g} USD are spent in {spent.calls} calls {where}"
            f"{without if spent.assumed else ''}, and the next call may cost {next_usd:.4g}. {self._kept('max_usd')}"
        )

    def _kept(self, setting: str) -> str:
        return (
            f"What was answered is kept in the cache and costs nothing again: raise {setting} and run it once more; it "
            "may then spend the difference."
        )
