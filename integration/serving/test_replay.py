"""The host time of a replay's fill beside the least that a hook of SGLang's can take, in servers.

    python -m integration.serving.serve_test replay

A third server has the plugin, and at each replay a function in its place that only points the backend
at its captured metadata, inside the wrapper that SGLang puts around a hook. Its time is that of the
wrapper, the clock and cold caches; what the plugin takes beyond it is the look at the batch.
"""

from __future__ import annotations

from integration.serving.ab_servers import ENVIRONMENTS, MANY, PLUGIN_ENV, AbServers, Setup
from integration.serving.compare import SHORT_LENGTHS, Report, needs_graphs, prompts, scheduler_figures

SETUPS = (
    Setup(
        "replay", MANY, environments={**ENVIRONMENTS, "least": {**PLUGIN_ENV, "NSA_PROBE_LEAST": "1"}}
    ),
)
ROUNDS = 6  # each begins with another server
NEW_TOKENS = 96


def test_host_time_beside_the_least(servers: AbServers, report: Report) -> None:
    needs_graphs(servers)
    names = list(servers)
    asked = prompts(SHORT_LENGTHS, seed=91)
    for turn in range(ROUNDS):
        first = turn % len(names)
        answers = {
            name: [servers[name].generate(prompt, NEW_TOKENS).output_ids for prompt in asked]
            for name in names[first:] + names[:first]
        }
        assert answers["plugin"] == answers["sglang"]
        assert answers["least"] == answers["sglang"]
    fill_us = {name: scheduler_figures(server)["fill_us"] for name, server in servers.items()}
    medians = {name: figures["median"] for name, figures in fill_us.items()}
    report("replay", {"fill_us": fill_us})
    assert medians["least"] < medians["plugin"] < medians["sglang"], medians
