"""Without CUDA graphs, and without the overlapping scheduler: both servers alike."""

from __future__ import annotations

from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    assert_alike,
    at_once,
    check_record,
    mismatches,
    one_at_a_time,
    prompts,
    read_record,
    summary,
)

NO_GRAPHS = Setup("no-graphs", (*MANY, "--disable-cuda-graph"))
SETUPS = (NO_GRAPHS, Setup("no-overlap", (*MANY, "--disable-overlap-schedule")))


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=51))
    report(f"{servers.setup.name}.one_at_a_time", summary(rows))
    assert mismatches(rows) == []


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=50 + count) for count in (3, 16)]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(servers: AbServers, report: Report) -> None:
    """Where there are no graphs, the in-graph adapter leaves everything to SGLang and says so."""
    record = read_record(servers["plugin"])
    if servers.setup.name != NO_GRAPHS.name or record["in_place"]["draft-extend"]:
        check_record(servers, report)
        return
    report(f"{servers.setup.name}.record", {"record": record})
    assert "CUDA graphs disabled" in record["reason"]
    assert record["captures"] == []
    assert record["replays"] == 0
    assert record["fallbacks"] == {}
