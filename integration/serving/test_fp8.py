"""FP8 KV cache and FlashMLA's other kernel, which has metadata of its own: both servers alike."""

from __future__ import annotations

from integration.serving.ab_servers import FP8, MANY, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    check_record,
    expect_alike_at_once,
    mismatches,
    one_at_a_time,
    prompts,
    summary,
)

SETUPS = (Setup("fp8", (*MANY, *FP8), decode_backend="flashmla_kv"),)


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=31))
    report("fp8.one_at_a_time", summary(rows))
    assert mismatches(rows) == []


def test_many_at_once(servers: AbServers, report: Report) -> None:
    expect_alike_at_once(servers, report, (3, 16, 24), seed=30)


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
