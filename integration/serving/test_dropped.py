"""Nobody reads a page table that the plugin leaves out: with -1 in its place answers stay the same.

    python -m integration.serving.serve_test dropped
    python -m integration.serving.serve_test dropped -- -k "flashmla_sparse or legacy"

The wide page table, ``page_table_1``, is neither filled nor allocated where SGLang's own
conditions, speculation aside, say that nothing reads it. Here the probe (``probe/``) gives the captured
metadata such a table and fills it with -1, which is no slot. Whatever read it would leave every token
out. The control is SGLang's older top-k, which does read it: there verify's -1 changes tokens and the
drafts' change drafts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pytest

from integration.serving.ab_servers import (
    ALL_ROLES_ENV,
    FP8,
    MANY,
    ROLES,
    SGLANG_ENV,
    AbServers,
    Setup,
)
from integration.serving.compare import (
    Report,
    mismatches,
    needs_graphs,
    one_at_a_time,
    scheduler_figures,
    summary,
)
from integration.serving.test_corruption import ASKED, LIMIT_S, ask, caught_by

TABLE = "page_table_1=-1"
STAND_INS = [f"{role}:{TABLE}" for role in ROLES]
WITH_STAND_IN = {**ALL_ROLES_ENV, "NSA_PROBE_CORRUPT": ",".join(STAND_INS)}
LEGACY = {"SGLANG_OPT_USE_TOPK_V2": "0"}
# By decode backend, the module with its kernels, where a host may lack it.
MODULES = {
    "flashmla_sparse": None,
    "flashmla_kv": None,
    "fa3": "sgl_kernel.flash_ops",
    "tilelang": "tilelang",
}


def setup(backend: str, more: Mapping[str, str | None] | None = None, name: str = "") -> Setup:
    environments = {
        "plugin": {**WITH_STAND_IN, **(more or {})},
        "sglang": {**SGLANG_ENV, **(more or {})},
    }
    flags = (*MANY, *(FP8 if backend == "flashmla_kv" else ()))
    return Setup(f"dropped-{name or backend}", flags, environments, backend)


def is_here(module: str | None) -> bool:
    try:
        return module is None or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its package
        return False


CONTROL = setup("flashmla_sparse", LEGACY, "legacy-top-k")
SETUPS = (CONTROL, *(setup(backend) for backend, module in MODULES.items() if is_here(module)))


@pytest.fixture(autouse=True, scope="module")
def _captured(servers: AbServers) -> None:
    needs_graphs(servers)


def test_without_a_stand_in_both_arms_are_alike(servers: AbServers, report: Report) -> None:
    """And the table is left out by every role, but where the older top-k reads it."""
    rows = ask(servers)
    stand_ins = scheduler_figures(servers["plugin"])["stand_ins"]
    report(f"{servers.setup.name}.none", {"stand_ins": stand_ins, **summary(rows)})
    assert mismatches(rows) == []
    assert stand_ins == ([] if servers.setup.name == CONTROL.name else sorted(ROLES))


@pytest.mark.parametrize("name", STAND_INS)
def test_minus_one_changes_nothing_where_nothing_reads(
    servers: AbServers, report: Report, name: str
) -> None:
    """One role at a time; with the older top-k, a table of -1 is seen."""
    servers["plugin"].corrupt(name)
    found = summary(ask(servers))
    servers["plugin"].corrupt()
    report(f"{servers.setup.name}.{name}", {"caught_by": caught_by(found), **found})
    if servers.setup.name != CONTROL.name:
        assert mismatches(found["unlike"]) == []
    elif name.startswith("verify:"):
        assert "tokens" in caught_by(found)
    else:
        assert caught_by(found) != []


def test_minus_one_in_all_roles_together(servers: AbServers, report: Report) -> None:
    """And nothing of it is left afterwards."""
    servers["plugin"].corrupt(*STAND_INS)
    together = summary(ask(servers))
    servers["plugin"].corrupt()
    after = one_at_a_time(servers, ASKED[:3], limit_s=LIMIT_S)
    report(f"{servers.setup.name}.together", {"caught_by": caught_by(together), **together})
    if servers.setup.name == CONTROL.name:
        assert "tokens" in caught_by(together)
    else:
        assert mismatches(together["unlike"]) == []
    assert mismatches(after) == []
