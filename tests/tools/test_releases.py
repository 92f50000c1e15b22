"""The matrix of releases: each role is compared, or the plugin's own words say why not."""

from __future__ import annotations

import json

import pytest

from integration.figures import releases_page
from integration.figures.committed import RESULTS
from integration.releases import matrix

EQUAL = {"values_compared": 1_234, "values_different": 0}
DECLINED = {"declined": "with this SGLang release the plugin fills no verify metadata"}
IN_A_STEP = dict.fromkeys(matrix.ROLES[:3], EQUAL)


@pytest.mark.parametrize(
    ("version", "roles", "missing"),
    [
        ("0.5.12.post1", {"draft-extend": EQUAL, "draft-decode": DECLINED, "verify": DECLINED}, []),
        ("0.5.11", {"draft-extend": DECLINED}, ["draft-extend"]),
        ("0.5.13.post1", {"draft-extend": EQUAL, "draft-decode": EQUAL, "verify": EQUAL}, []),
        ("0.5.14", {"draft-extend": EQUAL, "draft-decode": EQUAL, "verify": DECLINED}, ["verify"]),
        ("0.5.17", {**IN_A_STEP, "decode": DECLINED}, []),
        ("0.5.18", {**IN_A_STEP, "decode": DECLINED}, ["decode"]),
        ("0.5.23", {"draft-extend": EQUAL}, ["draft-decode", "verify", "decode"]),
    ],
)
def test_from_0_5_13_on_no_role_of_a_step_may_be_missing_and_decode_from_0_5_18_on(
    version, roles, missing
):
    assert matrix.missing_roles(version, roles) == missing


def test_a_role_of_the_demo_is_summed_over_its_tensors():
    part = {"steps": 3, "compared": {"a": 5, "b": 7}, "different": {"b": 2}, "first_difference": "b[0]"}
    assert matrix._of_role(part) == {"values_compared": 12, "values_different": 2}
    assert matrix._of_role(DECLINED) == DECLINED


def test_the_page_shows_each_role():
    different = {"values_compared": 9, "values_different": 1}
    roles = {"draft-extend": EQUAL, "draft-decode": different, "verify": DECLINED}
    tried = releases_page._tried_roles([{"roles": roles}, {}])
    assert tried == list(roles)
    shown = releases_page._roles("0.5.12", {"roles": roles}, tried)
    assert shown == ("0.5.12", "1,234", "different", f"declined: {DECLINED['declined']}")
    assert releases_page._roles("0.5.12", {"roles": roles}) == (*shown, "-")


def test_the_page_says_what_the_servers_of_a_release_were_asked(monkeypatch):
    summary = {"prompts": 10, "different": 1, "accepted_drafts": {}}
    at_once = {"prompts": 7, "different": 2, "accepted_drafts": {}}
    load = {"seconds": 90.0, "errors": {"plugin": ["hangs"], "sglang": []},
            "requests": {"plugin": {"answered": 1_500}, "sglang": {"answered": 20}}}  # fmt: skip
    found = {
        "fp8.one_at_a_time": summary,
        "fp8.many_at_once": {"each": [at_once, at_once]},
        "memory.cache": {"before": summary},
        "corruption.verify.cu_seqlens_k": {"prompts": 99, "different": 99, "accepted_drafts": {}},
        "load": load,
        "load-checked": load,
        "load.start": {},
    }
    monkeypatch.setattr(releases_page, "parts", lambda name: found)
    row = releases_page._served("0.5.23")
    assert row == ("0.5.23", "2", "34", "6", "3", "40 and 3,000", "2")
    monkeypatch.setattr(releases_page, "parts", lambda name: {"fp8.one_at_a_time": summary})
    assert releases_page._served("0.5.23") == ("0.5.23", "1", "10", "1", "-", "-", "-")
    monkeypatch.setattr(releases_page, "parts", lambda name: {})
    assert releases_page._served("0.5.23") is None


def test_two_ranks_are_of_releases_that_ran_all_of_it(monkeypatch):
    whole = {"tp2.record": {}, "dp2.record": {}, "switch-tp2.load": {}}
    found = {
        "serve-1.json": whole,
        "serve-2.json": {"tp2.record": {}, "dp2.record": {}},
        "serve-3.json": whole,
    }
    monkeypatch.setattr(releases_page, "parts", found.__getitem__)
    assert "every role filled: 1 and 3. Both ranks" in releases_page._two_ranks(["1", "2", "3"])


def test_the_page_says_what_gpu_test_found_with_a_release(monkeypatch):
    def part(commit, **found):
        return {"of": {"commit": commit}, **found}

    found = {
        "tests": part("b" * 40, passed=False, counts={"passed": 1_200, "failed": 2, "error": 3}),
        "sglang_kit": part("a" * 7, passed=True),
        "adapters": part("c" * 7, passed=False),  # of the tests, too
    }
    monkeypatch.setattr(releases_page, "parts", lambda name: found)
    commits = "aaaaaaa, bbbbbbb"
    row = releases_page._gpu_tested("0.5.23")
    assert row == ("0.5.23", "1,200", "5", "0", "-", "-", "passed", commits)
    found["demo"] = part("a" * 7, passed=False)
    row = releases_page._gpu_tested("0.5.23")
    assert row == ("0.5.23", "1,200", "5", "0", "-", "failed", "passed", commits)
    del found["tests"]
    assert releases_page._gpu_tested("0.5.23") is None


def test_every_comparison_in_a_result_file_counts_what_differs():
    """`servers.comparisons` passes over one that does not."""

    def check(found):
        assert "tokens_compared" not in found or "different" in found, (path.name, found)
        return found

    for path in RESULTS.glob("serve-*.json"):
        json.loads(path.read_text(), object_hook=check)


def test_the_roles_are_the_packages():
    """The matrix runs without the package, which may not be built."""
    from sglang_nsa_plugin.state import ALL_ROLES

    assert ALL_ROLES == matrix.ROLES


@pytest.mark.parametrize(
    ("counts", "passed"),
    [({"passed": 112, "skipped": 14}, True), ({"passed": 111, "failed": 1}, False), ({}, False)],
)
def test_values_alone_keep_the_tests_of_an_earlier_run_with_its_commit(counts, passed, monkeypatch):
    row = {"of": {"commit": "4d1558e"}, "adapter_tests": counts}
    monkeypatch.setattr(matrix.result_files, "committed", lambda _: {"parts": {"0.5.19": row}})
    assert matrix.earlier_tests("0.5.19") == (passed, {"commit": "4d1558e", **counts})
    row["adapter_tests"] = {"commit": "a49e3a5", **counts}  # of a run with values alone in between
    assert matrix.earlier_tests("0.5.19") == (passed, {"commit": "a49e3a5", **counts})
    assert matrix.earlier_tests("0.5.20") == (False, {"commit": None})
