"""What the plugin gains in a tiny model's servers: 20 pairs, 1 request and 16 at once, bfloat16 and FP8.

    python -m integration.serving.serve_test paired

All servers are ready before the first timing; those of the other kind idle. Every pair sends the same
requests to both servers, in each order and on each half of the cores, and takes the medians. The goals
are printed, not asserted: steps of a model this small vary from pair to pair by more than the gain.
``us_of_a_step`` says where the time of a step with one request goes, from the probe's host times.
"""

from __future__ import annotations

from typing import Any

from integration.serving.ab_servers import FP8, MANY, AbServers, Fleet, Setup
from integration.serving.compare import Report, check_record, scheduler_figures
from integration.serving.paired_timing import paired, step_milliseconds, throughput

PAIRS = 20
ROUNDS = 4  # of each pair: one alone is off by a fifth and more where other tenants share the host
SETUPS = (
    Setup("paired-bf16", MANY),
    Setup("paired-fp8", (*MANY, *FP8), decode_backend="flashmla_kv"),
)
# Ratios of the plugin to SGLang: time of a step, tokens a second.
GOALS = {"step_time": 0.90, "throughput": 1.08}


def test_pairs(servers: AbServers, fleet: Fleet, report: Report) -> None:
    if not fleet.alone(servers.setup):
        for beside in SETUPS:
            if beside != servers.setup:
                fleet.ready(beside)
    plugin, sglang = servers["plugin"], servers["sglang"]
    kind = {
        "kind": servers.setup.name.removeprefix("paired-"),
        "decode_backend": servers.setup.decode_backend,
    }

    step = paired(plugin, sglang, step_milliseconds, PAIRS, ROUNDS)
    spent = {name: host_times(scheduler_figures(server), step[name]) for name, server in servers.items()}
    unit = "ms per speculative step, 1 request"
    figures = {**kind, "unit": unit, **step, "us_of_a_step": spent}
    report(f"{servers.setup.name}.step_time", figures)
    print(against_goal("step_time", step))

    many = paired(plugin, sglang, throughput, PAIRS, ROUNDS)
    figures = {**kind, "unit": "new tokens per second, 16 at once", **many}
    report(f"{servers.setup.name}.throughput", figures)
    print(against_goal("throughput", many))

    check_record(servers, report)
    fills = {name: each["fill"] for name, each in spent.items()}
    assert fills["plugin"] < fills["sglang"], fills


def against_goal(name: str, figures: dict[str, Any]) -> str:
    """The median ratio, its goal, and whether it reaches that."""
    goal, median = GOALS[name], figures["plugin_over_sglang"]["median"]
    reached = median <= goal if goal < 1 else median >= goal
    verdict = "reached" if reached else "missed"
    return f"{name}: {median:.2f} times SGLang's, goal {goal:.2f} {verdict}"


def host_times(probe: dict[str, Any], step: dict[str, float]) -> dict[str, float]:
    """Medians of one step: the fill, all else before the replay, and what is left of the step."""
    fill, before = probe["fill_us"]["median"], probe.get("before_replay_us", probe["fill_us"])["median"]
    whole = 1000 * step["median"]
    return {
        "fill": fill,
        "before_replay_without_fill": round(before - fill, 1),
        "rest_of_step": round(whole - before, 1),
        "step": round(whole, 1),
    }
