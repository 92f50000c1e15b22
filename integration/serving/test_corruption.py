"""One wrong metadata tensor at a time: the comparison sees each that anything reads.

The probe (``probe/``) corrupts the tensor after the plugin's fill, in the captured graph.
Greedy tokens do not depend on drafts, so the accepted drafts tell. So does a server that ends or hangs.
"""

from __future__ import annotations

from typing import Any

import pytest

from integration.serving.ab_servers import MANY, PLUGIN_ENV, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import Report, mismatches, needs_graphs, one_at_a_time, prompts, summary
from integration.serving.server import ServerError

# What draft-extend reads in SGLang 0.5.17 with flashmla_sparse, a fused top-k and its second version.
READ = {
    "dsa_cache_seqlens_int32": "flash_mla_sparse_fwd's topk_length",
    "real_page_table": "the indexer's logits (DeepGEMM) and the top-k's translation to slots",
}
# The schedule of DeepGEMM's logits no longer fits these, and their kernel waits forever: the last test.
HANGS = {"dsa_seqlens_expanded": "the indexer's logits (DeepGEMM), the top-k, and both their plans"}
# The graph has no page_table_1 here: only the top-k without SGLANG_OPT_USE_TOPK_V2, an unfused one and
# FlashInfer's read it, and then it is there.
UNREAD = {
    "cache_seqlens_int32": "Indexer._get_topk_paged takes its shape, and draft-extend's lengths from "
    "dsa_seqlens_expanded; the CuTe logits, which would read it, are left out there",
    "cu_seqlens_k": "only _forward_standard_mha reads it, and a captured draft-extend never takes MHA",
    "dsa_cu_seqlens_k": "only _forward_fa3 reads it, for fa3 as the decode backend",
}
FIELDS = (*READ, *HANGS, *UNREAD)
CORRUPTIBLE = {**PLUGIN_ENV, "NSA_PROBE_CORRUPT": ",".join(FIELDS)}
SETUPS = (Setup("corruption", MANY, environments={"plugin": CORRUPTIBLE, "sglang": SGLANG_ENV}),)
ASKED = prompts((5, 40, 64, 150, 300, 700, 1_300), seed=81)
LIMIT_S = 20.0  # an answer takes less than one; a wrong length may make a kernel wait forever


@pytest.fixture(autouse=True)
def _captured(servers: AbServers) -> None:
    needs_graphs(servers)


def test_without_corruption_both_arms_are_alike(servers: AbServers, report: Report) -> None:
    rows = ask(servers)
    report("corruption.none", summary(rows))
    assert mismatches(rows) == []


@pytest.mark.parametrize("field", UNREAD)
def test_nothing_reads_this_tensor(servers: AbServers, report: Report, field: str) -> None:
    found = corrupted(servers, field)
    report(f"corruption.{field}", {"unread": UNREAD[field], **found})
    assert found["caught_by"] == []


@pytest.mark.parametrize("field", READ)
def test_a_wrong_tensor_is_caught(servers: AbServers, report: Report, field: str) -> None:
    found = corrupted(servers, field)
    report(f"corruption.{field}", {"read_by": READ[field], **found})
    assert found["caught_by"] != []


def test_both_arms_are_alike_again(servers: AbServers, report: Report) -> None:
    """The differences came from the corrupted tensors; nothing of them is left."""
    rows = ask(servers)
    report("corruption.none_again", summary(rows))
    assert mismatches(rows) == []


@pytest.mark.parametrize("field", HANGS)
def test_a_wrong_tensor_that_the_server_does_not_outlive(
    servers: AbServers, report: Report, field: str
) -> None:
    found = corrupted(servers, field)
    report(f"corruption.{field}", {"read_by": HANGS[field], **found})
    assert found["caught_by"] != []


def ask(servers: AbServers) -> list[dict[str, Any]]:
    """All prompts, without pages that an earlier one left in the cache."""
    for server in servers.values():
        server.flush_cache()
    return one_at_a_time(servers, ASKED, limit_s=LIMIT_S)


def corrupted(servers: AbServers, field: str) -> dict[str, Any]:
    """What the comparison says while one tensor is wrong."""
    servers["plugin"].corrupt(field)
    try:
        rows = ask(servers)
    except ServerError as error:
        return {"caught_by": ["server"], "error": str(error).partition("\n")[0]}
    servers["plugin"].corrupt()
    found = summary(rows)
    caught = {"tokens": "same_ids", "finish": "same_finish", "accepted drafts": "same_drafts"}
    return {"caught_by": [what for what, same in caught.items() if found[same] < len(rows)], **found}
