"""Seeded sampling: the same tokens with the plugin, as far as SGLang gives the same tokens twice.

SGLang takes a seed of each request only for deterministic inference, which it refuses with this
attention. What is left is the seed of the server: one random stream that every step of every request
advances. So each server gets the same requests in the same order, and a second SGLang shows how far it
repeats itself: after the first difference between those two nothing can be compared.
"""

from __future__ import annotations

from integration.serving.ab_servers import MANY, PLUGIN_ENV, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import (
    NEW_TOKENS,
    Report,
    check_record,
    comparison,
    mismatches,
    prompts,
    summary,
)

SETUPS = (
    Setup(
        "sampling",
        (*MANY, "--random-seed", "7"),
        environments={"plugin": PLUGIN_ENV, "sglang": SGLANG_ENV, "again": SGLANG_ENV},
    ),
)
LENGTHS = (5, 20, 64, 150, 400, 900, 30, 65, 200, 1_200)
TEMPERATURES = (0.3, 0.7, 1.0)
LEAST_COMPARED = 3


def test_seeded_sampling(servers: AbServers, report: Report) -> None:
    rows, compared = [], 0
    for number, prompt in enumerate(prompts(LENGTHS, seed=61)):
        temperature = TEMPERATURES[number % len(TEMPERATURES)]
        answers = {
            name: server.generate(prompt, NEW_TOKENS, temperature=temperature)
            for name, server in servers.items()
        }
        if mismatches([comparison(answers["again"], answers["sglang"], len(prompt))]):
            break
        rows.append(comparison(answers["plugin"], answers["sglang"], len(prompt)))
        compared += 1
    report("sampling.seeded", {"asked": len(LENGTHS), "until_sglang_differs": compared, **summary(rows)})
    assert compared >= LEAST_COMPARED, "SGLang does not repeat itself: nothing to compare with"
    assert mismatches(rows) == []


def test_temperature_changes_the_tokens(servers: AbServers, report: Report) -> None:
    """Else the test above would compare greedy answers."""
    (prompt,) = prompts((150,), seed=62)
    target = servers["sglang"]
    answers = [target.generate(prompt, NEW_TOKENS, temperature=t).output_ids for t in (0.0, 1.0)]
    report("sampling.differs_from_greedy", {"differs": answers[0] != answers[1]})
    assert answers[0] != answers[1]


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
