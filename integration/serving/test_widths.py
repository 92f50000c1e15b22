"""Drafts of other lengths than 4: both servers alike."""

from __future__ import annotations

from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    check_record,
    expect_alike_at_once,
    expect_alike_one_at_a_time,
    prompts,
)

SETUPS = tuple(Setup(f"width{count - 1}-{count}", MANY, draft_tokens=count) for count in (2, 4, 6))


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    expect_alike_one_at_a_time(servers, report, prompts(SHORT_LENGTHS, seed=41))


def test_many_at_once(servers: AbServers, report: Report) -> None:
    expect_alike_at_once(servers, report, (7, 16), seed=40)


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
