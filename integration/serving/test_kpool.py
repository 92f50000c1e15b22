"""A model with a pooled index, filled in its graphs: same tokens and drafts, and who filled what.

    python -m integration.serving.serve_test kpool

This slice has not run yet. It needs SGLang 0.5.20 or later and takes one GPU. All servers have the
plugin of ``kpool_attention/``; those without sglang-nsa-plugin have SGLang's own fused metadata. Replays
of the second setup are all shadow-checked.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from integration.releases import differences
from integration.serving import checkpoint
from integration.serving.ab_servers import (
    ALL_ROLES_ENV,
    MANY,
    PROBE,
    ROLES,
    AbServers,
    Environment,
    Setup,
)
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    assert_alike,
    at_once,
    check_replays,
    mismatches,
    of_role,
    one_at_a_time,
    prompts,
    read_record,
    scheduler_figures,
    summary,
)
from integration.serving.test_roles import kept

POOL = 4  # tokens of an index key, as GLM-5.3-Flash has them
ATTENTION = Path(__file__).parent / "kpool_attention"
PATH = os.pathsep.join(filter(None, [str(ATTENTION), str(PROBE), os.environ.get("PYTHONPATH")]))
FILLED: Environment = {**ALL_ROLES_ENV, "PYTHONPATH": PATH}
CHECKED: Environment = {**FILLED, "SGLANG_NSA_METADATA_CHECK": "1"}
SGLANG: Environment = {"SGLANG_PLUGINS": "probe,kpool_attention", "PYTHONPATH": PATH}
SETUPS = (
    Setup("kpool", MANY, {"plugin": FILLED, "sglang": SGLANG}),
    Setup("kpool-checked", MANY, {"plugin": CHECKED, "sglang": SGLANG}),
)
# Around multiples of the pool and of its pages, which have 64 pools.
LENGTHS = (*SHORT_LENGTHS, 61, 62, 66, 255, 256, 257, 1_021, 1_022, 1_023, 1_024)
SHARED = 300  # tokens of a beginning that is in the cache: more than a page


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instead of the model of the other slices."""
    if not differences.of(differences.HAS_POOLED_INDEX):
        pytest.skip("this SGLang serves no model with a pooled index")
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("kpool"), index_kpool=POOL)


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    """Also two that begin alike, the second with a prefix from the cache."""
    begin, *ends = prompts([SHARED, 40, 41], seed=161)
    asked = [*prompts(LENGTHS, seed=160), *(begin + end for end in ends)]
    figures = summary(one_at_a_time(servers, asked))
    report(f"{servers.setup.name}.one_at_a_time", figures)
    assert mismatches(figures["each"]) == []
    drafts = figures["accepted_drafts"]["sglang"]
    assert len(drafts) == servers.setup.draft_tokens, f"some step should accept all drafts: {drafts}"


def test_many_at_once(servers: AbServers, report: Report) -> None:
    rows = [at_once(servers, count, seed=160 + count) for count in (3, 7, 16)]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def test_record(servers: AbServers, report: Report) -> None:
    """Every role is in place, SGLang filled no step, and the check compared some and found nothing."""
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    sglang = scheduler_figures(servers["sglang"])
    counted = {role: kept(of_role(probe, role)) for role in ROLES}
    figures = {"probe": counted, "sglang": {role: kept(of_role(sglang, role)) for role in ROLES}}
    report(f"{servers.setup.name}.record", {"record": record, **figures})
    assert record["in_place"] == dict.fromkeys(ROLES, True), record
    is_checked = servers.setup.environments["plugin"] == CHECKED
    for role in ROLES:
        found = record["roles"][role]
        assert found["fallbacks"] == {}, role
        check_replays(role, found, counted[role])
        assert (found["checks"] > 0) == is_checked, role
        assert found["mismatches"] == 0, role
