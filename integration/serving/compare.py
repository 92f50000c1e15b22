"""What the serving tests share: prompts, the comparison of both servers, and what the servers recorded.

Greedy tokens do not depend on drafts, so wrong metadata shows in the accepted drafts; wrong tokens show
memory that was written or freed at the wrong time. Both are compared, and the reasons to finish.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import pytest

from integration.serving import checkpoint
from integration.serving.ab_servers import ROLES, AbServer, AbServers
from integration.serving.ab_stats import (
    FAULT,
    Row,
    accepted_drafts,
    is_explained,
    mismatched,
    total,
    verdict,
)
from integration.serving.server import Answer, Server
from sglang_nsa_plugin.options import CHECK_VARIABLE

RECORD_KEY = "nsa_metadata"
FIRST_ROLE = "draft-extend"  # the one that every adapter fills
PROBE_SETTLES_S = 2.0
# Around pages (64 tokens), and with 96 new tokens within index_topk: beyond, SGLang's top-k writes the
# chosen positions in an order that differs from run to run, and bfloat16 sums with it.
SHORT_LENGTHS = (1, 5, 20, 63, 64, 65, 150, 400, 900, 1_300)
NEW_TOKENS = 96
LEAST_ASKS, MOST_ASKS = 2, 5
REPEATS = 10  # of SGLang's arm alone, to explain other tokens
# How far the tokens of a step may differ between servers where the batches differ.
ACCEPTANCE_LIMIT = 0.02

Report = Callable[[str, dict[str, Any]], None]  # writes the figures of one part


def prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random ordinary tokens; the same for both servers, and no common beginnings."""
    source = random.Random(seed)
    return [source.choices(range(checkpoint.ORDINARY), k=length) for length in lengths]


def comparison(plugin: Answer, sglang: Answer, length: int) -> Row:
    """How two answers to a prompt of ``length`` tokens differ."""
    pairs = zip_longest(plugin.output_ids, sglang.output_ids)
    longest = max(len(plugin.output_ids), len(sglang.output_ids))
    return {
        "length": length,
        "tokens": len(sglang.output_ids),
        "deterministic": length + longest <= checkpoint.INDEX_TOPK,
        "same_ids": plugin.output_ids == sglang.output_ids,
        "same_drafts": plugin.histogram == sglang.histogram,
        "same_finish": plugin.finish == sglang.finish,
        "first_different_token": next((i for i, (a, b) in enumerate(pairs) if a != b), None),
        "accepted_drafts": {"plugin": plugin.histogram, "sglang": sglang.histogram},
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts over `comparison` rows, the accepted drafts of both servers, and rows that are not alike.

    ``different`` counts `mismatches`; ``unlike`` has every row whose tokens, drafts or finish differ.
    With a row for each prompt the result files would be too large.
    """
    return {
        "prompts": len(rows),
        "tokens_compared": sum(row["tokens"] for row in rows),
        **{name: sum(row[name] for row in rows) for name in ("same_ids", "same_drafts", "same_finish")},
        "different": len(mismatches(rows)),
        "accepted_drafts": accepted_drafts(rows),
        "unlike": [
            row for row in rows if not (row["same_ids"] and row["same_drafts"] and row["same_finish"])
        ],
    }


def other_answers(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in tokens or reason to finish, and SGLang alone does not explain it."""
    differ = (row for row in rows if not (row["same_ids"] and row["same_finish"]))
    return [row for row in differ if not is_explained(row)]


def mismatches(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in tokens or reason to finish, or, where SGLang is repeatable, in the drafts."""
    return [row for row in rows if mismatched(row)]


def one_at_a_time(
    servers: AbServers,
    asked: Sequence[Sequence[int]],
    new_tokens: int | None = NEW_TOKENS,
    *,
    explains: bool = True,
    **options: Any,
) -> list[Row]:
    """Each prompt to both servers in turn.

    Where the tokens differ, and unless ``explains`` is false, SGLang's arm alone is asked again and
    again: the row keeps the prompt, all answers and the verdict.
    """
    rows = []
    for prompt in asked:
        answers = {n: server.generate(prompt, new_tokens, **options) for n, server in servers.items()}
        row = comparison(answers["plugin"], answers["sglang"], len(prompt))
        if explains and not row["same_ids"]:
            outputs = [answers["sglang"].output_ids]
            for number in range(REPEATS):
                if number % 2:  # the others find the prompt in the cache
                    servers["sglang"].flush_cache()
                outputs.append(servers["sglang"].generate(prompt, new_tokens, **options).output_ids)
            row["difference"] = difference(prompt, [answers["plugin"].output_ids], outputs)
        rows.append(row)
    return rows


def difference(
    prompt: Sequence[int], plugin: Sequence[list[int]], sglang: Sequence[list[int]]
) -> dict[str, Any]:
    """What is kept of a prompt with other tokens: each answer once, how often it came, the verdict."""
    found = {"prompt": list(prompt), "verdict": verdict(plugin, sglang)}
    for name, outputs in (("plugin", plugin), ("sglang", sglang)):
        counts = Counter(map(tuple, outputs))
        found[name] = [{"times": n, "output_ids": list(ids)} for ids, n in counts.items()]
    print(f"other tokens, {len(prompt)} tokens in the prompt: {found['verdict']}")
    return found


def expect_alike_one_at_a_time(servers: AbServers, report: Report, asked: Sequence[list[int]]) -> None:
    """Same tokens and drafts, prompt after prompt; some step accepts every draft."""
    rows = one_at_a_time(servers, asked)
    figures = summary(rows)
    report(f"{servers.setup.name}.one_at_a_time", figures)
    assert mismatches(rows) == []
    drafts = figures["accepted_drafts"]["sglang"]
    assert len(drafts) == servers.setup.draft_tokens, f"some step should accept all drafts: {drafts}"


def at_once(servers: AbServers, count: int, seed: int) -> Row:
    """``count`` prompts in one request, several times to each server.

    Which requests share a batch changes bfloat16 sums, and with a near tie tokens. A prompt is different
    where no answer of the plugin is one of SGLang's; both are asked again before that is believed. New
    tokens differ by request, so that the batch shrinks while it runs.
    """
    source = random.Random(seed)
    asked = prompts([source.choice(SHORT_LENGTHS[1:8]) for _ in range(count)], seed)
    new_tokens = [NEW_TOKENS // 2 + 8 * (i % 7) for i in range(count)]
    answers: dict[str, list[list[Answer]]] = {name: [] for name in servers}
    for asks in range(1, MOST_ASKS + 1):
        for name, server in servers.items():
            server.flush_cache()
            answers[name].append(server.generate_batch(asked, new_tokens))
        row = repeated(answers["plugin"], answers["sglang"], asked)
        if asks >= LEAST_ASKS and not row["different"]:
            break
    for name, each in answers.items():
        lengths = [[len(answer.output_ids) for answer in ask] for ask in each]
        assert lengths == [new_tokens] * asks, f"{name}: answers of other lengths than asked for"
    return {"at_once": count, "asks": asks, **row}


def repeated(
    plugin: Sequence[Sequence[Answer]],
    sglang: Sequence[Sequence[Answer]],
    asked: Sequence[Sequence[int]],
) -> Row:
    """The comparison of `at_once`; one sequence for each time that all prompts were asked."""
    repeatable = 0
    differences = []
    answers = zip(zip(*plugin, strict=True), zip(*sglang, strict=True), strict=True)
    for prompt, (ours, theirs) in zip(asked, answers, strict=True):
        expected = [answer.output_ids for answer in theirs]
        repeatable += expected.count(expected[0]) == len(expected)
        got = [answer.output_ids for answer in ours]
        if not any(ids in expected for ids in got):
            differences.append(difference(prompt, got, expected))
    accepted = {
        name: total(answer.histogram for ask in asks for answer in ask)
        for name, asks in (("plugin", plugin), ("sglang", sglang))
    }
    return {
        "prompts": len(sglang[0]),
        "tokens_compared": sum(len(answer.output_ids) for answer in sglang[0]),
        "repeatable": repeatable,
        "different": len(differences),
        **({"differences": differences} if differences else {}),
        "accepted_drafts": accepted,
    }


def assert_alike(rows: Sequence[Row]) -> None:
    """No prompt of `at_once` got tokens that SGLang alone does not explain; it repeats most answers."""
    differences = [each for row in rows for each in row.get("differences", ())]
    assert [each for each in differences if each["verdict"] == FAULT] == []
    repeatable, asked = (sum(row[name] for row in rows) for name in ("repeatable", "prompts"))
    assert 2 * repeatable > asked, (
        f"SGLang repeats its answer to {repeatable} of {asked} prompts: too few to compare"
    )


def expect_alike_at_once(servers: AbServers, report: Report, counts: Sequence[int], seed: int) -> None:
    """The same of so many prompts at once, each number with prompts of its own."""
    rows = [at_once(servers, count, seed + count) for count in counts]
    report(f"{servers.setup.name}.many_at_once", {"each": rows})
    assert_alike(rows)


def relative(plugin: float, sglang: float) -> float:
    """How far the plugin's figure is from SGLang's, as a share of SGLang's."""
    return round(abs(plugin - sglang) / sglang, 5)


def read_record(target: Server) -> dict[str, Any]:
    """The plugin's record of the first scheduler, as ``GET /server_info`` shows it."""
    return records(target)[0]


def records(target: Server) -> list[dict[str, Any]]:
    """The plugin's record of each scheduler that ``GET /server_info`` asks, one a data parallel rank."""
    states = target.server_info()["internal_states"]
    missing = [rank for rank, state in enumerate(states) if RECORD_KEY not in state]
    assert not missing, (
        f"server {target.name}: /server_info has no internal_states[{missing[0]}][{RECORD_KEY!r}]: the "
        f"plugin is not active in the scheduler; see {target.log_path}"
    )
    return [dict(state[RECORD_KEY]) for state in states]


def processes(server: AbServer) -> list[dict[str, Any]]:
    """What the probe wrote in each process that loads plugins."""
    return [json.loads(path.read_text()) for path in sorted(server.probe_dir.glob("*.json"))]


def schedulers_figures(server: AbServer) -> list[dict[str, Any]]:
    """The probe's figures of each scheduler; it writes them when no replay ran for a moment."""
    time.sleep(PROBE_SETTLES_S)
    return [figures for figures in processes(server) if "fill_us" in figures]


def scheduler_figures(server: AbServer) -> dict[str, Any]:
    """The same of a server with one scheduler."""
    timed = schedulers_figures(server)
    assert len(timed) == 1, (
        f"server {server.name}: {len(timed)} processes in {server.probe_dir} timed draft-extend "
        f"replays, expected 1; see {server.log_path}"
    )
    return timed[0]


def in_graph(probe: Mapping[str, Any]) -> bool:
    """Whether this SGLang captures draft-extend in graphs, by what the probe found to time."""
    return "replays" in probe


def check_record(servers: AbServers, report: Report) -> None:
    """Every captured step of each role went through the plugin, none through SGLang's own fill."""
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    steps = probe["replays"] if in_graph(probe) else probe["fills"]
    report(
        f"{servers.setup.name}.record",
        {"record": record, "probe_steps": steps, "probe_roles": probe.get("roles", {})},
    )
    assert record["pid"] == probe["pid"]
    check_filled_roles(record, probe)


def check_filled_roles(record: Mapping[str, Any], probe: Mapping[str, Any]) -> None:
    """The roles of `is_filled` are in place, no others, and SGLang filled none of their steps."""
    roles = [role for role in record["in_place"] if is_filled(probe, role)]
    assert record["in_place"] == {role: role in roles for role in record["in_place"]}, record
    for role in roles:
        assert record["roles"][role]["backend"] == "cuda", role
        assert record["roles"][role]["fallbacks"] == {}, role
        check_steps(role, record["roles"][role], of_role(probe, role))


def expect_every_role_filled(servers: AbServers, report: Report) -> dict[str, Any]:
    """Every role is in place, SGLang filled no step, and a check compared some and found nothing.

    Returns the plugin's record.
    """
    probe, record = scheduler_figures(servers["plugin"]), read_record(servers["plugin"])
    sglang = scheduler_figures(servers["sglang"])
    counted = {role: kept(of_role(probe, role)) for role in ROLES}
    figures = {"probe": counted, "sglang": {role: kept(of_role(sglang, role)) for role in ROLES}}
    report(f"{servers.setup.name}.record", {"record": record, **figures})
    assert record["in_place"] == dict.fromkeys(ROLES, True), record
    is_checked = servers.setup.environments["plugin"][CHECK_VARIABLE] is not None
    for role in ROLES:
        found = record["roles"][role]
        assert found["backend"] == "cuda", role
        assert found["fallbacks"] == {}, role
        check_steps(role, found, counted[role])
        assert (found["checks"] > 0) == is_checked, role
        assert found["mismatches"] == 0, role
    return record


def kept(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the probe counted and timed of one role."""
    names = ("capture_bs", "replays", "replays_by_batch_size", "fills", "fill_us")
    return {name: figures[name] for name in names if name in figures}


def is_filled(probe: Mapping[str, Any], role: str) -> bool:
    """Whether the plugin fills this role by default.

    With one draft step there is no draft-decode. Where draft-extend has no graph, the others have to be
    named.
    """
    return role == FIRST_ROLE or (in_graph(probe) and role in probe["roles"])


def of_role(probe: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    """What the probe counted of a role: those of draft-extend's runner are the probe's own figures."""
    return probe if role == FIRST_ROLE else probe["roles"][role]


def median_us_by_role(probe: Mapping[str, Any]) -> dict[str, float]:
    """The median host time of each role's metadata, in microseconds."""
    roles = (FIRST_ROLE, *probe.get("roles", {}))
    return {role: of_role(probe, role)["fill_us"]["median"] for role in roles}


def check_steps(role: str, found: Mapping[str, Any], counted: Mapping[str, Any]) -> None:
    """The plugin's record of a role says what the probe counted: replays, or steps without a graph."""
    if in_graph(counted):
        assert sorted(found["captures"]) == sorted(counted["capture_bs"]), role
        assert found["replays"] == counted["replays"] > 0, role
    else:
        assert found["launches"] == counted["fills"] > 0, role


def needs_graphs(servers: AbServers) -> None:
    """Skips where this SGLang runs draft-extend without a graph."""
    if read_record(servers["plugin"])["adapter"] != "in-graph":
        pytest.skip("this SGLang runs draft-extend without a graph")


def gpu_memory_mib(servers: Iterable[Server]) -> int:
    """Memory in use by the processes of these servers on all GPUs, in MiB."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    pids: set[int] = set().union(*(server.pids() for server in servers))
    pairs = [map(int, line.split(",")) for line in lines]
    found = [mib for pid, mib in pairs if pid in pids]
    assert found, f"nvidia-smi must list a process of the servers, got {lines}"
    return sum(found)
