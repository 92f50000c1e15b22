"""Target-verify filled in its graph, too: same tokens and drafts, with and without the shadow check.

Verify metadata decides which tokens the target model sees, so an error in it shows in the tokens.
"""

from __future__ import annotations

import pytest

from integration.serving.ab_servers import PLUGIN_ENV, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import (
    Report,
    assert_alike,
    at_once,
    expect_alike_one_at_a_time,
    in_graph,
    read_record,
    scheduler_figures,
)

ROLES = ("draft-extend", "verify")
BOTH = {**PLUGIN_ENV, "SGLANG_NSA_METADATA_ROLES": ",".join(ROLES)}
CHECKED = {**BOTH, "SGLANG_NSA_METADATA_CHECK": "1"}
SETUPS = (
    Setup("verify", environments={"plugin": BOTH, "sglang": SGLANG_ENV}),
    Setup("verify-checked", environments={"plugin": CHECKED, "sglang": SGLANG_ENV}),
)


@pytest.fixture(autouse=True)
def _needs_graphs(servers: AbServers) -> None:
    if not in_graph(scheduler_figures(servers["plugin"])):
        pytest.skip(
            "this SGLang runs draft-extend without a graph, and the plugin fills no verify there"
        )


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    expect_alike_one_at_a_time(servers, report, seed=51)


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=50 + count) for count in (3, 7, 16)]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(servers: AbServers, report: Report) -> None:
    """Both roles are in place, SGLang filled no step, and the check compared some and found nothing."""
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    report(f"{servers.setup.name}.record", {"record": record, "probe_steps": probe["replays"]})
    assert record["in_place"] == dict.fromkeys(ROLES, True), record
    unless_0_5_15 = ("short while the plugin fills verify", "SGLang's: this SGLang does not fit")
    assert record["tree_mask"].startswith(unless_0_5_15), record
    is_checked = servers.setup.name == "verify-checked"
    for role in ROLES:
        found = record["roles"][role]
        assert found["backend"] == "cuda", role
        assert found["fallbacks"] == {}, role
        assert found["replays"] > 0, role
        assert sorted(found["captures"]) == sorted(probe["capture_bs"]), role
        assert (found["checks"] > 0) == is_checked, role
        assert found["mismatches"] == 0, role
    assert record["roles"]["draft-extend"]["replays"] == probe["replays"]
