"""What a server does while it is switched one way: under requests of our own, or under its users'.

Own requests: one batch of prompts goes out as one streamed call of ``/generate``. Its prompts are random
tokens, new each time, so that no prefix cache holds them. Only the time counts in which all requests
decode: from the last request's first token to the first request's last one, so no prefill is in it.
SGLang reports the steps of a whole request (``spec_verify_ct``). Where it sent an event after each of
them, the time between two events of a request is that of a step, and the median of all of them is a
figure that a few long steps do not move. The mean counts every step: the time from a request's first to
its last event of the window, over the steps between them; where events are fewer than steps, these are
its tokens × (steps ÷ tokens) of the whole request. Tokens a second are those of the whole window.

Other people's load: all draft-extend steps that the plugin counts, over the time between two looks at
``/server_info``. Prefills and pauses are in that time, so keep the load steady.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

from sglang_nsa_plugin.cli.ab.server import Record, Server, ServerError

# Every vocabulary has these tokens, and they are ordinary ones. Special tokens lie at either end.
TOKENS = range(100, 4000)
FEWEST_STEPS = 8
GENERATED = "sglang:generation_tokens_total"

# In an event, which is not parsed as a whole: it may be long, and the next one waits.
_ID = rb'"id":\s*"([^"]+)"'
_TOKENS = rb'"completion_tokens":\s*(\d+)'


class NotResolvedError(Exception):
    """The server answered, but nothing can be compared under this load. The message says why."""


@dataclass
class Measured:
    """What was measured while the switch stood still.

    Attributes:
        step_ms: time of one speculative step, the mean.
        tokens_per_s: tokens a second of all requests together; None where nobody counts them.
        tokens_per_step: tokens that a step gives a request; None under the load of others.
        median_step_ms: the median step; None where no request's events were its steps.
    """

    step_ms: float
    tokens_per_s: float | None
    tokens_per_step: float | None
    median_step_ms: float | None = None


class Window(NamedTuple):
    """What one request did while all of them decoded: from its first to its last event of that time.

    Attributes:
        seconds: between those two events.
        tokens: that came after the first.
        steps: that they took.
        step_s: the time of each step; empty where an event is not always one step.
    """

    seconds: float
    tokens: int
    steps: float
    step_s: list[float]


@dataclass
class Answer:
    """One request's events: when each came, how many tokens it had by then; and the last one's data."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    last: bytes = b""

    def raise_if_cut_short(self) -> None:
        """Neither SGLang nor a lost connection ended the request before its last token."""
        reason = self.meta.get("finish_reason")
        if reason is None:
            raise ServerError("the answer of /generate broke off: did the server die? Its log says more")
        if reason["type"] != "length":
            raise ServerError(f"the server ended a request early: {json.dumps(reason)}")

    @property
    def meta(self) -> dict[str, Any]:
        """SGLang's ``meta_info`` of the finished request."""
        found: dict[str, Any] = json.loads(self.last)["meta_info"]
        return found


class OwnRequests:
    """Batches of random prompts."""

    def __init__(self, server: Server, requests: int, input_len: int, output_len: int) -> None:
        self.server = server
        self.requests = requests
        self.input_len = input_len
        self.output_len = output_len

    def measure(self) -> Measured:
        """Sends one batch and waits for its end."""
        prompts = [random.choices(TOKENS, k=self.input_len) for _ in range(self.requests)]
        answers = collect(self.server.generate(prompts, self.output_len))
        for answer in answers:
            answer.raise_if_cut_short()
        if len(answers) != self.requests:
            raise ServerError(
                f"{self.server.url}/generate answered {len(answers)} of {self.requests} requests"
            )
        return measured(answers)


class OtherLoad:
    """Whatever the server is asked by others, for some seconds."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.server = server
        self.seconds = seconds

    def measure(self) -> Measured:
        """Watches the counters."""
        begin, tokens_begin, steps_begin = self._look()
        sleep(self.seconds)
        end, tokens_end, steps_end = self._look()
        steps = max(after - before for before, after in zip(steps_begin, steps_end, strict=True))
        if steps < FEWEST_STEPS:
            raise NotResolvedError(
                f"the server took {steps} steps in {self.seconds:g} s, fewer than {FEWEST_STEPS}: "
                "keep it busy all the while"
            )
        has_tokens = tokens_begin is not None and tokens_end is not None
        generated = tokens_end - tokens_begin if has_tokens else None  # type: ignore[operator]
        seconds = end - begin
        return Measured(1e3 * seconds / steps, None if generated is None else generated / seconds, None)

    def _look(self) -> tuple[float, float | None, list[int]]:
        tokens = self.server.metric(GENERATED)
        steps = [all_steps(record) for record in self.server.records()]
        return perf_counter(), tokens, steps


def all_steps(record: Record) -> int:
    """The steps of a rank, or of one of its roles, whoever filled them."""
    return filled_by_plugin(record) + sum(map(int, record["fallbacks"].values()))


def filled_by_plugin(record: Record) -> int:
    """The steps of a rank, or of one of its roles, that the plugin filled."""
    return int(record["replays"]) + int(record["launches"])


def collect(events: Iterable[bytes]) -> list[Answer]:
    """The events by request. Only the last one of each is kept: an event repeats all tokens so far."""
    answers: dict[bytes, Answer] = {}
    for event in events:
        now = perf_counter()
        request, tokens = re.search(_ID, event), re.search(_TOKENS, event)
        if request is None or tokens is None:
            raise ServerError(f"/generate sent {event[:300].decode(errors='replace').strip()}")
        answer = answers.setdefault(request[1], Answer())
        answer.times.append(now)
        answer.tokens.append(int(tokens[1]))
        answer.last = event
    return list(answers.values())


def measured(answers: list[Answer]) -> Measured:
    """Step time and tokens while all these requests decode."""
    begin = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    windows = [_inside(answer, begin, end) for answer in answers]
    mean_s = sum(each.seconds for each in windows) / sum(each.steps for each in windows)
    each_s = [step for window in windows for step in window.step_s]
    tokens = sum(answer.tokens[-1] - answer.tokens[0] for answer in answers)
    return Measured(
        step_ms=1e3 * mean_s,
        tokens_per_s=sum(each.tokens / each.seconds for each in windows),
        tokens_per_step=tokens / sum(map(_steps, answers)),
        median_step_ms=1e3 * median(each_s) if each_s else None,
    )


def _inside(answer: Answer, begin: float, end: float) -> Window:
    """What this request did between these times."""
    inside = [i for i, at in enumerate(answer.times) if begin <= at <= end]
    of_request, all_tokens = _steps(answer), answer.tokens[-1] - answer.tokens[0]
    first, last = (inside[0], inside[-1]) if inside else (0, 0)
    seconds = answer.times[last] - answer.times[first]
    tokens = answer.tokens[last] - answer.tokens[first]
    is_event_a_step = len(answer.times) - 1 == of_request
    steps = float(last - first) if is_event_a_step else of_request * tokens / max(all_tokens, 1)
    if steps < FEWEST_STEPS or seconds <= 0:
        raise NotResolvedError(
            f"the requests decode together for fewer than {FEWEST_STEPS} steps: raise --output-len, or "
            "lower --requests to what the server runs at once"
        )
    times = answer.times[first : last + 1] if is_event_a_step else []
    return Window(seconds, tokens, steps, [after - before for before, after in pairwise(times)])


def _steps(answer: Answer) -> int:
    meta = answer.meta
    if not meta.get("spec_verify_ct"):
        raise NotResolvedError(
            "meta_info has no spec_verify_ct: no speculative step answered these requests"
        )
    return int(meta["spec_verify_ct"])
