"""The shadow check in real servers: every replay compared under load, and a planted error found.

    python -m pytest integration/test_shadow_serving.py -v -s [--load-s 60]

Two servers share one GPU. In one the plugin is as it is; in the other the probe writes wrong numbers
behind each of its fills.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import server
from server import Arm, Server
from test_serving import NEW_TOKENS, prompts, read_record

FIELD = "real_page_table"
CHECKED = {**server.PLUGIN_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}
ARMS: dict[str, dict[str, str | None]] = {
    "checked": CHECKED,
    "corrupted": {**CHECKED, "NSA_PROBE_CORRUPT": FIELD},
}
LONGEST = 3_000
LENGTHS = (5, 64, 300, 1_500)
Report = Callable[[str, dict[str, Any]], None]


@pytest.fixture(scope="module")
def servers(model: Path, folder: Path) -> Iterator[dict[str, Arm]]:
    with server.start_arms(ARMS, model, folder, server.START_LIMIT_S) as running:
        yield running


def test_a_planted_error_is_found_and_sglang_takes_over(servers: dict[str, Arm], report: Report) -> None:
    """The first checks find it, the log says so, and the tokens after it are right."""
    corrupted, checked = servers["corrupted"].server, servers["checked"].server
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


def test_every_replay_under_mixed_load_is_checked(
    servers: dict[str, Arm], report: Report, request: pytest.FixtureRequest
) -> None:
    target = servers["checked"].server
    requests = mixed_load(target, request.config.getoption("--load-s"), seed=4)
    record = read_record(target)
    report("shadow_checked_load", {"requests": requests, "record": record})
    assert record["checks"] == record["replays"] > 0
    assert record["mismatches"] == 0
    assert record["fallbacks"] == {}


def mixed_load(
    target: Server,
    seconds: float,
    seed: int,
    at_once: Sequence[int] = (1, 3, 7, 16),
    new_tokens: Sequence[int] = (32, NEW_TOKENS),
) -> int:
    """Requests of random lengths, so many at once, for so long; returns how many were answered."""
    source = random.Random(seed)
    begin, requests = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        lengths = [source.randint(1, LONGEST) for _ in range(source.choice(at_once))]
        batch = prompts(lengths, seed=source.randrange(1 << 30))
        answers, _ = target.generate_at_once(batch, source.choice(new_tokens))
        requests += len(answers)
    return requests
