"""The plugin in real servers: same tokens, in the graph, and the host time of the fill.

    python -m pytest integration/serving/test_serving.py -v -s

Two servers share one GPU, one with the plugin and one without, started with the same flags. Tests
run in the order of this file; each writes its figures before it asserts, so a failure leaves them.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from integration.serving.ab_servers import AbServers, Setup
from integration.serving.ab_stats import total
from integration.serving.compare import (
    RECORD_KEY,
    REPEATS,
    Report,
    check_filled_roles,
    difference,
    in_graph,
    median_us_by_role,
    mismatches,
    one_at_a_time,
    processes,
    prompts,
    read_record,
    scheduler_figures,
    summary,
)
from integration.serving.server import Answer, Server

NEW_TOKENS = 192
# Around pages (64 tokens).
LENGTHS = (5, 8, 13, 20, 33, 54, 63, 64, 65, 90, 150, 250, 400, 640, 900, 1200, 1500, 1800)
# Beyond index_topk SGLang's top-k writes the chosen positions in an order that differs from run to run,
# and bfloat16 sums with it: some prompts get other tokens each time. Only those that SGLang without
# the plugin answers REPEATS times with the same tokens can tell whether the plugin changes any.
LONG_LENGTHS = (2040, 2049, 2500, 3600, 4800, 6000)
MOST_CANDIDATES = 8
AT_ONCE_LENGTHS = LENGTHS[:16]  # the greatest captured batch size
LEAST_STEPS = 1000
FILL_LIMIT_US = 10.0
STEP_LIMIT_US = 15.0  # all roles together
DRAFT_TOKENS = 4

LAUNCHER_LINE = r"sglang-nsa-plugin \S+: metadata backend \S+"
SCHEDULER_LINE = r"sglang-nsa-plugin \S+: draft-extend: adapter \S+, implementation \w+"

SETUPS = (Setup("core"),)


def test_plugin_is_found_in_both_processes(servers: AbServers, report: Report) -> None:
    found = {
        name: {p["role"]: p["plugin_loaded"] for p in processes(server)}
        for name, server in servers.items()
    }
    log = servers["plugin"].log()
    lines = {
        role: match[0] if (match := re.search(pattern, log)) else None
        for role, pattern in (("launcher", LAUNCHER_LINE), ("scheduler", SCHEDULER_LINE))
    }
    report("discovery", {"plugin_loaded": found, "log_lines": lines})
    assert found["plugin"] == {"launcher": True, "scheduler": True}
    assert found["sglang"] == {"launcher": False, "scheduler": False}
    assert lines["launcher"], f"no line like {LAUNCHER_LINE!r} in {servers['plugin'].log_path}"
    assert lines["scheduler"], f"no line like {SCHEDULER_LINE!r} in {servers['plugin'].log_path}"
    assert "sglang-nsa-plugin" not in servers["sglang"].log()


def test_same_tokens_one_at_a_time(servers: AbServers, report: Report) -> None:
    """Token ids are equal, prompt by prompt; within index_topk the accepted drafts are, too."""
    chosen, drawn = repeatable_prompts(servers["sglang"])
    rows = one_at_a_time(servers, [*prompts(LENGTHS, seed=1), *chosen], NEW_TOKENS)
    figures = {
        "new_tokens": NEW_TOKENS,
        "within_index_topk": sum(row["deterministic"] for row in rows),
        "same_ids_and_accepted_drafts": sum(row["same_ids"] and row["same_drafts"] for row in rows),
        "long_prompts": {"answered_alike": REPEATS, "drawn": drawn, "kept": len(chosen)},
        **summary(rows),
    }
    report("tokens_one_at_a_time", figures)
    assert mismatches(rows) == []
    assert figures["tokens_compared"] == len(rows) * NEW_TOKENS
    drafts = figures["accepted_drafts"]["sglang"]
    assert len(drafts) == DRAFT_TOKENS, f"0, 1, 2 and 3 drafts should be accepted: {drafts}"
    assert all(drafts), f"0, 1, 2 and 3 drafts should be accepted: {drafts}"


def test_tokens_many_at_once(servers: AbServers, report: Report) -> None:
    """Only reported: how requests fall into batches differs, and bfloat16 results with it."""
    batch = prompts(AT_ONCE_LENGTHS, seed=2)
    answers = {name: server.generate_at_once(batch, NEW_TOKENS)[0] for name, server in servers.items()}
    accepted = {name: total(a.histogram for a in each) for name, each in answers.items()}
    differences = differences_at_once(servers["sglang"], batch, answers)
    figures = {
        "prompts": len(batch),
        "identical": len(batch) - len(differences),
        "differences": differences,
        "accepted_drafts": accepted,
    }
    report("tokens_many_at_once", figures)
    for name, each in answers.items():
        assert all(len(a.output_ids) == NEW_TOKENS for a in each), f"{name}: an answer is short"


def differences_at_once(
    sglang: Server, batch: list[list[int]], answers: dict[str, list[Answer]]
) -> list[dict[str, Any]]:
    """Where the tokens differ: the prompt, all answers, and the verdict after SGLang was asked again."""
    pairs = enumerate(zip(answers["plugin"], answers["sglang"], strict=True))
    differ = [i for i, (ours, theirs) in pairs if ours.output_ids != theirs.output_ids]
    alone = [answers["sglang"]]
    for _ in range(REPEATS if differ else 0):
        sglang.flush_cache()
        alone.append(sglang.generate_at_once(batch, NEW_TOKENS)[0])
    return [
        difference(batch[i], [answers["plugin"][i].output_ids], [each[i].output_ids for each in alone])
        for i in differ
    ]


def test_record_counts_every_step(servers: AbServers, report: Report) -> None:
    """Every step of each role went through the plugin, none through SGLang's own fill."""
    probe = scheduler_figures(servers["plugin"])
    record = read_record(servers["plugin"])
    steps = probe["replays"] if in_graph(probe) else probe["fills"]
    report("record", {"record": record, "probe_steps": steps, "probe_roles": probe.get("roles", {})})
    assert record["backend"] == "cuda", record
    assert sum(record["fallbacks"].values()) == 0, record["fallbacks"]
    assert record["pid"] == probe["pid"]
    assert steps > LEAST_STEPS
    if in_graph(probe):
        assert record["adapter"] == "in-graph", record
        assert record["in_graph"], record
    else:
        assert record["adapter"] == "eager", record
    check_filled_roles(record, probe)
    assert RECORD_KEY not in servers["sglang"].server_info()["internal_states"][0]


def test_published_fence_is_the_one_in_the_graph(servers: AbServers, report: Report) -> None:
    """One event for each captured batch size that was replayed.

    SGLang makes one for each replay; since 0.5.22 none, and the scheduler waits for the whole forward.
    """
    figures = {name: scheduler_figures(server) for name, server in servers.items()}
    if not in_graph(figures["plugin"]):
        pytest.skip("this SGLang runs draft-extend without a graph, and so without such an event")
    fences = {name: {k: f[k] for k in ("distinct_fences", "replays")} for name, f in figures.items()}
    report("fence_events", fences)
    plugin, sglang = figures["plugin"], figures["sglang"]
    assert plugin["distinct_fences"] == len(plugin["replays_by_batch_size"])
    expected = sglang["distinct_fences"]
    assert expected == 0 or expected > len(sglang["replays_by_batch_size"])


def test_host_time_of_the_fill(servers: AbServers, report: Report) -> None:
    figures = {name: scheduler_figures(server) for name, server in servers.items()}
    kept = ("fill_us", "before_replay_us", "replays", "replays_by_batch_size", "capture_bs", "fills")
    step = {name: median_us_by_role(f) for name, f in figures.items()}
    report(
        "host_time",
        {
            **{name: {k: f[k] for k in kept if k in f} for name, f in figures.items()},
            "median_us_by_role": step,
        },
    )
    if in_graph(figures["plugin"]):
        assert figures["plugin"]["fill_us"]["median"] <= FILL_LIMIT_US
    in_place = read_record(servers["plugin"])["in_place"]
    if set(in_place) == set(step["plugin"]) and all(in_place.values()):
        if in_graph(figures["plugin"]):
            assert sum(step["plugin"].values()) <= STEP_LIMIT_US, step
        assert all(step["plugin"][role] < step["sglang"][role] for role in in_place), step
    assert figures["plugin"]["fill_us"]["median"] < figures["sglang"]["fill_us"]["median"]


def repeatable_prompts(target: Server) -> tuple[list[list[int]], int]:
    """One prompt of each of LONG_LENGTHS that this server always answers alike; how many were drawn."""
    chosen: list[list[int]] = []
    drawn = 0
    for length in LONG_LENGTHS:
        for seed in range(MOST_CANDIDATES):
            (prompt,) = prompts([length], seed=1000 * length + seed)
            drawn += 1
            if always_answers_alike(target, prompt):
                chosen.append(prompt)
                break
        else:
            pytest.fail(
                f"server {target.name}: answered none of {MOST_CANDIDATES} prompts of {length} tokens "
                f"{REPEATS} times alike"
            )
    return chosen, drawn


def always_answers_alike(target: Server, prompt: list[int]) -> bool:
    """Whether the same request, each time without a cached prefix, gets the same token ids."""
    first: list[int] | None = None
    for _ in range(REPEATS):
        target.flush_cache()
        answer = target.generate(prompt, NEW_TOKENS).output_ids
        if first is not None and answer != first:
            return False
        first = answer
    target.flush_cache()
    return True
