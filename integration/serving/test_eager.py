"""Without CUDA graphs, and without the overlapping scheduler: both servers alike."""

from __future__ import annotations

from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    check_record,
    expect_alike_at_once,
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
    expect_alike_at_once(servers, report, (3, 16), seed=50)


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
