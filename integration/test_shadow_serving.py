"""The shadow check in real servers: every replay compared under load, and a planted error found.

    python -m pytest integration/test_shadow_serving.py -v -s [--shadow-s 60]

Two servers share one GPU. In one the plugin is as it is; in the other the probe writes wrong numbers
behind each of its fills.
"""

from __future__ import annotations

import random
import time

import pytest
from arms import PLUGIN_ENV, Arms, Setup
from compare import Report, prompts, read_record

FIELD = "real_page_table"
CHECKED = {**PLUGIN_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}
SETUPS = (
    Setup("shadow", arms={"checked": CHECKED, "corrupted": {**CHECKED, "NSA_PROBE_CORRUPT": FIELD}}),
)
NEW_TOKENS = 192
AT_ONCE = (1, 3, 7, 16)
LONGEST = 3_000
LENGTHS = (5, 64, 300, 1_500)


def test_a_planted_error_is_found_and_sglang_takes_over(arms: Arms, report: Report) -> None:
    """The first checks find it, the log says so, and the tokens after it are right."""
    corrupted, checked = arms["corrupted"].server, arms["checked"].server
    arms["corrupted"].corrupt(FIELD)
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
    arms: Arms, report: Report, request: pytest.FixtureRequest
) -> None:
    target = arms["checked"].server
    source = random.Random(4)
    begin, requests = time.monotonic(), 0
    while time.monotonic() - begin < request.config.getoption("--shadow-s"):
        count = source.choice(AT_ONCE)
        lengths = [source.randint(1, LONGEST) for _ in range(count)]
        batch = prompts(lengths, seed=source.randrange(1 << 30))
        answers, _ = target.generate_at_once(batch, source.choice((32, NEW_TOKENS)))
        requests += len(answers)
    record = read_record(target)
    report("shadow_checked_load", {"requests": requests, "record": record})
    assert record["checks"] == record["replays"] > 0
    assert record["mismatches"] == 0
    assert record["fallbacks"] == {}
