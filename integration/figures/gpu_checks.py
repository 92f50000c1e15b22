"""What was compared and watched on a GPU, for docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from integration.figures.committed import paragraph, table
from integration.result_files import all_of_role

Part = dict[str, Any]
Row = tuple[str, str, str]


def section(gpu: dict[str, Part], serve: dict[str, Part], loads: Sequence[Part]) -> list[str]:
    """A table of the checks, and what a shadow check costs.

    Args:
        gpu: parts of ``make gpu-test``.
        serve: parts of ``make serve-test``.
        loads: the result files of ``make serve-test PART=shadow-load``, one of each GPU.
    """
    rows = [
        *tested(gpu["tests"]),
        *sanitized_fills(gpu["sanitizers"]),
        *sanitized_tests("the tests", gpu.get("sanitized_tests", {})),
        *sanitized_tests("the tests that hold 17 GB", gpu.get("sanitized_vast_tests", {})),
        *demonstrated(gpu["demo"]),
        *(row for part in SOAKS for row in soaked(gpu.get(part, {}))),
        *under_load(serve.get("shadow_checked_load", {})),
        *loaded(loads),
        *planted(serve),
        *counted(serve.get("metrics", {})),
    ]
    return [
        table(("check", "how much", "found"), rows),
        *cost_of_a_check(gpu.get("check_cost", {})),
    ]


def tested(part: Part) -> Iterator[Row]:
    yield "`make gpu-test`: tests", f"{part['counts']['passed']} passed", failures(part)


def failures(part: Part) -> str:
    return ", ".join(f"`{name}` failed" for name in part["failed"]) or "0 failed"


def sanitized_fills(part: Part) -> Iterator[Row]:
    ran = tools(part)
    fills = ", ".join(sorted({f"{tool['fills']} fills" for tool in ran.values()}))
    yield f"compute-sanitizer over fills: {', '.join(ran)}", f"{fills} each", errors(ran)
    found = [
        f"{tool} {'found it' if count else 'did not find it'}" for tool, count in part["planted"].items()
    ]
    yield (
        "the same over fills with planted errors",
        "reads of memory that was never written, or freed",
        ", ".join(found),
    )


def sanitized_tests(which: str, part: Part) -> Iterator[Row]:
    ran = tools(part)
    if not ran:
        return
    passed = sorted({tool["tests"].get("passed", 0) for tool in ran.values()})
    copies = [copies_of_sglang(name, tool) for name, tool in ran.items() if tool["copies_of_sglang"]]
    failed = sorted({name for tool in ran.values() for name in tool["failed"]})
    yield (
        f"compute-sanitizer over {which}: {', '.join(ran)}",
        f"{' or '.join(map(str, passed))} passed under each",
        "; ".join([errors(ran), *copies, *(f"`{name}` failed" for name in failed)]),
    )


def copies_of_sglang(name: str, tool: Part) -> str:
    """Uninitialized cells that SGLang's own code copies are no finding of the plugin's."""
    return f"{tool['copies_of_sglang']:,} copies by SGLang's own code, under {name}"


def tools(part: Part) -> dict[str, Part]:
    """What each tool found, without the summaries beside them."""
    return {name: tool for name, tool in part.items() if isinstance(tool, dict) and "errors" in tool}


def errors(ran: dict[str, Part]) -> str:
    ended = [tool["errors"] for tool in ran.values() if tool["errors"] is not None]
    not_ended = [name for name, tool in ran.items() if tool["errors"] is None]
    return "; ".join([f"{sum(ended)} errors", *(f"{name} did not end" for name in not_ended)])


def demonstrated(part: Part) -> Iterator[Row]:
    values, different = (sum(part[key].values()) for key in ("compared", "different"))
    yield (
        "`sglang-nsa-plugin demo`: replays compared with SGLang's own fill",
        f"{part['steps']} replays, {values:,} values",
        f"{different} different",
    )


SOAKS = ("soak", "soak_verify", "soak_draft_decode")


def soaked(part: Part) -> Iterator[Row]:
    if "replays" in part:  # else it was not run, or did not end
        yield (
            f"`integration/gpu/soak.py`, {part.get('role', 'draft-extend')}: random batches, shadow-checked",
            f"{part['checks']:,} of {part['replays']:,} replays, {part['values_compared']:,} values",
            f"{part['mismatches']} different",
        )


def under_load(part: Part) -> Iterator[Row]:
    if part:
        record = part["record"]
        roles = [all_of_role(record, role) for role in record["roles"]]
        yield (
            "a server under mixed load, every replay of every role shadow-checked",
            f"{sum(role['checks'] for role in roles):,} replays",
            f"{sum(role['mismatches'] for role in roles)} different",
        )


def loaded(runs: Sequence[Part]) -> Iterator[Row]:
    if not runs:
        return
    totals = [total for run in runs for total in by_role(run["parts"]["total"])]
    checks, values, different = (
        sum(total[key] for total in totals) for key in ("checks", "values_checked", "mismatches")
    )
    servers = [server for run in runs for server in run["parts"]["servers"].values()]
    failed = sum("error" in server for server in servers)
    yield (
        "servers of 2 to 6 draft tokens, bfloat16 and FP8, the same",
        f"{checks:,} replays, {values:,} values, on {len(runs)} GPUs",
        f"{different} different, {failed} of {len(servers)} servers failed",
    )


def by_role(total: Part) -> list[Part]:
    """Where every role was filled, those of each; else the total, which is draft-extend's."""
    return list(total["roles"].values()) if "roles" in total else [total]


def planted(serve: dict[str, Part]) -> Iterator[Row]:
    """By role."""
    for key, part in serve.items():
        if key.startswith("planted_error"):
            role = key.partition(".")[2] or "draft-extend"
            yield (
                f"a shadow-checked server, with wrong values planted after the fill of {role}",
                f"{part['prompts_after']} prompts after that",
                f"values that differ: {part['record']['mismatches']}, found by the first check; "
                "then SGLang's own fill and right tokens",
            )


def counted(part: Part) -> Iterator[Row]:
    if not part:
        return
    moments = [part[moment] for moment in ("before", "after")]
    by_place = {
        "`/metrics`": [next(iter(moment["metrics"].values()))["replays"] for moment in moments],
        "`/server_info`": [moment["server_info"]["replays"] for moment in moments],
        "its own record": [moment["scheduler"]["replays"] for moment in moments],
    }
    counts = [f"{place} {before:,} and {after:,}" for place, (before, after) in by_place.items()]
    yield "replays that a server counts, by place", "before and after a load", "; ".join(counts)


def cost_of_a_check(part: Part) -> list[str]:
    if not part:
        return []
    (host, stream), (checked_host, checked_stream) = (
        [part["us"][replay][clock]["median"] for clock in ("host", "stream")]
        for replay in ("unchecked", "checked")
    )
    return [
        paragraph(
            f"A shadow check adds {checked_host - host:.0f} µs on the host and "
            f"{checked_stream - stream:.0f} µs on the stream to a replay. That was measured outside a server, where making a "
            f"batch and replaying it without a check takes {host:.0f} µs on the host and {stream:.0f} µs on the stream."
        )
    ]
