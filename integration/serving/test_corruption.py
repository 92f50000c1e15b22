"""One wrong metadata tensor at a time, in each role: the comparison sees each that anything reads.

    python -m integration.serving.serve_test corruption

The probe (``probe/``) corrupts the tensor after the plugin's fill, in the captured graph. Greedy tokens
do not depend on drafts, so for the two draft roles the accepted drafts tell; for verify the tokens
must. So does a server that ends or hangs. Each role has a server with the plugin; all of them are
compared with the same server without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from integration.serving.ab_servers import ALL_ROLES_ENV, MANY, ROLES, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import Report, mismatches, needs_graphs, one_at_a_time, prompts, summary
from integration.serving.server import ServerError

# What the roles read in SGLang 0.5.17 with flashmla_sparse, a fused top-k and its second version.
READ = {
    "dsa_cache_seqlens_int32": "flash_mla_sparse_fwd's topk_length",
    "real_page_table": "the indexer's logits (DeepGEMM) and the top-k's translation to slots",
}
# The schedule of DeepGEMM's logits no longer fits these, and their kernel waits forever: the last test.
HANGS = {"dsa_seqlens_expanded": "the indexer's logits (DeepGEMM), the top-k, and both their plans"}
# The graphs may have a page_table_1; test_dropped.py is about it.
UNREAD = {
    "cache_seqlens_int32": "Indexer._get_topk_paged takes its shape, and its lengths from "
    "dsa_seqlens_expanded; the CuTe logits, which would read it, are left out there",
    "cu_seqlens_k": "only _forward_standard_mha reads it, and captured graphs never take MHA",
    "dsa_cu_seqlens_k": "only _forward_fa3 reads it, for fa3 as the decode backend",
}
# Draft-decode has a row for each request: both of these are one tensor there.
SAME_IN_DECODE = "cache_seqlens_int32"
LIMIT_S = 20.0  # an answer takes less than one; a wrong length may make a kernel wait forever
ASKED = prompts((5, 40, 64, 150, 300, 700, 1_300), seed=81)


def of(role: str, fields: Iterable[str]) -> list[str]:
    """Those of the fields that are tensors of their own in this role."""
    return [field for field in fields if role != "draft-decode" or field != SAME_IN_DECODE]


def each(fields: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(role, field) for role in ROLES for field in of(role, fields)]


def corruptible(role: str) -> dict[str, str | None]:
    names = ",".join(f"{role}:{field}" for field in of(role, (*READ, *HANGS, *UNREAD)))
    return {**ALL_ROLES_ENV, "NSA_PROBE_CORRUPT": names}


SETUPS = (
    Setup("corruption", MANY, {**{role: corruptible(role) for role in ROLES}, "sglang": SGLANG_ENV}),
)


@pytest.fixture(autouse=True, scope="module")
def _captured(servers: AbServers) -> None:
    needs_graphs(pair(servers, ROLES[0]))


@pytest.mark.parametrize("role", ROLES)
def test_without_corruption_both_arms_are_alike(servers: AbServers, report: Report, role: str) -> None:
    rows = ask(pair(servers, role))
    report(f"corruption.{role}.none", summary(rows))
    assert mismatches(rows) == []


@pytest.mark.parametrize(("role", "field"), each(UNREAD))
def test_nothing_reads_this_tensor(servers: AbServers, report: Report, role: str, field: str) -> None:
    found = corrupted(pair(servers, role), role, field)
    report(f"corruption.{role}.{field}", {"unread": UNREAD[field], **found})
    assert found["caught_by"] == []


@pytest.mark.parametrize(("role", "field"), each(READ))
def test_a_wrong_tensor_is_caught(servers: AbServers, report: Report, role: str, field: str) -> None:
    found = corrupted(pair(servers, role), role, field)
    report(f"corruption.{role}.{field}", {"read_by": READ[field], **found})
    assert found["caught_by"] != []
    assert role != "verify" or "tokens" in found["caught_by"], found["caught_by"]


@pytest.mark.parametrize("role", ROLES)
def test_both_arms_are_alike_again(servers: AbServers, report: Report, role: str) -> None:
    """The differences came from the corrupted tensors; nothing of them is left."""
    rows = ask(pair(servers, role))
    report(f"corruption.{role}.none_again", summary(rows))
    assert mismatches(rows) == []


@pytest.mark.parametrize(("role", "field"), each(HANGS))
def test_a_wrong_tensor_that_the_server_does_not_outlive(
    servers: AbServers, report: Report, role: str, field: str
) -> None:
    found = corrupted(pair(servers, role), role, field)
    report(f"corruption.{role}.{field}", {"read_by": HANGS[field], **found})
    servers[role].stop()  # a kernel that waits forever takes the other servers' time on the GPU
    assert found["caught_by"] != []


def pair(servers: AbServers, role: str) -> AbServers:
    """The server whose tensors of this role can be made wrong, and the one without the plugin."""
    return AbServers(servers.setup, {"plugin": servers[role], "sglang": servers["sglang"]})


def ask(servers: AbServers) -> list[dict[str, Any]]:
    """All prompts, without pages that an earlier one left in the cache."""
    for server in servers.values():
        server.flush_cache()
    return one_at_a_time(servers, ASKED, explains=False, limit_s=LIMIT_S)


def corrupted(servers: AbServers, role: str, field: str) -> dict[str, Any]:
    """What the comparison says while one tensor is wrong."""
    servers["plugin"].corrupt(f"{role}:{field}")
    try:
        rows = ask(servers)
    except ServerError as error:
        return {"caught_by": ["server"], "error": str(error).partition("\n")[0]}
    servers["plugin"].corrupt()
    found = summary(rows)
    return {"caught_by": caught_by(found), **found}


def caught_by(found: Mapping[str, Any]) -> list[str]:
    """What differs between the answers of a `summary`."""
    caught = {"tokens": "same_ids", "finish": "same_finish", "accepted drafts": "same_drafts"}
    return [what for what, same in caught.items() if found[same] < found["prompts"]]
