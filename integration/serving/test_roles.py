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

import pytest

from integration.serving.ab_servers import (
    ALL_ROLES_ENV,
    MANY,
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
    expect_alike_at_once,
    expect_every_role_filled,
    mismatches,
    one_at_a_time,
    other_answers,
    prompts,
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
    """0.5.13 and 0.5.14 run draft-extend alone without a graph; earlier releases have no other hook."""
    if not scheduler_figures(servers["sglang"])["roles"]:
        pytest.skip("with this SGLang the plugin fills draft-extend alone")


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=51))
    figures = summary(rows)
    per_step = {name: mean_tokens(counts) for name, counts in figures["accepted_drafts"].items()}
    report(f"{servers.setup.name}.one_at_a_time", {"tokens_per_step": per_step, **figures})
    assert other_answers(rows) == []
    assert len(figures["accepted_drafts"]["sglang"]) == servers.setup.draft_tokens, (
        "some step should accept all drafts"
    )
    if servers.setup.draft_tokens - 1 <= FEW_STEPS:
        assert mismatches(rows) == []
    assert per_step["plugin"] >= per_step["sglang"] * (1 - ACCEPTANCE_LIMIT), per_step


def test_many_at_once(servers: AbServers, report: Report) -> None:
    expect_alike_at_once(servers, report, (3, 7, 16), seed=50)


def test_record(servers: AbServers, report: Report) -> None:
    record = expect_every_role_filled(servers, report)
    unless_0_5_15 = ("short while the plugin fills verify", "SGLang's: this SGLang does not fit")
    assert record["tree_mask"].startswith(unless_0_5_15), record
