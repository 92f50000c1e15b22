"""The shadow check in real servers: every replay compared under load, and a planted error found.

    python -m pytest integration/serving/test_shadow_serving.py -v -s [--shadow-s 60]

Two servers share one GPU. In one the plugin is as it is; in the other the probe writes wrong values
after each of its fills.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from integration.serving import metrics_page
from integration.serving.ab_servers import PLUGIN_ENV, AbServer, AbServers, Setup
from integration.serving.compare import Report, prompts, read_record, scheduler_figures
from integration.serving.server import Server

FIELD = "real_page_table"
CHECKED = {**PLUGIN_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}
SETUPS = (
    Setup(
        "shadow",
        ("--enable-metrics",),
        environments={"checked": CHECKED, "corrupted": {**CHECKED, "NSA_PROBE_CORRUPT": FIELD}},
    ),
)
NEW_TOKENS = 192
AT_ONCE = (1, 3, 7, 16)
LONGEST = 3_000
LENGTHS = (5, 64, 300, 1_500)
STEPS = 1_000


def test_a_planted_error_is_found_and_sglang_takes_over(servers: AbServers, report: Report) -> None:
    """The first checks find it, the log says so, and the tokens after it are right."""
    corrupted, checked = servers["corrupted"], servers["checked"]
    servers["corrupted"].corrupt(FIELD)
    corrupted.generate([1, 2, 3], NEW_TOKENS)  # whose first steps may be wrong
    record = read_record(corrupted)
    answers = [
        [each.generate(prompt, NEW_TOKENS).output_ids for each in (corrupted, checked)]
        for prompt in prompts(LENGTHS, seed=3)
    ]
    report("planted_error", {"field": FIELD, "record": record, "prompts_after": len(answers)})
    assert record["mismatches"] > 0
    assert record["first_mismatch"].startswith(f"{FIELD}[")
    assert record["fallbacks"]["the shadow check found a difference"] > 0
    assert record["checks"] <= record["replays"] < 10
    assert "the shadow check found a difference" in corrupted.log()
    assert [a == b for a, b in answers] == [True] * len(LENGTHS)


def test_metrics_and_server_info_say_what_the_scheduler_counted(
    servers: AbServers, report: Report
) -> None:
    """Before and after 1,000 replays, and in the server whose check has found a difference."""
    checked = servers["checked"]
    found = {"before": reported(checked)}
    begin = steps(found["before"]["server_info"])
    while steps(read_record(checked)) < begin + STEPS:
        checked.generate_at_once(prompts([64] * AT_ONCE[-1], seed=5), NEW_TOKENS)
    found |= {"after": reported(checked), "with_mismatches": reported(servers["corrupted"])}
    report("metrics", found)
    for name, each in found.items():
        assert each["server_info"] == each["scheduler"], name
        assert list(each["metrics"].values()) == [metrics_page.expected(each["scheduler"])], name
    assert steps(found["after"]["scheduler"]) >= begin + STEPS
    assert found["with_mismatches"]["scheduler"]["fallbacks"]


def reported(server: AbServer) -> dict[str, Any]:
    """One server's state in three places; the scheduler's own file is written once steps have paused."""
    return {
        "scheduler": scheduler_figures(server)["plugin_record"],
        "server_info": read_record(server),
        "metrics": metrics_page.read(server.url),
    }


def steps(record: dict[str, Any]) -> int:
    return int(record["replays"] + record["launches"])


def test_every_replay_under_mixed_load_is_checked(
    servers: AbServers, report: Report, request: pytest.FixtureRequest
) -> None:
    target = servers["checked"]
    requests = mixed_load(target, request.config.getoption("--shadow-s"), seed=4)
    record = read_record(target)
    report("shadow_checked_load", {"requests": requests, "record": record})
    assert record["checks"] == record["replays"] > 0
    assert record["mismatches"] == 0
    assert record["fallbacks"] == {}


def mixed_load(
    target: Server,
    seconds: float,
    seed: int,
    at_once: Sequence[int] = AT_ONCE,
    new_tokens: Sequence[int] = (32, NEW_TOKENS),
) -> int:
    """Requests of random lengths, `at_once` at a time; returns how many were answered."""
    source = random.Random(seed)
    begin, requests = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        lengths = [source.randint(1, LONGEST) for _ in range(source.choice(at_once))]
        batch = prompts(lengths, seed=source.randrange(1 << 30))
        answers, _ = target.generate_at_once(batch, source.choice(new_tokens))
        requests += len(answers)
    return requests
