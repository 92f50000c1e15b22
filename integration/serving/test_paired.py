"""What the plugin gains in a tiny model's servers: 20 pairs, 1 request and 16 at once, bfloat16 and FP8.

    python -m integration.serving.serve_test paired

All servers are ready before the first timing; those of the other kind idle. Every pair sends the same
requests to both arms, in each order and on each half of the cores, and takes the medians. The goals
stand beside the medians of all pairs, not asserted: steps of a model this small vary from pair to pair
by more than the gain. Where the time of a step with one request goes is written beside them, in
microseconds, from the probe's host times.
"""

from __future__ import annotations

from typing import Any

from integration.serving.ab_servers import FP8, MANY, Arms, Fleet, Setup
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


def test_pairs(arms: Arms, fleet: Fleet, report: Report) -> None:
    if not fleet.alone(arms.setup):
        for beside in SETUPS:
            if beside != arms.setup:
                fleet.ready(beside)
    plugin, sglang = arms["plugin"].server, arms["sglang"].server
    kind = {"kind": arms.setup.name.removeprefix("paired-"), "decode_backend": arms.setup.decode_backend}

    step = paired(plugin, sglang, step_milliseconds, PAIRS, ROUNDS)
    spent = {name: host_times(scheduler_figures(arm), step[name]) for name, arm in arms.items()}
    unit = "ms per speculative step, 1 request"
    figures = {**kind, "unit": unit, **step, "us_of_a_step": spent}
    report(f"{arms.setup.name}.step_time", {**figures, **against_goal("step_time", step)})

    many = paired(plugin, sglang, throughput, PAIRS, ROUNDS)
    figures = {**kind, "unit": "new tokens per second, 16 at once", **many}
    report(f"{arms.setup.name}.throughput", {**figures, **against_goal("throughput", many)})

    check_record(arms, report)
    fills = {name: each["fill"] for name, each in spent.items()}
    assert fills["plugin"] < fills["sglang"], fills


def against_goal(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The goal of this ratio, and whether the median reaches it."""
    goal, median = GOALS[name], figures["plugin_over_sglang"]["median"]
    return {"goal": goal, "reached": median <= goal if goal < 1 else median >= goal}


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
