"""Without CUDA graphs, and without the overlapping scheduler: both arms alike."""

from __future__ import annotations

from integration.serving.ab_servers import MANY, Arms, Setup
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


def test_one_at_a_time(arms: Arms, report: Report) -> None:
    rows = one_at_a_time(arms, prompts(SHORT_LENGTHS, seed=51))
    report(f"{arms.setup.name}.one_at_a_time", summary(rows))
    assert mismatches(rows) == []


def test_many_at_once(arms: Arms, report: Report) -> None:
    rows = [at_once(arms, count, seed=50 + count) for count in (3, 16)]
    report(f"{arms.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(arms: Arms, report: Report) -> None:
    """Where there are no graphs, the in-graph adapter leaves everything to SGLang and counts nothing."""
    record = read_record(arms["plugin"].server)
    if arms.setup.name != NO_GRAPHS.name or record["adapter"] != "in-graph":
        check_record(arms, report)
        return
    report(f"{arms.setup.name}.record", {"record": record})
    assert record["captures"] == []
    assert record["replays"] == 0
    assert record["fallbacks"] == {}
