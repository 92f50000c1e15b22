"""One request and many, up to the context's end, cached, cut into chunks and aborted: both alike.

The context ends inside a page and within index_topk, where SGLang's answers are repeatable; a prompt is
filled in several chunks; batches pad to 1, 2, 4, 8 or 16 requests, and 48 are more than any graph holds.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from integration.releases.differences import decode_graphs
from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.ab_stats import Row, accepted_drafts, mean_tokens
from integration.serving.compare import (
    ACCEPTANCE_LIMIT,
    NEW_TOKENS,
    SHORT_LENGTHS,
    Report,
    assert_alike,
    at_once,
    check_record,
    comparison,
    mismatches,
    one_at_a_time,
    prompts,
    relative,
    summary,
)
from integration.serving.server import REQUEST_LIMIT_S, Answer, Server

CONTEXT = 1_500
CHUNK = 256
SETUPS = (
    Setup(
        "cases",
        (
            *MANY,
            *("--context-length", str(CONTEXT)),
            *("--chunked-prefill-size", str(CHUNK)),
            *decode_graphs(16, (1, 2, 4, 8, 16)),
        ),
    ),
)
COUNTS = (1, 3, 5, 7, 16, 48)
LONGEST_WAIT_S = 20.0
ABORT_AFTER_S = 0.3  # 1,000 tokens take longer than a second


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    """From 1 token to several chunks."""
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=11))
    report("cases.one_at_a_time", {"chunk": CHUNK, **summary(rows)})
    assert mismatches(rows) == []
    assert max(row["length"] for row in rows) > 2 * CHUNK


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=20 + count) for count in COUNTS]
    accepted = accepted_drafts(rows)
    tokens_per_step = {name: mean_tokens(counts) for name, counts in accepted.items()}
    apart = relative(**tokens_per_step)
    report("cases.many_at_once", {"each": rows})
    assert_alike(rows)
    assert apart < ACCEPTANCE_LIMIT, tokens_per_step


def test_generation_up_to_the_context(servers: AbServers, report: Report) -> None:
    """Without a number of new tokens, SGLang ends where the context does."""
    rows = one_at_a_time(servers, prompts((700, 1_200, 1_400, 1_470, 1_487), seed=12), None)
    report("cases.up_to_the_context", {"context": CONTEXT, **summary(rows)})
    assert mismatches(rows) == []
    assert all(0 < CONTEXT - row["length"] - row["tokens"] < 10 for row in rows), "none came to the end"


def test_prompts_and_generation_over_the_context(servers: AbServers, report: Report) -> None:
    """Both servers take the same lengths, and refuse the others alike; what follows is unharmed."""
    asked = [(prompt, 1) for prompt in prompts(range(CONTEXT - 14, CONTEXT + 3), seed=13)]
    asked += [(prompt, CONTEXT) for prompt in prompts((1, 800), seed=14)]
    outcomes = {
        name: [outcome(server, prompt, new_tokens) for prompt, new_tokens in asked]
        for name, server in servers.items()
    }
    statuses = [status for status, _ in outcomes["sglang"]]
    rows = one_at_a_time(servers, prompts((90, 1_300), seed=15))
    report("cases.over_the_context", {"statuses": statuses, "after": summary(rows)})
    assert outcomes["plugin"] == outcomes["sglang"]
    assert 200 in statuses
    assert 400 in statuses
    assert mismatches(rows) == []


def outcome(target: Server, prompt: list[int], new_tokens: int) -> tuple[int, Any]:
    """The status, and the tokens of an answer that is one."""
    parameters = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": parameters}
    reply = target.send("POST", "/generate", REQUEST_LIMIT_S, json=body)
    return reply.status_code, reply.json().get("output_ids") if reply.ok else None


def test_cached_prefixes(servers: AbServers, report: Report) -> None:
    """The second request finds its first pages in the radix cache, the third a part of them."""
    (first,) = prompts((700,), seed=16)
    (tail,) = prompts((200,), seed=17)
    rows, cached = [], []
    for prompt in (first, first, first[:450] + tail):
        answers = {name: server.generate(prompt, NEW_TOKENS) for name, server in servers.items()}
        rows.append(comparison(answers["plugin"], answers["sglang"], len(prompt)))
        cached.append({name: answer.meta["cached_tokens"] for name, answer in answers.items()})
    report("cases.cached_prefixes", {"cached_tokens": cached, **summary(rows)})
    assert mismatches(rows) == []
    assert all(each["plugin"] == each["sglang"] for each in cached)
    assert cached[0]["sglang"] == 0
    assert cached[1]["sglang"] > 500
    assert 0 < cached[2]["sglang"] <= 450


def test_aborted_requests(servers: AbServers, report: Report) -> None:
    """Half of a batch is aborted in the middle; the others end, and so does what follows."""
    aborted, kept = {}, {}
    for name, server in servers.items():
        aborted[name], kept[name] = abort_half(server, 8)
    rows = one_at_a_time(servers, prompts((64, 400), seed=18))
    figures = {
        name: [(answer.finish.get("type"), len(answer.output_ids)) for answer in each]
        for name, each in aborted.items()
    }
    report("cases.aborted", {"aborted": figures, "after": summary(rows)})
    for name in servers:
        assert {answer.finish.get("type") for answer in aborted[name]} == {"abort"}, name
        assert all(0 < len(answer.output_ids) < 1_000 for answer in aborted[name]), name
        assert [len(answer.output_ids) for answer in kept[name]] == [1_000] * 4, name
    assert mismatches(rows) == []


def abort_half(target: Server, count: int) -> tuple[list[Answer], list[Answer]]:
    """Every second of ``count`` requests is aborted while it generates 1,000 tokens."""
    answers: dict[int, Answer] = {}

    def ask(number: int, prompt: list[int]) -> None:
        answers[number] = target.generate(prompt, 1_000, rid=f"abort-{number}")

    threads = [
        threading.Thread(target=ask, args=pair) for pair in enumerate(prompts([100] * count, seed=19))
    ]
    for thread in threads:
        thread.start()
    time.sleep(ABORT_AFTER_S)
    for number in range(0, count, 2):
        target.abort(f"abort-{number}")
    for thread in threads:
        thread.join(LONGEST_WAIT_S)
    assert len(answers) == count, f"server {target.name}: {count - len(answers)} requests have no answer"
    return [answers[n] for n in range(0, count, 2)], [answers[n] for n in range(1, count, 2)]


def test_openai_endpoints(servers: AbServers, report: Report) -> None:
    common = {"model": "default", "temperature": 0, "max_tokens": 64, "ignore_eos": True}
    chat = {**common, "messages": [{"role": "user", "content": "Which token is next?"}]}
    text = {**common, "prompt": "Which token is next?"}
    replies: dict[str, list[Row]] = {"plugin": [], "sglang": []}
    for name, server in servers.items():
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            reply = server.request("POST", path, REQUEST_LIMIT_S, json=body)
            replies[name].append({"choices": reply["choices"], "usage": reply["usage"]})
        stream = {**text, "stream": True}
        events = server.send("POST", "/v1/completions", REQUEST_LIMIT_S, json=stream).text
        replies[name].append({"streamed": events.rstrip().endswith("data: [DONE]")})
    report("cases.openai", {"usage": [reply.get("usage") for reply in replies["sglang"]]})
    assert replies["plugin"] == replies["sglang"]
    assert replies["sglang"][0]["choices"][0]["message"]["content"]
    assert replies["sglang"][1]["usage"]["completion_tokens"] == 64
    assert replies["sglang"][2]["streamed"]


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
