"""What the slices of ``make serve-test`` compared, for docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from integration.figures.committed import SHOWN_GPU, gpu_name, paragraph, table
from integration.result_files import all_of_role
from integration.serving.ab_stats import Row, accepted_drafts, mean_tokens

# Setups of the servers and what is different about them.
SETUPS = {
    "cases": "1 to 48 requests at once; prompts up to and beyond the context's end, cached, chunked, "
    "aborted; OpenAI's API",
    "fp8": "`flashmla_kv`, FP8; 24 requests at once are more than a graph holds",
    "width1-2": "1 step, 2 draft tokens",
    "width3-4": "3 steps, 4 draft tokens",
    "width5-6": "5 steps, 6 draft tokens",
    "roles": "every plan of a step filled: draft-extend, draft-decode, verify",
    "roles-checked": "the same, every replay shadow-checked",
    "roles-5-steps": "the same with 5 steps; SGLang leaves the schedules of three draft steps as captured",
    "no-graphs": "`--disable-cuda-graph`: SGLang fills",
    "no-overlap": "`--disable-overlap-schedule`",
    "memory": "memory released and resumed, weights updated",
    "memory-graphs": "the memory of CUDA graphs released and resumed, every replay shadow-checked",
    "memory-graphs-fp8": "the same with `flashmla_kv`, FP8",
    "other-plugin": "another plugin patched the scheduler's constructor first: SGLang fills, and a log line says "
    "why; with a backend asked for by name the server does not start",
    "sampling": "temperature 0.3 to 1, a seeded server",
    "tp2": "two GPUs, tensor parallel",
    "dp2": "two GPUs, data parallel attention",
}
COLUMNS = (
    "servers",
    "prompts",
    "tokens",
    "different",
    "tokens per step: SGLang → plugin",
    "replays",
    "fallbacks",
)


def section(parts: dict[str, Any]) -> list[str]:
    """A table of the setups that ran, the switch in service, fault injection, a profile and the load."""
    return [
        *compared(parts),
        *switched(parts),
        *corrupted(parts),
        *dropped(parts),
        *profiled(parts),
        *tables(parts),
        *under_load(parts),
    ]


def compared(parts: dict[str, Any]) -> list[str]:
    rows = [_row(name, parts) for name in SETUPS if any(key.startswith(f"{name}.") for key in parts)]
    if not rows:
        return []
    return [
        paragraph(
            "More pairs of servers, with the plugin and without, answered the same prompts. A prompt counts as different if its tokens, the reason "
            "why it ended or, with one request at a time, its accepted drafts differ."
        ),
        table(COLUMNS, rows),
    ]


def _row(name: str, parts: dict[str, Any]) -> tuple[str, ...]:
    own = {key: part for key, part in parts.items() if key.startswith(f"{name}.")}
    rows = [row for part in own.values() for row in comparisons(part)]
    per_step = tokens_per_step(accepted_drafts(rows))
    records = own.get(f"{name}.record", {})
    found = records.get("of_every_process") or [records["record"]] if records else []
    return (
        f"{name}: {SETUPS[name]}{_of_other_gpus(own)}",
        f"{sum(row['prompts'] for row in rows):,}",
        f"{sum(row['tokens_compared'] for row in rows):,}",
        str(sum(row["different"] for row in rows)),
        f"{per_step['sglang']:.2f} → {per_step['plugin']:.2f}",
        " + ".join(f"{record['replays']:,}" for record in found) or "-",
        str(sum(sum(record["fallbacks"].values()) for record in found)) if found else "-",
    )


def _of_other_gpus(parts: dict[str, Any]) -> str:
    """Where a setup ran on another GPU than an H200."""
    gpus = {gpu_name(gpu) for part in parts.values() for gpu in part.get("of", {"gpus": []})["gpus"]}
    others = sorted(gpu for gpu in gpus if SHOWN_GPU not in gpu)
    return f" ({', '.join(others)})" if others else ""


def tokens_per_step(accepted: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {server: mean_tokens(counts) for server, counts in accepted.items()}


def comparisons(part: Any) -> Iterator[Row]:
    """What `compare.summary` and `compare.repeated` found, anywhere in a part."""
    if isinstance(part, list):
        for each in part:
            yield from comparisons(each)
    elif isinstance(part, dict):
        if "accepted_drafts" in part and "different" in part:
            yield part
        else:
            for each in part.values():
                yield from comparisons(each)


def switched(parts: dict[str, Any]) -> list[str]:
    """The switch in service, on every rank of a server."""
    if "switch-tp2.tokens" not in parts or "switch-tp2.load" not in parts:
        return []
    tokens, load = parts["switch-tp2.tokens"], parts["switch-tp2.load"]
    same = ", ".join(f"{count} {name}" for name, count in tokens["same"].items() if name != "off")
    ranks = load["ranks"]
    replays = " and ".join(f"{rank['replays']:,}" for rank in ranks)
    roles = [all_of_role(rank, role) for rank in ranks for role in rank["roles"]]
    return [
        paragraph(
            "The switch in service, on two GPUs, tensor parallel, with every replay shadow-checked: of "
            f"{tokens['prompts']} prompts, these gave the tokens and accepted drafts of SGLang's own fill: "
            f"{same}, with {tokens['switches']:,} switches in the middle of those requests. Under "
            f"load, {load['switches']:,} switches in {load['requests']:,} requests: the {len(ranks)} ranks "
            f"ran {replays} steps with the plugin's fill of every role, in which "
            f"{sum(role['mismatches'] for role in roles)} values differed."
        )
    ]


def corrupted(parts: dict[str, Any]) -> list[str]:
    found = {
        key.removeprefix("corruption."): part["caught_by"]
        for key, part in parts.items()
        if key.startswith("corruption.") and "caught_by" in part
    }
    if not found:
        return []
    rows = [
        (f"`{name}`", " and ".join(by) or "nothing: no consumer reads it") for name, by in found.items()
    ]
    return [
        paragraph(
            "Fault injection: the probe corrupted one tensor at a time after the plugin's fill. *Server*: it "
            "stopped answering. `integration/serving/test_corruption.py` says why some tensors are not read."
        ),
        table(("corrupted tensor", "what differed"), rows),
    ]


def dropped(parts: dict[str, Any]) -> list[str]:
    """What -1 in place of the page tables that graphs do without changes, by setup and table."""
    rows = []
    for key, part in parts.items():
        setup, _, table_name = key.removeprefix("dropped-").partition(".")
        if key.startswith("dropped-") and "caught_by" in part:
            rows.append((setup, f"`{table_name}`", " and ".join(part["caught_by"]) or "nothing"))
    if not rows:
        return []
    return [
        paragraph(
            "Graphs of filled roles do without the wide page tables, because nothing reads them. In this test each "
            "graph kept its table, full of -1, and nothing may differ. SGLang's older top-k reads the table (first "
            "rows): there something must differ."
        ),
        table(("servers", "page table", "what differed"), rows),
    ]


def profiled(parts: dict[str, Any]) -> list[str]:
    """What is launched for metadata between the graphs of a step."""
    rows = []
    for key in sorted((key for key in parts if key.startswith("profile.")), key=_requests):
        if "roles" not in parts[key].get("plugin", {}):  # the start
            continue
        for name, arm in (("SGLang", "sglang"), ("plugin", "plugin")):
            roles = parts[key][arm]["roles"].values()
            steps = max(role["calls"] for role in roles)
            launches, gpu_us = (sum(role[what] for role in roles) for what in ("launches", "gpu_us"))
            rows.append(
                (key.removeprefix("profile."), name, f"{launches / steps:g}", f"{gpu_us / steps:.0f} µs")
            )
    if not rows:
        return []
    return [
        paragraph(
            "A profile of a running server: what is launched for metadata between the graphs of a step."
        ),
        table(("requests", "server", "launches a step", "their GPU time a step"), rows),
    ]


def tables(parts: dict[str, Any]) -> list[str]:
    """The memory of the graphs' page tables, by the server's own line, and of the servers in all."""
    if "tables" not in parts:
        return []
    found = parts["tables"]
    memory = found["gpu_mib"]
    return [
        paragraph(
            f"Graphs for {found['requests']} requests of up to {found['context']:,} tokens: by the plugin's own line "
            f"their page tables take {found['tables_mb']:,} MB instead of {found['before_mb']:,} MB; the server's "
            f"process takes {memory['plugin']:,} MiB of the GPU, and SGLang's {memory['sglang']:,} MiB, with a KV "
            "cache of the same size."
        )
    ]


def _requests(key: str) -> int:
    number = key.removeprefix("profile.")
    return int(number) if number.isdecimal() else 0


def under_load(parts: dict[str, Any]) -> list[str]:
    return [
        paragraph(f"{name}{_of_other_gpus({name: parts[name]})}: {_loaded(parts[name])}")
        for name in ("load", "load-checked", "load-6-drafts")
        if name in parts
    ]


def _loaded(load: dict[str, Any]) -> str:
    ours, theirs = (load["requests"][server]["answered"] for server in ("plugin", "sglang"))
    per_step = load["tokens_per_step"]
    return (
        f"{load['clients']} clients for {load['seconds'] / 60:.0f} minutes: {ours:,} requests with the "
        f"plugin, {theirs:,} without, {sum(map(len, load['errors'].values()))} failed; tokens per step "
        f"{per_step['plugin']:.3f} and {per_step['sglang']:.3f}; "
        f"GPU memory grew by {load['memory_mib']['grown']['gpu']} MiB in the last third."
        f"{_checked(load['record'])}"
    )


def _checked(record: dict[str, Any]) -> str:
    """Of a load whose replays were shadow-checked."""
    roles = [all_of_role(record, role) for role in record.get("roles", {})]
    checks, different = (sum(role[key] for role in roles) for key in ("checks", "mismatches"))
    if not checks:
        return ""
    return f" {checks:,} replays of all roles were compared with SGLang's own fill: {different:,} values differed."
