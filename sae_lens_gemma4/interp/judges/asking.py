"""A language model as a judge: asked by several threads, its answers checked, kept and counted.

An answer that cannot be used is asked for again, with what was wrong; after `retries` the question has no answer, which
is counted and never filled in. The same question is asked once. Every answer is in the cache before it is used, so
what ends a run (a budget, an error, Ctrl-C, a kill) loses no answer that came. Each request is entered in the budget
before it is sent, those that are sent again after a failure too.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from tqdm.auto import tqdm

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.errors import warn_caller
from sae_lens_gemma4.interp.judges.budget import Budget
from sae_lens_gemma4.interp.judges.cache import NOTHING, AnswerCache, Known, key_of
from sae_lens_gemma4.interp.judges.clients import Client, Reply, identity_of
from sae_lens_gemma4.interp.judges.failures import RequestError, pause_s
from sae_lens_gemma4.interp.judges.judge import (
    LABEL_CHARACTERS,
    Answer,
    Cost,
    DetectionQuestion,
    JudgeError,
    LabelQuestion,
    TooLongWarning,
)
from sae_lens_gemma4.interp.judges.questions import AGAIN_BYTES, Prompt, Unusable, answer_of, prompt_of, prompts_hash

Question = LabelQuestion | DetectionQuestion
Found = Answer | list[bool]

_CUT_OFF = "it was cut off at max_output_tokens"
_TOO_LONG = "the question is longer than the model reads"


class LLMJudge:
    """A judge of questions that a client answers.

    Args:
        name: who labels will be said to be by.
        concurrency: calls at once.
        retries: how often a question is asked again whose answer cannot be used, over all runs on its cache; and how
            often in one run because its requests fail in passing.
        sleep: waits so many seconds before a request is sent again; None: for real, until the run ends.
    """

    def __init__(
        self, name: str, client: Client, cache: AnswerCache, budget: Budget, *,
        concurrency: int = 4, retries: int = 3, progress: bool = False,
        sleep: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        self.identity = identity_of(client.identity)
        self.name, self.client, self.cache, self.budget = name, client, cache, budget
        self.concurrency, self.retries, self.progress, self.sleep = concurrency, retries, progress, sleep
        self.counts: Counter[str] = Counter()
        """Different `questions`: answered from the cache (`cached`), by the model or not at all (`asked`), and of both
        those without an answer (`unanswered`)."""
        self.refused: Counter[str] = Counter()
        """Why questions had to be asked again or have no answer: replies that could not be used, by reason."""
        self._lock = threading.Lock()

    def label(self, questions: Sequence[LabelQuestion]) -> list[Answer | None]:
        """As `Judge`; a question without positives has no answer, and is not asked.

        Raises:
            JudgeError: the model cannot be reached, or refuses.
            BudgetError: what may be spent in this folder is used up. All answers so far are kept by both.

        Warns `TooLongWarning` of questions that the model cannot read; they have no answer, and a later run asks again.
        """
        return cast("list[Answer | None]", self._ask(questions))

    def detect(self, questions: Sequence[DetectionQuestion]) -> list[list[bool] | None]:
        """As `Judge`; errors as `label`."""
        return cast("list[list[bool] | None]", self._ask(questions))

    def cost(
        self, n_label: int, n_detect: int, *, n_examples: int = 20, bytes_per_example: int = 400, n_promoted: int = 10
    ) -> Cost:
        contexts = (Example(text="x" * bytes_per_example),) * n_examples
        label = prompt_of(LabelQuestion(0, contexts, (), ("x" * 8,) * n_promoted)).n_bytes
        detect = prompt_of(DetectionQuestion(0, "x" * LABEL_CHARACTERS, contexts)).n_bytes
        return self.budget.cost([label] * n_label + [detect] * n_detect, 0, self._tries, AGAIN_BYTES)

    def cost_of(self, questions: Sequence[Question]) -> Cost:
        by_key = {self._key(prompt): (q, prompt) for q in questions if _asks(q) for prompt in [prompt_of(q)]}
        known = {key: self.cache.get(key) for key in by_key}
        open_ = [p.n_bytes for key, (q, p) in by_key.items() if self._usable(q, known[key]) is None
                 and known[key].refused <= self.retries]  # fmt: skip
        return self.budget.cost(open_, len(by_key) - len(open_), self._tries, AGAIN_BYTES)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "identity": self.identity,
            **dict(self.client.identity),
            "left_out": sorted(self.client.left_out),
            "prompts": prompts_hash(),
            **{key: self.counts[key] for key in ("questions", "cached", "asked", "unanswered")},
            "unusable": self.refused.total(),
            "refused": dict(sorted(self.refused.items())),
            **self.budget.record(),
        }

    @property
    def _tries(self) -> int:
        """Requests that a question may need: after unusable answers and after failures, `retries` each."""
        return 1 + 2 * self.retries

    def _ask(self, questions: Sequence[Question]) -> list[Found | None]:
        prompts = [prompt_of(q) if _asks(q) else None for q in questions]
        keys = [None if p is None else self._key(p) for p in prompts]
        todo = {key: (q, p) for key, q, p in zip(keys, questions, prompts, strict=True) if key and p}
        found: dict[str, Found | None] = {}
        with tqdm(total=len(todo), desc=self.name, disable=not self.progress, unit="question") as bar:
            for key, (question, _) in list(todo.items()):
                known = self.cache.get(key)
                usable = self._usable(question, known)
                if usable is not None or known.refused > self.retries:
                    found[key] = usable
                    del todo[key]
                    bar.update()
            self.counts.update(questions=len(found), cached=len(found))
            n_long = self.refused[_TOO_LONG]

            def work(key: str, stop: threading.Event) -> None:
                found[key] = self._answer(key, *todo[key], stop=stop)

            _in_threads(list(todo), work, self.concurrency, bar)
        self.counts["unanswered"] += sum(answer is None for answer in found.values())
        if n_long := self.refused[_TOO_LONG] - n_long:
            warn_caller(
                f"{self.name} cannot read {n_long} of {len(found)} questions, which are longer than its context and "
                "have no answer: show fewer or shorter contexts, or lower max_output_tokens.",
                TooLongWarning,
            )
        return [found[key] if key else _unasked(q) for key, q in zip(keys, questions, strict=True)]

    def _answer(self, key: str, question: Question, prompt: Prompt, *, stop: threading.Event) -> Found | None:
        """Ask until there is a usable answer; one of another process is taken as it is."""
        known, sent = self.cache.get(key), prompt
        failures: list[RequestError] = []
        while (usable := self._usable(question, known)) is None and known.refused <= self.retries:
            if known.reason is not None:
                sent = prompt.again(known.reason)
            try:
                reply = self._reply(sent, failures, stop)
                usable = answer_of(question, reply.text)
            except RequestError as e:
                if not e.too_long:
                    raise
                self._refuse(_TOO_LONG)  # for nothing, so that it need not be remembered
                break
            except Unusable as e:
                reason = _CUT_OFF if reply.cut_off else str(e)
                self.cache.refuse(key, self.name, reason)
                self._refuse(reason)
                known = self.cache.get(key)
            else:
                self.cache.put(key, self.name, reply.text)
                break
        with self._lock:
            self.counts.update(questions=1, asked=1)
        return usable

    def _reply(self, prompt: Prompt, failures: list[RequestError], stop: threading.Event) -> Reply:
        """Send until there is a reply; `failures` are those of the question so far, of which it may have `retries`."""
        while True:
            if stop.is_set():  # and the error that ended the run is told already
                raise JudgeError(f"{self.name} is asked no more.")
            try:
                return self._request(prompt)
            except RequestError as e:
                if e.adapted:
                    continue
                failures.append(e)
                if e.too_long or not e.passes or len(failures) > self.retries:
                    raise
                (self.sleep or stop.wait)(pause_s(len(failures), e.wait_s))

    def _request(self, prompt: Prompt) -> Reply:
        """One request, entered in the budget before it is sent."""
        reserved = self.budget.reserve(prompt.n_bytes)
        try:
            reply = self.client.complete(prompt)
        except BaseException as e:
            if isinstance(e, RequestError) and not e.billable:
                self.budget.release(reserved)
            else:
                self.budget.book(reserved)
            raise
        self.budget.book(reserved, reply.input_tokens, reply.output_tokens)
        return reply

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self.refused[reason] += 1

    def _usable(self, question: Question, known: Known) -> Found | None:
        """A kept answer, checked again: the file may be anybody's."""
        if known is NOTHING or known.text is None:
            return None
        try:
            return answer_of(question, known.text)
        except Unusable:
            return None

    def _key(self, prompt: Prompt) -> str:
        return key_of(self.client.identity, prompt.system, prompt.user)


def _asks(question: Question) -> bool:
    return bool(question.positives if isinstance(question, LabelQuestion) else question.examples)


def _unasked(question: Question) -> Found | None:
    return None if isinstance(question, LabelQuestion) else []


def _in_threads(jobs: Sequence[Any], work: Callable[[Any, threading.Event], object], n_threads: int, bar: Any) -> None:
    """Do the jobs. After an error requests under way are ended, none is begun, and the first error is raised.

    Threads are daemons, so that Ctrl-C need not wait for replies: concurrent.futures would wait for them at exit.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    for job in jobs:
        waiting.put(job)

    def loop() -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                work(job, stop)
            except BaseException as e:
                ended.put(e)
                stop.set()
                return
            bar.update()
        ended.put(None)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(min(n_threads, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        errors = [error for _ in threads if (error := ended.get()) is not None]
    except BaseException:  # Ctrl-C
        stop.set()
        raise
    if errors:
        raise errors[0]
