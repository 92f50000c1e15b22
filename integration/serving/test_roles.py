"""Every plan of a speculative step filled in its graph: same tokens and drafts, and who filled what.

    python -m integration.serving.serve_test roles
    NSA_TEST_ROLES=draft-extend,verify python -m integration.serving.serve_test roles

Verify metadata decides which tokens the target model sees, so an error in it shows in the tokens; in
the other two it shows in the accepted drafts. The last setup has 5 steps: from 4 on, SGLang leaves the
logits' schedule and the top-k plan of its first three draft steps as they were captured
(docs/upstream/), which the plugin does not. There more drafts may be accepted than by SGLang, and the
tokens are the same.
"""

from __future__ import annotations

from typing import Any

import pytest

from integration.serving.ab_servers import (
    ALL_ROLES_ENV,
    MANY,
    ROLES,
    SGLANG_ENV,
    AbServers,
    Environment,
    Setup,
)
from integration.serving.ab_stats import mean_tokens
from integration.serving.compare import (
    ACCEPTANCE_LIMIT,
    SHORT_LENGTHS,
    Report,
    assert_alike,
    at_once,
    check_replays,
    mismatches,
    of_role,
    one_at_a_time,
    other_answers,
    prompts,
    read_record,
    scheduler_figures,
    summary,
)

CHECKED: Environment = {**ALL_ROLES_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}
# Up to 3 steps SGLang's accepted drafts are to be the plugin's.
FEW_STEPS = 3
SETUPS = (
    Setup("roles", MANY, {"plugin": ALL_ROLES_ENV, "sglang": SGLANG_ENV}),
    Setup("roles-checked", MANY, {"plugin": CHECKED, "sglang": SGLANG_ENV}),
    Setup("roles-5-steps", MANY, {"plugin": ALL_ROLES_ENV, "sglang": SGLANG_ENV}, draft_tokens=6),
)


@pytest.fixture(autouse=True)
def _needs_graphs(servers: AbServers) -> None:
    if read_record(servers["plugin"])["adapter"] != "in-graph":
        pytest.skip("this SGLang runs draft-extend without a graph, where the plugin has no other role")


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    figures = summary(one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=51)))
    per_step = {name: mean_tokens(counts) for name, counts in figures["accepted_drafts"].items()}
    report(f"{servers.setup.name}.one_at_a_time", {"tokens_per_step": per_step, **figures})
    assert other_answers(figures["each"]) == []
    assert len(figures["accepted_drafts"]["sglang"]) == servers.setup.draft_tokens, (
        "some step should accept all drafts"
    )
    if servers.setup.draft_tokens - 1 <= FEW_STEPS:
        assert mismatches(figures["each"]) == []
    assert per_step["plugin"] >= per_step["sglang"] * (1 - ACCEPTANCE_LIMIT), per_step


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=50 + count) for count in (3, 7, 16)]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(servers: AbServers, report: Report) -> None:
    """Every role is in place, SGLang filled no step, and the check compared some and found nothing."""
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    counted = {role: kept(of_role(probe, role)) for role in ROLES}
    sglang = scheduler_figures(servers["sglang"])
    report(
        f"{servers.setup.name}.record",
        {
            "record": record,
            "probe": counted,
            "sglang": {role: kept(of_role(sglang, role)) for role in ROLES},
        },
    )
    assert record["in_place"] == dict.fromkeys(ROLES, True), record
    unless_0_5_15 = ("short while the plugin fills verify", "SGLang's: this SGLang does not fit")
    assert record["tree_mask"].startswith(unless_0_5_15), record
    is_checked = servers.setup.name == "roles-checked"
    for role in ROLES:
        found = record["roles"][role]
        assert found["backend"] == "cuda", role
        assert found["fallbacks"] == {}, role
        check_replays(role, found, counted[role])
        assert (found["checks"] > 0) == is_checked, role
        assert found["mismatches"] == 0, role


def kept(figures: Any) -> dict[str, Any]:
    """What the probe counted and timed of one role."""
    names = ("capture_bs", "replays", "replays_by_batch_size", "fill_us")
    return {name: figures[name] for name in names}
