"""Drafts of other lengths than 4: both servers alike."""

from __future__ import annotations

from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.compare import (
    Report,
    assert_alike,
    at_once,
    check_record,
    expect_alike_one_at_a_time,
)

SETUPS = tuple(Setup(f"width{count - 1}-{count}", MANY, draft_tokens=count) for count in (2, 4, 6))


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    expect_alike_one_at_a_time(servers, report, seed=41)


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=40 + count) for count in (7, 16)]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
