"""What the slices of ``make serve-test`` compared, for README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from integration.serving.ab_stats import (
    ARMS,
    GPU_GROWTH_MIB,
    Row,
    accepted_drafts,
    mean_tokens,
    mismatched,
)

# Setups of the servers and what is different about them.
SETUPS = {
    "cases": "1 to 48 at once, up to the context's end and over it, cached, in chunks, aborted, OpenAI's API",
    "fp8": "`flashmla_kv`, FP8; 24 at once are more than a graph holds",
    "width1-2": "1 step, 2 draft tokens",
    "width3-4": "3 steps, 4 draft tokens",
    "width5-6": "5 steps, 6 draft tokens",
    "no-graphs": "`--disable-cuda-graph`: SGLang's own fill",
    "no-overlap": "`--disable-overlap-schedule`",
    "memory": "memory released and resumed, weights updated",
    "sampling": "temperature 0.3 to 1, a seeded server",
    "tp2": "two GPUs, tensor parallel",
    "dp2": "two GPUs, data parallel attention",
}


def figures(parts: dict[str, Any]) -> list[str]:
    """A table of the setups that were run, and a sentence on the wrong tensors."""
    return [*compared(parts), *corrupted(parts), *under_load(parts)]


def compared(parts: dict[str, Any]) -> list[str]:
    lines = [line(name, parts) for name in SETUPS if any(key.startswith(f"{name}.") for key in parts)]
    if not lines:
        return []
    return [
        "Both arms were asked the same on other servers, too; a prompt counts as different when its tokens, "
        "the reason it ended or, one request at a time, its accepted drafts differ:\n\n"
        "| servers | prompts | tokens | different | tokens per step, SGLang → plugin | replays | fallbacks |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    ]


def line(name: str, parts: dict[str, Any]) -> str:
    own = {key: part for key, part in parts.items() if key.startswith(f"{name}.")}
    rows = [row for part in own.values() for row in rows_of(part)]
    accepted = accepted_drafts(rows)
    records = own.get(f"{name}.record", {})
    found = records.get("of_every_process") or [records["record"]] if records else []
    cells = [
        f"{name}: {SETUPS[name]}",
        f"{sum(row.get('prompts', 1) for row in rows):,}",
        f"{sum(row['tokens_compared' if 'different' in row else 'tokens'] for row in rows):,}",
        str(sum(different(row) for row in rows)),
        f"{mean_tokens(accepted['sglang']):.2f} → {mean_tokens(accepted['plugin']):.2f}",
        " + ".join(f"{record['replays']:,}" for record in found) or "-",
        str(sum(sum(record["fallbacks"].values()) for record in found)) if found else "-",
    ]
    return f"| {' | '.join(cells)} |"


def rows_of(part: Any) -> Iterator[Row]:
    """The rows of `compare.comparison` and `compare.repeated` anywhere in a part."""
    if isinstance(part, list):
        for each in part:
            yield from rows_of(each)
    elif isinstance(part, dict):
        if "accepted_drafts" in part and ("first_different_token" in part or "different" in part):
            yield part
        else:
            for each in part.values():
                yield from rows_of(each)


def different(row: Row) -> int:
    return int(row["different"] if "different" in row else mismatched(row))


def corrupted(parts: dict[str, Any]) -> list[str]:
    found = {
        key.removeprefix("corruption."): part["caught_by"]
        for key, part in parts.items()
        if key.startswith("corruption.") and "caught_by" in part
    }
    if not found:
        return []
    caught = [f"`{name}` ({' and '.join(by)})" for name, by in found.items() if by]
    unread = [f"`{name}`" for name, by in found.items() if not by]
    return [
        f"One tensor at a time made wrong behind the fill, and what differed then: {', '.join(caught) or 'none'}; "
        f"{', '.join(unread) or 'none'} changed nothing, because nothing reads them there "
        "(`integration/serving/test_corruption.py` says why). *Server*: it stopped answering."
    ]


def under_load(parts: dict[str, Any]) -> list[str]:
    if "load" not in parts:
        return []
    load = parts["load"]
    answered, steps = ({arm: load[key][arm] for arm in ARMS} for key in ("requests", "tokens_per_step"))
    return [
        f"{load['clients']} clients for {load['seconds'] / 60:.0f} minutes: {answered['plugin']['answered']:,} requests "
        f"with the plugin, {answered['sglang']['answered']:,} without, {sum(map(len, load['errors'].values()))} failed; "
        f"tokens per step {steps['plugin']:.3f} and {steps['sglang']:.3f}; "
        f"{gpu_memory(load['memory_mib']['grown']['gpu'])}."
    ]


def gpu_memory(grown: int) -> str:
    """How much it grew, where nothing else on the GPU can have hidden that."""
    if grown <= -GPU_GROWTH_MIB:
        return f"GPU memory fell by {-grown:,} MiB in the last third, so something else on the GPU had ended and its growth is not known"
    return f"GPU memory grew by {grown} MiB in the last third"
