"""Plain decode of servers without speculation, filled in its graph: same tokens, and who filled what.

    python -m integration.serving.serve_test decode

It needs SGLang 0.5.18 or later and takes one GPU. Replays of the second and third setup are all
shadow-checked. The third has FlashMLA's other kernel and its metadata.
"""

from __future__ import annotations

import pytest

from integration.serving.ab_servers import FP8, MANY, PLUGIN_ENV, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    check_steps,
    expect_alike_at_once,
    kept,
    mismatches,
    of_role,
    one_at_a_time,
    prompts,
    read_record,
    scheduler_figures,
    summary,
)
from integration.serving.test_switch import OFF, switch
from sglang_nsa_plugin.adapters.supported import NO_DECODE_FENCE
from sglang_nsa_plugin.state import DECODE

FILLED = {**PLUGIN_ENV, "SGLANG_NSA_METADATA_ROLES": DECODE}
CHECKED = {**FILLED, "SGLANG_NSA_METADATA_CHECK": "1"}
UNCHECKED = Setup("decode", MANY, {"plugin": FILLED, "sglang": SGLANG_ENV}, draft_tokens=0)
BOTH = {"plugin": CHECKED, "sglang": SGLANG_ENV}
SETUPS = (
    UNCHECKED,
    Setup("decode-checked", MANY, BOTH, draft_tokens=0),
    Setup("decode-fp8", (*MANY, *FP8), BOTH, decode_backend="flashmla_kv", draft_tokens=0),
)


@pytest.fixture(autouse=True)
def _needs_the_fence(servers: AbServers) -> None:
    if read_record(servers["plugin"])["roles"][DECODE]["reason"] == NO_DECODE_FENCE:
        pytest.skip(NO_DECODE_FENCE)


def test_one_at_a_time(servers: AbServers, report: Report) -> None:
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=121))
    report(f"{servers.setup.name}.one_at_a_time", summary(rows))
    assert mismatches(rows) == []


def test_many_at_once(servers: AbServers, report: Report) -> None:
    """Also more than the graphs hold, which SGLang plans without a graph."""
    expect_alike_at_once(servers, report, (3, 7, 16, 24), seed=120)


def test_record(servers: AbServers, report: Report) -> None:
    """The role is in place, SGLang filled no replay, and the check compared all and found nothing."""
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    counted, found = kept(of_role(probe, DECODE)), record["roles"][DECODE]
    sglang = kept(of_role(scheduler_figures(servers["sglang"]), DECODE))
    report(f"{servers.setup.name}.record", {"record": record, "probe": counted, "sglang": sglang})
    assert record["in_place"] == {"draft-extend": False, DECODE: True}, record
    assert found["backend"] == "cuda"
    assert found["fallbacks"] == {}
    assert found["bytes_saved"] == 0  # SGLang itself leaves the wide table out
    check_steps(DECODE, found, counted)
    # The last replay is compared before the next one.
    checks = (0,) if servers.setup is UNCHECKED else (found["replays"] - 1, found["replays"])
    assert found["checks"] in checks
    assert found["mismatches"] == 0


def test_tokens_are_the_same_while_it_is_switched_off(servers: AbServers, report: Report) -> None:
    target, asked = servers["plugin"], prompts(SHORT_LENGTHS, seed=131)
    answers = {}
    for name, value in (("on", 1), ("off", 0), ("on again", 1)):
        assert switch(target, value) == [True]
        target.flush_cache()
        answers[name] = [target.generate(prompt, 64).output_ids for prompt in asked]
    found = read_record(target)["roles"][DECODE]
    report(f"{servers.setup.name}.switch", {"prompts": len(asked), "record": found})
    assert answers["off"] == answers["on"]
    assert answers["on again"] == answers["on"]
    assert set(found["fallbacks"]) == {OFF}
    assert found["mismatches"] == 0
