"""docs/results.md: what was measured and compared, in servers and outside them."""

from __future__ import annotations

from typing import Any

from integration.figures import gain, gpu_checks, one_fill, servers, step_cost
from integration.figures.committed import (
    RESULTS,
    SHOWN_RELEASE,
    commits,
    gpu_name,
    host_us_of_a_step,
    load,
    paragraph,
    parts,
    parts_by_gpus,
    table,
)

FULL_STEP_MS = (5, 18)  # assumed of one speculative step of DeepSeek-V3.2 at full size; not measured
SERVE, GPU_TEST = f"serve-{SHOWN_RELEASE}.json", f"gpu-test-{SHOWN_RELEASE}.json"


def page() -> str:
    serve, gpu = parts(SERVE), parts(GPU_TEST)
    loads = [load(path.name) for path in sorted(RESULTS.glob("shadow-load-*.json"))]
    newest = one_fill.newest(RESULTS)
    sections = [
        "# Results",
        paragraph(
            "Made by `python -m integration.figures.build` from the files in `integration/results/`; do not "
            f"edit. SGLang {SHOWN_RELEASE} unless another release is named."
        ),
        "## In a server",
        *_in_a_server(serve),
        *step_cost.section(RESULTS),
        "## One fill, outside a server",
        *([] if newest is None else one_fill.section(newest)),
        "## Same tokens as SGLang",
        *_tokens(serve),
        *servers.section(serve),
        "## Checks on a GPU",
        *gpu_checks.section(gpu, serve, loads),
        "## Where the figures come from",
        *_origin(),
    ]
    return "\n\n".join(sections) + "\n"


def _in_a_server(serve: dict[str, Any]) -> list[str]:
    """Host times of the fill, and what they change in a step."""
    times = serve["host_time"]
    step = host_us_of_a_step(serve)
    assert step is not None, f"{SERVE}: has no median_us_by_role"
    host_rows = [
        (
            "the metadata of all three graphs, medians added up",
            f"{step['sglang']:,.0f} µs",
            f"{step['plugin']:,.0f} µs",
        ),
        _host_row(times, "the fill before a draft-extend replay, median", "fill_us", "median"),
        _host_row(times, "the same, 90th percentile", "fill_us", "p90"),
        _host_row(
            times, "the same, maximum: SGLang compiles its kernel for a new size", "fill_us", "max"
        ),
        _host_row(
            times, "all host time from the call to the replay, median", "before_replay_us", "median"
        ),
    ]
    return [
        paragraph(
            "Host times of two servers that share one GPU and differ only in the plugin. The model is tiny, with 2 "
            "layers and one MTP layer; EAGLE runs 3 steps with 4 draft tokens."
        ),
        table(("time on the host", "SGLang", "with the plugin"), host_rows),
        _full_size((step["sglang"] - step["plugin"]) / 1000),
        *gain.section([load(name) for name in _gain_files()]),
    ]


def _gain_files() -> list[str]:
    """Those of the shown release first."""
    names = sorted(path.name for path in RESULTS.glob("gain-*.json"))
    return sorted(names, key=lambda name: not name.endswith(f"-{SHOWN_RELEASE}.json"))


def _host_row(times: dict[str, Any], what: str, clock: str, statistic: str) -> tuple[str, ...]:
    us = (times[server][clock][statistic] for server in ("sglang", "plugin"))
    return (what, *(f"{each:,.0f} µs" for each in us))


def _full_size(saved_ms: float) -> str:
    return paragraph(
        f"The plugin saves {saved_ms:.2f} ms of host time per step and rank. Of a step of "
        f"{FULL_STEP_MS[0]} to {FULL_STEP_MS[1]} ms, which we assume for DeepSeek-V3.2 at full size and have not "
        f"measured, this is at most {_share_of_step(saved_ms)}. "
        "Where the GPU is the bottleneck it is less; for models with shorter steps the share is larger."
    )


def _share_of_step(saved_ms: float) -> str:
    least, most = (100 * saved_ms / step for step in reversed(FULL_STEP_MS))
    return f"{least:.0f} to {most:.0f} %"


def _tokens(serve: dict[str, Any]) -> list[str]:
    found, record = serve["tokens_one_at_a_time"], serve["record"]["record"]
    within = found["within_index_topk"]
    same = within - sum(row["deterministic"] and not row["same_drafts"] for row in found["unlike"])
    long, per_step = found["long_prompts"], servers.tokens_per_step(found["accepted_drafts"])
    return [
        paragraph(
            f"At temperature 0, {found['same_ids']} of {found['prompts']} prompts of 5 to 6,000 tokens gave "
            f"identical token ids. {within} of them stay within the 2,048 tokens that sparse attention "
            f"keeps; for {same} of those the same number of drafts was accepted at each step. Beyond 2,048 "
            "tokens SGLang's top-k has no fixed order and some prompts give other tokens each time. So "
            f"{long['drawn']} longer prompts were drawn, and the {long['kept']} kept to which SGLang without the "
            f"plugin gave the same answer {long['answered_alike']} times. Tokens per step: "
            f"{per_step['plugin']:.2f} with the plugin, {per_step['sglang']:.2f} without; the difference is that "
            "of accepted drafts beyond 2,048 tokens, which vary with SGLang alone, too. "
            f"{record['replays']:,} replays, all in the graph, {sum(record['fallbacks'].values())} fallbacks."
        )
    ]


def _origin() -> list[str]:
    rows = []
    step_costs = (path.name for path in sorted(RESULTS.glob("step-cost-*.json")))
    loads = (path.name for path in sorted(RESULTS.glob("shadow-load-*.json")))
    for name in (SERVE, *_gain_files(), *step_costs, GPU_TEST, *loads):
        run = load(name)
        for gpu, names in parts_by_gpus(run).items():
            setups = dict.fromkeys(part.partition(".")[0] for part in names)
            rows.append((f"`{name}`", gpu_name(gpu), run["versions"]["torch"], ", ".join(setups)))
    serve = load(SERVE)
    return [
        table(("file", "GPU", "torch", "parts"), rows),
        paragraph(
            f"`{SERVE}` is of commits {commits(serve)}, `{GPU_TEST}` of "
            f"commits {commits(load(GPU_TEST))}. Each part of a file names its GPU, date and commit."
        ),
    ]
