"""The shadow check in real servers: every replay compared under load, and a planted error found.

    python -m pytest integration/serving/test_shadow_serving.py -v -s [--shadow-s 60]

Two servers share one GPU, and fill every role. In one the plugin is as it is; in the other the probe
writes wrong values after the fills of one role after the other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from integration.serving import metrics_page
from integration.serving.ab_servers import ALL_ROLES_ENV, ROLES, AbServer, AbServers, Setup
from integration.serving.compare import (
    FIRST_ROLE,
    Report,
    prompts,
    read_record,
    scheduler_figures,
)
from integration.serving.server import Server

FIELD = "real_page_table"
CHECKED = {**ALL_ROLES_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}
CORRUPTIBLE = {**CHECKED, "NSA_PROBE_CORRUPT": ",".join(f"{role}:{FIELD}" for role in ROLES)}
SETUPS = (
    Setup(
        "shadow",
        ("--enable-metrics",),
        environments={"checked": CHECKED, "corrupted": CORRUPTIBLE},
    ),
)
NEW_TOKENS = 192
AT_ONCE = (1, 3, 7, 16)
LONGEST = 3_000
LENGTHS = (5, 64, 300, 1_500)
STEPS = 1_000


@pytest.mark.parametrize("role", ROLES)
def test_a_planted_error_is_found_and_sglang_takes_over(
    servers: AbServers, report: Report, role: str
) -> None:
    """The first check finds it, the log says so, the tokens after it are right, and the roles whose
    errors come later are filled as before.
    """
    corrupted, checked = servers["corrupted"], servers["checked"]
    before = read_record(corrupted)["roles"]
    corrupted.corrupt(f"{role}:{FIELD}")
    corrupted.generate([1, 2, 3], NEW_TOKENS)  # whose first steps may be wrong
    record = read_record(corrupted)["roles"]
    answers = [
        [each.generate(prompt, NEW_TOKENS).output_ids for each in (corrupted, checked)]
        for prompt in prompts(LENGTHS, seed=3)
    ]
    report(
        f"planted_error.{role}", {"field": FIELD, "record": record[role], "prompts_after": len(answers)}
    )
    found = record[role]
    assert found["mismatches"] > 0
    assert found["first_mismatch"].startswith(f"{FIELD}[")
    assert found["fallbacks"]["the shadow check found a difference"] > 0
    assert found["replays"] - before[role]["replays"] < 10
    for later in ROLES[ROLES.index(role) + 1 :]:
        assert record[later]["fallbacks"] == {}, later
        assert record[later]["mismatches"] == 0, later
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
    for role in ROLES:
        check_every_replay(role, record["roles"][role])


def check_every_replay(role: str, found: dict[str, Any], fallbacks: Collection[str] = ()) -> None:
    """Each replay of a role was compared, nothing differed, and SGLang filled for these reasons alone.

    Where the plugin has no hook behind a replay, it is compared before the next one: the last is not.
    """
    assert found["replays"] > 0
    assert found["replays"] - found["checks"] in (0, int(role != FIRST_ROLE)), role
    assert found["mismatches"] == 0
    assert set(found["fallbacks"]) == set(fallbacks)


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
